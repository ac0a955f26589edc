"""Are ranks uniform? An exact test by their ECDF, with simultaneous bands, and chi-squared.

NumPy alone, but for one tail of chi-squared: no model, no guide.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ranks = NDArray[np.int64]
Flags = NDArray[np.bool_]

_MOST_POINTS = 100  # at which the ECDF is looked at
_MOST_BINS, _FEWEST_IN_BIN = 20, 5.0
_BISECTIONS = 40  # of the logarithm of a level


class UniformRanks:
    r"""What :math:`N` ranks are like that are uniform on 0, ..., L, and how far others are from it.

    The statistic is the smallest of the two-sided tail probabilities of the counts
    :math:`X_i = \#\{r < i\} \sim \mathrm{Binomial}(N, i / (L + 1))`, the local level. Its
    distribution is exact, by a recursion over i: given their sum, the increments of the counts are
    those of independent Poisson numbers (Moscovich & Nadler 2017).

    Args:
        num_ranks: N.
        num_draws: L.

    Attributes:
        points: the numbers i, at most 100 of 1, ..., L.

    References:
        Säilynoja, Bürkner & Vehtari (2022). Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison. Statistics and
        Computing 32, section 2.
        Moscovich & Nadler (2017). Fast calculation of boundary crossing probabilities for Poisson
        processes. Statistics & Probability Letters 123.
    """

    def __init__(self, num_ranks: int, num_draws: int) -> None:
        self.num_ranks, self.num_draws = num_ranks, num_draws
        wanted = np.linspace(1, num_draws, min(num_draws, _MOST_POINTS))
        self.points: Ranks = np.unique(np.round(wanted).astype(np.int64))
        numbers = np.arange(1, num_ranks + 1)
        self._log_factorial = np.concatenate([[0.0], np.cumsum(np.log(numbers))])
        self._levels = np.stack([self._local_levels(share) for share in self.shares])
        self._outside = functools.lru_cache(self._probability_outside)

    @property
    def shares(self) -> Array:
        """The expected share of ranks below each point."""
        shares: Array = self.points / (self.num_draws + 1)
        return shares

    def _local_levels(self, share: float) -> Array:
        """Return the two-sided tail probability of each count from 0 to N below a point."""
        count = np.arange(self.num_ranks + 1)
        log_choose = self._log_factorial[-1] - self._log_factorial - self._log_factorial[::-1]
        log_p = log_choose + count * np.log(share) + count[::-1] * np.log1p(-share)
        probability = np.exp(log_p)
        below, above = np.cumsum(probability), np.cumsum(probability[::-1])[::-1]
        return np.minimum(1.0, 2 * np.minimum(below, above))

    def counts(self, ranks: Ranks) -> Ranks:
        """Return how many of some ranks lie below each point."""
        cumulated = np.cumsum(np.bincount(ranks, minlength=self.num_draws + 1))
        found: Ranks = cumulated[self.points - 1]
        return found

    def p_value(self, ranks: Ranks) -> float:
        """Return the probability of ranks whose ECDF leaves as narrow a band."""
        level = self._levels[np.arange(len(self.points)), self.counts(ranks)].min()
        # Equal levels, at i and L + 1 - i, differ by rounding. Far out, where the exact number
        # drowns in rounding, Bonferroni's bound is as good.
        return float(min(self._outside(level * (1 + 1e-9)) + 1e-14, len(self.points) * level, 1.0))

    def band(self, error_rate: float) -> tuple[Ranks, Ranks]:
        """Return the smallest and the largest counts at each point that are inside.

        All of them are, with a probability of at least 1 - error_rate.
        """
        low, high = np.log(error_rate / len(self.points)) - 1.0, 0.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            inside = self._outside(float(np.exp(middle))) <= error_rate
            low, high = (middle, high) if inside else (low, middle)
        return self._inside(float(np.exp(low)))

    def _inside(self, level: float) -> tuple[Ranks, Ranks]:
        """Return the ends of the counts whose local level is above a level, at each point."""
        inside = self._levels > level
        return inside.argmax(1), self.num_ranks - inside[:, ::-1].argmax(1)

    def _probability_outside(self, level: float) -> float:
        """Return the probability that a local level at any point is not above a level."""
        if not (self._levels > level).any(1).all():
            return 1.0
        first, last = 0, np.ones(1)  # the smallest count inside, and the probability of each
        lower, upper = self._inside(level)
        rates = self.num_ranks * np.diff(np.concatenate([[0.0], self.shares, [1.0]]))
        lower, upper = np.append(lower, self.num_ranks), np.append(upper, self.num_ranks)
        for rate, low, high in zip(rates, lower, upper, strict=True):
            steps = np.arange(high - first + 1)
            jump = np.exp(steps * np.log(rate) - rate - self._log_factorial[steps])
            last = np.convolve(last, jump)[max(low - first, 0) : high - first + 1]
            first = max(int(low), first)
        total = self.num_ranks
        of_total = np.exp(total * np.log(total) - total - self._log_factorial[-1])
        return float(max(0.0, 1.0 - last[0] / of_total))

    def chi_squared_p_value(self, ranks: Ranks) -> float:
        """Return Pearson's, of at most 20 bins with five ranks expected in each or more."""
        bins = int(min(_MOST_BINS, self.num_draws + 1, self.num_ranks / _FEWEST_IN_BIN))
        if bins < 2:
            return float("nan")
        parts = np.array_split(np.bincount(ranks, minlength=self.num_draws + 1), bins)
        expected = self.num_ranks * np.array([len(part) for part in parts]) / (self.num_draws + 1)
        statistic = (np.square([part.sum() for part in parts] - expected) / expected).sum()
        halves = torch.tensor([(bins - 1) / 2, statistic / 2], dtype=torch.float64)
        return float(torch.special.gammaincc(halves[0], halves[1]))


def holm(p_values: Array) -> Array:
    """Return p-values of a family of tests such that the least is below α with probability α.

    At most that, whatever their dependence (Holm 1979). nan where a test said nothing.
    """
    found = np.full(len(p_values), np.nan)
    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    found[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return found
