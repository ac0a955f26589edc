"""Frozen result types; every estimate carries its standard error."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae import arviz_bridge, estimators

__all__ = [
    "PARETO_K_THRESHOLD",
    "Bound",
    "EMResult",
    "FitResult",
    "Given",
    "LogWeights",
    "doubts",
    "given_text",
    "heavy_tailed",
]

# Vehtari et al. (2024): above it importance sampling is not to be trusted, its errors included.
PARETO_K_THRESHOLD = 0.7
# A share of effective particles above which a heavy tail does no harm: weights that all but agree.
_NEARLY_EQUAL = 0.9
# The squared skewness of an estimate above which a few particles decide its error.
_FEW_DECIDE = 0.5


@dataclass(frozen=True)
class LogWeights:
    """The spine: three log densities of each particle of each datum, in nats.

    Attributes:
        log_likelihood: sum over observed sites of log p(x | z), [K, N].
        log_prior: sum over latent sites of log p(z), [K, N].
        log_guide: sum over latent sites of log q(z | x), [K, N].
        given: global latent sites, and the values that they were fixed at.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {self.log_likelihood.shape, self.log_prior.shape, self.log_guide.shape}
        if len(shapes) != 1:
            raise ValueError(
                "log_likelihood, log_prior and log_guide need one shape [K, N], found "
                f"{sorted(tuple(shape) for shape in shapes)}"
            )

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z), [K, N]."""
        return self.log_likelihood + self.log_prior

    @property
    def total(self) -> Tensor:
        """log w = log p(x, z) - log q(z | x), [K, N]."""
        return self.log_likelihood + self.log_prior - self.log_guide

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_likelihood.shape[0]

    @property
    def num_data(self) -> int:
        """N."""
        return self.log_likelihood.shape[1]

    @staticmethod
    def concatenate(chunks: Sequence[LogWeights], dim: int) -> LogWeights:
        """Join chunks along particles (dim 0) or data (dim 1)."""
        return LogWeights(
            torch.cat([chunk.log_likelihood for chunk in chunks], dim),
            torch.cat([chunk.log_prior for chunk in chunks], dim),
            torch.cat([chunk.log_guide for chunk in chunks], dim),
        )

    def __repr__(self) -> str:
        return f"LogWeights(num_particles={self.num_particles}, num_data={self.num_data})"


@dataclass(frozen=True)
class Bound:
    """A lower bound on log p(x) for each datum, in nats.

    Attributes:
        name: what it is, for example "ELBO" or "IWAE-5000".
        value: [N], float64.
        std_error: Monte Carlo standard error of each, [N]: value ± 1.96 of them covers with
            probability 0.95 (see :func:`pyro_vae.estimators.calibrated`).
        num_particles: K.
        given: global latent sites, and the values that they were fixed at: then the bound is on
            log p(x | these).
        skewness: of the particles' effects on the value, [N].
        ess: effective sample size of the importance weights, [N], between 1 and K.
        largest: the largest log weights of each datum, [M, N]: those that tell its k-hat.
        mean_of: "weights", or "log weights" as of the ELBO.
    """

    name: str
    value: Tensor
    std_error: Tensor
    num_particles: int
    given: Mapping[str, Tensor] = field(default_factory=dict)
    skewness: Tensor | None = None
    ess: Tensor | None = None
    largest: Tensor | None = field(default=None, repr=False)
    mean_of: str = "log weights"

    @property
    def mean(self) -> float:
        """Mean over the data, in nats per datum."""
        return float(self.value.mean())

    @property
    def mean_std_error(self) -> float:
        """Monte Carlo standard error of the mean for these data.

        Draws of different data are independent. The spread over other data that
        might have been drawn is not in it.
        """
        return float(estimators.mean_std_error(self.std_error, self.skewness, self.num_particles))

    @functools.cached_property
    def pareto_k(self) -> Tensor:
        """Pareto k-hat of each datum's importance weights, [N]; nan from too few particles.

        Above 0.7 the guide misses so much of the posterior that importance sampling through it is
        not to be trusted; infinite where every weight is zero.
        """
        k_hat = torch.full(self.value.shape, math.nan, dtype=torch.float64)
        if self.largest is None:
            return k_hat
        largest = self.largest.detach().cpu()
        some = ~(largest == -math.inf).all(0)
        k_hat[~some] = math.inf
        if bool(some.any()):
            found = arviz_bridge.pareto_k_of_largest(largest[:, some].T.numpy(), self.num_particles)
            k_hat[some] = torch.as_tensor(found, dtype=torch.float64)
        return k_hat

    @property
    def untrusted(self) -> Tensor:
        """For which data the error is not to be trusted, [N].

        Of a mean of weights, those of heavy tails (:func:`heavy_tailed`); of the ELBO, those of
        which a few particles decide it.
        """
        if self.skewness is None or self.ess is None:
            return torch.zeros(self.value.shape, dtype=torch.bool)
        if self.mean_of == "weights":
            return heavy_tailed(self.pareto_k, self.ess.cpu(), self.num_particles)
        return (self.skewness.square() > _FEW_DECIDE * self.num_particles).cpu()

    def __repr__(self) -> str:
        given = f"; given {given_text(self.given)}" if self.given else ""
        return (
            f"{self.name}: {self.mean:.4f} ± {self.mean_std_error:.4f} nats per datum "
            f"({self.value.shape[0]} data{given}){self._doubts()}"
        )

    def _doubts(self) -> str:
        """Return what a reader of the value has to know beside its error."""
        if self.largest is None or self.ess is None:
            return ""
        size, untrusted = self.value.shape[0], int(self.untrusted.sum())
        heavy = int(heavy_tailed(self.pareto_k, self.ess.cpu(), self.num_particles).sum())
        threshold = f"k-hat is above {PARETO_K_THRESHOLD}"
        doubts = ""
        if self.mean_of == "weights" and untrusted:
            doubts = (
                f"; for {untrusted} of {size} data the error is not to be trusted, and log p(x) "
                f"may be far above: {threshold}"
            )
        elif untrusted:
            doubts = (
                f"; for {untrusted} of {size} data the error is not to be trusted: a few "
                "particles decide it"
            )
        if self.mean_of != "weights" and heavy:
            doubts += (
                f"; for {heavy} of {size} data {threshold}: the guide misses a part of the "
                "posterior"
            )
        if bool(self.pareto_k.isnan().any()):
            doubts += f"; {self.num_particles} particles are too few for a k-hat"
        return doubts


class Given(dict[str, Tensor]):
    """Global latent sites, and the values that they were fixed at.

    Args:
        values: by site.
        chosen: the sites whose values were passed; those of the others are the guide's median.
    """

    def __init__(self, values: Mapping[str, Tensor], chosen: Iterable[str] = ()) -> None:
        super().__init__(values)
        self.chosen = frozenset(chosen)


def given_text(given: Mapping[str, Any]) -> str:
    """Return what a result says of global latents that were fixed; "" where none were."""
    chosen = [name for name in given if isinstance(given, Given) and name in given.chosen]
    medians = [name for name in given if name not in chosen]
    parts = [(medians, "at the guide's median"), (chosen, "at the values passed")]
    return "; ".join(f"{', '.join(names)} {how}" for names, how in parts if names)


def heavy_tailed(pareto_k: Any, ess: Any, num_particles: int) -> Any:
    """Return for which data importance weights are not to be trusted, errors included.

    Those with k-hat above 0.7, but for weights that all but agree, of which k-hat is the shape of
    a tail too light to matter.

    Args:
        pareto_k: [N], a tensor or an array.
        ess: effective sample size, [N], likewise.
        num_particles: K.
    """
    return (pareto_k > PARETO_K_THRESHOLD) & ~(ess > _NEARLY_EQUAL * num_particles)


def doubts(pareto_k: np.ndarray, ess: np.ndarray, num_particles: int) -> str:
    """Return for how many data importance weights are not to be trusted, in words; "" for none.

    Args:
        pareto_k: [N], or a number where the batch is one datum.
        ess: effective sample size, likewise.
        num_particles: K.
    """
    heavy = np.atleast_1d(heavy_tailed(pareto_k, ess, num_particles))
    parts = []
    if heavy.any():
        parts.append(
            f"for {heavy.sum()} of {heavy.size} data the importance weights are not to be trusted "
            f"(k-hat is above {PARETO_K_THRESHOLD})"
        )
    if np.isnan(pareto_k).any():
        parts.append(f"{num_particles} particles are too few for a k-hat")
    return "; ".join(parts)


@dataclass(frozen=True)
class FitResult:
    """What :func:`pyro_vae.fit` did.

    Attributes:
        history: equally long lists, one entry per epoch: epoch, step, elbo,
            elbo_std_error, validation_elbo, validation_elbo_std_error (ELBOs in nats
            per datum; standard errors over minibatches; nan where there is nothing to
            estimate from), beta (the factor on the latent terms at the epoch's last step).
        stopped_by: "epochs", "max_steps", "patience", "callback" or "interrupted".
        steps: optimizer steps taken, those of resumed runs included.
        elapsed: seconds spent in training and validation, likewise.
        best_epoch: the epoch whose parameters the model and guide now hold, when
            validation data were given; otherwise the last.
    """

    history: Mapping[str, list[float]]
    stopped_by: str
    steps: int
    elapsed: float
    best_epoch: int

    def __repr__(self) -> str:
        epochs = len(self.history["epoch"])
        last = f", elbo={self.history['elbo'][-1]:.4f}" if epochs else ""
        return (
            f"FitResult(stopped_by={self.stopped_by!r}, epochs={epochs}, steps={self.steps}, "
            f"elapsed={self.elapsed:.1f}s{last})"
        )


@dataclass(frozen=True)
class EMResult:
    """What :func:`pyro_vae.em` did.

    Attributes:
        history: equally long lists, one entry per half-step: iteration (0 is the start),
            half_step ("E" or "M"), elbo and elbo_std_error (in nats per datum; Monte
            Carlo standard error, 0 where nothing was drawn).
        stopped_by: "tolerance", "noise", "num_iterations" or "interrupted".
        iterations: M-steps taken.
        elapsed: seconds.
    """

    history: Mapping[str, list[Any]]
    stopped_by: str
    iterations: int
    elapsed: float

    @property
    def converged(self) -> bool:
        """Whether an iteration gained less than the tolerance, its error included."""
        return self.stopped_by == "tolerance"

    @property
    def elbo(self) -> float:
        """The ELBO after the last half-step, in nats per datum; nan where there was none."""
        return float(self.history["elbo"][-1]) if self.history["elbo"] else math.nan

    @property
    def elbo_std_error(self) -> float:
        """Its Monte Carlo standard error."""
        return float(self.history["elbo_std_error"][-1]) if self.history["elbo"] else math.nan

    def __repr__(self) -> str:
        return (
            f"EMResult(stopped_by={self.stopped_by!r}, iterations={self.iterations}, "
            f"elapsed={self.elapsed:.1f}s, elbo={self.elbo:.4f})"
        )
