"""Normalizing flows as a family: each coordinate a spline of noise, given those before it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.families.gaussian import LocatedFamily
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.types import Distribution

_BOUND = 4.0  # the spline bends noise within this many standard deviations
_NO_SHAPE = torch.Size()
_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Flow(LocatedFamily):
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
        sizes = self._sizes(mean.shape[-1])
        rest = mean.new_zeros(*mean.shape[:-1], sum(sizes[2:]))
        # Units that all start alike would stay alike.
        start, count = sum(sizes[2:4]), sizes[4]
        steps = torch.arange(count, device=mean.device, dtype=mean.dtype)
        rest[..., start : start + count] = torch.sin(1.0 + 2.4 * steps)
        return torch.cat([mean, std.log(), rest], -1)

    def conditional(
        self, params: Tensor, size: int, before: Tensor, columns: slice
    ) -> Distribution:
        """Return the flow's conditional, a distribution over real vectors."""
        return _Conditional(self, params, size, before, columns)

    def from_noise(self, params: Tensor, size: int, noise: Tensor) -> Tensor:
        """Return draws made of noise, [K, ..., D]."""
        return _Conditional(self, params, size, noise.new_zeros(0), slice(0, size)).draw(noise)

    def units(self, params: Tensor, size: int) -> Tensor:
        """Return the scales for the locations, and 1 or less for all else."""
        units = super().units(params, size)
        units[..., 2 * size :] = 0.3  # knots and weights act together: longer steps overshoot
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


class _Conditional(TorchDistribution):
    """Coordinates of a flow given those before them, with all weights of their datum."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, family: Flow, params: Tensor, size: int, before: Tensor, columns: slice
    ) -> None:
        sizes, shape = family._sizes(size), family._shape
        loc, log_scale, own, linear, inward, bias, outward = params.split(list(sizes), -1)
        hidden = bias.shape[-1]
        # A unit of degree g sees coordinates 0 to g, and speaks to those after g.
        degree = torch.arange(hidden, device=params.device) % max(1, size - 1)
        coordinate = torch.arange(size, device=params.device)
        sees = (coordinate <= degree.unsqueeze(-1)).to(params)  # [H, D]
        row, column = torch.tril_indices(size, size, -1, device=params.device)
        self._linear = params.new_zeros(*params.shape[:-1], size, size)
        self._linear[..., row, column] = linear
        self._loc, self._scale, self._bias = loc, log_scale.exp(), bias
        self._own = own.unflatten(-1, (size, shape))
        self._inward = inward.unflatten(-1, (hidden, size)) * sees
        self._outward = outward.unflatten(-1, (size, shape, hidden)) * (1 - sees.mT).unsqueeze(1)
        self._bins, self._before, self._columns = family.bins, before, columns
        batch_shape = torch.broadcast_shapes(params.shape[:-1], before.shape[:-1])
        events = torch.Size([columns.stop - columns.start])
        super().__init__(batch_shape, events, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Conditional:
        """Return the distribution of another batch shape."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Return draws, differentiable by the parameters."""
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        return self.draw(torch.randn(shape, dtype=self._loc.dtype, device=self._loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, of the batch shape."""
        return self.coordinate_log_prob(value).sum(-1)

    def _splines(self, known: Tensor, columns: slice) -> tuple[Tensor, Tensor, Any]:
        """Return shift, log scale and spline of some coordinates.

        Args:
            known: standardized coordinates from the first on, [..., C]; those that a conditional
                may not see do not count, so C may be anything from columns.start on.
            columns: which.
        """
        count = known.shape[-1]
        raw = self._own[..., columns, :]
        if count:
            # einsum: @ would copy the weights for each particle.
            seen = torch.einsum("...hc,...c->...h", self._inward[..., :count], known)
            units = torch.tanh(seen + self._bias)
            raw = raw + torch.einsum("...dsh,...h->...ds", self._outward[..., columns, :, :], units)
        shift = raw[..., 0]
        if count:
            linear = self._linear[..., columns, :count]
            shift = shift + torch.einsum("...dc,...c->...d", linear, known)
        widths, heights, slopes = raw[..., 2:].split([self._bins, self._bins, self._bins - 1], -1)
        spline = _spline_type()(widths, heights, slopes, bound=_BOUND)
        # Bounded, so that no product of weights overflows.
        return shift, 3 * torch.tanh(raw[..., 1] / 3), spline

    def _standardized(self, value: Tensor) -> Tensor:
        """Return coordinates from the first on in units of their scales."""
        count = value.shape[-1]
        return (value - self._loc[..., :count]) / self._scale[..., :count]

    def draw(self, noise: Tensor) -> Tensor:
        """Return the coordinates, made of noise, one after the other."""
        known, first = self._standardized(self._before), self._columns.start
        found = [known.expand(*torch.broadcast_shapes(known.shape[:-1], noise.shape[:-1]), first)]
        for step in range(noise.shape[-1]):
            column = slice(first + step, first + step + 1)
            shift, log_scale, spline = self._splines(torch.cat(found, -1), column)
            found.append(shift + log_scale.exp() * spline(noise[..., step : step + 1]))
        drawn = torch.cat(found, -1)[..., first:]
        return self._loc[..., self._columns] + self._scale[..., self._columns] * drawn

    def coordinate_log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of each coordinate given those before it."""
        batch = torch.broadcast_shapes(self._before.shape[:-1], value.shape[:-1])
        parts = [part.expand(*batch, -1) for part in (self._before, value)]
        known = self._standardized(torch.cat(parts, -1))
        shift, log_scale, spline = self._splines(known, self._columns)
        bent = (known[..., self._columns] - shift) * torch.exp(-log_scale)
        noise = spline.inv(bent)
        slope = spline.log_abs_det_jacobian(noise, bent)
        normal = -0.5 * (noise.square() + _LOG_2PI)
        return normal - slope - log_scale - self._scale[..., self._columns].log()


def _spline_type() -> Any:
    try:
        from zuko.transforms import MonotonicRQSTransform
    except ImportError as error:
        raise ImportError("families.Flow needs zuko: pip install 'pyro-vae[flows]'") from error
    return MonotonicRQSTransform
