"""Whether a row of a table is at its optimum: the slope there, and tails that no draw reaches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.refinement.blocks import Block
from pyro_vae.refinement.climbing import Climber

__all__ = ["Promise", "slope_promises", "unseen"]

_REPLICATES = 8  # of the slope
_SLOPE = 4.0  # what a step down the slope may promise, in tolerances
_REACH = 3.75  # standard deviations: of the draws of a check hardly one lies beyond
_WIDTH, _BINS = 1.5, 4  # of the tail


@dataclass(frozen=True, slots=True)
class Promise:
    """Which rows a step up the slope promises little.

    Attributes:
        little: where that is so, two standard errors included, [n].
        undecided: where it is so without them alone: more particles may tell, [n].
    """

    little: Tensor
    undecided: Tensor


def slope_promises(
    climber: Climber, block: Block, table: Tensor, tolerance: float, effort: int
) -> Promise:
    """Return which rows have hardly a slope left.

    Args:
        climber: of the family.
        block: of n data.
        table: their rows, [n, P].
        tolerance: of the ELBO, in nats.
        effort: how many times the particles of a first look.
    """
    slopes = climber.slopes(block, table, range(effort * _REPLICATES)).flatten(2)
    promised, error = _newton_gain(slopes)
    little = promised + 2 * error < _SLOPE * tolerance
    return Promise(little, ~little & (promised < _SLOPE * tolerance))


def _newton_gain(slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a Newton step gains where the family is near the posterior, and its error, [n].

    In its own units the family's Fisher information is about one, and so is the curvature of
    the ELBO: the step gains half the square of the slope.

    Args:
        slopes: independent estimates, [R, n, P].
    """
    mean, variance = slopes.mean(0), slopes.var(0) / slopes.shape[0]
    promised = 0.5 * (mean.square() - variance).sum(-1)
    error = (mean.square() * variance + 0.5 * variance.square()).sum(-1).sqrt()
    return promised, torch.nan_to_num(error, nan=torch.inf)


def unseen(climber: Climber, block: Block, table: Tensor) -> Tensor:
    """Return how much of the ELBO lies beyond the reach of draws, along each axis, [n].

    An integrand such as exp(z) under a wide Gaussian has all its mean there, and its average over
    draws is then too good, whatever their spread says.

    Args:
        climber: of the family.
        block: of n data.
        table: their rows, [n, P].
    """
    size = climber.blocks.family.num_noise(block.size)
    middle = _REACH + _WIDTH * (torch.arange(_BINS, dtype=torch.float64) + 0.5)
    edges = _REACH + _WIDTH * torch.arange(_BINS + 1, dtype=torch.float64)
    mass = torch.special.ndtr(-edges).diff().neg()
    points = torch.cat([middle, -middle])
    noise = torch.einsum("k,ij->kij", points, torch.eye(size, dtype=torch.float64)).flatten(0, 1)
    weights = climber.log_weights(block, table, noise.to(table), 1).double()
    centre = climber.log_weights(block, table, torch.zeros_like(noise[:1]).to(table), 1).double()
    lost = (centre - weights).unflatten(0, (len(points), size)).sum(1)
    return torch.nan_to_num((torch.cat([mass, mass]).to(lost) @ lost).abs(), nan=torch.inf)
