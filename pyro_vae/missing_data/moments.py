"""Mean and spread of weighted draws that come in pieces, with the mean's standard error."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyro_vae.particles.estimators import calibrated, skewness_of

__all__ = ["WeightedMoments"]

# Powers of the weights and of the values whose products make mean, sd, error and skewness.
_DEGREES = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3))


class WeightedMoments:
    r"""Weighted mean and sd of draws for each datum, and the Monte Carlo error of the mean.

    .. math:: \bar x = \sum_k \bar w_k x_k, \quad
        \mathrm{se}^2 = \sum_k \bar w_k^2 (x_k - \bar x)^2

    with weights that sum to one; calibrated (see
    :func:`pyro_vae.particles.estimators.calibrated`) by the third moment.

    Args:
        weights: [N, K], which sum to one.
    """

    def __init__(self, weights: np.ndarray) -> None:
        self._weights = weights
        self._seen = 0
        self._first = torch.zeros(())
        self._sums: list[Tensor] = [torch.zeros(())] * len(_DEGREES)

    def update(self, draws: Tensor) -> None:
        """Take in the draws of the next particles, [k, N, ...]."""
        x = draws.double().cpu()
        if not self._seen:
            self._first = x[0]
        # Of differences to the first draw: no cancellation.
        x = x - self._first
        w = torch.as_tensor(self._weights[:, self._seen : self._seen + len(x)].T)
        terms = [torch.einsum("kn,kn...->n...", w**power, x**degree) for power, degree in _DEGREES]
        self._sums = [total + term for total, term in zip(self._sums, terms, strict=True)]
        self._seen += len(x)

    def results(self) -> dict[str, np.ndarray]:
        """Return ``mean``, its standard error ``mean_se``, and ``sd``, [N, ...] each."""
        wx, wxx, vx, vxx, ux, uxx, uxxx = self._sums
        num_particles = self._weights.shape[1]
        v, u = (
            torch.as_tensor((self._weights**power).sum(1)).reshape(-1, *[1] * (wx.ndim - 1))
            for power in (2, 3)
        )
        variance = (vxx - 2 * wx * vx + wx**2 * v).clamp(min=0)
        third = uxxx - 3 * wx * uxx + 3 * wx**2 * ux - wx**3 * u
        # Each particle moves the mean by K w (x - mean).
        skewed = skewness_of(num_particles * variance, num_particles**2 * third)
        error = calibrated(variance.sqrt(), skewed, num_particles)
        moments = {
            "mean": wx + self._first,
            # Of about one particle there is no spread to tell from.
            "mean_se": torch.where(v < 0.9, error, math.nan),
            "sd": (wxx - wx**2).clamp(min=0).sqrt(),
        }
        return {name: value.numpy() for name, value in moments.items()}
