"""Results of training: those of fit and em, and of an epoch for callbacks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["EMResult", "EMStop", "Epoch", "FitResult", "FitStop", "HalfStep"]

FitStop: TypeAlias = Literal["epochs", "max_steps", "patience", "callback", "interrupted"]
EMStop: TypeAlias = Literal["tolerance", "noise", "num_iterations", "interrupted"]
HalfStep: TypeAlias = Literal["E", "M"]


@dataclass(frozen=True)
class Epoch:
    """The argument of a callback of :func:`pyro_vae.fit`, at the end of an epoch.

    Attributes:
        epoch: counted from 1.
        step: optimizer steps so far.
        elbo: mean over the epoch, in nats per datum.
        validation_elbo: in nats per datum; nan without validation data.
        elapsed: seconds of training and validation so far.
    """

    epoch: int
    step: int
    elbo: float
    validation_elbo: float
    elapsed: float


@dataclass(frozen=True)
class FitResult:
    """The result of :func:`pyro_vae.fit`.

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
    stopped_by: FitStop
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
    """The result of :func:`pyro_vae.em`.

    Attributes:
        history: equally long lists, one entry per half-step: iteration (0 is the start),
            half_step ("E" or "M"), elbo and elbo_std_error (in nats per datum; Monte
            Carlo standard error, 0 where nothing was drawn).
        stopped_by: "tolerance", "noise", "num_iterations" or "interrupted".
        iterations: M-steps taken.
        elapsed: seconds.
    """

    history: Mapping[str, list[Any]]
    stopped_by: EMStop
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
