"""Pareto k-hat of importance weights per datum, and which weights it says not to trust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_vae.diagnostics.psis import psis
from pyro_vae.particles.estimators import LogWeights

Numbers = TypeVar("Numbers", Tensor, np.ndarray)

# Vehtari et al. (2024): above it importance sampling is not to be trusted, its errors included.
PARETO_K_THRESHOLD = 0.7
# A share of effective particles above which a heavy tail does no harm: weights that all but agree.
NEARLY_EQUAL = 0.9


def heavy_tailed(pareto_k: Numbers, ess: Numbers, num_particles: int) -> Numbers:
    """Return for which data importance weights are not to be trusted, errors included.

    By k-hat and effective sample size of K particles, [N] each: those with k-hat above 0.7, but for
    weights that all but agree, of which k-hat is the shape of a tail too light to matter.
    """
    return (pareto_k > PARETO_K_THRESHOLD) & ~(ess > NEARLY_EQUAL * num_particles)


def doubts(pareto_k: np.ndarray, ess: np.ndarray, num_particles: int) -> str:
    """Return for how many data weights are not to be trusted, in words; "" for none.

    By k-hat and effective sample size of K particles, [N], or numbers of a batch that is one datum.
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


def pareto_k(log_weights: LogWeights | Tensor) -> Tensor:
    """Return the Pareto k-hat of each datum's importance weights (Vehtari et al. 2024).

    Above 0.7 the guide misses so much of the posterior that importance sampling
    through it, standard errors included, is not to be trusted. ArviZ's PSIS fits it,
    to each datum alone: a k-hat of weights summed over data grows with their number.

    Args:
        log_weights: LogWeights, or a tensor [K, N] of log weights in nats.

    Returns:
        [N], float64; 0 where the weights are constant to rounding, nan where K is too
        small to fit a tail.

    Raises:
        ValueError: for weights that are not [K, N], or hold nan or +inf.

    Example:
        >>> import torch
        >>> pareto_k(torch.zeros(100, 2)).tolist()
        [0.0, 0.0]
    """
    total = log_weights.total if isinstance(log_weights, LogWeights) else log_weights
    if total.ndim != 2:
        raise ValueError(f"log weights of shape [K, N] are needed, found {tuple(total.shape)}")
    _, k_hat = psis(total.T.detach().cpu().numpy())
    return torch.as_tensor(k_hat, dtype=torch.float64)


@dataclass(frozen=True)
class SmoothedWeights:
    """Pareto-smoothed importance weights, and how far they are to be trusted.

    Attributes:
        weights: [N, K], which sum to one; nan where every weight is zero.
        pareto_k: [N]; infinite where every weight is zero.
        ess: effective sample size, [N].
    """

    weights: np.ndarray
    pareto_k: np.ndarray
    ess: np.ndarray

    @classmethod
    def of(cls, log_weights: np.ndarray) -> SmoothedWeights:
        """Smooth log weights [N, K], in nats, not normalized."""
        some = ~np.isneginf(log_weights).all(axis=1)
        weights = np.full(log_weights.shape, np.nan)
        pareto_k = np.full(len(log_weights), np.inf)
        smoothed, pareto_k[some] = psis(log_weights[some])
        found = np.exp(smoothed - smoothed.max(1, keepdims=True))
        weights[some] = found / found.sum(1, keepdims=True)
        return cls(weights, pareto_k, 1 / (weights**2).sum(1))

    def draw(self, num_draws: int, key: Sequence[int]) -> np.ndarray:
        """Choose particles by their weights, with replacement: their numbers, [S, N].

        The key is the seed of the choice. ValueError for data of which every weight is zero.
        """
        zero = np.flatnonzero(np.isnan(self.weights).any(axis=1))
        if zero.size:
            raise ValueError(
                f"every importance weight is zero for {zero.size} of {len(self.weights)} data: "
                f"{zero[:5].tolist()}; the guide proposes nothing that the model allows there"
            )
        generator = np.random.default_rng(key)
        num_particles = self.weights.shape[1]
        index = [generator.choice(num_particles, size=num_draws, p=row) for row in self.weights]
        return np.stack(index, axis=1)
