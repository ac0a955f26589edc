"""Delta: the family of points, for maximum a posteriori estimates."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_vae.families.base import FactorizedFamily
from pyro_vae.programs.types import Distribution

__all__ = ["Delta"]


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

    def marginal(self, params: Tensor) -> Distribution:
        """Return Delta(params[..., 0])."""
        return dist.Delta(params[..., 0])

    def mapped(self, params: Tensor, transform: Transform) -> Distribution:
        """Return Delta(transform(params[..., 0])), its log density zero."""
        return dist.Delta(transform(params[..., 0]), event_dim=transform.codomain.event_dim)

    def from_moments(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return the mean as the location, [..., 1]; a point has no width."""
        return mean.unsqueeze(-1)

    def quantile(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return the location, whatever the noise, [K, ...]."""
        return params[..., 0] + torch.zeros_like(noise)
