"""Pareto-smoothed importance weights, and draws by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyro_vae.diagnostics.psis import psis

__all__ = ["SmoothedWeights"]


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
        if some.any():
            smoothed, pareto_k[some] = psis(log_weights[some])
            found = np.exp(smoothed - smoothed.max(1, keepdims=True))
            weights[some] = found / found.sum(1, keepdims=True)
        return cls(weights, pareto_k, 1 / (weights**2).sum(1))

    def draw(self, num_draws: int, key: Sequence[int]) -> np.ndarray:
        """Choose particles by their weights, with replacement: their numbers, [S, N].

        Args:
            num_draws: S.
            key: the seed of the choice.

        Raises:
            ValueError: for data of which every weight is zero.
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
