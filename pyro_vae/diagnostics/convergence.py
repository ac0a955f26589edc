"""Have chains converged? R-hat and effective sample sizes of many quantities at once.

The definitions are ArviZ's (Vehtari et al. 2021), which computes them one quantity after the other;
chains of a thousand data have tens of thousands.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

_AT_ONCE = 2**21  # numbers whose Fourier transforms are held at once
_TAILS = (0.05, 0.95)


class Convergence(NamedTuple):
    """R-hat and effective sample sizes of quantities.

    Attributes:
        rhat: rank-normalized split R-hat, [M]; infinite where every chain stands still.
        ess_bulk: effective number of draws for the centre, [M].
        ess_tail: the smaller one of those for the 5% and 95% quantiles, [M].

    All are nan where a quantity is the same in all draws or somewhere not finite.
    """

    rhat: Array
    ess_bulk: Array
    ess_tail: Array

    @classmethod
    def of(cls, draws: Array) -> Convergence:
        """Return the diagnostics of chains.

        Args:
            draws: [C, S, M]: chains, draws, quantities; at least 4 draws.

        References:
            Vehtari, Gelman, Simpson, Carpenter & Burkner (2021). Rank-normalization, folding, and
            localization: an improved R-hat for assessing convergence of MCMC. Bayesian Analysis.
        """
        num_chains, num_draws, num_quantities = draws.shape
        width = max(1, _AT_ONCE // (num_chains * num_draws))
        columns = range(0, num_quantities, width)
        parts = [_of_columns(draws[..., start : start + width]) for start in columns]
        return cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def split_rhat(draws: Array) -> Array:
    """Return the R-hat of the halves of chains [C, S, M], [M]; nan where a quantity stands still.

    Of the numbers themselves, as in Gelman et al. (2013), Bayesian Data Analysis, section 11.4.
    """
    return _rhat(_split(draws))


def ess_of_mean(draws: Array) -> Array:
    """Return for how many independent draws chains [C, S, M] count in their means, [M]."""
    return _ess(_split(draws))


def _of_columns(draws: Array) -> Convergence:
    draws = np.asarray(draws, dtype=np.float64)
    usable = np.isfinite(draws).all((0, 1)) & (np.ptp(draws, axis=(0, 1)) > 0)
    safe = np.where(usable, draws, np.arange(draws.shape[1])[:, np.newaxis])
    halves = _split(safe)
    ranks = _normal_scores(halves)
    folded = _normal_scores(np.abs(halves - np.median(halves, (0, 1))))
    tails = [_ess(_split(safe <= np.quantile(safe, level, (0, 1)))) for level in _TAILS]
    # Folded draws of two values are all alike: they say nothing, and their R-hat is nan.
    found = np.fmax(_rhat(ranks), _rhat(folded)), _ess(ranks), np.minimum(*tails)
    return Convergence(*(np.where(usable, numbers, np.nan) for numbers in found))


def _split(draws: NDArray[np.float64] | NDArray[np.bool_]) -> Array:
    """Return the first and the second half of each chain as chains of their own."""
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, -half:]]).astype(np.float64)


def _normal_scores(draws: Array) -> Array:
    """Return normal quantiles of the ranks among all draws of a quantity."""
    flat = draws.reshape(-1, draws.shape[-1])
    columns = torch.as_tensor(flat.T.copy())
    ordered = columns.sort(-1).values
    # Equal draws share the mean of their ranks.
    below = torch.searchsorted(ordered, columns)
    ranks = (below + torch.searchsorted(ordered, columns, right=True) + 1) / 2
    scores = torch.special.ndtri((ranks.double() - 0.375) / (flat.shape[0] + 0.25))
    return scores.numpy().T.reshape(draws.shape)


def _rhat(draws: Array) -> Array:
    """Return the square root of the ratio of the variance of all draws to that within chains."""
    count = draws.shape[1]
    between = count * draws.mean(1).var(0, ddof=1)
    within = draws.var(1, ddof=1).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Array = np.sqrt((between / within + count - 1) / count)
    return ratio


def _ess(draws: Array) -> Array:
    """Return the effective sample size by Geyer's initial monotone sequence, [M]."""
    num_chains, count, _ = draws.shape
    covariance = _autocovariance(draws).mean(0)
    within = covariance[0] * count / (count - 1)
    total = covariance[0] + draws.mean(1).var(0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = 1 - (within - covariance) / total
    correlation[0] = 1
    num_pairs = max(1, (count - 1) // 2)
    even, odd = correlation[: 2 * num_pairs : 2], correlation[1 : 2 * num_pairs : 2]
    pairs = even + odd
    # The first pair that is not positive, or the last one; of it only the even lag counts.
    ended = pairs <= 0
    ended[0], ended[-1] = num_pairs == 1, True
    last = ended.argmax(0)
    before = np.arange(num_pairs)[:, np.newaxis] < last
    tail = np.where(pairs >= 0, even, np.maximum(even, 0))
    tail = np.take_along_axis(tail, last[np.newaxis], 0)[0]
    time = -1 + 2 * (np.minimum.accumulate(pairs) * before).sum(0) + tail
    size = num_chains * count
    ess: Array = size / np.maximum(time, 1 / np.log10(size))
    return np.where(np.ptp(draws, axis=(0, 1)) > 0, ess, size)


def _autocovariance(draws: Array) -> Array:
    """Return the autocovariance of each chain at each lag, [C, S, M]."""
    count = draws.shape[1]
    centred = draws - draws.mean(1, keepdims=True)
    transformed = np.fft.rfft(centred, 2 * count, axis=1)
    power = (transformed * transformed.conj()).real
    covariance: Array = np.fft.irfft(power, 2 * count, axis=1)[:, :count] / count
    return covariance
