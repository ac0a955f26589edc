"""Log weights in; bounds, effective sample sizes and standard errors out.

Everything here is a reduction over the particle dimension of log weights of
shape [K, N] (particles, data), in nats. Torch only: no model, no guide, no Pyro.

One rule gives every Monte Carlo standard error. An estimate that is a smooth
function of means over particles has, to first order, an *influence* per
particle: how much that particle moves it. The standard error is the standard
deviation of the influences over the square root of K, and the influence of a
difference of two estimates is the difference of their influences, so that a
difference of estimates made from the same draws gets a paired standard error
by the same rule (the delta method, or infinitesimal jackknife).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "StreamingELBO",
    "StreamingIWAE",
    "effective_sample_size",
    "elbo",
    "elbo_influence",
    "iwae_bound",
    "iwae_influence",
    "mean_std_error",
    "mixture_log_guide",
    "std_error",
]


def elbo(log_weights: Tensor) -> Tensor:
    """Return the evidence lower bound, the mean of the log weights.

    Args:
        log_weights: [K, N], in nats.

    Returns:
        [N], in nats.
    """
    return log_weights.mean(0)


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


def elbo_influence(log_weights: Tensor) -> Tensor:
    """Return what each particle contributes to the ELBO, about zero: [K, N]."""
    return log_weights - log_weights.mean(0)


def iwae_influence(log_weights: Tensor) -> Tensor:
    """Return what each particle contributes to the IWAE bound, to first order: [K, N].

    The derivative of log(mean w) along w_k - mean w, that is w_k / mean(w) - 1.
    """
    return torch.exp(log_weights - iwae_bound(log_weights)) - 1.0


def std_error(influence: Tensor) -> Tensor:
    """Return the standard error of an estimate from its influences.

    Args:
        influence: [K, N], mean zero over K.

    Returns:
        [N]; nan for a single particle, from which no error can be told.
    """
    num_particles = influence.shape[0]
    if num_particles < 2:
        return torch.full_like(influence[0], math.nan)
    return torch.sqrt(influence.square().sum(0) / (num_particles * (num_particles - 1)))


def mean_std_error(std_errors: Tensor) -> Tensor:
    """Return the standard error of a mean over data whose draws are independent.

    Args:
        std_errors: [N], one for each datum.

    Returns:
        Scalar: sqrt(sum of squares) / N. It is the Monte Carlo error for these
        data, not the spread over other data that might have been seen.
    """
    return std_errors.square().sum().sqrt() / std_errors.shape[0]


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


class StreamingELBO:
    """Mean of log weights and its standard error, from chunks of particles.

    Chan, Golub & LeVeque (1983): the mean and the sum of squared deviations of
    two sets from those of each. Memory does not depend on the number of chunks.

    Example:
        >>> import torch
        >>> stream = StreamingELBO()
        >>> for chunk in torch.arange(6.0).reshape(6, 1).split(4):
        ...     stream.update(chunk)
        >>> stream.value.item()
        2.5
    """

    def __init__(self) -> None:
        self.num_particles = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, log_weights: Tensor) -> None:
        """Take in a chunk of log weights, [k, N]."""
        chunk = log_weights.double()
        size = chunk.shape[0]
        mean = chunk.mean(0)
        squares = (chunk - mean).square().sum(0)
        if self._mean is None or self._squares is None:
            self._mean, self._squares = mean, squares
        else:
            total = self.num_particles + size
            shift = mean - self._mean
            # Not mean + shift * share: that is nan where a weight of zero makes one -inf.
            self._mean = self._mean * (self.num_particles / total) + mean * (size / total)
            self._squares = (
                self._squares + squares + shift.square() * (self.num_particles * size / total)
            )
        self.num_particles += size

    @property
    def value(self) -> Tensor:
        """The ELBO of each datum, [N]."""
        return _seen(self._mean)

    @property
    def std_error(self) -> Tensor:
        """Its standard error, [N]; nan from a single particle."""
        squares = _seen(self._squares)
        if self.num_particles < 2:
            return torch.full_like(squares, math.nan)
        return torch.sqrt(squares / (self.num_particles * (self.num_particles - 1)))


class StreamingIWAE:
    """Log mean weight and its standard error, from chunks of particles.

    Keeps log(sum w) and log(sum w^2) only, so that memory does not depend on K.

    Example:
        >>> import torch
        >>> stream = StreamingIWAE()
        >>> for chunk in torch.zeros(6, 1).split(4):
        ...     stream.update(chunk)
        >>> stream.value.item(), stream.std_error.item()
        (0.0, 0.0)
    """

    def __init__(self) -> None:
        self.num_particles = 0
        self._log_sum: Tensor | None = None
        self._log_squares: Tensor | None = None

    def update(self, log_weights: Tensor) -> None:
        """Take in a chunk of log weights, [k, N]."""
        chunk = log_weights.double()
        log_sum, log_squares = torch.logsumexp(chunk, 0), torch.logsumexp(2 * chunk, 0)
        if self._log_sum is None or self._log_squares is None:
            self._log_sum, self._log_squares = log_sum, log_squares
        else:
            self._log_sum = torch.logaddexp(self._log_sum, log_sum)
            self._log_squares = torch.logaddexp(self._log_squares, log_squares)
        self.num_particles += chunk.shape[0]

    @property
    def value(self) -> Tensor:
        """The importance-weighted bound of each datum, [N]."""
        return _seen(self._log_sum) - math.log(self.num_particles)

    @property
    def std_error(self) -> Tensor:
        """Its standard error by the delta method, [N]; nan from a single particle."""
        log_sum, log_squares = _seen(self._log_sum), _seen(self._log_squares)
        if self.num_particles < 2:
            return torch.full_like(log_sum, math.nan)
        # K^2 times the variance of the mean of w / mean(w), from sums: rounding can
        # leave a small negative number where the weights are constant.
        excess = torch.exp(log_squares - 2 * log_sum) * self.num_particles - 1.0
        return torch.sqrt(excess.clamp_min(0.0) / (self.num_particles - 1))

    @property
    def effective_sample_size(self) -> Tensor:
        """Kish's effective sample size of each datum, [N]."""
        return torch.exp(2 * _seen(self._log_sum) - _seen(self._log_squares))


def _seen(total: Tensor | None) -> Tensor:
    if total is None:
        raise ValueError("no log weights yet: call update first")
    return total
