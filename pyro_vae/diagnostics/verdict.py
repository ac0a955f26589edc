r"""Are importance weights, and what is made of them, to be trusted? One rule, datum by datum.

Of K weights the largest :math:`\min(K/5, 3\sqrt K)` are the tail that k-hat is fitted to. They are
trusted where

1. the tail is light: k-hat is at most :math:`\min(1 - 1/\log_{10} K, 0.7)`, or the tail carries at
   most twice what as many average weights would; and
2. the effective sample size is at least 400, or K / 10 where that is less; or
3. they are nearly equal: more than 0.9 K are effective.

k-hat alone says bad of the best guides: where weights are nearly equal, the excesses of the largest
ones over the others are tiny, and of any shape. So a heavy tail counts where it carries weight. And
weights of a light tail may be few: a mean of less than a tenth of the draws has no good error.
Fewer than 30 weights have no k-hat: they must be nearly equal.

That is asked of what has an error of its own: a bound, log p(x) of a comparison, an imputation,
resampled draws. A verdict on a posterior (:attr:`Weights.good`) takes 400 effective draws of any K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_vae.diagnostics.psis import FEWEST_WEIGHTS, psis, tail_length

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Vehtari et al. (2024): above it importance sampling is not to be trusted, its errors included.
_PARETO_K_THRESHOLD = 0.7
# Effective draws that put a posterior mean within 0.2 posterior standard deviations of the truth
# but for four standard errors.
FEWEST_EFFECTIVE = 400
# The share of effective draws that a mean of few weights takes.
_EFFECTIVE_SHARE = 0.1
# A share of effective draws above which a heavy tail does no harm: weights that all but agree.
_NEARLY_EQUAL = 0.9
# The weight of the tail in units of that of as many average draws, up to which it does no harm.
LIGHT_TAIL = 2.0


def pareto_k_threshold(num_particles: int) -> float:
    r"""Return the k-hat above which K weights are too few: :math:`\min(1 - 1/\log_{10} K, 0.7)`.

    Vehtari et al. (2024), section 3.2.4.
    """
    if num_particles < 2:
        return -math.inf
    return min(1 - 1 / math.log10(num_particles), _PARETO_K_THRESHOLD)


def tail_share_of(largest: Array, log_mean_weight: Array) -> Array:
    """Return what the largest weights carry, in units of what as many average ones would, [N].

    Args:
        largest: the :func:`tail_length` largest log weights of each datum, [N, M].
        log_mean_weight: log of the mean of all K weights, [N].

    Returns:
        [N]; infinite where every weight is zero.
    """
    zero = np.isneginf(log_mean_weight)
    mean = np.where(zero, 0.0, log_mean_weight)
    share = np.exp(largest.astype(np.float64) - mean[:, np.newaxis]).mean(1)
    return np.where(zero, np.inf, share)


@dataclass(frozen=True, slots=True)
class Weights:
    """What importance weights of each datum look like.

    Attributes:
        num_particles: K.
        pareto_k: [N]; infinite where every weight is zero, nan where K is too small.
        ess: Kish's effective sample size, [N]; 0 where every weight is zero.
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
            logs = log_weights[some].astype(np.float64)
            weights = np.exp(logs - logs.max(1, keepdims=True))
            ess[some] = weights.sum(1) ** 2 / np.square(weights).sum(1)
            size = tail_length(num_particles)
            largest = np.partition(logs, num_particles - size, 1)[:, -size:]
            tail_share[some] = tail_share_of(largest, logs.max(1) + np.log(weights.mean(1)))
        return cls(num_particles, pareto_k, ess, tail_share)

    @classmethod
    def joined(cls, blocks: Sequence[Weights]) -> Weights:
        """Return those of blocks of data as one."""
        columns = [(block.pareto_k, block.ess, block.tail_share) for block in blocks]
        pareto_k, ess, tail_share = (np.concatenate(part) for part in zip(*columns, strict=True))
        return cls(blocks[0].num_particles, pareto_k, ess, tail_share)

    @property
    def good(self) -> Flags:
        """For which data a posterior of these weights, and its evidence, can be trusted, [N]."""
        return (self.ess >= FEWEST_EFFECTIVE) & self._light

    @property
    def trusted(self) -> Flags:
        """For which data what is made of the weights, and its error, can be trusted, [N]."""
        return (self._enough & self._light) | self._equal

    @property
    def doubt(self) -> str:
        """For how many data the weights are not to be trusted, and why, in words; "" for none."""
        bad = ~self.trusted
        if not bad.any():
            return ""
        counted = f"for {bad.sum()} of {bad.size} data"
        why = "; ".join(self._reasons(bad))
        return f"{counted} the importance weights are not to be trusted: {why}"

    def _reasons(self, bad: Flags) -> Iterator[str]:
        """Yield what is wrong with bad weights, of how many, and what to do."""
        zero, unknown = np.isinf(self.tail_share), np.isnan(self.pareto_k)
        rest = bad & ~zero & ~unknown
        heavy, few = rest & ~self._light, rest & ~self._enough
        if zero.any():
            yield f"{zero.sum()} of which every draw has no density under the model"
        if (bad & unknown).any():
            yield (
                f"{self.num_particles} particles are too few for a k-hat, and the weights are far "
                f"from equal: take {FEWEST_WEIGHTS} particles or more"
            )
        if heavy.any():
            yield (
                f"{heavy.sum()} with a heavy tail (k-hat above "
                f"{pareto_k_threshold(self.num_particles):.2f}, and the largest weights carry more "
                f"than {LIGHT_TAIL:g} times their share)"
            )
        if few.any():
            yield f"{few.sum()} with fewer than {self._fewest:g} effective particles"
        if heavy.any() or few.any():
            yield "pyro_vae.refine brings the guide closer, pyro_vae.repair mends datum by datum"

    @property
    def _fewest(self) -> float:
        return min(FEWEST_EFFECTIVE, _EFFECTIVE_SHARE * self.num_particles)

    @property
    def _enough(self) -> Flags:
        return self.ess >= self._fewest

    @property
    def _equal(self) -> Flags:
        return self.ess > _NEARLY_EQUAL * self.num_particles

    @property
    def _light(self) -> Flags:
        """For which data the tail carries no more than it may, [N]; of no k-hat for none."""
        light = self.pareto_k <= pareto_k_threshold(self.num_particles)
        return light | ((self.tail_share <= LIGHT_TAIL) & ~np.isnan(self.pareto_k))
