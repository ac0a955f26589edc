"""Pareto-smoothed importance sampling by the installed ArviZ, 0.x or 1.x; arrays alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

# Weights in the smallest tail that both versions fit: ArviZ 0.x wants five, and ArviZ 1.x wants
# the lower quartile above the minimum, which in its reckoning takes six.
_SMALLEST_TAIL = 6
FEWEST_WEIGHTS = 5 * _SMALLEST_TAIL  # a fifth of so few is the tail
# An efficiency of draws for which ArviZ takes a fifth of the weights as tail, however many there
# are: it takes 3 sqrt(K / efficiency) where those are fewer.
_FIFTH = 1e-12


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Smooth importance weights by Pareto-smoothed importance sampling, ArviZ's own.

    A generalized Pareto distribution is fitted to the :math:`M = \min(K/5, 3\sqrt{K})` largest
    of the K weights, and they are replaced by its quantiles. Its shape :math:`\hat k` says
    how heavy the tail is: above 0.7 estimates made with it are not reliable.

    Where there is no tail to fit, the weights are normalized and not smoothed, and:

    - :math:`\hat k = 0` if the M largest weights are equal to rounding (as all are when the
      guide is the exact posterior): nothing is heavy, though the fit is undefined;
    - :math:`\hat k = \infty` if they differ, but the smallest quarter of them is zero or one
      and the same value, as when a handful of particles carries all the weight;
    - :math:`\hat k` is nan if K < 30, so that M < 6, and the weights are not all equal.

    Args:
        log_weights: [N, K], K log weights of each of N data, in nats, not normalized. -inf is a
            weight of zero. Pass float32 weights as they are: what counts as equal to rounding
            follows from the dtype.

    Returns:
        The smoothed log weights [N, K], float64, normalized so that logsumexp over K is zero,
        and :math:`\hat k` [N].

    Raises:
        ValueError: if the shape is not [N, K], or a row holds nan or inf or only -inf.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024). Pareto smoothed importance sampling.
        Journal of Machine Learning Research 25(72).

    Example:
        >>> import numpy as np
        >>> smoothed, pareto_k = psis(np.full((2, 100), -3.0))
        >>> pareto_k
        array([0., 0.])
        >>> np.exp(smoothed).sum(axis=1).round(12)
        array([1., 1.])
    """
    given = np.asarray(log_weights)
    if given.ndim != 2 or given.shape[1] == 0:
        raise ValueError(f"log_weights: wanted shape [N, K] with K > 0, found {list(given.shape)}")
    return _psis(given, int(_tail_size(given.shape[1])))


def tail_length(num_particles: int) -> int:
    """Return how many of K log weights, the largest ones, tell their k-hat: all of too few."""
    if _tail_size(num_particles) < _SMALLEST_TAIL:
        return num_particles
    return math.ceil(_tail_size(num_particles)) + 1  # and the largest that is not of it


def pareto_k_of_largest(largest: np.ndarray, num_particles: int) -> np.ndarray:
    """Return the k-hat, [N], of K log weights of which the largest are at hand, as of :func:`psis`.

    They are [N, tail_length(K)], in any order. ValueError for another number of them, and for what
    :func:`psis` refuses.
    """
    size = tail_length(num_particles)
    if largest.ndim != 2 or largest.shape[1] != size:
        wanted = f"[N, {size}] for K = {num_particles}"
        raise ValueError(f"largest: wanted shape {wanted}, found {list(largest.shape)}")
    if size == num_particles:
        return psis(largest)[1]
    exact = _tail_size(num_particles)
    tail = math.ceil(exact) if _is_version_0() else math.floor(exact)
    top = -np.sort(-largest, axis=1)[:, : tail + 1]
    # Of the rest only the number counts: as many stand-ins, none above the tail, as make the tail
    # a fifth of all, which is the most that ArviZ fits.
    weights = np.concatenate([top, np.repeat(top[:, -1:], 5 * tail - top.shape[1], axis=1)], axis=1)
    return _psis(weights, int(exact), efficiency=_FIFTH)[1]


def _tail_size(num_particles: int) -> float:
    return float(min(num_particles / 5, 3 * num_particles**0.5))


def _psis(
    given: np.ndarray, tail_size: int, efficiency: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Smooth log weights [N, K]; the efficiency is that of the draws, as ArviZ takes it."""
    weights = given.astype(np.float64)
    _refuse_rows(np.isnan(weights).any(axis=1), "nan")
    _refuse_rows(np.isposinf(weights).any(axis=1), "inf")
    _refuse_rows(np.isneginf(weights).all(axis=1), "only -inf: every weight is zero")
    smoothed = weights - np.logaddexp.reduce(weights, axis=1, keepdims=True)
    if tail_size < _SMALLEST_TAIL:
        flat = _top_is_flat(weights, weights.shape[1], given.dtype)
        return smoothed, np.where(flat, 0.0, np.nan)
    flat = _top_is_flat(weights, tail_size, given.dtype)
    pareto_k = np.where(flat, 0.0, np.inf)
    fit = ~flat & _tail_can_be_fitted(weights, tail_size)
    if fit.any():
        # Overflow inside a fit is how ArviZ finds that there is none; the outcome is looked at
        # here, so nothing is hidden.
        with np.errstate(all="ignore"):
            tried, shape = _arviz_psislw(weights[fit], efficiency)
        succeeded = np.isfinite(shape) & ~np.isnan(tried).any(axis=1)
        rows = np.flatnonzero(fit)[succeeded]
        smoothed[rows], pareto_k[rows] = tried[succeeded], shape[succeeded]
    return smoothed, pareto_k


def _arviz_psislw(log_weights: np.ndarray, efficiency: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the smoothed log weights [N, K] and k-hat [N] of the installed ArviZ."""
    if _is_version_0():
        import arviz as az

        smoothed, pareto_k = az.psislw(log_weights, reff=efficiency)
    else:
        from arviz_stats.base import array_stats

        # Written for leave-one-out weights, 1/p(x|z), it takes log p(x|z), and turns the sign.
        smoothed, pareto_k = array_stats.psislw(-log_weights, r_eff=efficiency, axis=-1)
    return smoothed, pareto_k


def _is_version_0() -> bool:
    """Return whether ArviZ is 0.x, which has psislw of its own and rounds a tail's length up."""
    import arviz as az

    return hasattr(az, "psislw")


def _top_is_flat(weights: np.ndarray, size: int, dtype: np.dtype) -> np.ndarray:
    """Return for each row whether its `size` largest log weights are equal to rounding."""
    top = np.partition(weights, -size, axis=1)[:, -size:]
    largest = top.max(axis=1)
    # A log weight is a sum of many terms: its rounding error is some tens of units in the last
    # place. In float64 anything below 1e-8 is as good as equal.
    eps = float(np.finfo(dtype).eps) if np.issubdtype(dtype, np.floating) else 0.0
    return np.ptp(top, axis=1) <= max(1e-8, 64 * eps) * np.maximum(1.0, np.abs(largest))


def _tail_can_be_fitted(weights: np.ndarray, size: int) -> np.ndarray:
    """Return for each row whether the lower quartile of its tail is above the least of the tail.

    ArviZ 1.x finds no fit where it is not; ArviZ 0.x fits the weights that are left, be they
    five of hundreds. The same k-hat under both is better.
    """
    relative = np.sort(np.exp(weights - weights.max(axis=1, keepdims=True)), axis=1)
    tail = relative[:, -size:]
    quartile = tail[:, int(size / 4 + 0.5) - 1]
    return np.asarray(quartile - tail[:, 0] > np.finfo(np.float64).tiny)


def _refuse_rows(bad: ArrayLike, what: str) -> None:
    rows = np.flatnonzero(bad)
    if rows.size:
        shown = ", ".join(map(str, rows[:10])) + (", ..." if rows.size > 10 else "")
        raise ValueError(
            f"log_weights: {rows.size} of {np.size(bad)} rows hold {what}: rows {shown}"
        )
