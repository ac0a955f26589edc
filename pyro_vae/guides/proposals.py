"""The distribution of one site of a guide, made from a family's over a datum's coordinates."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.families.base import FactorizedFamily, Family
from pyro_vae.guides.coordinates import Coordinates
from pyro_vae.programs.types import Distribution

_NO_SHAPE = torch.Size()
_GAUSSIAN = (torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)


def proposal(
    family: Family, params: Tensor, size: int, coordinates: Coordinates, before: list[Tensor]
) -> Distribution:
    """Return the distribution of a site, given the sites before it.

    Args:
        family: the variational family.
        params: of the family for each datum, with batch dimensions as those of spread rows;
            of a factorized family, the site's own.
        size: D.
        coordinates: the site's.
        before: the unconstrained values of all sites before it, as spread rows.

    Returns:
        A distribution of the site's batch and event shape; on real support the family's own,
        elsewhere mapped to the support.

    Raises:
        ValueError: for a site with batch dimensions inside the datum, where the family has no
            density of each coordinate.
    """
    # Remembered, so that losses of Pyro's, too, score a draw by what it was made of.
    transform = coordinates.cached_transform
    if isinstance(family, FactorizedFamily):
        arranged = coordinates.arrange(params.movedim(-1, 0)).movedim(0, -1)
        if not coordinates.is_identity:
            return family.mapped(arranged, transform)
        return family.marginal(arranged).to_event(transform.domain.event_dim)
    shape = torch.broadcast_shapes(*(rows.shape[:-1] for rows in before))
    while len(shape) > len(coordinates.batch) and shape[0] == 1:
        shape = shape[1:]  # a dimension of a site before this one
    known = [
        rows.reshape(rows.shape[max(0, rows.ndim - 1 - len(shape)) :]).expand(*shape, -1)
        for rows in before
    ]
    joint = family.conditional(
        params, size, torch.cat(known, -1) if known else params[..., :0], coordinates.columns
    )
    base = _of_site(joint, coordinates)
    return base if coordinates.is_identity else dist.TransformedDistribution(base, [transform])


def _of_site(joint: Any, coordinates: Coordinates) -> Distribution:
    """Return a distribution over a site's coordinates [..., d] in the site's own shape."""
    if coordinates.is_plain and len(coordinates.event) == 1:
        return joint
    if coordinates.is_plain and not coordinates.event and isinstance(joint, _GAUSSIAN):
        return dist.Normal(joint.loc[..., 0], joint.variance[..., 0].sqrt())
    single = coordinates.columns.stop - coordinates.columns.start == 1
    if not (single or isinstance(joint, _GAUSSIAN) or hasattr(joint, "coordinate_log_prob")):
        raise ValueError(
            f"latent site {coordinates.name!r} has batch dimensions inside a datum, or an event "
            f"that is no vector: {type(joint).__name__} needs a method coordinate_log_prob"
        )
    return _Arranged(joint, coordinates)


class _Arranged(TorchDistribution):
    """A joint distribution over a site's coordinates, where the site is a batch inside a datum.

    Its draws in the batch depend on one another. The log density of each is that given those
    before it: their sum is the joint's, and where a mask leaves some of them out, those
    left out are auxiliary draws, which no bound minds.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, joint: Any, coordinates: Coordinates) -> None:
        self._joint, self._coordinates = joint, coordinates
        super().__init__(
            torch.broadcast_shapes(joint.batch_shape, coordinates.batch),
            torch.Size(coordinates.event),
            validate_args=False,
        )

    @property
    def support(self) -> constraints.Constraint:
        """The reals."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Arranged:
        """Return the distribution of another batch shape."""
        # Of size 1 where the joint has its coordinates instead.
        sizes = zip(batch_shape[::-1], self._coordinates.inside[::-1], strict=False)
        inner = [1 if inside else size for size, inside in sizes]
        lead = batch_shape[: len(batch_shape) - len(inner)]
        joint = self._joint.expand(torch.Size([*lead, *inner[::-1]]))
        return _Arranged(joint, self._coordinates)

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Return draws, differentiable by the parameters."""
        return self._coordinates.arrange(self._joint.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of each entry of the batch, given those before it."""
        spread = self._coordinates.flatten(value)
        if spread.shape[-1] == 1:
            log_prob = self._joint.log_prob(spread).unsqueeze(-1)
        elif isinstance(self._joint, _GAUSSIAN):
            log_prob = _gaussian_log_prob(self._joint, spread)
        else:
            log_prob = self._joint.coordinate_log_prob(spread)
        arranged = self._coordinates.arrange(log_prob)
        return sum_rightmost(arranged, len(self.event_shape))


def _gaussian_log_prob(joint: Any, value: Tensor) -> Tensor:
    """Return the log density of each coordinate given those before it, of the value's shape."""
    difference = (value - joint.loc).unsqueeze(-1)
    if isinstance(joint, torch.distributions.MultivariateNormal):
        factor = joint.scale_tril
    else:
        factor = torch.linalg.cholesky(joint.covariance_matrix)
    noise = torch.linalg.solve_triangular(factor, difference, upper=False).squeeze(-1)
    scale = factor.diagonal(dim1=-2, dim2=-1)
    return -0.5 * (noise.square() + math.log(2 * math.pi)) - scale.log()
