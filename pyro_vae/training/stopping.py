"""When training should stop: a validation ELBO that no longer rises."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pyro_vae.programs.messages import as_number


@dataclass
class Plateau:
    r"""How many epochs a smoothed validation ELBO has not risen.

    .. math:: s_t = \frac{\sum_{i \le t} a^{t - i} v_i}{\sum_{i \le t} a^{t - i}}

    for values v and the smoothing a. An epoch counts as a rise where s is more than ``min_delta``
    above the last one that did.

    Args:
        min_delta: nats per datum, at least 0.
        smoothing: the weight of earlier epochs, in [0, 1); 0 for the values themselves.

    Attributes:
        stalled: epochs since the last rise.

    Raises:
        ValueError: for a number outside of its range.

    Example:
        >>> plateau = Plateau(min_delta=0.1)
        >>> for value in (-3.0, -2.0, -1.95, -1.95):
        ...     plateau.add(value)
        >>> plateau.stalled
        2
    """

    min_delta: float = 0.0
    smoothing: float = 0.0
    stalled: int = field(default=0, init=False)
    _reached: float = field(default=-math.inf, init=False)
    _sum: float = field(default=0.0, init=False)
    _weight: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not 0 <= as_number("min_delta", self.min_delta) < math.inf:
            what = "nats per datum that a rise is at least, a finite number of at least 0"
            raise ValueError(f"min_delta={self.min_delta!r}: {what}")
        if not 0 <= as_number("smoothing", self.smoothing) < 1:
            what = "the weight of earlier epochs is at least 0 and below 1"
            raise ValueError(f"smoothing={self.smoothing!r}: {what}")

    def add(self, elbo: float) -> None:
        """Take up the validation ELBO of the next epoch."""
        self._sum = self.smoothing * self._sum + elbo
        self._weight = self.smoothing * self._weight + 1.0
        smoothed = self._sum / self._weight
        rises = smoothed > self._reached + self.min_delta
        self._reached = smoothed if rises else self._reached
        self.stalled = 0 if rises else self.stalled + 1
