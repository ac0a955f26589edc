"""Outlier scores of a batch: log p(x), posterior predictive checks, and an encoder's features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_vae.diagnostics.pareto_k import SmoothedWeights
from pyro_vae.guides.amortized import AmortizedGuide
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.estimators import Estimate, LogWeights, calibrated
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.particles.global_latents import Given
from pyro_vae.particles.run import is_observed
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import row_guide
from pyro_vae.programs.observed import check_drawable
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.sites import array_of
from pyro_vae.programs.state import call_network, evaluation, unwrapped
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Program

# A statistic of M data, from observed values [M, ...] by site to [M].
Statistic = Callable[[Mapping[str, Tensor]], Tensor]

_Columns: TypeAlias = dict[str, np.ndarray]

_ROUNDING = 1e-6  # what float32 may make of a constant
_ROWS = 4096  # data that an encoder sees at once


@dataclass(frozen=True, slots=True)
class OutlierScores:
    """Scores of N data; :func:`pyro_vae.outliers` ranks them.

    Attributes:
        log_evidence: log p(x) by importance weights, in nats, [N].
        std_error: its Monte Carlo standard error, [N].
        good: whether both are to be trusted, [N].
        predictive: how far the datum is above the posterior's replicas of it, in standard
            deviations of these, by log likelihood and each statistic, [N] each.
        predictive_p: posterior predictive p-values, likewise: the share of the replicas with a
            lower value, ties by half.
        given: the values that global latents were fixed at.
    """

    log_evidence: np.ndarray
    std_error: np.ndarray
    good: np.ndarray
    predictive: Mapping[str, np.ndarray]
    predictive_p: Mapping[str, np.ndarray]
    given: Given


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model with a guide, and the settings of the scores; see :func:`pyro_vae.outliers`."""

    model: Program
    guide: Program
    num_particles: int
    statistics: Mapping[str, Statistic]
    given: GivenValues | None
    data_plate: DataPlate
    compile: Compile

    def check_guide(self, data: Batch, others: Batch) -> None:
        """Raise ValueError for a guide with parameters of each datum, which knows no others."""
        if row_guide(self.guide) is not None:
            raise ValueError(
                "outliers: a LocalGuide has parameters for its own data alone, and new data are "
                "compared with others; take an AmortizedGuide, whose encoder knows them all"
            )
        if data.size == others.size and (size := data.size or 0) > 1:
            # As many data as it was made for show nothing of it; a run on fewer is refused.
            fewer = data.rows(slice(0, size - 1))
            prepare(self.model, self.guide, (fewer,), self.given, self.data_plate, 0)

    def score(self, batch: Batch, seed: int) -> OutlierScores:
        """Return the scores of the data of a batch."""
        evaluator, given = prepare(
            *(self.model, self.guide, (batch,), self.given, self.data_plate, seed),
            compile=self.compile,
        )
        if evaluator.structure.data_dim is None:
            raise ValueError(
                "outliers compares data with one another, and data_plate=False says that all is "
                "one datum"
            )
        check_drawable(evaluator.structure, batch.device)

        def scores(chunks: Iterable[Chunk]) -> tuple[object, ...]:
            return _of_block(evaluator, list(chunks), self.statistics)

        columns = zip(*evaluator.over_blocks(scores, self.num_particles), strict=True)
        evidence, error, good = (np.concatenate(next(columns)) for _ in range(3))
        above, lower = (
            {name: np.concatenate([each[name] for each in column]) for name in column[0]}
            for column in columns
        )
        return OutlierScores(evidence, error, good, above, lower, given)


def features_of(encoder: Program, batch: Batch) -> np.ndarray:
    """Return an encoder's features of a batch, [N, F], in blocks of data.

    Raises:
        ValueError: for features that are not [N, F], or not finite.
    """
    found = []
    with torch.no_grad(), evaluation(encoder):
        for start in range(0, batch.size or 0, _ROWS):
            rows = batch.rows(slice(start, start + _ROWS))
            some = call_network(encoder, rows.args, dict(rows.kwargs))
            if not isinstance(some, Tensor) or some.ndim != 2 or len(some) != rows.size:
                what = list(some.shape) if isinstance(some, Tensor) else type(some).__name__
                raise ValueError(f"features: [{rows.size}, F], a row per datum, needed; got {what}")
            found.append(some.double().numpy(force=True))
    features = np.concatenate(found)
    if not np.isfinite(features).all():
        bad = np.flatnonzero(~np.isfinite(features).all(1))
        raise ValueError(f"features of {bad.size} data are not finite: {bad[:5].tolist()}")
    return features


def encoder_of(guide: Program) -> Program | None:
    """Return the encoder of a guide; None where it has none that is known."""
    inner = unwrapped(guide)
    return inner.encoder if isinstance(inner, AmortizedGuide) else None


_Block: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, _Columns, _Columns]


def _of_block(
    evaluator: Evaluator, chunks: list[Chunk], statistics: Mapping[str, Statistic]
) -> _Block:
    """Return log p(x) of a block of data, its error and whether it is good, and both predictive."""
    total = LogWeights.concatenate([chunk.weights for chunk in chunks], 0).total
    estimate = Estimate.iwae(total.double())
    error = calibrated(estimate.std_error, estimate.skewness, len(total))
    logs = total.T.double().numpy(force=True)
    smoothed = SmoothedWeights.of(logs)
    # Of a datum that nothing drawn allows, every draw is as good.
    weights = np.where(np.isnan(smoothed.weights), 1 / len(total), smoothed.weights)
    pairs = [_replicate(evaluator, chunk, statistics) for chunk in chunks]
    above, lower = {}, {}
    for name in pairs[0]:
        of_datum, of_replica = (
            np.concatenate([pair[name][side] for pair in pairs]).T for side in (0, 1)
        )
        above[name] = _above(of_datum, of_replica, weights)
        share = (of_replica < of_datum) + 0.5 * (of_replica == of_datum)
        lower[name] = (weights * share).sum(1).clip(0.0, 1.0)
    value = estimate.value.numpy(force=True)
    return value, error.numpy(force=True), smoothed.raw.trusted, above, lower


def _above(of_datum: np.ndarray, of_replica: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return how far data are above their replicas, in standard deviations of these, [n].

    The mean is that of the posterior, the standard deviation that of all draws: few of them may
    carry the weight.
    """
    with np.errstate(invalid="ignore"):  # -inf of what no draw allows
        mean = (weights * np.nan_to_num(of_datum - of_replica, nan=0.0)).sum(1)
    spread = of_replica.std(1)
    rounding = _ROUNDING * (1 + np.abs(of_replica).max(1))
    # Of a constant, what is not equal to it is infinitely far.
    far = np.where(np.abs(mean) <= rounding, 0.0, np.copysign(np.inf, mean))
    return np.divide(mean, spread, out=far, where=spread > rounding)


def _replicate(
    evaluator: Evaluator, chunk: Chunk, statistics: Mapping[str, Statistic]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return of each particle what a discrepancy is of the datum and of its replica, [k, n] each.

    Of the log likelihood given the same latents, and of statistics.
    """
    rows, count = chunk.rows, chunk.weights.num_particles
    size, key = rows.stop - rows.start, (rows.start, chunk.particles.start)
    values = evaluator.latents(chunk.values)
    values = {
        **values,
        **evaluator.draw_summed_out(rows, values, (Purpose.OUTLIER_SUMMED_OUT, *key)),
    }
    names = [site.name for site in evaluator.structure.observed]
    run = evaluator.predictive_run(rows, count, values, (Purpose.OUTLIER_REPLICAS, *key))
    with evaluator.evaluating():
        seen = replace(evaluator.model, summed_out=()).run(rows, count, values)
        both = seen.log_prob(is_observed), torch.stack([run.term(name) for name in names]).sum(0)
    seen_of, replica_of = (each.double().numpy(force=True) for each in both)
    found = {"log_likelihood": (seen_of, replica_of)}
    if statistics:
        data = _data(evaluator, rows)
        drawn = run.values()
        of_site = evaluator.by_datum({name: drawn[name] for name in names})
        replicas = {
            name: value.double().cpu().masked_fill(data[name].isnan(), math.nan).flatten(0, 1)
            for name, value in of_site.items()
        }
    for name, statistic in statistics.items():
        of_data = np.broadcast_to(_value_of(name, statistic, data, size), (count, size))
        found[name] = (
            of_data,
            _value_of(name, statistic, replicas, count * size).reshape(count, size),
        )
    return found


def _data(evaluator: Evaluator, rows: slice) -> dict[str, Tensor]:
    """Return observed values of some data by site, NaN where one is missing or masked."""
    structure, found = evaluator.structure, {}
    for site in structure.observed:
        value = torch.as_tensor(array_of(site.value, site, structure)[rows]).double()
        out = torch.as_tensor(array_of(site.left_out, site, structure)[rows])
        found[site.name] = value.masked_fill(out, math.nan)
    return found


def _value_of(
    name: str, statistic: Statistic, values: Mapping[str, Tensor], size: int
) -> np.ndarray:
    """Return what a statistic says of M data, [M]; ValueError for what is not a number for each."""
    found = torch.as_tensor(statistic(values))
    if found.shape != (size,) or bool(found.isnan().any()):
        shapes = {site: list(value.shape) for site, value in values.items()}
        raise ValueError(
            f"statistics[{name!r}] returned shape {list(found.shape)} with "
            f"{int(found.isnan().sum())} nan for values of shapes {shapes}: a number for each of "
            f"{size} data is needed (values that are missing or masked are nan)"
        )
    return found.double().numpy(force=True)
