"""Frozen result types; every estimate carries its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae import estimators

__all__ = ["Bound", "EMResult", "FitResult", "LogWeights", "given_text"]


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
        std_error: Monte Carlo standard error of each, [N].
        num_particles: K.
        given: global latent sites, and the values that they were fixed at: then the bound is on
            log p(x | these).
    """

    name: str
    value: Tensor
    std_error: Tensor
    num_particles: int
    given: Mapping[str, Tensor] = field(default_factory=dict)

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
        return float(estimators.mean_std_error(self.std_error))

    def __repr__(self) -> str:
        given = f"; given {given_text(self.given)}" if self.given else ""
        return (
            f"{self.name}: {self.mean:.4f} ± {self.mean_std_error:.4f} nats per datum "
            f"({self.value.shape[0]} data{given})"
        )


def given_text(given: Mapping[str, Any]) -> str:
    """Return what a result says of global latents that were fixed; "" where none were."""
    return f"{', '.join(given)} at the guide's median" if given else ""


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
