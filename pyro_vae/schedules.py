"""The factor on the latent terms at each step of training: constant, warm-up, cycles."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsFloat

__all__ = ["Constant", "Cyclical", "LinearWarmup", "Schedule", "factor_at", "shortfall"]


class Schedule(ABC):
    r"""The factor β on the latent terms of the ELBO, step by step.

    .. math:: \mathbb{E}_q[\log p(x | z)] - \beta_t \, \mathrm{KL}(q(z | x), p(z))

    :func:`pyro_vae.fit` applies it in training steps; evaluation is never scaled. Any
    function from a step to a factor will do there. A schedule also says when it is done,
    so that fit can tell of a warm-up that training cut short.

    To write one, give the two methods below.
    """

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the factor at a step, counted from 0."""

    @abstractmethod
    def full_at(self, since: int = 0) -> int | None:
        """Return the first step, from ``since`` on, that has the final factor.

        None for a schedule without a final factor.
        """


@dataclass(frozen=True)
class Constant(Schedule):
    """One factor at all steps: the β of a β-VAE (Higgins et al. 2017).

    Args:
        beta: the factor, at least 0.

    Raises:
        ValueError: for a factor that is negative or not finite.

    Example:
        >>> import pyro_vae as pv
        >>> pv.schedules.Constant(4.0)(10)
        4.0
    """

    beta: float

    def __post_init__(self) -> None:
        _check_factor("beta", self.beta)

    def __call__(self, step: int) -> float:
        """Return the factor at a step, counted from 0."""
        return float(self.beta)

    def full_at(self, since: int = 0) -> int:
        """Return the first step, from ``since`` on, that has the final factor."""
        return since


@dataclass(frozen=True)
class LinearWarmup(Schedule):
    r"""A line from one factor to another, then level (Bowman et al. 2016).

    .. math:: \beta_t = \text{start} + (\text{end} - \text{start}) \min(1, t / \text{steps})

    Args:
        steps: after which the factor is ``end``.
        start: the factor at step 0.
        end: the final factor; below ``start``, the line falls.

    Raises:
        ValueError: for steps that are no whole number of at least 1, or a factor that is
            negative or not finite.

    Example:
        >>> import pyro_vae as pv
        >>> warmup = pv.schedules.LinearWarmup(100)
        >>> warmup(0), warmup(25), warmup(100), warmup.full_at()
        (0.0, 0.25, 1.0, 100)
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check_whole("steps", self.steps, 1)
        _check_factor("start", self.start)
        _check_factor("end", self.end)

    def __call__(self, step: int) -> float:
        """Return the factor at a step, counted from 0."""
        return _line(step / self.steps, self.start, self.end)

    def full_at(self, since: int = 0) -> int:
        """Return the first step, from ``since`` on, that has the final factor."""
        return since if self.start == self.end else max(since, int(self.steps))


@dataclass(frozen=True)
class Cyclical(Schedule):
    """A warm-up again and again: each period starts anew, rises, then is level.

    Within a period the factor goes from ``start`` to ``end`` on a line, over a fraction
    ``ramp`` of it, and stays there for the rest (Fu et al. 2019). The ramp is rounded to
    whole steps, of which each period has at least one at either end.

    Args:
        period: steps in a cycle, at least 2.
        ramp: fraction of the period that the line takes.
        start: the factor at the first step of each period.
        end: the factor at the last.
        cycles: periods after which the factor stays at ``end``; None for no end of them.

    Raises:
        ValueError: for a period or cycles that are no whole number of at least 2 and 1, a
            ramp outside (0, 1], or a factor that is negative or not finite.

    Example:
        >>> import pyro_vae as pv
        >>> schedule = pv.schedules.Cyclical(period=8, cycles=2)
        >>> [schedule(step) for step in (0, 2, 4, 7, 8, 10, 12, 16)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0]
    """

    period: int
    ramp: float = 0.5
    start: float = 0.0
    end: float = 1.0
    cycles: int | None = None

    def __post_init__(self) -> None:
        _check_whole("period", self.period, 2)
        if not 0 < self.ramp <= 1:
            what = "the fraction of a period that the line takes is above 0 and at most 1"
            raise ValueError(f"ramp={self.ramp!r}: {what}")
        _check_factor("start", self.start)
        _check_factor("end", self.end)
        if self.cycles is not None:
            _check_whole("cycles", self.cycles, 1)

    @property
    def _ramp_steps(self) -> int:
        return int(min(max(round(self.ramp * self.period), 1), self.period - 1))

    def __call__(self, step: int) -> float:
        """Return the factor at a step, counted from 0."""
        if self.cycles is not None and step >= self.cycles * self.period:
            return float(self.end)
        return _line(step % self.period / self._ramp_steps, self.start, self.end)

    def full_at(self, since: int = 0) -> int:
        """Return the first step, from ``since`` on, that has the final factor."""
        over = self.cycles is not None and since >= self.cycles * self.period
        if over or self.start == self.end:
            return since
        return max(since, since - since % int(self.period) + self._ramp_steps)


def factor_at(schedule: Callable[[int], Any], step: int) -> float:
    """Return a schedule's factor at a step.

    Args:
        schedule: a Schedule, or any function from a step to a number.
        step: counted from 0.

    Raises:
        ValueError: for a factor that is negative or no finite number.
    """
    found = schedule(step)
    if not (isinstance(found, SupportsFloat) and 0 <= float(found) < math.inf):
        what = f"the schedule's factor at step {step}, counted from 0, is {found!r}"
        raise ValueError(f"{what}; a finite number of at least 0 is needed")
    return float(found)


def shortfall(schedule: Callable[[int], Any] | None, steps: int) -> str | None:
    """Return what is wrong with ending after so many steps; None for nothing.

    Args:
        schedule: of which only a :class:`Schedule` says when it is done.
        steps: taken in all.

    Returns:
        Words that begin with the last of these steps, counted from 1.
    """
    last = steps - 1
    full = schedule.full_at(last) if isinstance(schedule, Schedule) and steps > 0 else None
    if schedule is None or full is None or full == last:
        return None
    return (
        f"step {steps}, with the factor {schedule(last):g} on the latent terms; {schedule!r} comes "
        f"to {schedule(full):g} at step {full + 1}. Train longer, or shorten it"
    )


def _line(fraction: float, start: float, end: float) -> float:
    return float(end if fraction >= 1 else start + (end - start) * fraction)


def _check_whole(name: str, value: float, least: int) -> None:
    if not (least <= value < math.inf) or value != int(value):
        raise ValueError(f"{name}={value!r}: a whole number of at least {least} is needed")


def _check_factor(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        what = "a factor on the latent terms is a finite number of at least 0"
        raise ValueError(f"{name}={value!r}: {what}")
