"""Draws of latents that go into ArviZ's container: a guide's own, or given ones of chains."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
from torch import Tensor

from pyro_vae.diagnostics.pareto_k import SmoothedWeights
from pyro_vae.diagnostics.verdict import Weights
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.pair_runner import draw_step
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.types import Values

logger = logging.getLogger(__name__)

# How draws of the guide are brought closer to the posterior: Pareto-smoothed importance sampling.
Resampling: TypeAlias = Literal["psis"]
# Arrays of each group, by the name of their variable: draws first, then the datum.
Groups: TypeAlias = dict[str, dict[str, np.ndarray]]

# Groups of one value for each draw of the posterior, which move with it.
_OF_DRAWS = (
    *("posterior", "unconstrained_posterior", "posterior_predictive", "log_likelihood"),
    *("log_prior", "sample_stats"),
)

INDEPENDENT = (
    "draws are independent of one another: R-hat is 1, or nan of one chain, and the effective "
    "sample size is their number whatever the guide, and neither says how well it fits"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some draws of a block of data.

    Attributes:
        rows: which data.
        start: the number of the first draw.
        values: of all latents, what is summed out among them: ``[K, *plates, *event]``.
        stats: name to numbers of each draw and datum, [K, N].
    """

    rows: slice
    start: int
    values: Values
    stats: dict[str, Tensor]


class Draws(Protocol):
    """Where draws come from."""

    @property
    def num_chains(self) -> int:
        """Chains that the draws of a datum are of, one after the other."""

    def blocks(self) -> Iterator[Iterator[Piece]]:
        """Yield the draws of each block of data in turn, in pieces."""

    def settle(self, rows: slice, groups: Groups, shared: list[str]) -> None:
        """Finish the groups of a block in place: arrays [S, N, ...], or [S, ...] if shared."""

    def constants(self) -> dict[str, np.ndarray]:
        """Return numbers of each datum, [N], once every block is settled."""

    def attrs(self) -> dict[str, str]:
        """Return what there is to say of the draws, once every block is settled."""


class GuideDraws:
    """Draws of the guide, as they are or resampled datum by datum by their importance weights.

    Args:
        evaluator: of the pair.
        num_draws: S, of each datum.
        resample: None, or "psis".
    """

    num_chains = 1

    def __init__(self, evaluator: Evaluator, num_draws: int, resample: Resampling | None) -> None:
        self._evaluator, self._num_draws, self._resample = evaluator, num_draws, resample
        self._weights: list[Weights] = []  # of each block
        self._never = 0  # draws without a density under the model

    def blocks(self) -> Iterator[Iterator[Piece]]:
        """Yield the draws of each block of data in turn, in pieces."""
        for chunks in self._evaluator.blocks(self._num_draws):
            yield map(self._piece, chunks)

    def _piece(self, chunk: Chunk) -> Piece:
        weights, start = chunk.weights, chunk.particles.start
        drawn = self._evaluator.draw_summed_out(
            chunk.rows, chunk.values, (Purpose.EXPORTED_SUMMED_OUT, chunk.rows.start, start)
        )
        stats = {"log_p": weights.log_joint, "log_q": weights.log_guide}
        stats["log_weight"] = weights.total
        return Piece(chunk.rows, start, {**chunk.values, **drawn}, stats)

    def settle(self, rows: slice, groups: Groups, shared: list[str]) -> None:
        """Note the importance weights of a block, and resample by them if that is asked for."""
        log_weight = groups["sample_stats"]["log_weight"]
        self._never += int(np.isneginf(log_weight).sum())
        smoothed = SmoothedWeights.of(np.atleast_2d(log_weight.T))
        self._weights.append(smoothed.raw)
        if self._resample is not None:
            key = [self._evaluator.seed, Purpose.EXPORTED_CHOICE, rows.start]
            _resample(groups, smoothed.draw(self._num_draws, key), shared, warn=rows.start == 0)

    def constants(self) -> dict[str, np.ndarray]:
        """Return k-hat and effective sample size of each datum's importance weights."""
        weights = Weights.joined(self._weights)
        return {"pareto_k": weights.pareto_k, "ess": weights.ess}

    def attrs(self) -> dict[str, str]:
        """Return for how many data the weights are in doubt; log it where that matters."""
        weights = Weights.joined(self._weights)
        doubt = weights.doubt
        if self._resample is None and self._evaluator.outside:
            logger.warning(
                "to_arviz: %d of the %d draws of the guide, over all data, have no density under "
                "the model, through %s: they are no draws of a posterior. Take resample='psis'",
                self._never,
                self._num_draws * len(weights.ess),
                ", ".join(self._evaluator.outside),
            )
        elif self._resample is not None and doubt:
            logger.warning("to_arviz: resampled draws, %s", doubt)
        note = f"{INDEPENDENT}; constant_data has k-hat and ESS of its importance weights"
        return {"resampled": self._resample or "no", "doubt": doubt, "note": note}


@dataclass(frozen=True, slots=True)
class GivenDraws:
    """Draws from elsewhere, of all data.

    Attributes:
        evaluator: of the pair, on these data.
        draws: latent site to values ``[S, N, *inner plates, *event]``; without N where all is one
            datum. Of chains one after the other.
        num_chains: how many.
        stats: numbers of each draw and datum, [S, N].
        of_data: numbers, or words, of each datum, [N].
        note: what there is to say of the draws.
    """

    evaluator: Evaluator
    draws: Values
    num_chains: int = 1
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    of_data: Mapping[str, np.ndarray] = field(default_factory=dict)
    note: str = ""

    def blocks(self) -> Iterator[Iterator[Piece]]:
        """Yield the draws of each block of data in turn, in pieces."""
        evaluator = self.evaluator
        device = evaluator.batch.device
        here = {name: value.to(device) for name, value in self.draws.items()}
        values = evaluator.from_single(evaluator.single_by_datum(here))
        for rows in evaluator.data_blocks():
            yield self._pieces(rows, evaluator.take_data(values, rows, evaluator.num_data))

    def _pieces(self, rows: slice, values: Values) -> Iterator[Piece]:
        evaluator = self.evaluator
        step, whole = draw_step(rows.stop - rows.start), evaluator.structure.data_plate is None
        num_draws = next(iter(values.values())).shape[0]
        at = slice(rows.start, rows.stop)
        for start in range(0, num_draws, step):
            some = {name: value[start : start + step] for name, value in values.items()}
            # Of these the density is a sum over all values.
            free = {n: v for n, v in some.items() if n not in evaluator.pair.summed_out}
            stats = {
                name: (value if whole or value.ndim < 2 else value[:, at])[start : start + step]
                for name, value in self.stats.items()
            }
            if free:
                log_likelihood, log_prior = evaluator.score_model(rows, free)
                stats["log_p"] = log_likelihood + log_prior
            yield Piece(rows, start, some, stats)

    def settle(self, rows: slice, groups: Groups, shared: list[str]) -> None:
        """Leave the groups as they are."""

    def constants(self) -> dict[str, np.ndarray]:
        """Return the numbers of each datum."""
        return dict(self.of_data)

    def attrs(self) -> dict[str, str]:
        """Return the note."""
        return {"note": self.note} if self.note else {}


def _resample(groups: Groups, index: np.ndarray, shared: list[str], *, warn: bool) -> None:
    """Replace the draws of each datum by some of them, [S, N], in place; drop log weights.

    Shared variables, without a value for each datum, are dropped with a warning unless they are
    the same for every draw.
    """
    whole = groups["sample_stats"].pop("log_weight").ndim == 1  # one datum, no datum dimension
    posterior = groups.get("posterior", {})  # none of a model without latents
    for name in () if whole else shared:
        if not (posterior[name] == posterior[name][:1]).all():
            del posterior[name]
            if warn:
                logger.warning(
                    "to_arviz: the deterministic site %r is of no datum, and draws are resampled "
                    "datum by datum: it is left out",
                    name,
                )
    chosen = (index[:, 0],) if whole else (index, np.arange(index.shape[1]))
    for group in _OF_DRAWS:
        for name, value in groups.get(group, {}).items():
            if whole or group != "posterior" or name not in shared:
                groups[group][name] = value[chosen]
