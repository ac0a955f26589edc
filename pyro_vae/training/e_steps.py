"""E-steps of EM: how q is renewed, what E_q[log p(x, z)] is then, and the ELBO with its error.

Each keeps q fixed between two updates, so that the expectation is a deterministic function
of the model's parameters.
"""

from __future__ import annotations

import contextlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.infer
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.guides.exact import ExactGuide
from pyro_vae.guides.local import LocalGuide
from pyro_vae.losses.elbo import ELBO
from pyro_vae.particles.estimators import (
    effective_sample_size,
    elbo,
    elbo_influence,
    iwae_bound,
    iwae_influence,
    mean_std_error,
    std_error,
)
from pyro_vae.particles.evaluator import Chunk, Evaluator
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import evaluation, preserved_rng
from pyro_vae.refinement.refine import refine_table

__all__ = ["EStep", "Estimate", "ExactStep", "ImportanceStep", "NUTSStep", "VariationalStep"]

logger = logging.getLogger(__name__)

_TOLERANCE = 0.02  # in nats per datum: which rows of a table count as converged
_FEW = 10.0  # effective draws of a datum


@dataclass(frozen=True)
class Estimate:
    """An ELBO, in nats per datum.

    Attributes:
        mean: over the data.
        std_error: Monte Carlo standard error of it; 0 where nothing was drawn.
        influence: [K, N] of each draw, where later estimates use the same random numbers.
    """

    mean: float
    std_error: float = 0.0
    influence: Tensor | None = None

    @classmethod
    def of(cls, value: Tensor, influence: Tensor, *, common: bool) -> Estimate:
        """Return the estimate of values [N] with influences [K, N]."""
        error = float(mean_std_error(std_error(influence)))
        return cls(float(value.mean()), error, influence if common else None)

    def gain(self, before: Estimate) -> tuple[float, float]:
        """Return how much higher this is than another, and the standard error of that."""
        error = math.hypot(self.std_error, before.std_error)
        if self.influence is not None and before.influence is not None:
            error = float(mean_std_error(std_error(self.influence - before.influence)))
        return self.mean - before.mean, error


class EStep(ABC):
    """q, held fixed between two updates."""

    @abstractmethod
    def update(self, iteration: int) -> Estimate:
        """Renew q under the model's present parameters; return the ELBO."""

    @abstractmethod
    def objective(self) -> Tensor:
        """Return E_q[log p(x, z)] in nats per datum, up to a constant: a scalar with gradients."""

    @abstractmethod
    def estimate(self) -> Estimate:
        """Return the ELBO of q as it is under the model's present parameters."""

    def warn(self) -> None:  # noqa: B027 - an exact one has nothing to say
        """Log what the last update leaves to be desired."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what is held."""


class ExactStep(EStep):
    """q is the exact posterior of enumerable latents: the ELBO after an update is log p(x)."""

    def __init__(
        self, model: Callable[..., Any], guide: ExactGuide, batch: Batch, structure: Structure
    ) -> None:
        self._model, self._guide, self._batch = model, guide, batch
        self._num_data = structure.num_data
        self._loss = ELBO(kl="sample")
        self._frozen = contextlib.ExitStack()

    def update(self, iteration: int) -> Estimate:
        """Freeze the posterior under the present parameters."""
        self._frozen.close()
        self._frozen.enter_context(self._guide.frozen(*self._batch.args, **self._batch.kwargs))
        return self.estimate()

    def objective(self) -> Tensor:
        """Return the ELBO itself: the entropy of q is a constant."""
        with evaluation(self._model):
            loss = self._loss.differentiable_loss(
                self._model, self._guide, *self._batch.args, **self._batch.kwargs
            )
        return -loss / self._num_data

    def estimate(self) -> Estimate:
        """Return the ELBO, without error."""
        return Estimate(float(self.objective().detach()))

    def close(self) -> None:
        """Let the guide follow the parameters again."""
        self._frozen.close()


@dataclass(frozen=True)
class _Draws:
    """Draws of some particles for some data, each with its share of the posterior."""

    rows: slice
    values: Mapping[str, Tensor]
    weight: Tensor  # [k, n]; sums to 1 over all particles of a datum


class DrawnStep(EStep):
    """q is represented by draws, with equal weights or not."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        batch: Batch,
        data_plate: str | bool | None,
        num_particles: int,
        seed: int,
    ) -> None:
        self._seed, self._num_particles = seed, num_particles
        self._scorer, self._graded = (
            Evaluator(model, guide, batch, data_plate=data_plate, seed=seed, gradients=gradients)
            for gradients in (False, True)
        )
        self._draws: list[_Draws] = []

    def objective(self) -> Tensor:
        """Return the weighted mean of log p(x, z) over the draws."""
        total: Tensor | float = 0.0
        for draws in self._draws:
            log_joint = torch.stack(self._graded.score_model(draws.rows, draws.values)).sum(0)
            # A draw of no weight may have no density either.
            log_joint = torch.where(draws.weight > 0, log_joint, 0.0)
            total = total + (draws.weight.to(log_joint) * log_joint).sum()
        return torch.as_tensor(total) / self._scorer.num_data

    def _log_joint(self) -> list[Tensor]:
        """Return log p(x, z) of the draws, [k, n] each."""
        return [
            torch.stack(self._scorer.score_model(draws.rows, draws.values)).sum(0).double()
            for draws in self._draws
        ]

    def _stream(self, *key: int) -> int:
        return int(np.random.SeedSequence([self._seed, *key]).generate_state(1, np.uint32)[0])


class VariationalStep(DrawnStep):
    """q is a table of a family, refined from its present rows."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: LocalGuide,
        batch: Batch,
        data_plate: str | bool | None,
        num_particles: int,
        seed: int,
        steps: int,
    ) -> None:
        if not guide.family.has_density:
            num_particles = 1
        super().__init__(model, guide, batch, data_plate, num_particles, seed)
        self._model, self._guide, self._data_plate = model, guide, data_plate
        self._steps = steps

    def update(self, iteration: int) -> Estimate:
        """Refine every row; the random numbers are the same at each update."""
        guide = self._guide
        self._scorer.seed = self._seed
        refined = refine_table(
            self._model, self._scorer, guide, self._data_plate, self._steps, _TOLERANCE
        )
        with torch.no_grad():
            guide.table.copy_(refined.table)
            guide.converged.copy_(refined.converged)
        # Draws other than those that measure the ELBO, which the M-step would overfit.
        self._scorer.seed = self._stream(1)
        self._draws = [
            _Draws(
                chunk.rows,
                chunk.values,
                torch.full_like(chunk.weights.total, 1 / self._num_particles),
            )
            for chunk in self._scorer.chunks(self._num_particles)
        ]
        return self.estimate()

    def estimate(self) -> Estimate:
        """Return the ELBO from draws made of the same random numbers each time."""
        self._scorer.seed = self._seed
        total = _total(self._scorer.chunks(self._num_particles))
        if not self._guide.family.has_density:
            return Estimate(float(total.mean()))
        return Estimate.of(elbo(total), elbo_influence(total), common=True)

    def warn(self) -> None:
        """Say how many rows the last update left unfinished."""
        left = int((~self._guide.converged).sum())
        if left:
            logger.warning(
                "em: in the last E-step, %d of %d data had not converged to within %g nats; "
                "raise e_steps",
                left,
                self._guide.num_data,
                _TOLERANCE,
            )


class ImportanceStep(DrawnStep):
    """q is the posterior by self-normalised weights of draws from the guide, fresh each time."""

    def update(self, iteration: int) -> Estimate:
        """Draw and weight; the ELBO of the posterior is log p(x), by importance sampling."""
        self._scorer.seed = self._stream(2, iteration)
        chunks = list(self._scorer.chunks(self._num_particles))
        if all(bool((value == value[:1]).all()) for value in chunks[0].values.values()):
            raise ValueError(
                "the guide draws one and the same point each time: it has no density to weight "
                "by. Use a guide with one, such as a LocalGuide of families.Normal()"
            )
        self._total = _total(chunks)
        shares = torch.softmax(self._total, 0)
        self._draws = [
            _Draws(chunk.rows, chunk.values, shares[chunk.particles, chunk.rows])
            for chunk in chunks
        ]
        self._before = self._log_joint()
        return self.estimate()

    def estimate(self) -> Estimate:
        """Return log p(x) at the update, plus what E_q[log p(x, z)] has gained since."""
        gained = torch.zeros_like(self._total)
        place = _places(self._draws)
        for where, new, old in zip(place, self._log_joint(), self._before, strict=True):
            # Draws of no density had no weight.
            gained[where] = torch.where(torch.isfinite(old), new - old, 0.0)
        share = torch.softmax(self._total, 0)
        mean = (share * gained).sum(0)
        relative = share * self._num_particles
        influence = iwae_influence(self._total) + relative * (gained - mean)
        return Estimate.of(iwae_bound(self._total) + mean, influence, common=False)

    def warn(self) -> None:
        """Say for how many data the guide is no longer near the posterior."""
        few = int((effective_sample_size(self._total) < _FEW).sum())
        if few:
            logger.warning(
                "em: in the last E-step, %d of %d data had an effective sample size below %g: the "
                "guide is far from their posterior. Refine it (pyro_vae.refine), or raise "
                "num_particles",
                few,
                self._scorer.num_data,
                _FEW,
            )


class NUTSStep(DrawnStep):
    """q is the posterior by the No-U-Turn sampler over all latents of all data at once.

    NUTS draws do not tell log p(x), so that is measured by importance sampling
    through the guide, on draws of its own.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        batch: Batch,
        data_plate: str | bool | None,
        num_particles: int,
        seed: int,
        warmup: int,
        structure: Structure,
    ) -> None:
        super().__init__(model, guide, batch, data_plate, num_particles, seed)
        self._evidence = ImportanceStep(model, guide, batch, data_plate, num_particles, seed)
        self._model, self._batch, self._warmup = model, batch, warmup
        self._transforms = {
            site.name: biject_to(site.support)
            for site in (*structure.local_latents, *structure.global_latents)
        }
        whole = slice(0, self._scorer.num_data)
        drawn = self._scorer.single_values(self._scorer.draw(whole, 1, (4,))[0])
        self._last = {name: drawn[name][0].detach() for name in self._transforms}
        self._divergences = 0

    def update(self, iteration: int) -> Estimate:
        """Run the chain on from its last state, with the step size adapted anew."""
        self._log_evidence = self._evidence.update(iteration)
        start = {name: t.inv(self._last[name]) for name, t in self._transforms.items()}
        with preserved_rng(self._batch.device), evaluation(self._model):
            torch.manual_seed(self._stream(3, iteration))
            chain = pyro.infer.MCMC(
                pyro.infer.NUTS(self._model),
                num_samples=self._num_particles,
                warmup_steps=self._warmup,
                initial_params=start,
                disable_progbar=True,
            )
            chain.run(*self._batch.args, **self._batch.kwargs)
        values = {name: value.detach() for name, value in chain.get_samples().items()}
        self._last = {name: value[-1] for name, value in values.items()}
        self._divergences = sum(map(len, chain.diagnostics()["divergences"].values()))
        whole = slice(0, self._scorer.num_data)
        weight = torch.full((1, 1), 1 / self._num_particles, device=self._batch.device)
        self._draws = [_Draws(whole, self._scorer.from_single(values), weight)]
        (self._before,) = self._log_joint()
        return self._log_evidence

    def estimate(self) -> Estimate:
        """Return log p(x) at the update, plus what E_q[log p(x, z)] has gained since."""
        (now,) = self._log_joint()
        gained = (now - self._before).mean(1)
        error = math.hypot(self._log_evidence.std_error, _batch_means_error(gained))
        return Estimate(self._log_evidence.mean + float(gained.mean()), error)

    def warn(self) -> None:
        """Say how many transitions of the last run diverged."""
        if self._divergences:
            logger.warning(
                "em: in the last E-step, %d of %d NUTS draws diverged: the posterior is steep "
                "somewhere, and its draws may miss that part",
                self._divergences,
                self._num_particles,
            )
        self._evidence.warn()


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


def _places(draws: list[_Draws]) -> list[tuple[slice, slice]]:
    """Return where each of the draws stands in [K, N]."""
    seen: dict[int, int] = {}
    places = []
    for some in draws:
        start = seen.get(some.rows.start, 0)
        stop = seen[some.rows.start] = start + some.weight.shape[0]
        places.append((slice(start, stop), some.rows))
    return places
