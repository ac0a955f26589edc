"""Gaussian families (independent coordinates, any covariance, low rank), and points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_vae.families.base import FactorizedFamily, Family, precisions
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.types import Distribution

_FACTORINGS = 20  # iterations of a start
_RESOLVED = 0.1  # of a width that rounding may change: it costs half the square, in nats


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

    def marginal(self, params: Tensor) -> Distribution:
        """Return Normal(params[..., 0], exp(params[..., 1]))."""
        return dist.Normal(params[..., 0], params[..., 1].exp())

    def from_moments(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return location and log scale, [..., 2]."""
        return torch.stack([mean, std.log()], -1)

    def quantile(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return location + scale * noise, [K, ...]."""
        return params[..., 0] + params[..., 1].exp() * noise

    def coordinate_units(self, params: Tensor) -> Tensor:
        """Return the scale for the location, and 1 for the log scale."""
        return torch.stack([params[..., 1].exp(), torch.ones_like(params[..., 1])], -1)


class LocatedFamily(Family):
    """A family whose parameters begin with D locations and D log scales."""

    def units(self, params: Tensor, size: int) -> Tensor:
        """Return the scales for the locations, and 1 for all else."""
        units = torch.ones_like(params)
        units[..., :size] = params[..., size : 2 * size].exp()
        return units


@dataclass(frozen=True)
class FullRankNormal(LocatedFamily):
    r"""A Gaussian with any covariance, over all latents of a datum jointly.

    .. math:: z = m + \mathrm{diag}(s)\, (I + B)\, \epsilon

    D locations, D log scales and the D (D - 1) / 2 entries of a strictly lower triangular B, in
    units of the scales: with B = 0 it is :class:`Normal`. The Cholesky factor is diag(s) (I + B).

    Example:
        >>> import torch
        >>> family = FullRankNormal()
        >>> params = family.initial(torch.zeros(3), torch.ones(3))
        >>> family.conditional(params, 3, torch.zeros(1), slice(1, 3)).scale_tril
        tensor([[1., 0.],
                [0., 1.]])
    """

    def params_shape(self, size: int) -> tuple[int, ...]:
        """Return (2 D + D (D - 1) / 2,)."""
        return (2 * size + size * (size - 1) // 2,)

    def initial(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return location, log scale, and no correlation."""
        below = mean.new_zeros(*mean.shape[:-1], mean.shape[-1] * (mean.shape[-1] - 1) // 2)
        return torch.cat([mean, std.log(), below], -1)

    def conditional(
        self, params: Tensor, size: int, before: Tensor, columns: slice
    ) -> Distribution:
        """Return a MultivariateNormal."""
        loc, factor = self._loc_and_factor(params, size)
        first, shift = columns.start, loc[..., columns]
        if first:
            away = (before - loc[..., :first]).unsqueeze(-1)
            known = torch.linalg.solve_triangular(factor[..., :first, :first], away, upper=False)
            shift = shift + (factor[..., columns, :first] @ known).squeeze(-1)
        return dist.MultivariateNormal(shift, scale_tril=factor[..., columns, columns])

    def from_noise(self, params: Tensor, size: int, noise: Tensor) -> Tensor:
        """Return location + Cholesky factor @ noise, [K, ..., D]."""
        loc, factor = self._loc_and_factor(params, size)
        return loc + (factor @ noise.unsqueeze(-1)).squeeze(-1)

    def from_gaussian(self, mean: Tensor, scale_tril: Tensor) -> Tensor:
        """Return that Gaussian."""
        size, scale = mean.shape[-1], scale_tril.diagonal(dim1=-2, dim2=-1)
        row, column = torch.tril_indices(size, size, -1, device=mean.device)
        below = (scale_tril / scale.unsqueeze(-1))[..., row, column]
        return torch.cat([mean, scale.log(), below], -1)

    def is_resolved(self, params: Tensor, size: int) -> Tensor:
        """Return whether each coordinate is rounded by little beside its width given all others."""
        loc, factor = self._loc_and_factor(params, size)
        rounded = torch.finfo(params.dtype).eps * (loc.abs() + factor.norm(dim=-1))
        return (rounded * precisions(factor).sqrt() < _RESOLVED).all(-1)

    def shifted(self, params: Tensor, size: int, shift: Tensor) -> Tensor:
        r"""Return the Gaussian moved in its own whitened coordinates.

        .. math:: m' = m + L \delta, \quad L' = L T

        with L the Cholesky factor and T lower triangular, its diagonal the exponentials of the
        shift. So a Gaussian of any correlation is as easy to move as a round one.
        """
        loc, factor = self._loc_and_factor(params, size)
        shift, turn = self._loc_and_factor(shift, size)
        return self.from_gaussian(loc + (factor @ shift.unsqueeze(-1)).squeeze(-1), factor @ turn)

    def _loc_and_factor(self, params: Tensor, size: int) -> tuple[Tensor, Tensor]:
        loc, log_scale, below = params.split([size, size, params.shape[-1] - 2 * size], -1)
        row, column = torch.tril_indices(size, size, -1, device=params.device)
        factor = torch.diag_embed(torch.ones_like(loc))
        factor[..., row, column] = below
        return loc, log_scale.exp().unsqueeze(-1) * factor


@dataclass(frozen=True)
class LowRankNormal(LocatedFamily):
    r"""A Gaussian whose covariance is diagonal but for a few directions.

    .. math:: z = m + \mathrm{diag}(s)\, (\epsilon + F u), \quad
        \epsilon \sim \mathrm{Normal}(0, I_D),\ u \sim \mathrm{Normal}(0, I_R)

    For many latents: (2 + R) D parameters, where a full covariance has D (D + 3) / 2.

    Args:
        rank: R, columns of F.

    Example:
        >>> LowRankNormal(rank=2).params_shape(50)
        (200,)
    """

    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", as_count("rank", self.rank))

    def params_shape(self, size: int) -> tuple[int, ...]:
        """Return ((2 + R) D,)."""
        return ((2 + self.rank) * size,)

    def num_noise(self, size: int) -> int:
        """Return D + R."""
        return size + self.rank

    def initial(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return location, log scale and a small F; the moments are right, up to it.

        At F = 0 the ELBO has no slope along F: from there no direction would be found.
        """
        size = mean.shape[-1]
        grid = torch.arange(size, device=mean.device).unsqueeze(-1) + 0.5
        waves = torch.arange(1, self.rank + 1, device=mean.device)
        factor = (0.1 * torch.cos(math.pi * grid * waves / size)).to(mean)
        log_scale = std.log() - 0.5 * factor.square().sum(-1).log1p()
        return torch.cat([mean, log_scale, factor.flatten().expand(*mean.shape[:-1], -1)], -1)

    def conditional(
        self, params: Tensor, size: int, before: Tensor, columns: slice
    ) -> Distribution:
        """Return a LowRankMultivariateNormal."""
        loc, scale, factor = self._parts(params, size)
        first, mine = columns.start, factor[..., columns, :]
        shift = torch.zeros_like(mine[..., 0])
        if first:
            # u given what is known is Gaussian again, with precision I + F'F and mean solved.
            known = factor[..., :first, :]
            eye = torch.eye(self.rank, dtype=params.dtype, device=params.device)
            root = torch.linalg.cholesky(eye + known.mT @ known)
            seen = ((before - loc[..., :first]) / scale[..., :first]).unsqueeze(-1)
            shift = (mine @ torch.cholesky_solve(known.mT @ seen, root)).squeeze(-1)
            mine = torch.linalg.solve_triangular(root, mine.mT, upper=False).mT
        scale = scale[..., columns]
        return dist.LowRankMultivariateNormal(
            loc[..., columns] + scale * shift, scale.unsqueeze(-1) * mine, scale.square()
        )

    def from_noise(self, params: Tensor, size: int, noise: Tensor) -> Tensor:
        """Return a draw of D + R numbers, [K, ..., D]."""
        loc, scale, factor = self._parts(params, size)
        own, shared = noise.split([size, self.rank], -1)
        return loc + scale * (own + (factor @ shared.unsqueeze(-1)).squeeze(-1))

    def from_gaussian(self, mean: Tensor, scale_tril: Tensor) -> Tensor:
        """Return the R directions in which that Gaussian is widest for its conditional scales."""
        rank = min(self.rank, mean.shape[-1])
        root = scale_tril.double()
        variance, total = 1 / precisions(root), root.square().sum(-1)
        floor = 0.01 * variance
        # Principal axis factoring: directions for these scales, scales for these directions.
        for _ in range(_FACTORINGS):
            scale = variance.sqrt()
            left, values, _ = torch.linalg.svd(root / scale.unsqueeze(-1))
            over = (values[..., :rank].square() - 1).clamp_min(0.01).sqrt()
            factor = left[..., :rank] * over.unsqueeze(-2)
            variance = torch.maximum(total - (scale.unsqueeze(-1) * factor).square().sum(-1), floor)
        factor = torch.nn.functional.pad(factor, (0, self.rank - rank)).to(mean)
        return torch.cat([mean, scale.to(mean).log(), factor.flatten(-2)], -1)

    def _parts(self, params: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        loc, log_scale, factor = params.split([size, size, self.rank * size], -1)
        return loc, log_scale.exp(), factor.unflatten(-1, (size, self.rank))


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
