"""Are draws those of a posterior? Means and widths beside those of chains, along the worst axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_vae.diagnostics.convergence import ess_of_mean

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """Along each direction of a datum's latents: a mean and a width beside the posterior's.

    Attributes:
        direction: unit vectors in posterior standard deviations, [M, D].
        shift: mean less that of the posterior, in posterior standard deviations, [M].
        shift_se: its standard error, [M].
        width: standard deviation, in those of the posterior, [M].
        width_se: its standard error, [M].
    """

    direction: Array
    shift: Array
    shift_se: Array
    width: Array
    width_se: Array

    @classmethod
    def of(cls, draws: Array, chains: Array) -> Moments:
        r"""Return the moments of draws [S, D] beside those of chains [C, S', D].

        The directions are the D axes, and three in which most is wrong:

        .. math:: \max_v, \min_v \frac{v^T \Sigma_q v}{v^T \Sigma_p v}, \quad
            v = \Sigma_p^{-1} (m_q - m_p)

        found from the first half of all draws, and measured by the second, so that the choice does
        not bias them. :math:`\Sigma_p` is drawn towards its diagonal where draws are few.
        """
        scale = chains.std((0, 1))
        centre = chains.mean((0, 1))
        draws, chains = (draws - centre) / scale, (chains - centre) / scale
        half, middle = len(draws) // 2, chains.shape[1] // 2
        found = _worst(draws[:half], chains[:, :middle])
        axes = np.eye(draws.shape[1])
        parts = [
            (axes, *_measured(draws, chains)),
            (found, *_measured(draws[half:] @ found.T, chains[:, middle:] @ found.T)),
        ]
        return cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _worst(draws: Array, chains: Array) -> Array:
    """Return the directions, [3, D], along which draws are narrowest, widest and furthest off."""
    size = draws.shape[1]
    flat = chains.reshape(-1, size)
    ess = ess_of_mean(chains).min()
    covariances = []
    for some, count in ((draws, len(draws)), (flat, min(ess, len(flat)))):
        found = np.atleast_2d(np.cov(some, rowvar=False))
        share = size / (size + count)
        covariances.append((1 - share) * found + share * np.diag(np.diag(found)))
    root = np.linalg.cholesky(covariances[1])
    half = np.linalg.solve(root, covariances[0])
    _, vectors = np.linalg.eigh(np.linalg.solve(root, half.T))
    apart = np.linalg.solve(root, draws.mean(0) - flat.mean(0))
    chosen = np.stack([vectors[:, 0], vectors[:, -1], apart], 1)
    directions: Array = np.linalg.solve(root.T, chosen).T
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _measured(draws: Array, chains: Array) -> tuple[Array, Array, Array, Array]:
    """Return what :class:`Moments` has, of draws [S, M] and chains [C, S', M]."""
    flat = chains.reshape(-1, chains.shape[-1])
    centre, scale = flat.mean(0), flat.std(0)
    mine = draws.std(0)
    width = mine / scale
    ess = ess_of_mean(chains)
    ess_of_squares = ess_of_mean(np.square(chains - centre))
    shift = (draws.mean(0) - centre) / scale
    shift_se = np.sqrt(np.square(width) / len(draws) + 1 / ess)

    def spread(deviations: Array) -> Array:
        """Return by how much the standard deviation of one draw of each varies, of one."""
        kurtosis = (deviations**4).mean(0) / np.square((deviations**2).mean(0))
        return np.asarray(np.sqrt(np.maximum(kurtosis - 1, 0)) / 2)

    error = spread(draws - draws.mean(0)) / math.sqrt(len(draws))
    width_se = width * np.hypot(error, spread(flat - centre) / np.sqrt(ess_of_squares))
    return shift, shift_se, width, width_se
