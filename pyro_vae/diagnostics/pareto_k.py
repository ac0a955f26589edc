"""Pareto k-hat of importance weights per datum, and the weights that its fit smooths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_vae.diagnostics.psis import psis
from pyro_vae.diagnostics.verdict import Weights
from pyro_vae.particles.estimators import LogWeights


def pareto_k(log_weights: LogWeights | Tensor) -> Tensor:
    """Return the Pareto k-hat of each datum's importance weights (Vehtari et al. 2024).

    Above 0.7 the tail of the weights is so heavy that importance sampling through the guide,
    standard errors included, is not to be trusted, where that tail carries weight: of nearly equal
    weights k-hat is the shape of a tail that does not matter, so look at the effective sample size
    too. ArviZ's PSIS fits it, to each datum alone: a k-hat of weights summed over data grows with
    their number.

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


@dataclass(frozen=True, slots=True)
class SmoothedWeights:
    """Pareto-smoothed importance weights.

    Attributes:
        weights: [N, K], which sum to one; nan where every weight is zero.
        raw: k-hat, effective sample size and tail of the weights before smoothing.
    """

    weights: np.ndarray
    raw: Weights

    @classmethod
    def of(cls, log_weights: np.ndarray) -> SmoothedWeights:
        """Smooth log weights [N, K], in nats, not normalized."""
        some = ~np.isneginf(log_weights).all(axis=1)
        weights = np.full(log_weights.shape, np.nan)
        pareto_k = np.full(len(log_weights), np.inf)
        smoothed, pareto_k[some] = psis(log_weights[some])
        found = np.exp(smoothed - smoothed.max(1, keepdims=True))
        weights[some] = found / found.sum(1, keepdims=True)
        return cls(weights, Weights.of(log_weights, pareto_k))

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
