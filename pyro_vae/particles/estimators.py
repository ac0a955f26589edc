"""Log weights in; bounds, effective sample sizes and standard errors out.

Beside :class:`LogWeights` themselves, everything here is a reduction over the
particle dimension of log weights of shape [K, N] (particles, data), in nats.
Torch only: no model, no guide, no Pyro.

One rule gives every Monte Carlo standard error. An estimate that is a smooth
function of means over particles has, to first order, an *influence* per
particle: how much that particle moves it. The standard error is the standard
deviation of the influences over the square root of K (the delta method, or
infinitesimal jackknife). Influences add and subtract as estimates do, so the
difference of two estimates made from the same draws has a paired error
(:class:`Estimate`).

Where few particles carry most of the spread, the influences are skewed, and an
estimate that missed them has too small an error. So results report the
calibrated error of a datum: wider by what the skewness says (:func:`calibrated`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# How fast the error grows with the squared skewness of the estimate. The Edgeworth expansion of
# the studentized mean says 1.1 of the skewness of the distribution; where the tail is heavy, that
# of K particles is far less. With 8, intervals cover what they should in benchmarks/coverage.py.
_PER_SQUARED_SKEWNESS = 8.0
# Where one particle carries most of the spread, it has already made the error a large one.
_WIDEST = 4.0
_FEWEST_OF_STRATUM = 20  # draws
_TINY = torch.finfo(torch.float64).tiny
_HUGE = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class LogWeights:
    """Three log densities of each particle of each datum, in nats.

    Attributes:
        log_likelihood: sum over observed sites of log p(x | z), [K, N].
        log_prior: sum over latent sites of log p(z), [K, N].
        log_guide: sum over latent sites of log q(z | x), [K, N].
        given: global latent sites, and the values that they were fixed at.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {self.log_likelihood.shape, self.log_prior.shape, self.log_guide.shape}
        if len(shapes) != 1:
            raise ValueError(
                "log_likelihood, log_prior and log_guide need one shape [K, N], found "
                f"{sorted(tuple(shape) for shape in shapes)}"
            )

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z), [K, N]."""
        return self.log_likelihood + self.log_prior

    @property
    def total(self) -> Tensor:
        """log w = log p(x, z) - log q(z | x), [K, N]."""
        return self.log_joint - self.log_guide

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_likelihood.shape[0]

    @property
    def num_data(self) -> int:
        """N."""
        return self.log_likelihood.shape[1]

    @staticmethod
    def concatenate(chunks: Sequence[LogWeights], dim: int) -> LogWeights:
        """Join chunks along particles (dim 0) or data (dim 1)."""
        parts = zip(*((c.log_likelihood, c.log_prior, c.log_guide) for c in chunks), strict=True)
        log_likelihood, log_prior, log_guide = (torch.cat(part, dim) for part in parts)
        return LogWeights(log_likelihood, log_prior, log_guide)

    def __repr__(self) -> str:
        return f"LogWeights(num_particles={self.num_particles}, num_data={self.num_data})"


def iwae_bound(log_weights: Tensor) -> Tensor:
    r"""Return the importance-weighted bound, the log of the mean weight.

    .. math:: \log \frac{1}{K} \sum_k w_k

    Its expectation is a lower bound on log p(x) that tightens with K (Burda,
    Grosse & Salakhutdinov 2016, eq. 8).

    Args:
        log_weights: [K, N], in nats.

    Returns:
        [N], in nats; -inf where every weight is zero.
    """
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate for each datum, with what each particle contributes to it.

    Sums and differences of estimates made from the same particles add and subtract the influences,
    so that their standard errors are paired ones.

    Attributes:
        value: [N], in nats.
        influence: [K, N], mean zero over K.

    Example:
        >>> import torch
        >>> log_weights = torch.randn(100, 2)
        >>> gain = Estimate.elbo(log_weights + 1.0) - Estimate.elbo(log_weights)
        >>> gain.value.round(decimals=4).tolist(), gain.std_error.max().item() < 1e-6
        ([1.0, 1.0], True)
    """

    value: Tensor
    influence: Tensor

    @classmethod
    def elbo(cls, log_weights: Tensor) -> Estimate:
        """Return the ELBO of log weights [K, N]."""
        value = log_weights.mean(0)
        return cls(value, log_weights - value)

    @classmethod
    def iwae(cls, log_weights: Tensor) -> Estimate:
        """Return the importance-weighted bound of log weights [K, N].

        The influence is the derivative of log(mean w) along w_k - mean w: w_k / mean(w) - 1.
        """
        value = iwae_bound(log_weights)
        return cls(value, torch.exp(log_weights - value) - 1.0)

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.value + other.value, self.influence + other.influence)

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.influence - other.influence)

    def stratified(self, counts: Sequence[int]) -> Estimate:
        r"""Return the estimate of draws of which fixed shares are of several densities.

        What a density's draws have in common is no error, as their number is no chance: the
        influences of each stratum, of n draws, are about their own mean, times
        :math:`\sqrt{n / (n - 1)}`, which that mean takes away (Owen 2013, section 8.4).

        Args:
            counts: of the draws of each density, in the order of the particles. Where one has so
                few that they say little of its spread, they are taken for draws of the mixture,
                and the error is too large.

        References:
            Owen (2013). Monte Carlo theory, methods and examples.
        """
        if min(counts) < _FEWEST_OF_STRATUM:
            return self
        parts = self.influence.split(list(counts))
        about = [(each - each.mean(0)) * (len(each) / (len(each) - 1)) ** 0.5 for each in parts]
        return Estimate(self.value, torch.cat(about))

    @property
    def std_error(self) -> Tensor:
        """Standard error of each value, [N]; nan from a single particle, which tells none."""
        return _std_error(self.influence.square().sum(0), self.influence.shape[0])

    @property
    def skewness(self) -> Tensor:
        """Skewness of the influences, [N], at most sqrt(K) in size; 0 where they are constant."""
        return skewness_of(self.influence.square().mean(0), self.influence.pow(3).mean(0))

    @property
    def mean(self) -> float:
        """Mean over the data, in nats per datum."""
        return float(self.value.mean())

    @property
    def mean_std_error(self) -> float:
        """Standard error of the mean over the data, whose draws are independent."""
        return float(mean_std_error(self.std_error))


def calibrated(std_error: Tensor, skewness: Tensor, num_particles: int) -> Tensor:
    r"""Return standard errors such that value ± 1.96 of them covers with probability 0.95.

    .. math:: s \, \min(1 + 8 \gamma^2 / K, 4)

    with the skewness :math:`\gamma` of the influences. A mean of K particles has skewness
    :math:`\gamma / \sqrt{K}`; where that is not small, its distance from the truth in units
    of its own standard error has long tails (Johnson 1978, eq. 2.5; Hall 1992, section 2.6).

    Args:
        std_error: [N], of an :class:`Estimate`.
        skewness: [N], of the influences.
        num_particles: K.

    Returns:
        [N]: not less than std_error, and at most 4 times as much.

    References:
        Johnson (1978). Modified t tests and confidence intervals for asymmetrical populations.
        Journal of the American Statistical Association 73(363).
        Hall (1992). The bootstrap and Edgeworth expansion. Springer.
    """
    return std_error * _widening(skewness.square() / num_particles)


def mean_std_error(
    std_errors: Tensor, skewness: Tensor | None = None, num_particles: int = 1
) -> Tensor:
    """Return the standard error of a mean over data whose draws are independent.

    Args:
        std_errors: [N], one for each datum.
        skewness: [N], of the influences, where the errors are :func:`calibrated` ones: the
            skewness of a mean over data is less than that of each, and so is what it adds.
        num_particles: K, likewise.

    Returns:
        Scalar: sqrt(sum of squares) / N. It is the Monte Carlo error for these
        data, not the spread over other data that might have been seen.
    """
    if skewness is None:
        return std_errors.square().sum().sqrt() / std_errors.shape[0]
    plain = std_errors / _widening(skewness.square() / num_particles)
    variance, third = plain.square().sum(), (skewness * plain.pow(3)).sum()
    of_mean = skewness_of(variance, third)
    return calibrated(variance.sqrt(), of_mean, num_particles) / std_errors.shape[0]


def independent_difference(
    errors: tuple[Tensor, Tensor],
    skewnesses: tuple[Tensor, Tensor],
    counts: tuple[int, int],
    num_particles: int,
) -> tuple[Tensor, Tensor]:
    """Return the calibrated error and the skewness of a difference of independent estimates.

    Args:
        errors: :func:`calibrated` ones of the two, [N].
        skewnesses: of the influences of each, [N].
        counts: how many particles each was made of.
        num_particles: K, as of how many particles the skewness of the difference is told, so that
            its square over K is that of an estimate of K particles.
    """
    pairs = list(zip(errors, skewnesses, counts, strict=True))
    plain = [error / _widening(skew.square() / count) for error, skew, count in pairs]
    third = [skew * p.pow(3) / count**0.5 for p, (_, skew, count) in zip(plain, pairs, strict=True)]
    variance = plain[0].square() + plain[1].square()
    skewness = skewness_of(variance, third[0] - third[1]) * num_particles**0.5
    return calibrated(variance.sqrt(), skewness, num_particles), skewness


def skewness_of(variance: Tensor, third: Tensor) -> Tensor:
    """Return the skewness of a variance and a third central moment; 0 of constants."""
    return torch.where(variance > 0, third / variance.clamp_min(_TINY).pow(1.5), 0.0)


def _std_error(squares: Tensor, num_particles: int) -> Tensor:
    """Return the standard error of a mean, [N], from the sum of squares about it."""
    if num_particles < 2:
        return torch.full_like(squares, math.nan)
    return torch.sqrt(squares / (num_particles * (num_particles - 1)))


def _widening(squared_skewness: Tensor) -> Tensor:
    return (1 + _PER_SQUARED_SKEWNESS * squared_skewness).clamp_max(_WIDEST)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Return Kish's effective sample size, :math:`(\sum w)^2 / \sum w^2`.

    Args:
        log_weights: [K, N], in nats.

    Returns:
        [N], between 1 and K.
    """
    return torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))


def mixture_log_guide(log_guides: Tensor) -> Tensor:
    """Return the log density of the equal mixture of guides (the balance heuristic).

    Importance weights against the mixture, with as many draws from each guide,
    have no heavier a tail than those of the best guide in it (Veach & Guibas 1995).

    Args:
        log_guides: [G, K, N], the log density of the same draws under each guide.

    Returns:
        [K, N].
    """
    return torch.logsumexp(log_guides, 0) - math.log(log_guides.shape[0])


class _Stream:
    """Mean and central moments of values, from chunks of them, for each datum.

    Chan, Golub & LeVeque (1983), and Pebay (2008, eq. 1.1) for the third: the moments of two
    sets from those of each. Memory does not depend on the number of particles.
    """

    def __init__(self) -> None:
        self.num_particles = 0  # K so far
        # The mean, and sums of powers about it; None before the first chunk.
        self._moments: tuple[Tensor, Tensor, Tensor] | None = None

    def _add(self, values: Tensor) -> None:
        size, mean = values.shape[0], values.mean(0)
        about = values - mean
        squared = about.square()
        squares, cubes = squared.sum(0), (squared * about).sum(0)
        before, total = self.num_particles, self.num_particles + size
        if self._moments is not None:
            first, first_squares, first_cubes = self._moments
            shift = mean - first
            cubes = (
                first_cubes
                + cubes
                + shift.pow(3) * (before * size * (before - size) / total**2)
                + 3 * shift * (before * squares - size * first_squares) / total
            )
            squares = first_squares + squares + shift.square() * (before * size / total)
            # Not first + shift * share: that is nan where a weight of zero makes one -inf.
            mean = first * (before / total) + mean * (size / total)
        self._moments, self.num_particles = (mean, squares, cubes), total

    def _seen(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._moments is None:
            raise ValueError("no log weights yet: call update first")
        return self._moments

    @property
    def skewness(self) -> Tensor:
        """The skewness of the particles' influences, [N]."""
        _, squares, cubes = self._seen()
        return skewness_of(squares / self.num_particles, cubes / self.num_particles)


class StreamingELBO(_Stream):
    """Mean of log weights and its standard error, from chunks of particles.

    Example:
        >>> import torch
        >>> stream = StreamingELBO()
        >>> for chunk in torch.arange(6.0).reshape(6, 1).split(4):
        ...     stream.update(chunk)
        >>> stream.value.item()
        2.5
    """

    def update(self, log_weights: Tensor) -> None:
        """Take in a chunk of log weights, [k, N]."""
        self._add(log_weights.double())

    @property
    def value(self) -> Tensor:
        """The ELBO of each datum, [N]."""
        return self._seen()[0]

    @property
    def std_error(self) -> Tensor:
        """Its standard error, [N]; nan from a single particle."""
        return _std_error(self._seen()[1], self.num_particles)


class StreamingIWAE(_Stream):
    """Log mean weight and its standard error, from chunks of particles.

    Keeps moments of the weights relative to the largest so far.

    Example:
        >>> import torch
        >>> stream = StreamingIWAE()
        >>> for chunk in torch.zeros(6, 1).split(4):
        ...     stream.update(chunk)
        >>> stream.value.item(), stream.std_error.item()
        (0.0, 0.0)
    """

    def __init__(self) -> None:
        super().__init__()
        self._log_largest = torch.zeros(())

    def update(self, log_weights: Tensor) -> None:
        """Take in a chunk of log weights, [k, N]."""
        chunk = log_weights.double()
        largest = chunk.amax(0)
        if self._moments is not None:
            largest = torch.maximum(largest, self._log_largest)
            # 0 of a datum whose weights were all zero: nothing to scale.
            factor = torch.exp(self._log_largest - largest).nan_to_num(0.0)
            mean, squares, cubes = self._moments
            self._moments = mean * factor, squares * factor**2, cubes * factor**3
        self._log_largest = largest
        self._add(torch.exp(chunk - largest.clamp_min(-_HUGE)))

    @property
    def value(self) -> Tensor:
        """The importance-weighted bound of each datum, [N]."""
        return self._seen()[0].log() + self._log_largest

    @property
    def std_error(self) -> Tensor:
        """Its standard error by the delta method, [N]; nan from a single particle."""
        mean, squares, _ = self._seen()
        return _std_error(squares, self.num_particles) / mean

    @property
    def effective_sample_size(self) -> Tensor:
        """Kish's effective sample size of each datum, [N]."""
        mean, squares, _ = self._seen()
        return self.num_particles / (1 + squares / (self.num_particles * mean.square()))


class LargestWeights:
    """The largest log weights of each datum, from chunks of particles.

    They are all that the fit of a tail needs.

    Args:
        size: how many.

    Example:
        >>> import torch
        >>> stream = LargestWeights(2)
        >>> for chunk in torch.arange(6.0).reshape(6, 1).split(4):
        ...     stream.update(chunk)
        >>> sorted(stream.value.flatten().tolist())
        [4.0, 5.0]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: list[Tensor] = []

    def update(self, log_weights: Tensor) -> None:
        """Take in a chunk of log weights, [k, N]."""
        self._kept.append(log_weights)
        # Not at every chunk, which may be a few particles of a large K.
        if sum(map(len, self._kept)) > 4 * self.size:
            self._kept = [self.value]

    @property
    def value(self) -> Tensor:
        """The largest, in any order, [size, N]; all where there are fewer."""
        kept = torch.cat(self._kept)
        if kept.shape[0] <= self.size:
            return kept
        if kept.device.type != "cpu":
            return torch.topk(kept, self.size, dim=0, sorted=False).values
        # Five times as fast there as topk.
        by_datum = kept.detach().T.contiguous().numpy()
        largest = np.partition(by_datum, -self.size, axis=1)[:, -self.size :]
        return torch.from_numpy(np.ascontiguousarray(largest.T))
