r"""Conformal p-values: how strange are scores beside those of data known to be ordinary?

.. math:: p = \frac{1 + \#\{i : s_i \ge s\}}{1 + n}

Where the n calibration data and a new one are exchangeable, :math:`P(p \le \alpha) \le \alpha`, for
any score and any n: no distribution is assumed (Vovk, Gammerman & Shafer 2005).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Conformal:
    """P-values of N data by S scores.

    Attributes:
        of_score: [N, S].
        combined: of all scores together, [N].
    """

    of_score: Array
    combined: Array

    @classmethod
    def of(cls, calibration: Array, new: Array, two_sided: NDArray[np.bool_]) -> Conformal:
        r"""Return the p-values of new scores [N, S] beside those of calibration data [n, S].

        A two-sided p-value is twice the smaller one-sided, at most 1. The combined one ranks
        Fisher's :math:`-\sum_s \log p_s` of the new datum among the n + 1 of all, each with its
        p-values in the same set of n + 1 data: it is conformal itself, however the scores depend
        on one another.

        Args:
            calibration: larger is stranger; infinite ones may be, nan not.
            new: likewise.
            two_sided: [S], whether small ones are as strange as large ones.
        """
        n, scores = calibration.shape
        ordered = np.sort(calibration, 0)
        # Of each calibration datum among the others and itself; a new one adds itself to these.
        least = _columns(ordered, calibration, "left")  # how many are less
        most = n - _columns(ordered, calibration, "right")  # how many are more
        of_score, combined = np.empty((len(new), scores)), np.empty(len(new))
        below, above = _columns(ordered, new, "right"), n - _columns(ordered, new, "left")
        for number, datum in enumerate(new):
            mine = _p_values(above[number] + 1, below[number] + 1, n, two_sided)
            equal_or_more = n - least + (datum >= calibration)
            equal_or_less = n - most + (datum <= calibration)
            theirs = _p_values(equal_or_more, equal_or_less, n, two_sided)
            of_score[number] = mine
            fisher, of_new = -np.log(theirs).sum(1), -np.log(mine).sum()
            # Sums of the same numbers in another order differ by rounding.
            combined[number] = (1 + (fisher >= of_new - 1e-9).sum()) / (n + 1)
        return cls(of_score, combined)


def benjamini_hochberg(p_values: Array) -> Array:
    """Return p-values adjusted by Benjamini & Hochberg (1995), [N].

    Of the data with an adjusted one up to q at most the share q is there by chance, on average:
    conformal p-values depend on one another in the way that this allows (Bates et al. 2023).
    """
    order = np.argsort(p_values)
    ratio = p_values[order] * len(p_values) / np.arange(1, len(p_values) + 1)
    found = np.empty_like(ratio)
    found[order] = np.minimum(1.0, np.minimum.accumulate(ratio[::-1])[::-1])
    return found


def chance_of_as_many(count: int, size: int, calibration: int, level: float) -> float:
    r"""Return with which probability so many of ordinary data have a p-value of at most a level.

    All are ranked among the same n calibration data, so they are more often called together than
    independent ones: of N data the number is beta-binomial, with
    :math:`k = \lfloor \alpha (n + 1) \rfloor` and n + 1 - k (Bates et al. 2023); of p-values that
    combine scores about so.

    Args:
        count: how many were called.
        size: of how many, N.
        calibration: n.
        level: alpha.
    """
    k = math.floor(level * (calibration + 1) * (1 + 1e-12))  # of a product that is whole
    if count <= 0 or k > calibration:
        return 1.0
    if k == 0:
        return 0.0

    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    rest = calibration + 1 - k
    logs = (
        log_beta(m + k, size - m + rest)
        - log_beta(k, rest)
        - math.log(size + 1)
        - log_beta(m + 1, size - m + 1)
        for m in range(count, size + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def _columns(ordered: Array, values: Array, side: str) -> NDArray[np.int64]:
    pairs = zip(ordered.T, values.T, strict=True)
    return np.stack([np.searchsorted(one, v, side) for one, v in pairs], 1)  # type: ignore[call-overload]


def _p_values(
    equal_or_more: NDArray[np.int64],
    equal_or_less: NDArray[np.int64],
    n: int,
    two_sided: NDArray[np.bool_],
) -> Array:
    more, less = equal_or_more / (n + 1), equal_or_less / (n + 1)
    return np.where(two_sided, np.minimum(1.0, 2 * np.minimum(more, less)), more)
