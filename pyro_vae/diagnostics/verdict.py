"""Is a posterior made of importance weights to be trusted? Good or bad, datum by datum.

k-hat alone says bad of the best guides: where weights are nearly equal, the excesses of the largest
ones over the others are tiny, and of any shape. So a heavy tail counts where it carries weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_vae.diagnostics.pareto_k import NEARLY_EQUAL, PARETO_K_THRESHOLD
from pyro_vae.diagnostics.psis import psis, tail_length

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Effective draws that put a posterior mean within 0.2 posterior standard deviations of the truth
# but for four standard errors.
FEWEST_EFFECTIVE = 400
# The share of effective draws that a mean of few weights takes.
_EFFECTIVE_SHARE = 0.1
# The weight of the tail in units of that of as many average draws, up to which it does no harm.
_LIGHT_TAIL = 2.0


def pareto_k_threshold(num_particles: int) -> float:
    r"""Return the k-hat above which K weights are too few: :math:`\min(1 - 1/\log_{10} K, 0.7)`.

    Vehtari et al. (2024), section 3.2.4.
    """
    if num_particles < 2:
        return -math.inf
    return min(1 - 1 / math.log10(num_particles), PARETO_K_THRESHOLD)


@dataclass(frozen=True, slots=True)
class Weights:
    """What importance weights of each datum look like.

    Attributes:
        num_particles: K.
        pareto_k: [N]; infinite where every weight is zero, nan where K is too small.
        ess: effective sample size, [N].
        tail_share: the share of the sum that the largest weights carry, those that k-hat is fitted
            to, in units of what as many average ones would, [N].
    """

    num_particles: int
    pareto_k: Array
    ess: Array
    tail_share: Array

    @classmethod
    def of(cls, log_weights: Array, k_hat: Array | None = None) -> Weights:
        """Return what log weights [N, K], in nats, look like.

        Args:
            log_weights: not normalized.
            k_hat: their k-hat, [N], where it is known.
        """
        num_data, num_particles = log_weights.shape
        some = ~np.isneginf(log_weights).all(1)
        pareto_k, ess = np.full(num_data, np.inf), np.zeros(num_data)
        tail_share = np.full(num_data, np.inf)
        if some.any():
            pareto_k[some] = psis(log_weights[some])[1] if k_hat is None else k_hat[some]
            weights = np.exp(log_weights[some] - log_weights[some].max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            ess[some] = 1 / np.square(weights).sum(1)
            size = tail_length(num_particles)
            largest = np.partition(weights, num_particles - size, 1)[:, -size:]
            tail_share[some] = largest.sum(1) * num_particles / size
        return cls(num_particles, pareto_k, ess, tail_share)

    @property
    def good(self) -> Flags:
        """For which data a posterior of these weights, and its evidence, can be trusted, [N]."""
        return (self.ess >= FEWEST_EFFECTIVE) & self._light

    @property
    def evidence_good(self) -> Flags:
        """For which data the mean weight, an estimate of p(x), and its error can be trusted, [N].

        It takes a light tail too, but fewer effective draws than a posterior, whose mean is to be
        known to 0.2 standard deviations: 400, or a tenth of all where that is less. Draws that are
        too few for a k-hat must all but agree.
        """
        enough = self.ess >= min(FEWEST_EFFECTIVE, _EFFECTIVE_SHARE * self.num_particles)
        equal = self.ess > NEARLY_EQUAL * self.num_particles
        return (enough & self._light & ~np.isnan(self.pareto_k)) | equal

    @property
    def _light(self) -> Flags:
        """For which data the tail carries no more than it may, [N]."""
        light = self.pareto_k <= pareto_k_threshold(self.num_particles)
        return light | (self.tail_share <= _LIGHT_TAIL)
