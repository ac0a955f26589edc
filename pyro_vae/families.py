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

__all__ = ["FactorizedFamily", "Normal"]


class FactorizedFamily(ABC):
    """A family whose unconstrained coordinates are independent given the parameters.

    To write one, give ``params_per_coordinate`` and the methods below. Parameters
    have any leading shape and end in ``params_per_coordinate``; they are
    unconstrained real numbers.
    """

    params_per_coordinate: int

    @abstractmethod
    def marginal(self, params: Tensor) -> Any:
        """Return the distribution of each coordinate.

        Args:
            params: [..., params_per_coordinate].

        Returns:
            A reparameterized distribution over the reals of batch shape [...].
        """

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
