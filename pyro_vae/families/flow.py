"""Normalizing flows as a family: each coordinate a spline of noise, given those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.families.base import Family
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.types import Distribution

__all__ = ["Flow"]

_BOUND = 4.0  # the spline bends noise within this many standard deviations
_NO_SHAPE = torch.Size()
_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Flow(Family):
    r"""An autoregressive flow of rational-quadratic splines (Durkan et al. 2019).

    .. math:: z_d = m_d + s_d\, \bigl(a_d + e^{b_d}\, \mathrm{spline}_d(\epsilon_d)\bigr),
        \quad \epsilon_d \sim \mathrm{Normal}(0, 1)

    where a, b and the knots of the spline are functions of the coordinates before d: linear
    in a (so that :class:`FullRankNormal` is a member), and through one layer of tanh units in
    all. Skewed, heavy-tailed and multimodal posteriors are within its reach. One density
    takes one pass; one draw takes D steps.

    All weights are the datum's own, so that an encoder and a table are two sources of the
    same family: P grows as D (3 bins + 1) (hidden + 1), which suits a dozen latents or two.

    The splines are zuko's: ``pip install 'pyro-vae[flows]'``.

    Args:
        bins: intervals of a spline.
        hidden: tanh units.

    Raises:
        ValueError: for bins < 2, or hidden < 1.
        ImportError: where zuko is not installed.

    Example:
        >>> Flow(bins=4, hidden=2).params_shape(1)
        (15,)
    """

    bins: int = 8
    hidden: int = 8
    anneals = True

    def __post_init__(self) -> None:
        for name, value, least in (("bins", self.bins, 2), ("hidden", self.hidden, 1)):
            object.__setattr__(self, name, as_count(name, value, least))
        _spline_type()

    @property
    def _shape(self) -> int:
        """Parameters of one coordinate's conditional: a, b, widths, heights, derivatives."""
        return 3 * self.bins + 1

    def params_shape(self, size: int) -> tuple[int, ...]:
        """Return (P,), for D coordinates."""
        return (sum(self._sizes(size)),)

    def initial(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return independent Gaussians: of the weights, only those into the tanh units differ."""
        size = mean.shape[-1]
        sizes = self._sizes(size)
        rest = mean.new_zeros(*mean.shape[:-1], sum(sizes[2:]))
        if size > 1:
            # Units that all start alike would stay alike.
            start, count = sum(sizes[2:4]), sizes[4]
            steps = torch.arange(count, device=mean.device, dtype=mean.dtype)
            rest[..., start : start + count] = torch.sin(1.0 + 2.4 * steps)
        return torch.cat([mean, std.log(), rest], -1)

    def conditional(
        self, params: Tensor, size: int, before: Tensor, columns: slice
    ) -> Distribution:
        """Return the flow's conditional, a distribution over real vectors."""
        return _Conditional(_Weights.of(self, params, size), before, columns)

    def from_noise(self, params: Tensor, size: int, noise: Tensor) -> Tensor:
        """Return draws made of noise, [K, ..., D]."""
        weights = _Weights.of(self, params, size)
        return weights.draw(noise.new_zeros(*noise.shape[:-1], 0), noise)

    def units(self, params: Tensor, size: int) -> Tensor:
        """Return the scales for the locations, and 1 or less for all else."""
        units = torch.ones_like(params)
        # Knots and weights act together: longer steps overshoot.
        units[..., 2 * size :] = 0.3
        units[..., :size] = params[..., size : 2 * size].exp()
        return units

    def _sizes(self, size: int) -> tuple[int, ...]:
        hidden = self.hidden if size > 1 else 0
        return (
            size,  # m
            size,  # log s
            size * self._shape,  # the conditionals' own parameters
            size * (size - 1) // 2,  # linear weights of a
            hidden * size,  # into the tanh units
            hidden,  # their biases
            size * self._shape * hidden,  # out of them
        )


@dataclass(frozen=True)
class _Weights:
    """A datum's parameters of a flow, each with the batch dimensions in front."""

    bins: int
    loc: Tensor  # [..., D]
    scale: Tensor  # [..., D]
    own: Tensor  # [..., D, shape]
    linear: Tensor  # [..., D, D], strictly lower triangular
    inward: Tensor  # [..., H, D], zero beyond a unit's degree
    bias: Tensor  # [..., H]
    outward: Tensor  # [..., D, shape, H], zero for units that see the coordinate

    @classmethod
    def of(cls, family: Flow, params: Tensor, size: int) -> _Weights:
        loc, log_scale, own, linear, inward, bias, outward = params.split(
            list(family._sizes(size)), -1
        )
        hidden, shape = bias.shape[-1], family._shape
        row, column = torch.tril_indices(size, size, -1, device=params.device)
        lower = params.new_zeros(*params.shape[:-1], size, size)
        lower[..., row, column] = linear
        # A unit of degree g sees coordinates 0 to g, and speaks to those after g.
        degree = torch.arange(hidden, device=params.device) % max(1, size - 1)
        coordinate = torch.arange(size, device=params.device)
        sees = (coordinate <= degree.unsqueeze(-1)).to(params)  # [H, D]
        return cls(
            bins=family.bins,
            loc=loc,
            scale=log_scale.exp(),
            own=own.unflatten(-1, (size, shape)),
            linear=lower,
            inward=inward.unflatten(-1, (hidden, size)) * sees,
            bias=bias,
            outward=outward.unflatten(-1, (size, shape, hidden)) * (1 - sees.mT).unsqueeze(1),
        )

    def splines(self, known: Tensor, columns: slice) -> tuple[Tensor, Tensor, Any]:
        """Return shift, log scale and spline of some coordinates.

        Args:
            known: standardized coordinates from the first on, [..., C]; those that a conditional
                may not see do not count, so C may be anything from columns.start on.
            columns: which.
        """
        count = known.shape[-1]
        own, linear = self.own[..., columns, :], self.linear[..., columns, :count]
        raw = own
        if count:
            # einsum: @ would copy the weights for each particle.
            seen = torch.einsum("...hc,...c->...h", self.inward[..., :count], known)
            units = torch.tanh(seen + self.bias)
            raw = own + torch.einsum("...dsh,...h->...ds", self.outward[..., columns, :, :], units)
            shift = raw[..., 0] + torch.einsum("...dc,...c->...d", linear, known)
        else:
            shift = raw[..., 0]
        widths, heights, slopes = raw[..., 2:].split([self.bins, self.bins, self.bins - 1], -1)
        spline = _spline_type()(widths, heights, slopes, bound=_BOUND)
        # Bounded, so that no product of weights overflows.
        return shift, 3 * torch.tanh(raw[..., 1] / 3), spline

    def standardized(self, value: Tensor, columns: slice) -> Tensor:
        return (value - self.loc[..., columns]) / self.scale[..., columns]

    def draw(self, before: Tensor, noise: Tensor) -> Tensor:
        """Return the coordinates after ``before``, made of noise, one after the other."""
        first = before.shape[-1]
        known = self.standardized(before, slice(0, first))
        found = [known.expand(*torch.broadcast_shapes(known.shape[:-1], noise.shape[:-1]), first)]
        for step in range(noise.shape[-1]):
            columns = slice(first + step, first + step + 1)
            shift, log_scale, spline = self.splines(torch.cat(found, -1), columns)
            found.append(shift + log_scale.exp() * spline(noise[..., step : step + 1]))
        drawn = slice(first, first + noise.shape[-1])
        standardized = torch.cat(found, -1)[..., first:]
        return self.loc[..., drawn] + self.scale[..., drawn] * standardized

    def coordinate_log_prob(self, before: Tensor, value: Tensor) -> Tensor:
        """Return the log density of each coordinate after ``before``, given those before it."""
        first = before.shape[-1]
        columns = slice(first, first + value.shape[-1])
        batch = torch.broadcast_shapes(before.shape[:-1], value.shape[:-1])
        whole = torch.cat([before.expand(*batch, -1), value.expand(*batch, -1)], -1)
        known = self.standardized(whole, slice(0, columns.stop))
        shift, log_scale, spline = self.splines(known, columns)
        bent = (known[..., columns] - shift) * torch.exp(-log_scale)
        noise = spline.inv(bent)
        slope = spline.log_abs_det_jacobian(noise, bent)
        normal = -0.5 * (noise.square() + _LOG_2PI)
        return normal - slope - log_scale - self.scale[..., columns].log()


class _Conditional(TorchDistribution):
    """Coordinates of a flow given those before them."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        weights: _Weights,
        before: Tensor,
        columns: slice,
        batch_shape: torch.Size | None = None,
    ) -> None:
        self._weights, self._before, self._columns = weights, before, columns
        if batch_shape is None:
            batch_shape = torch.broadcast_shapes(weights.bias.shape[:-1], before.shape[:-1])
        super().__init__(
            torch.Size(batch_shape), torch.Size([columns.stop - columns.start]), validate_args=False
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Conditional:
        """Return the distribution of another batch shape."""
        return _Conditional(self._weights, self._before, self._columns, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Return draws, differentiable by the parameters."""
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        noise = torch.randn(shape, dtype=self._weights.loc.dtype, device=self._weights.loc.device)
        return self._weights.draw(self._before, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, of the batch shape."""
        return self.coordinate_log_prob(value).sum(-1)

    def coordinate_log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of each coordinate given those before it."""
        return self._weights.coordinate_log_prob(self._before, value)


def _spline_type() -> Any:
    try:
        from zuko.transforms import MonotonicRQSTransform
    except ImportError as error:
        raise ImportError("families.Flow needs zuko: pip install 'pyro-vae[flows]'") from error
    return MonotonicRQSTransform
