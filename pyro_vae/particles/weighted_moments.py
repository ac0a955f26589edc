"""Weighted means and standard deviations of draws, datum by datum, with the error of the mean."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyro_vae.particles.estimators import calibrated, skewness_of

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
        self._weights, self._seen = weights, 0
        self._first = torch.zeros(())
        self._sums = [torch.zeros(())] * len(_DEGREES)
        self._within = torch.zeros(())

    def update(self, draws: Tensor, within: Tensor | None = None) -> None:
        """Take in the draws of the next particles, [k, N, ...].

        Args:
            draws: numbers, or their means given what each particle drew before.
            within: of means, the variances of the numbers about these: they count in ``sd``.
        """
        x = draws.double().cpu()
        self._first = self._first if self._seen else x[0]
        x = x - self._first  # no cancellation
        w = torch.as_tensor(self._weights[:, self._seen : self._seen + len(x)].T)
        terms = [torch.einsum("kn,kn...->n...", w**power, x**degree) for power, degree in _DEGREES]
        self._sums = [total + term for total, term in zip(self._sums, terms, strict=True)]
        if within is not None:
            self._within = self._within + torch.einsum("kn,kn...->n...", w, within.double().cpu())
        self._seen += len(x)

    def results(self) -> dict[str, np.ndarray]:
        """Return ``mean``, its standard error ``mean_se``, and ``sd``, [N, ...] each.

        NaN are ``mean_se`` where one particle has nearly all weight, and ``sd`` of one particle.
        """
        wx, wxx, vx, vxx, ux, uxx, uxxx = self._sums
        num_particles, inner = self._weights.shape[1], [1] * (wx.ndim - 1)
        powers = (torch.as_tensor((self._weights**power).sum(1)) for power in (2, 3))
        v, u = (total.reshape(-1, *inner) for total in powers)
        variance = (vxx - 2 * wx * vx + wx**2 * v).clamp(min=0)
        third = uxxx - 3 * wx * uxx + 3 * wx**2 * ux - wx**3 * u
        # Each particle moves the mean by K w (x - mean).
        skewed = skewness_of(num_particles * variance, num_particles**2 * third)
        error = calibrated(variance.sqrt(), skewed, num_particles)
        # Of about one particle there is no spread to tell from.
        error = torch.where(v < 0.9, error, math.nan)
        sd = ((wxx - wx**2).clamp(min=0) + self._within).sqrt()
        sd = sd if num_particles > 1 else torch.full_like(sd, math.nan)
        return {"mean": (wx + self._first).numpy(), "mean_se": error.numpy(), "sd": sd.numpy()}
