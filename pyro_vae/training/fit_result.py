"""What training gives back: its history, why it ended, and what says that it is unfinished."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from pyro_vae.refinement.refine import TOLERANCE

_BATCHES = 8  # of a quarter of the epochs, whose means the error of a trend is from
_PROMISE = 5 * TOLERANCE  # nats per datum

FitStop: TypeAlias = Literal[
    "epochs", "max_steps", "patience", "converged", "callback", "interrupted"
]


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
        stopped_by: "epochs", "max_steps", "patience", "converged", "callback" or "interrupted".
        steps: optimizer steps taken, those of resumed runs included.
        elapsed: seconds spent in training and validation, likewise.
        best_epoch: the epoch whose parameters the model and guide now hold, when
            validation data were given; otherwise the last.
        skipped: steps whose loss or gradient was not finite, which moved nothing
            (``on_nan="skip"``).
        promised: of a LocalGuide of all data jointly (data_plate=False): about how many nats its
            ELBO is below the optimum, by the slope that is left, and the standard error. Of other
            training that "converged": what :class:`pyro_vae.Converged` takes to be left. Else nan.

    Example:
        >>> history = {"epoch": list(range(100)), "elbo": [step / 7 for step in range(100)]}
        >>> FitResult(history, "epochs", 100, 1.0, 100).unfinished
        'the ELBO still rises by 3.4 ± 0.5 nats'
    """

    history: Mapping[str, list[float]]
    stopped_by: FitStop
    steps: int
    elapsed: float
    best_epoch: int
    skipped: int = 0
    promised: tuple[float, float] = math.nan, math.nan

    @property
    def trend(self) -> tuple[float, float]:
        """By how much the ELBO still rises, in nats per datum, and its standard error.

        From the third quarter of the epochs to the last; the error by batch means. nan for fewer
        than 64 epochs. A rise within the errors is no proof of an optimum: noise of a constant
        learning rate keeps an ELBO from it. :func:`pyro_vae.refine` says whether rows are there.
        """
        elbos = [elbo for elbo in self.history["elbo"] if not math.isnan(elbo)]
        size = len(elbos) // (4 * _BATCHES)
        if size < 2:
            return math.nan, math.nan
        last = torch.tensor(elbos[-2 * _BATCHES * size :], dtype=torch.float64)
        third, fourth = last.reshape(2, _BATCHES, size).mean(2)
        error = ((third.var() + fourth.var()) / _BATCHES).sqrt()
        return float(fourth.mean() - third.mean()), float(error)

    @property
    def unfinished(self) -> str:
        """What says that training has not reached the optimum; "" where nothing does.

        A :attr:`trend` or a gain :attr:`promised` that is plain: 3 standard errors, and more than
        0.02 nats, or 0.1 for the latter. Of training that "converged" the trend tells nothing: its
        rates fell, and the parameters are averages.
        """
        found = []
        if self.stopped_by != "converged" and self.trend[0] > max(TOLERANCE, 3 * self.trend[1]):
            found.append("the ELBO still rises by {:.2g} ± {:.1g} nats".format(*self.trend))
        if self.promised[0] > max(_PROMISE, 3 * self.promised[1]):
            found.append("its slope promises {:.2g} ± {:.1g} nats".format(*self.promised))
        return ", ".join(found)

    def __repr__(self) -> str:
        epochs = len(self.history["epoch"])
        skipped = f", skipped={self.skipped}" if self.skipped else ""
        last = f", elbo={self.history['elbo'][-1]:.4f}" if epochs else ""
        last += f", unfinished: {self.unfinished}" if self.unfinished else ""
        return (
            f"FitResult(stopped_by={self.stopped_by!r}, epochs={epochs}, steps={self.steps}"
            f"{skipped}, elapsed={self.elapsed:.1f}s{last})"
        )
