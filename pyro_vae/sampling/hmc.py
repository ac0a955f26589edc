"""Hamiltonian Monte Carlo, many chains of many data in one step; tensors in and out, no model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vae.sampling.streams import Stream

_DIVERGED = 1000.0  # nats of energy that a trajectory may gain
_JITTER = 0.25  # of the step size
# Of dual averaging (Hoffman & Gelman 2014, section 3.2).
_SHRINKAGE, _DELAY, _DECAY = 0.05, 10.0, 0.75


@dataclass(frozen=True, slots=True)
class Point:
    r"""Where chains are, and the terms of their log densities there.

    The density to the power :math:`\beta` is
    :math:`\log f_\beta(z) = \log f_0(z) + \beta \log r(z)`.

    Attributes:
        z: unconstrained coordinates, [C, N, D].
        base: log f_0, [C, N], in nats.
        ratio: log r, [C, N], in nats.
        base_slope: gradient of log f_0 by z, [C, N, D].
        ratio_slope: gradient of log r by z, [C, N, D].
    """

    z: Tensor
    base: Tensor
    ratio: Tensor
    base_slope: Tensor
    ratio_slope: Tensor

    def height(self, power: Tensor) -> Tensor:
        """Return log f of a power [N], [C, N] in float64; minus infinity where it is no number."""
        height = self.base.double() + power * self.ratio.double()
        return torch.nan_to_num(height, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

    def slope(self, power: Tensor) -> Tensor:
        """Return the gradient of log f of a power [N], [C, N, D]."""
        return self.base_slope + power.to(self.z).unsqueeze(-1) * self.ratio_slope

    def where(self, moved: Tensor, other: Point) -> Point:
        """Return this point for the chains [C, N] that moved, another one for the rest."""
        wide = moved.unsqueeze(-1)
        return Point(
            torch.where(wide, self.z, other.z),
            torch.where(moved, self.base, other.base),
            torch.where(moved, self.ratio, other.ratio),
            torch.where(wide, self.base_slope, other.base_slope),
            torch.where(wide, self.ratio_slope, other.ratio_slope),
        )


Density = Callable[[Tensor], Point]  # of z, [C, N, D]


@dataclass(frozen=True, slots=True)
class Kernel:
    """How a trajectory runs.

    Attributes:
        step: the step size of each datum, in units of the scale, [N].
        scale: about a root of the posterior's covariance: a Cholesky factor, [N, D, D], or the
            standard deviation of each coordinate, [N, D].
        num_steps: leapfrog steps of a trajectory. Their size varies by a quarter from one to the
            next, so that no direction comes back to where it began again and again.
    """

    step: Tensor
    scale: Tensor
    num_steps: int

    def __call__(
        self, density: Density, at: Point, power: Tensor, stream: Stream
    ) -> tuple[Point, Tensor, Tensor]:
        """Move every chain once, leaving f of the power [N] invariant.

        Returns:
            The new point; the probability of acceptance, [C, N], float64; and which trajectories
            diverged, [C, N].
        """
        momentum = stream.normal(at.z)
        jitter = 1 + _JITTER * (2 * stream.uniform(self.step.new_empty(())) - 1)
        kernel = replace(self, step=jitter * self.step)
        end, final = kernel._leapfrog(density, at, power, momentum)
        energy = at.height(power) - 0.5 * momentum.double().square().sum(-1)
        gain = end.height(power) - 0.5 * final.double().square().sum(-1) - energy
        # From where the density is zero any place with a density is a gain.
        gain = torch.nan_to_num(gain, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        acceptance = gain.clamp_max(0.0).exp()
        accepted = stream.uniform(acceptance) < acceptance
        return end.where(accepted, at), acceptance, gain < -_DIVERGED

    def _scaled(self, rows: Tensor, *, transposed: bool = False) -> Tensor:
        """Return rows [C, N, D] times step and scale, or the transposed scale."""
        rows = self.step.to(rows).unsqueeze(-1) * rows
        if self.scale.ndim == 2:
            return self.scale * rows
        return torch.einsum("nde,cne->cnd", self.scale.mT if transposed else self.scale, rows)

    def _leapfrog(
        self, density: Density, at: Point, power: Tensor, momentum: Tensor
    ) -> tuple[Point, Tensor]:
        """Return where a trajectory ends, and the momentum there; nan where it has left."""
        point = at
        momentum = momentum + 0.5 * self._scaled(at.slope(power), transposed=True)
        for step in range(self.num_steps):
            z = point.z + self._scaled(momentum)
            lost = ~z.isfinite().all(-1, keepdim=True)
            # A model may take no other numbers than finite ones: the chain stays, and is rejected.
            point = density(torch.where(lost, at.z, z))
            half = 0.5 if step == self.num_steps - 1 else 1.0
            momentum = momentum + half * self._scaled(point.slope(power), transposed=True)
            momentum = momentum.masked_fill(lost, math.nan)
        return point, momentum


class StepSizes:
    """Step sizes, one per datum, that dual averaging brings to a wanted acceptance.

    Args:
        start: [N].
        target: the wanted probability of acceptance.
    """

    def __init__(self, start: Tensor, target: float) -> None:
        self._target = target
        self.restart(start.double())

    def restart(self, start: Tensor) -> None:
        """Begin anew from step sizes [N]."""
        self._centre = (10 * start).log()
        self.current = start
        self._log_average, self._error, self._count = start.log(), torch.zeros_like(start), 0

    def update(self, acceptance: Tensor) -> None:
        """Learn from the mean acceptance of a datum's chains, [N]."""
        self._count += 1
        share = 1 / (self._count + _DELAY)
        self._error += share * (self._target - acceptance - self._error)
        log_step = self._centre - self._error * self._count**0.5 / _SHRINKAGE
        self.current = log_step.exp()
        weight = self._count**-_DECAY
        self._log_average += weight * (log_step - self._log_average)

    @property
    def average(self) -> Tensor:
        """The step sizes to go on with, [N]."""
        return self._log_average.exp()
