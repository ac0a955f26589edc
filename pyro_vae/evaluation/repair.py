"""A posterior for every datum, as cheap as will do: a ladder that data climb until it does."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.arviz_versions import Container
from pyro_vae.evaluation.rungs import EVERY_RUNG, RUNGS, Found, Ladder, Rung
from pyro_vae.export.arviz import Export, LogLikelihood
from pyro_vae.export.draws import INDEPENDENT, GivenDraws
from pyro_vae.export.marginal import MarginalBound
from pyro_vae.markup import result
from pyro_vae.particles.blocks import worth_parts
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.global_latents import Given
from pyro_vae.programs.messages import as_count, as_seed
from pyro_vae.programs.on_demand import on_demand
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Program
from pyro_vae.refinement.refine import TOLERANCE, checked_steps
from pyro_vae.report import mending, sections
from pyro_vae.report.findings import Finding
from pyro_vae.report.page import page, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Repair", "repair"]

logger = logging.getLogger(__name__)

FEWEST_PARTICLES = 1000  # draws that are weighed, at least
_BELOW = 5.0  # standard errors by which a bound contradicts another
_SURE = 2.0  # standard errors less than which a bound counts for, of several without a verdict
_ROUNDING = 1e-3  # nats that bounds without an error may differ by


@dataclass(frozen=True)
class Repair:
    """The result of :func:`repair`.

    Attributes:
        dataset: dims (datum, rung_name). Of each datum: ``rung``, where it ended; ``good``, its
            verdict there; ``log_evidence`` in nats with ``log_evidence_se``, of that rung, or where
            no verdict is good of that with the highest bound less two standard errors; ``pareto_k``
            and ``ess`` of the importance weights of its last rung (of chains the smallest effective
            sample size, and no k-hat); ``rhat`` of chains; ``audited``, and whether that
            ``contradicted`` its good verdict; ``cost``, its share of the seconds of the rungs that
            it was tried on. Of each datum and rung: ``log_evidence_of_rung``, with ``_se``, and
            ``tried``. Of each rung: ``seconds``.
        draws: latent site to draws of each datum's posterior, ``[S, N, *inner plates, *event]``.
        given: the values that global latents were fixed at, by name.
        is_whole: whether all is one datum, so that draws have no N.
        evaluator: of the pair that was mended, on these data; copies and pickles are without it.
    """

    dataset: xr.Dataset
    draws: Mapping[str, Tensor] = field(repr=False)
    given: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    is_whole: bool = False
    evaluator: Evaluator | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[object, ...]:
        *values, _ = (getattr(self, each.name) for each in fields(self))
        return type(self), tuple(values)

    @property
    def good(self) -> np.ndarray:
        """For which data the verdict is good, [N]."""
        return self.dataset["good"].values

    def summary(self) -> pd.DataFrame:
        """Return a row per rung.

        ``tried`` data, of which ``ended`` stayed, ``good`` of these with a good verdict; their mean
        ``log_evidence`` in nats per datum; the ``seconds`` that the rung took.
        """
        data = self.dataset
        rows = []
        for rung in data["rung_name"].values:
            here = (data["rung"] == rung).values
            found = data["log_evidence"].values[here]
            rows.append(
                {
                    "tried": int(data["tried"].sel(rung_name=rung).sum()),
                    "ended": int(here.sum()),
                    "good": int(data["good"].values[here].sum()),
                    "log_evidence": found.mean() if here.any() else np.nan,
                    "seconds": float(data["seconds"].sel(rung_name=rung)),
                }
            )
        return pd.DataFrame(rows, index=pd.Index(data["rung_name"].values, name="rung"))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the share of the data at each rung; needs the extra ``plots``."""
        from pyro_vae.plots.posteriors import plot_rungs

        return plot_rungs(self.dataset, ax)

    def findings(self) -> list[Finding]:
        """Return what the numbers say in plain words, the worst first."""
        return mending.of_repair(self.dataset)

    def to_html(self, path: str | Path | None = None, title: str = "Posteriors mended") -> str:
        """Return a page of findings, tables and a figure; needs the extra ``plots``.

        Args:
            path: a file to write it to as well.
            title: of the page.
        """
        return written(page(title, [sections.of_repair(self.dataset, self.summary())]), path)

    def to_arviz(
        self,
        *,
        coords: Mapping[str, ArrayLike] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        predictive: bool = True,
        log_likelihood: LogLikelihood = "pointwise",
        num_particles: int = 100,
        local_guide: Program | None = None,
        bound: MarginalBound | None = None,
        data_plate: DataPlate = None,
        file: str | os.PathLike[str] | None = None,
    ) -> Container:
        """Return the draws in ArviZ's container, one chain, and the dataset in its constant_data.

        The groups and the arguments are those of :func:`pyro_vae.to_arviz`; sample_stats has log_p,
        log p(x, z). Draws that are resampled are independent of one another but for repetitions,
        so that R-hat and effective sample sizes of this container say nothing: those of the
        dataset do, and the attribute ``note`` says so.

        Raises:
            ValueError: as :func:`pyro_vae.to_arviz`, and where the result holds no evaluator.
        """
        if self.evaluator is None:
            raise ValueError(
                "a repair that was copied or pickled is without its model: make the container "
                "before, to_arviz(file=...), or take .draws"
            )
        names = ("good", "log_evidence", "log_evidence_se", "pareto_k", "ess", "rhat", "cost")
        data = {name: self.dataset[name].values for name in names}
        data["rung"] = self.dataset["rung"].values.astype(str)
        note = f"{INDEPENDENT}; constant_data has the verdict, k-hat, ESS and R-hat of each datum"
        draws = GivenDraws(self.evaluator, self.draws, 1, {}, data, note)
        return Export(
            evaluator=self.evaluator,
            given=Given(self.given),
            draws=draws,
            coords=coords,
            dims=dims,
            predictive=predictive,
            log_likelihood=log_likelihood,
            num_particles=num_particles,
            local_guide=local_guide,
            bound=bound,
            data_plate=data_plate,
            file=file,
        ).container()

    def __repr__(self) -> str:
        return f"{self.summary().to_string(float_format='%.2f')}\n{self._verdicts()}"

    def _repr_html_(self) -> str:
        return result(self.summary(), [self._verdicts()])

    def _verdicts(self) -> str:
        bad = np.flatnonzero(~self.good)
        if not bad.size:
            return "every datum has a good verdict"
        names = ", ".join(map(str, bad[:10])) + (", ..." if bad.size > 10 else "")
        return f"{bad.size} of {self.good.size} data have no good verdict: {names}"


def repair(
    model: Program,
    guide: Program,
    *batch: Any,
    rungs: Sequence[Rung] = RUNGS,
    num_particles: int = 4000,
    num_draws: int = 1000,
    given: GivenValues | None = None,
    audit: int = 8,
    max_steps: int = 4000,
    tolerance: float = TOLERANCE,
    data_plate: DataPlate = None,
    seed: int | None = None,
    compile: Compile = "auto",
    progress: bool = True,
) -> Repair:
    """Return a posterior for each datum that can be trusted, or say for which there is none.

    A ladder, each rung for those data alone that the one before left without a good verdict:

    - ``"importance"``: the guide's draws, resampled by Pareto-smoothed importance weights;
    - ``"refined"``: those of a guide refined for the datum, in the same family;
    - ``"full rank"``: those of a refined Gaussian with any covariance;
    - ``"flow"``, only where ``rungs`` names it: those of a refined
      :class:`pyro_vae.families.Flow`. Later rungs mend as many data in a fraction of its seconds
      (``docs/benchmarks.md``);
    - ``"annealed"``: the ends of many annealed chains from the prior, resampled by their weights,
      which tell modes apart and how much each holds. A few go first, and data of which hardly any
      is effective are left to the next rung;
    - ``"chains"``: long chains of Hamiltonian Monte Carlo, and annealed importance sampling from
      the guide for log p(x).

    Of importance weights a verdict is good where the effective sample size is at least 400 and
    the tail does no harm: k-hat is below its threshold for so many draws, or the tail carries
    hardly more than its share (:mod:`pyro_vae.diagnostics.verdict`). A tenth of the draws are three
    times as wide, a twentieth are the prior's, and a twentieth lie around the highest mode out of
    the guide's reach to which gradients lead from twelve draws of the prior
    (:mod:`pyro_vae.sampling.far_modes`): so a part of the posterior that the guide misses shows in
    the weights. A datum with more than a hundredth of its posterior around such a mode is bad, as
    there may be more modes, and so is one whose posterior is cut off by rounding, such as that of a
    probability of 1 - 1e-9 in single precision. Of annealed chains half must be effective; chains
    must have converged. No verdict is good whose bound on log p(x) lies below that of an earlier
    rung by more than five standard errors.

    What a verdict cannot see, such as a mode that neither draws nor gradients reach, is looked for
    by an audit: before the rung "annealed", or at the end where that is none of the rungs, a few of
    the good data chosen at random get 128 annealed chains from the prior. Where the bound of one of
    these is higher than its own by more than five standard errors, all good verdicts so far are
    taken back, and the data climb on "annealed" if it is a rung; a logged warning says so. An
    audited datum costs about a seventh of what it would on that rung. With 8 audited data one is
    contradicted with probability 0.9 where a quarter of the verdicts are wrong.

    Args:
        model: a Pyro model.
        guide: a Pyro guide: amortized, local, or hand-written (one of no family is stood for by
            independent Gaussians with the moments of its draws).
        *batch: their arguments.
        rungs: which, in order.
        num_particles: K, draws that are weighed.
        num_draws: S, draws of each datum's posterior.
        audit: how many good data to ask anew; 0 for none. Where the model takes no fewer data than
            all, none are, but for one datum.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        max_steps: as in :func:`pyro_vae.refine`.
        tolerance: as in :func:`pyro_vae.refine`.
        data_plate: as in :func:`pyro_vae.log_weights`.
        seed: of all random numbers; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`.
        progress: whether to show a bar of the data that have ended; it appears after a second.

    Returns:
        A :class:`Repair`. A logged warning says how many data have no good verdict.

    Raises:
        ValueError: for what :func:`pyro_vae.refine` refuses, an unknown rung, and fewer than 1000
            particles.
    """
    if not rungs or set(rungs) - set(EVERY_RUNG) or len(set(rungs)) < len(rungs):
        raise ValueError(f"rungs={rungs!r}: some of {EVERY_RUNG} are needed, each once")
    seed = as_seed(seed)
    arguments = worth_parts(on_demand(*batch), data_plate)
    ladder = Ladder(
        model,
        guide,
        arguments,
        given,
        data_plate,
        as_count("num_particles", num_particles, FEWEST_PARTICLES),
        as_count("num_draws", num_draws),
        checked_steps(max_steps, tolerance),
        tolerance,
        seed,
        compile,
    )
    prepared = ladder.ready(guide, arguments)
    if prepared.stand_in is not None:
        ladder = replace(ladder, guide=prepared.stand_in, given=dict(prepared.given))
    num_data = prepared.evaluator.num_data
    result = _Result(tuple(rungs), num_data)
    splittable = prepared.evaluator.splittable
    audit = as_count("audit", audit, 0) if splittable or num_data == 1 else 0
    with tqdm(total=num_data, desc="repair", unit="datum", disable=not progress, delay=1.0) as bar:
        for number, rung in enumerate(rungs):
            if rung == "annealed":
                _audit(ladder, result, audit, rung=rung)
            _climb(ladder, result, number, splittable=splittable)
            bar.update(int(result.good.sum()) - bar.n)
        if "annealed" not in rungs:
            _audit(ladder, result, audit, rung=None)
    if not bool(result.good.all()):
        logger.warning(
            "repair: %d of %d data have no good verdict on any rung",
            int((~result.good).sum()),
            num_data,
        )
    is_whole = prepared.evaluator.structure.data_dim is None
    kept = prepared.evaluator.without_graphs()
    return result.repair(prepared.given, is_whole=is_whole, evaluator=kept)


def _climb(ladder: Ladder, result: _Result, number: int, *, splittable: bool) -> None:
    """Take what a rung finds for the data that have no good verdict."""
    todo = torch.nonzero(~result.good).flatten()
    if not len(todo):
        return
    fewer = splittable and len(todo) < len(result.good)
    begin = time.perf_counter()
    found = ladder.climb(result.rungs[number], todo if fewer else None)
    result.take(number, found, todo if fewer else torch.arange(len(result.good)))
    result.seconds[number] = time.perf_counter() - begin


def _audit(ladder: Ladder, result: _Result, count: int, rung: Rung | None) -> None:
    """Ask annealed chains about some of the good data; where one is wrong, all of them are open."""
    good = torch.nonzero(result.good).flatten()
    if not count or not len(good):
        return
    generator = torch.Generator().manual_seed(ladder.seed % 2**63)
    rows = good[torch.randperm(len(good), generator=generator)[:count]].sort().values
    wrong = result.audit(rows, ladder.audit(rows if len(result.good) > 1 else None))
    if wrong:
        result.good[:] = False
        logger.warning(
            "repair: annealed chains find more of log p(x) than the good verdicts of %d of %d "
            "audited data did, by more than %g standard errors: parts of these posteriors were "
            "missed. The good verdicts of %d data are taken back%s",
            wrong,
            len(rows),
            _BELOW,
            len(good),
            f", and they climb on {rung!r}" if rung else "; rungs=(..., 'annealed') mends them",
        )


class _Result:
    """What each datum has so far."""

    def __init__(self, rungs: tuple[Rung, ...], num_data: int) -> None:
        self.rungs = rungs
        self.good = torch.zeros(num_data, dtype=torch.bool)
        self.seconds = np.zeros(len(rungs))
        self._rung = torch.zeros(num_data, dtype=torch.long)
        shape = len(rungs), num_data
        self._evidence = torch.full(shape, -torch.inf, dtype=torch.float64)
        self._error = torch.full(shape, torch.nan, dtype=torch.float64)
        self._tried = torch.zeros(shape, dtype=torch.bool)
        self._numbers = {
            name: torch.full((num_data,), torch.nan, dtype=torch.float64)
            for name in ("pareto_k", "ess", "rhat")
        }
        self._draws: dict[str, Tensor] = {}
        self._audited, self._contradicted = torch.zeros(2, num_data, dtype=torch.bool)

    def audit(self, rows: Tensor, found: Found) -> int:
        """Note which of some good data an audit contradicts, and return how many."""
        at = self._rung[rows], rows
        error = torch.hypot(found.error, self._error[at])
        wrong = _is_below(self._evidence[at], found.log_evidence, error)
        self._audited[rows] = True
        self._contradicted[rows] = wrong
        return int(wrong.sum())

    def take(self, number: int, found: Found, rows: Tensor) -> None:
        """Note what a rung found for rows of the data, but for those that were good before."""
        fresh = ~self.good[rows]
        some = rows[fresh]
        error = torch.hypot(found.error[fresh], self._error[:, some])
        # A bound below another one misses a part of the posterior, however sure it is of itself.
        low = _is_below(found.log_evidence[fresh], self._evidence[:, some], error).any(0)
        self._rung[some] = number
        self._tried[number, some] = True
        self._evidence[number, some] = found.log_evidence[fresh]
        self._error[number, some] = found.error[fresh]
        for name, numbers in self._numbers.items():
            numbers[some] = getattr(found, name)[fresh].double()
        for name, value in found.draws.items():
            if name not in self._draws:
                self._draws[name] = value.clone()
            elif len(self.good) == 1:
                self._draws[name] = value
            else:
                device = value.device
                self._draws[name][:, some.to(device)] = value[:, fresh.to(device)]
        self.good[some] = found.good[fresh] & ~low

    def _cost(self) -> np.ndarray:
        """Return each datum's share of the seconds of the rungs that it was tried on, [N]."""
        tried = self._tried.numpy()
        shares = self.seconds / np.maximum(1, tried.sum(1))
        return np.asarray(shares @ tried)

    def repair(self, given: Given, *, is_whole: bool, evaluator: Evaluator | None = None) -> Repair:
        """Return the result."""
        names = np.array(self.rungs)
        # The highest of several noisy bounds is none: where the last is good, that; else the one
        # that is highest for sure.
        sure = (self._evidence - _SURE * self._error).nan_to_num(-torch.inf)
        best = torch.where(self.good, self._rung, sure.argmax(0))
        columns = torch.arange(len(best))
        of_rung = self._evidence.numpy()
        data = {
            "rung": ("datum", names[self._rung.numpy()]),
            "good": ("datum", self.good.numpy()),
            "log_evidence": ("datum", self._evidence[best, columns].numpy()),
            "log_evidence_se": ("datum", self._error[best, columns].numpy()),
            **{name: ("datum", numbers.numpy()) for name, numbers in self._numbers.items()},
            "audited": ("datum", self._audited.numpy()),
            "contradicted": ("datum", self._contradicted.numpy()),
            "log_evidence_of_rung": (
                ("rung_name", "datum"),
                np.where(self._tried.numpy(), of_rung, np.nan),
            ),
            "log_evidence_of_rung_se": (("rung_name", "datum"), self._error.numpy()),
            "tried": (("rung_name", "datum"), self._tried.numpy()),
            "cost": ("datum", self._cost()),
            "seconds": ("rung_name", self.seconds),
        }
        coords = {"rung_name": names, "datum": np.arange(len(best))}
        return Repair(xr.Dataset(data, coords), self._draws, given, is_whole, evaluator)


def _is_below(bounds: Tensor, others: Tensor, error: Tensor) -> Tensor:
    """Return which bounds on log p(x) lie below others, by the error of their difference."""
    return bounds < others - _BELOW * error - _ROUNDING
