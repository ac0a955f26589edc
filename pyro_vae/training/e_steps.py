"""E-steps of EM: how q is renewed, what E_q[log p(x, z)] is then, and the ELBO with its error.

Each keeps q fixed between two updates, so that the expectation is a deterministic function
of the model's parameters.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyro.infer
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.guides.base import FamilyGuide
from pyro_vae.guides.exact import ExactGuide
from pyro_vae.guides.local import LocalGuide
from pyro_vae.losses.elbo import ELBO
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.estimators import Estimate, effective_sample_size
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.purposes import bits_of
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import evaluation, seeded
from pyro_vae.programs.supports import is_discrete, support_of
from pyro_vae.programs.types import DataPlate, Program
from pyro_vae.refinement.refine import TOLERANCE, refine_table

_FEW = 10.0  # effective draws of a datum
_REFINE_STEPS, _WARMUP_STEPS = 100, 50  # by default


@dataclass(frozen=True, slots=True)
class StepELBO:
    """The ELBO after a half-step, in nats per datum.

    Attributes:
        mean: over the data.
        std_error: Monte Carlo standard error of it; 0 where nothing was drawn.
        common: the estimate itself, where later ones use the same random numbers.
    """

    mean: float
    std_error: float = 0.0
    common: Estimate | None = None

    def gain(self, before: StepELBO) -> tuple[float, float]:
        """Return how much higher this is than another, and the standard error of that."""
        error = math.hypot(self.std_error, before.std_error)
        if self.common is not None and before.common is not None:
            error = (self.common - before.common).mean_std_error
        return self.mean - before.mean, error


@dataclass(frozen=True, slots=True)
class Problem:
    """The pair and the data of an E-step, and its settings.

    Attributes:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: all the data.
        structure: of the model on them.
        data_plate: as in :func:`pyro_vae.log_weights`.
        num_particles: draws for each datum of an E-step that draws.
        steps: of an update, of those that take steps; None for their default.
        seed: of the draws.
    """

    model: Program
    guide: Program
    batch: Batch
    structure: Structure
    data_plate: DataPlate
    num_particles: int
    steps: int | None
    seed: int

    def stream(self, *key: int) -> int:
        """Return the seed of a stream of random numbers of its own."""
        return bits_of(self.seed, *key, count=32)


class EStep(ABC):
    """q, held fixed between two updates.

    Args:
        problem: the pair and its data.

    Raises:
        ValueError: for a model or guide that this E-step cannot use.
    """

    name: str

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    @abstractmethod
    def update(self, iteration: int) -> StepELBO:
        """Renew q under the model's present parameters; return the ELBO."""

    @abstractmethod
    def objective(self) -> Tensor:
        """Return E_q[log p(x, z)] in nats per datum, up to a constant: a scalar with gradients."""

    @abstractmethod
    def estimate(self) -> StepELBO:
        """Return the ELBO of q as it is under the model's present parameters."""

    def doubts(self) -> Iterator[str]:
        """Yield in which respects the last update was inaccurate."""
        yield from ()

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Release the guide."""


class ExactStep(EStep):
    """q is the exact posterior of enumerable latents: the ELBO after an update is log p(x)."""

    name = "exact"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if not isinstance(problem.guide, ExactGuide):
            raise ValueError(
                "e_step='exact' needs an ExactGuide, which enumerates discrete latents, found "
                f"{type(problem.guide).__name__}; for continuous latents choose 'variational', "
                "'importance' or 'nuts'"
            )
        self._guide, self._loss = problem.guide, ELBO(kl="sample")
        self._frozen = contextlib.ExitStack()

    def update(self, iteration: int) -> StepELBO:
        """Freeze the posterior under the present parameters."""
        batch = self._problem.batch
        self.close()
        self._frozen.enter_context(self._guide.frozen(*batch.args, **batch.kwargs))
        return self.estimate()

    def objective(self) -> Tensor:
        """Return the ELBO itself: the entropy of q is a constant."""
        model, batch = self._problem.model, self._problem.batch
        with evaluation(model):
            loss = self._loss.differentiable_loss(model, self._guide, *batch.args, **batch.kwargs)
        return -loss / self._problem.structure.num_data

    def estimate(self) -> StepELBO:
        """Return the ELBO, without error."""
        return StepELBO(float(self.objective().detach()))

    def close(self) -> None:
        """Let the guide follow the parameters again."""
        self._frozen.close()


@dataclass(frozen=True, slots=True)
class _Draws:
    """Draws of some particles for some data, each with its share of the posterior.

    ``weight``, [k, n], sums to 1 over all particles of a datum.
    """

    rows: slice
    values: Mapping[str, Tensor]
    weight: Tensor


class DrawnStep(EStep):
    """q is represented by draws, with equal weights or not."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._num_particles = problem.num_particles
        pair, plate, seed = (problem.model, problem.guide), problem.data_plate, problem.seed
        self._evaluator, self._graded = (
            Evaluator(*pair, problem.batch, data_plate=plate, seed=seed, gradients=gradients)
            for gradients in (False, True)
        )
        self._draws: list[_Draws] = []

    def objective(self) -> Tensor:
        """Return the weighted mean of log p(x, z) over the draws."""
        total = torch.zeros(())
        for draws in self._draws:
            log_joint = torch.stack(self._graded.score_model(draws.rows, draws.values)).sum(0)
            # A draw of no weight may have no density either.
            log_joint = torch.where(draws.weight > 0, log_joint, 0.0)
            total = total.to(log_joint) + (draws.weight.to(log_joint) * log_joint).sum()
        return total / self._evaluator.num_data

    def _log_joint(self) -> list[Tensor]:
        """Return log p(x, z) of the draws, [k, n] each."""
        scored = (self._evaluator.score_model(draws.rows, draws.values) for draws in self._draws)
        return [torch.stack(parts).sum(0).double() for parts in scored]


class VariationalStep(DrawnStep):
    """q is a table of a family, refined from its present rows."""

    name = "variational"

    def __init__(self, problem: Problem) -> None:
        if not isinstance(problem.guide, LocalGuide):
            raise ValueError(
                "e_step='variational' refines the rows of a LocalGuide, found "
                f"{type(problem.guide).__name__}: make one with pyro_vae.refine(model, guide, x)"
            )
        super().__init__(problem)
        self._guide = problem.guide
        if not self._guide.family.has_density:
            self._num_particles = 1

    def update(self, iteration: int) -> StepELBO:
        """Refine every row; the random numbers are the same at each update."""
        guide, problem = self._guide, self._problem
        self._evaluator.seed = problem.seed
        limits = problem.steps or _REFINE_STEPS, TOLERANCE
        refined = refine_table(problem.model, self._evaluator, guide, problem.data_plate, *limits)
        with torch.no_grad():
            guide.table.copy_(refined.table)
            guide.converged.copy_(refined.converged)
        # Draws other than those that measure the ELBO, which the M-step would overfit.
        self._evaluator.seed = problem.stream(1)
        share = 1 / self._num_particles
        self._draws = [
            _Draws(chunk.rows, chunk.values, torch.full_like(chunk.weights.total, share))
            for chunk in self._evaluator.chunks(self._num_particles)
        ]
        return self.estimate()

    def estimate(self) -> StepELBO:
        """Return the ELBO from draws made of the same random numbers each time."""
        self._evaluator.seed = self._problem.seed
        total = _total(self._evaluator.chunks(self._num_particles))
        if not self._guide.family.has_density:
            return StepELBO(float(total.mean()))
        found = Estimate.elbo(total)
        return StepELBO(found.mean, found.mean_std_error, common=found)

    def doubts(self) -> Iterator[str]:
        """Yield how many rows have not converged."""
        if left := int((~self._guide.converged).sum()):
            data = f"{left} of {self._guide.num_data} data"
            yield f"{data} had not converged to within {TOLERANCE:g} nats; raise e_steps"


class ImportanceStep(DrawnStep):
    """q is the posterior by self-normalised weights of draws from the guide, fresh each time."""

    name = "importance"

    def __init__(self, problem: Problem) -> None:
        guide = problem.guide
        if isinstance(guide, FamilyGuide) and not guide.family.has_density:
            raise ValueError(
                f"e_step={self.name!r} measures log p(x) by the guide's density, and "
                f"{guide.family!r} is a point, which has none; use another family"
            )
        if problem.num_particles < 2:
            raise ValueError(f"num_particles=1: e_step={self.name!r} needs at least 2")
        super().__init__(problem)

    def update(self, iteration: int) -> StepELBO:
        """Draw and weight; the ELBO of the posterior is log p(x), by importance sampling."""
        self._evaluator.seed = self._problem.stream(2, iteration)
        chunks = list(self._evaluator.chunks(self._num_particles))
        if all(bool((value == value[:1]).all()) for value in chunks[0].values.values()):
            raise ValueError(
                "the guide draws one and the same point each time: it has no density to weight "
                "by. Use a guide with one, such as a LocalGuide of families.Normal()"
            )
        self._total = _total(chunks)
        self._share = torch.softmax(self._total, 0)
        self._places = [(chunk.particles, chunk.rows) for chunk in chunks]
        both = zip(chunks, self._places, strict=True)
        self._draws = [_Draws(c.rows, c.values, self._share[place]) for c, place in both]
        self._evidence, self._before = Estimate.iwae(self._total), self._log_joint()
        return StepELBO(self._evidence.mean, self._evidence.mean_std_error)

    def estimate(self) -> StepELBO:
        """Return log p(x) at the update, plus what E_q[log p(x, z)] has gained since."""
        gained = torch.zeros_like(self._total)
        for place, new, old in zip(self._places, self._log_joint(), self._before, strict=True):
            # Draws of no density had no weight.
            gained[place] = torch.where(torch.isfinite(old), new - old, 0.0)
        mean = (self._share * gained).sum(0)
        since = Estimate(mean, self._share * self._num_particles * (gained - mean))
        found = self._evidence + since
        return StepELBO(found.mean, found.mean_std_error)

    def doubts(self) -> Iterator[str]:
        """Yield for how many data the guide is no longer near the posterior."""
        if few := int((effective_sample_size(self._total) < _FEW).sum()):
            data = f"{few} of {self._evaluator.num_data} data had an effective sample size below"
            what = "the guide is far from their posterior. Refine it (pyro_vae.refine)"
            yield f"{data} {_FEW:g}: {what}, or raise num_particles"


class NUTSStep(ImportanceStep):
    """q is the posterior by the No-U-Turn sampler over all latents of all data at once.

    NUTS gives no log p(x), so that is measured by importance sampling through the guide, on
    draws of its own.
    """

    name = "nuts"

    def __init__(self, problem: Problem) -> None:
        latents = (*problem.structure.local_latents, *problem.structure.global_latents)
        if undeclared := [site.name for site in latents if support_of(site.fn) is None]:
            raise ValueError(
                f"the distributions of the latent sites {undeclared} declare no support, which "
                "NUTS needs; give their classes one, or use e_step='importance'"
            )
        if names := [site.name for site in latents if is_discrete(site.fn)]:
            raise ValueError(
                f"the latent sites {names} are discrete, and NUTS needs gradients; use "
                "e_step='importance', or an ExactGuide where all are"
            )
        super().__init__(problem)
        self._transforms = {site.name: biject_to(site.fn.support) for site in latents}
        self._whole = slice(0, self._evaluator.num_data)
        drawn = self._evaluator.single_values(self._evaluator.draw(self._whole, 1, (4,))[0])
        self._last = {name: drawn[name][0].detach() for name in self._transforms}
        self._divergences = 0

    def update(self, iteration: int) -> StepELBO:
        """Run the chain on from its last state, with the step size adapted anew."""
        model, batch = self._problem.model, self._problem.batch
        self._at_update = super().update(iteration)
        with seeded(batch.device, self._problem.stream(3, iteration)), evaluation(model):
            chain = pyro.infer.MCMC(
                pyro.infer.NUTS(model),
                num_samples=self._num_particles,
                warmup_steps=self._problem.steps or _WARMUP_STEPS,
                initial_params={n: t.inv(self._last[n]) for n, t in self._transforms.items()},
                disable_progbar=True,
            )
            chain.run(*batch.args, **batch.kwargs)
        values = {name: value.detach() for name, value in chain.get_samples().items()}
        self._last = {name: value[-1] for name, value in values.items()}
        self._divergences = sum(len(found) for found in chain.diagnostics()["divergences"].values())
        weight = torch.full((1, 1), 1 / self._num_particles, device=batch.device)
        self._draws = [_Draws(self._whole, self._evaluator.from_single(values), weight)]
        self._before = self._log_joint()
        return self._at_update

    def estimate(self) -> StepELBO:
        """Return log p(x) at the update, plus what E_q[log p(x, z)] has gained since."""
        gained = (self._log_joint()[0] - self._before[0]).mean(1)
        error = math.hypot(self._at_update.std_error, _batch_means_error(gained))
        return StepELBO(self._at_update.mean + float(gained.mean()), error)

    def doubts(self) -> Iterator[str]:
        """Yield how many transitions of the last run diverged, and what to doubt of log p(x)."""
        if self._divergences:
            draws = f"{self._divergences} of {self._num_particles} NUTS draws"
            yield f"{draws} diverged: the posterior is steep somewhere, and they may miss that part"
        yield from super().doubts()


E_STEPS = {kind.name: kind for kind in (ExactStep, VariationalStep, ImportanceStep, NUTSStep)}


def _batch_means_error(chain: Tensor) -> float:
    """Return the standard error of the mean of a correlated chain, [K], by batch means."""
    count = math.isqrt(chain.shape[0])
    if count < 2:
        return math.nan
    means = chain[: chain.shape[0] // count * count].reshape(count, -1).mean(1)
    return float(means.std() / math.sqrt(count))


def _total(chunks: Iterable[Chunk]) -> Tensor:
    """Return the log weights of chunks, [K, N]."""
    blocks: dict[int, list[Tensor]] = {}
    for chunk in chunks:
        blocks.setdefault(chunk.rows.start, []).append(chunk.weights.total.double())
    return torch.cat([torch.cat(block) for block in blocks.values()], 1)
