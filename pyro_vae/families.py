"""Variational families: parameters in, distributions over unconstrained latents out.

A family knows nothing of where its parameters come from: an encoder
(:class:`pyro_vae.AmortizedGuide`) or a table (:class:`pyro_vae.LocalGuide`). The
difference of two guides of one family is then the source of the parameters and
nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["Delta", "FactorizedFamily", "Normal"]


class FactorizedFamily(ABC):
    """A family whose unconstrained coordinates are independent given the parameters.

    To write one, give ``params_per_coordinate`` and the methods below. Parameters
    have any leading shape and end in ``params_per_coordinate``; they are
    unconstrained real numbers.

    Attributes:
        params_per_coordinate: parameters of one coordinate.
        has_density: whether a member is a distribution with a density; a point has none.
    """

    params_per_coordinate: int
    has_density: bool = True

    @abstractmethod
    def marginal(self, params: Tensor) -> Any:
        """Return the distribution of each coordinate.

        Args:
            params: [..., params_per_coordinate].

        Returns:
            A reparameterized distribution over the reals of batch shape [...].
        """

    def mapped(self, params: Tensor, transform: Any) -> Any:
        """Return the distribution of the coordinates mapped to a constrained support.

        Args:
            params: [..., params_per_coordinate].
            transform: a bijection from the reals.

        Returns:
            A distribution over the transform's codomain.
        """
        base = self.marginal(params).to_event(transform.domain.event_dim)
        return dist.TransformedDistribution(base, [transform])

    @abstractmethod
    def from_noise(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return draws made of standard normal noise, differentiable by the parameters.

        Args:
            params: [..., params_per_coordinate].
            noise: [K, ...].

        Returns:
            [K, ...].
        """

    @abstractmethod
    def from_moments(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return the parameters, [..., params_per_coordinate], with these moments [...]."""

    @abstractmethod
    def units(self, params: Tensor) -> Tensor:
        """Return how far each parameter moves the marginal by about its own width.

        An optimiser that steps in these units is at home in a posterior of any scale.

        Args:
            params: [..., params_per_coordinate].

        Returns:
            Positive numbers of the same shape.
        """

    @abstractmethod
    def params_of(self, marginal: Any) -> Tensor | None:
        """Return the parameters of a distribution if it is of this family, else None.

        Args:
            marginal: a univariate distribution of batch shape [...].

        Returns:
            [..., params_per_coordinate], or None.
        """


@dataclass(frozen=True)
class Normal(FactorizedFamily):
    """Independent Gaussians (mean field): a location and a log scale per coordinate.

    Example:
        >>> import torch
        >>> family = Normal()
        >>> family.marginal(family.from_moments(torch.zeros(3), torch.ones(3))).batch_shape
        torch.Size([3])
    """

    params_per_coordinate = 2

    def marginal(self, params: Tensor) -> Any:
        """Return Normal(params[..., 0], exp(params[..., 1]))."""
        return dist.Normal(params[..., 0], params[..., 1].exp())

    def from_noise(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return location + scale * noise, [K, ...]."""
        return params[..., 0] + params[..., 1].exp() * noise

    def from_moments(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return location and log scale, [..., 2]."""
        return torch.stack([mean, std.log()], -1)

    def units(self, params: Tensor) -> Tensor:
        """Return the scale for the location, and 1 for the log scale."""
        return torch.stack([params[..., 1].exp(), torch.ones_like(params[..., 1])], -1)

    def params_of(self, marginal: Any) -> Tensor | None:
        """Return location and log scale of a Normal, [..., 2]; None for another type."""
        if not isinstance(marginal, torch.distributions.Normal):
            return None
        return self.from_moments(marginal.loc, marginal.scale)


@dataclass(frozen=True)
class Delta(FactorizedFamily):
    r"""A single point (maximum a posteriori): a location per coordinate.

    .. math:: \hat z = \arg\max_z \log p(x, z)

    The density that is maximised is that of z as the model writes it: on a constrained
    support the point is transform(location), and the log determinant of the transform is
    left out, as in Pyro's AutoDelta. So the answer is the mode in the user's
    parametrization; in another one (log s for s) it is another point.

    A point has no entropy. What stands in the place of the ELBO is
    :math:`\log p(x, \hat z)`, the height of a density: it is **not** a bound on log p(x), lies
    above it wherever the posterior is narrow, depends on the units of z, and is the same
    for every number of particles. Compare it with other values of its own kind only.

    Example:
        >>> import torch
        >>> Delta().marginal(torch.tensor([[0.5], [2.0]])).sample()
        tensor([0.5000, 2.0000])
    """

    params_per_coordinate = 1
    has_density = False

    def marginal(self, params: Tensor) -> Any:
        """Return Delta(params[..., 0])."""
        return dist.Delta(params[..., 0])

    def mapped(self, params: Tensor, transform: Any) -> Any:
        """Return Delta(transform(params[..., 0])), its log density zero."""
        return dist.Delta(transform(params[..., 0]), event_dim=transform.codomain.event_dim)

    def from_noise(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return the location, whatever the noise, [K, ...]."""
        return params[..., 0] + torch.zeros_like(noise)

    def from_moments(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return the mean as the location, [..., 1]; a point has no width."""
        return mean.unsqueeze(-1)

    def units(self, params: Tensor) -> Tensor:
        """Return ones: a point has no width to step by."""
        return torch.ones_like(params)

    def params_of(self, marginal: Any) -> Tensor | None:
        """Return the point of a Delta without a density of its own, [..., 1]; else None."""
        if not isinstance(marginal, dist.Delta) or bool((marginal.log_density != 0).any()):
            return None
        return marginal.v.unsqueeze(-1)
