"""Draws that a guide has moved after it drew them: their noise, and densities of them alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.programs.types import Distribution

NOISE_SITE = "_annealing_noise"  # of a guide: the standard normal numbers that draws are made of
WORK_SITE = "_annealing_work"  # of a guide: what their log density gained on the way

_NO_SHAPE = torch.Size()


class Noise(TorchDistribution):
    """Standard normal numbers whose density is counted with what is made of them: here it is one.

    Args:
        size: numbers in an event.
        like: of their dtype and on their device.
        batch_shape: of the distribution.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, size: int, like: Tensor, batch_shape: Any = _NO_SHAPE) -> None:
        self._like = like
        super().__init__(torch.Size(batch_shape), torch.Size([size]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Noise:
        """Return the distribution of another batch shape."""
        return Noise(self.event_shape[0], self._like, batch_shape)

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Return standard normal numbers."""
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        return torch.randn(shape, dtype=self._like.dtype, device=self._like.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zero."""
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        return torch.zeros(shape, dtype=self._like.dtype, device=self._like.device)


class Moved(TorchDistribution):
    """The proposal that scores a draw which was moved: a part of the density of that draw alone.

    Another draw was moved in another way, which nothing tells: its density is NaN.

    Args:
        base: the proposal, over the reals.
        draw: of it, moved, ``[..., *event]``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, base: Any, draw: Tensor) -> None:
        self._base, self._draw = base, draw
        shape = draw.shape[: draw.ndim - len(base.event_shape)]
        batch_shape = torch.broadcast_shapes(base.batch_shape, shape)
        super().__init__(batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The reals."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Moved:
        """Return the distribution of another batch shape."""
        shape = torch.Size(batch_shape)
        return Moved(self._base, self._draw.expand(shape + self.event_shape))

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Return the draw; ValueError where several are asked for."""
        if len(sample_shape):
            raise ValueError("a draw that was moved is one: run the guide for each further one")
        return self._draw.expand(self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the proposal's log density at the draw; NaN where the value is another one."""
        found = self._base.log_prob(value)
        # The steps of a draw amplify what rounding makes of it in another run.
        room = torch.finfo(self._draw.dtype).eps ** 0.25 * (1 + self._draw.detach().abs())
        other = (value - self._draw).detach().abs() > room
        if events := len(self.event_shape):
            other = other.flatten(-events).any(-1)
        return torch.where(other, torch.nan, found)


def moved(proposal: Distribution, draw: Tensor) -> Distribution:
    """Return a site's proposal for a draw that was moved, in unconstrained coordinates."""
    if isinstance(proposal, torch.distributions.TransformedDistribution):
        base: Any = Moved(proposal.base_dist, draw)
        return dist.TransformedDistribution(base, proposal.transforms)
    return Moved(proposal, draw)


def refuse_moved(names: Iterable[str], what: str) -> None:
    """Raise ValueError for a guide whose draws are moved, where its density at fixed draws counts.

    Args:
        names: of the guide's sites.
        what: that needs the density, and another one to take.
    """
    if NOISE_SITE in names:
        raise ValueError(
            f"the guide's family is Annealed, which moves its draws along the model's gradient and "
            f"has no density of given draws: {what}"
        )
