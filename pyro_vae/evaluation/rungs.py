"""The rungs of a repair: what each gives for some of the data, and whether that is good."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_vae.diagnostics.pareto_k import SmoothedWeights
from pyro_vae.diagnostics.verdict import Flags, Weights
from pyro_vae.evaluation.ais import ais
from pyro_vae.families.base import Family
from pyro_vae.families.flow import Flow
from pyro_vae.families.gaussian import FullRankNormal, Normal
from pyro_vae.guides.base import of_family
from pyro_vae.particles.estimators import Estimate, calibrated
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import on_rows
from pyro_vae.programs.processes import processes
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Program, Values
from pyro_vae.refinement.blocks import Block
from pyro_vae.refinement.refine import refine
from pyro_vae.sampling.annealing import Annealer, Schedule
from pyro_vae.sampling.chains import sample_posterior
from pyro_vae.sampling.density import Start
from pyro_vae.sampling.importance import weigh
from pyro_vae.sampling.prepare import Ready, ready

Rung: TypeAlias = Literal["importance", "refined", "full rank", "flow", "annealed", "chains"]
EVERY_RUNG: tuple[Rung, ...] = get_args(Rung)
RUNGS: tuple[Rung, ...] = ("importance", "refined", "full rank", "annealed", "chains")

_ANNEALED_CHAINS, _ANNEALED_STEPS = 512, 200
# So many tune the others, and as many go first: a datum of which few are effective will do no
# better. They count among all.
_SCOUTS, _HOPELESS = 64, 0.2
_AUDIT_CHAINS, _AUDIT_STEPS = 128, 100
_TOGETHER = 16384  # annealed chains that run at once
_EQUAL_CHAINS = 0.5  # the share of them that are effective, at least


@dataclass(frozen=True, slots=True)
class Found:
    """What a rung gave for n data.

    Attributes:
        good: the verdicts, [n].
        log_evidence: [n], in nats.
        error: its standard error, [n].
        pareto_k: [n].
        ess: [n].
        rhat: [n].
        draws: site to [S, n, ...].
    """

    good: Tensor
    log_evidence: Tensor
    error: Tensor
    pareto_k: Tensor
    ess: Tensor
    rhat: Tensor
    draws: Values


@dataclass(frozen=True, slots=True)
class _Ends:
    """Where annealed chains end, z [C, n, D], and their log weights, [C, n]."""

    log_weights: Tensor
    z: Tensor

    def of(self, rows: Tensor | slice) -> _Ends:
        """Return those of some data."""
        return _Ends(self.log_weights[:, rows], self.z[:, rows])

    @staticmethod
    def joined(parts: Sequence[_Ends], dim: int) -> _Ends:
        """Return several as one: more chains (dim 0), or more data (1)."""
        weights, z = zip(*((part.log_weights, part.z) for part in parts), strict=True)
        return _Ends(torch.cat(weights, dim), torch.cat(z, dim))


@dataclass(frozen=True, slots=True)
class Ladder:
    """Settings of a repair, and its rungs; see :func:`pyro_vae.repair`."""

    model: Program
    guide: Program
    batch: Batch
    given: GivenValues | None
    data_plate: DataPlate
    num_particles: int
    num_draws: int
    max_steps: int
    tolerance: float
    seed: int
    compile: Compile

    def climb(self, rung: Rung, rows: Tensor | None) -> Found:
        """Return what a rung gives for some of the data; None for all of them."""
        batch = self.batch if rows is None else self.batch.rows(rows)
        with on_rows(self.guide, rows):
            if rung == "importance":
                return self._importance(self.guide, batch)
            if rung == "annealed":
                return self._annealed(batch)
            if rung == "chains":
                return self._chains(batch)
            family: Family = Flow() if rung == "flow" else FullRankNormal()
            if rung == "refined":
                family = self.guide.family if of_family(self.guide) else Normal()
            local = refine(
                self.model,
                self.guide,
                batch,
                family=family,
                given=self.given,
                max_steps=self.max_steps,
                tolerance=self.tolerance,
                data_plate=self.data_plate,
                seed=self.seed,
                compile=self.compile,
                progress=False,
            )
            return self._importance(local, batch)

    def audit(self, rows: Tensor | None) -> Found:
        """Return what a few annealed chains give for some of the data; None for all of them."""
        batch = self.batch if rows is None else self.batch.rows(rows)
        with on_rows(self.guide, rows):
            return self._anneal(self.ready(self.guide, batch), _AUDIT_CHAINS, _AUDIT_STEPS)[0]

    def ready(self, guide: Program, batch: Batch) -> Ready:
        """Return what chains and draws of some data need."""
        given, plate = self.given, self.data_plate
        return ready(self.model, guide, (batch,), given, plate, self.seed, self.compile)

    def _importance(self, guide: Program, batch: Batch) -> Found:
        prepared = self.ready(guide, batch)

        def found(some: tuple[slice, Block]) -> Found:
            rows, block = some
            weighed = weigh(prepared, rows, block, self.num_particles)
            verdict = functools.partial(_reached, weighed.is_whole.numpy(force=True))
            estimate = Estimate.iwae(weighed.log_weights).stratified(weighed.counts)
            draws = weighed.z, weighed.log_weights, estimate
            return self._weighed(prepared, rows, *draws, verdict)

        return _joined(list(processes().by_turns(found, prepared.each())), prepared)

    def _annealed(self, batch: Batch) -> Found:
        prepared = self.ready(self.guide, batch)
        scouts, parts = self._anneal(prepared, _SCOUTS, _ANNEALED_STEPS)
        promising = torch.nonzero(scouts.ess > _HOPELESS * _SCOUTS).flatten()
        if not len(promising):
            return scouts
        ends, more = _Ends.joined(parts, 1), (_ANNEALED_CHAINS - _SCOUTS, _ANNEALED_STEPS)
        if len(promising) == len(scouts.good) or not prepared.evaluator.splittable:
            return self._anneal(prepared, *more, before=ends)[0]
        with on_rows(self.guide, promising):
            some = self.ready(self.guide, batch.rows(promising))
            found, _ = self._anneal(some, *more, before=ends.of(promising))
            return _with_rows(scouts, promising, found)

    def _anneal(
        self, prepared: Ready, num_chains: int, num_steps: int, before: _Ends | None = None
    ) -> tuple[Found, list[_Ends]]:
        """Return what chains give, and where those of each block of the data end.

        Together with chains that ran before, if there are: then the second is empty, as nothing
        follows.
        """
        start: Start = "guide" if prepared.evaluator.pair.masked else "prior"

        def annealed(some: tuple[slice, Block]) -> tuple[Found, _Ends]:
            rows, block = some
            limits: tuple[int, Schedule] = num_steps, "adaptive"
            annealer = Annealer(prepared, rows, block, start, num_chains, *limits)
            wave = 1 if before is None else 2
            if annealer.is_hopeless(wave):  # whatever steps would do
                z = annealer.first(wave)
                every = _Ends(z.new_full(z.shape[:2], -torch.inf, dtype=torch.float64), z)
            else:
                path = Annealer(prepared, rows, block, start, _SCOUTS, *limits).path()
                every = _Ends(*annealer.forward(path, wave=wave))
            if before is not None:
                every = _Ends.joined([before.of(rows), every], 0)
            draws = every.z, every.log_weights, Estimate.iwae(every.log_weights)
            return self._weighed(prepared, rows, *draws, _nearly_equal), every

        blocks = prepared.each(_TOGETHER // num_chains)
        parts, ends = zip(*processes().by_turns(annealed, blocks), strict=True)
        return _joined(list(parts), prepared), list(ends) if before is None else []

    def _weighed(
        self,
        prepared: Ready,
        rows: slice,
        z: Tensor,
        log_weights: Tensor,
        estimate: Estimate,
        verdict: Callable[[Weights], Flags],
    ) -> Found:
        """Return what draws [K, n, D] with log weights [K, n] give, the draws resampled."""
        error = calibrated(estimate.std_error, estimate.skewness, len(log_weights))
        of_datum = log_weights.T.numpy(force=True)
        never = np.max(of_datum, axis=1, keepdims=True) == -np.inf
        # Where every weight is zero any draws will do: the verdict is bad.
        smoothed = SmoothedWeights.of(np.where(never, 0.0, of_datum))
        weights = Weights.of(of_datum, smoothed.raw.pareto_k)
        index = smoothed.draw(self.num_draws, [self.seed, Purpose.RUNG_CHOICE, rows.start])
        chosen = torch.as_tensor(index, device=z.device).unsqueeze(-1)
        z = z.gather(0, chosen.expand(-1, -1, z.shape[-1]))
        return Found(
            torch.as_tensor(verdict(weights)),
            estimate.value.cpu(),
            error.cpu(),
            torch.as_tensor(weights.pareto_k),
            torch.as_tensor(weights.ess),
            torch.full(estimate.value.shape, torch.nan, dtype=torch.float64),
            prepared.values_of(rows, z, (Purpose.RUNG_SUMMED_OUT, rows.start)),
        )

    def _chains(self, batch: Batch) -> Found:
        batch = batch.whole()  # as their draws are
        options: dict[str, Any] = {
            "given": self.given,
            "data_plate": self.data_plate,
            "seed": self.seed,
            "compile": self.compile,
            "progress": False,
        }
        samples = sample_posterior(self.model, self.guide, batch, **options)
        bound = ais(self.model, self.guide, batch, **options)
        num_chains, num_draws = samples.log_joint.shape[:2]
        every = torch.linspace(0, num_chains * num_draws - 1, self.num_draws).long()
        return Found(
            (samples.converged.cpu()) & ~bound.untrusted,
            bound.value.cpu(),
            bound.std_error.cpu(),
            torch.full(bound.value.shape, torch.nan, dtype=torch.float64),
            torch.minimum(samples.ess, samples.ess_tail).cpu(),
            samples.rhat.cpu(),
            {name: value.flatten(0, 1)[every] for name, value in samples.draws.items()},
        )


def _reached(is_whole: Flags, weights: Weights) -> Flags:
    """Return for which data weights are good, of draws that reach all of the posterior, [n]."""
    return weights.good & is_whole


def _nearly_equal(weights: Weights) -> Flags:
    """Return for which data half of annealed chains are effective, [n]."""
    return weights.ess > _EQUAL_CHAINS * weights.num_particles


def _with_rows(found: Found, rows: Tensor, better: Found) -> Found:
    """Return what was found, with something better for some rows."""
    draws = {name: value.clone() for name, value in found.draws.items()}
    for name, value in draws.items():
        value[:, rows.to(value.device)] = better.draws[name]
    numbers = [field.name for field in fields(found) if field.name != "draws"]
    of_datum = {name: getattr(found, name).clone() for name in numbers}
    for name, value in of_datum.items():
        value[rows] = getattr(better, name)
    return Found(draws=draws, **of_datum)


def _joined(parts: Sequence[Found], prepared: Ready) -> Found:
    """Return what blocks of data gave as one."""
    whole = prepared.evaluator.structure.data_dim is None
    draws = {
        name: part if whole else torch.cat([each.draws[name] for each in parts], 1)
        for name, part in parts[0].draws.items()
    }
    return Found(
        torch.cat([part.good for part in parts]),
        torch.cat([part.log_evidence for part in parts]),
        torch.cat([part.error for part in parts]),
        torch.cat([part.pareto_k for part in parts]),
        torch.cat([part.ess for part in parts]),
        torch.cat([part.rhat for part in parts]),
        draws,
    )
