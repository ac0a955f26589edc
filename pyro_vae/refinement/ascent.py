"""Cycles from one start until each row has converged, and the checks of those that seem to have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.refinement.blocks import Block, per_row
from pyro_vae.refinement.climbing import Climber

CYCLE = 200  # steps between two comparisons
_SHORTER, _SHORTEST = 4.0, 1 / 64  # steps, after a cycle that lost
_MORE_EFFORT = 4  # for rows of which a first look at the slope cannot tell
_REPLICATES = 8  # of the slope
_SLOPE = 4.0  # what a step down the slope may promise, in tolerances
_REACH = 3.75  # standard deviations: of the draws of a check hardly one lies beyond
_WIDTH, _BINS = 1.5, 4  # of the tail


@dataclass(frozen=True, slots=True)
class Budget:
    """How long rows may climb from one start, and how exactly.

    Attributes:
        max_steps: of a row.
        tolerance: of the ELBO, in nats.
        bar: of progress, in steps.
    """

    max_steps: int
    tolerance: float
    bar: tqdm[Any]

    def more(self, max_steps: int) -> Budget:
        """Return the budget of another ascent, whose steps the bar shows on top."""
        self.bar.total = (self.bar.total or 0) + max_steps
        return replace(self, max_steps=max_steps)


@dataclass(frozen=True, slots=True)
class Ascent:
    """Where rows ended.

    Attributes:
        table: [N, P].
        converged: which rows have, [N].
    """

    table: Tensor
    converged: Tensor


def ascend(climber: Climber, start: Tensor, todo: Tensor, budget: Budget) -> Ascent:
    """Run cycles from a start until each row has converged.

    A cycle that loses is undone, and is no attempt that could have gained: the row's next one
    takes shorter steps.

    Args:
        climber: of the family.
        start: [N, P].
        todo: which rows, [N].
        budget: of each row.
    """
    table, settled = start.clone(), ~todo
    rate = torch.ones(table.shape[0], dtype=torch.float64, device=table.device)
    cycle, left, tolerance = 0, budget.max_steps, budget.tolerance
    while left > 0 and not bool(settled.all()):
        # Data that have settled leave the batch, where the model takes fewer.
        steps = min(CYCLE, left)
        for block in climber.blocks.at(torch.nonzero(~settled).flatten()):
            rows = block.rows
            before, open_rows = table[rows], ~settled[rows]
            done = climber.cycle(block, before, steps, cycle, rate[rows], tolerance)
            gain = done.gain.value
            better = per_row(open_rows & (gain > 0), before)
            table[rows] = torch.where(better, done.after, before)
            settled[rows] |= done.sound & (gain + 2 * done.gain.error < tolerance)
            rate[rows] = torch.where(
                done.sound,
                torch.where(gain > tolerance, 2 * rate[rows], rate[rows]).clamp(max=1.0),
                (rate[rows] / _SHORTER).clamp(min=_SHORTEST),
            )
        left, cycle = left - steps, cycle + 1
        budget.bar.update(steps)
        budget.bar.set_postfix_str(f"{int(settled.sum())} of {len(settled)} data have settled")
    return Ascent(table, _certified(climber, table, settled & todo, tolerance))


def _certified(climber: Climber, table: Tensor, claimed: Tensor, tolerance: float) -> Tensor:
    """Return which of the rows that claim to have converged pass the checks, [N]."""
    if not climber.blocks.family.has_density:
        return claimed
    passed, undecided = torch.zeros_like(claimed), claimed
    for effort in (1, _MORE_EFFORT):
        if not bool(undecided.any()):
            break
        still = torch.zeros_like(claimed)
        for block in climber.blocks.at(torch.nonzero(undecided).flatten()):
            rows = block.rows
            promised, error = _promise(climber.slopes(block, table[rows], effort * _REPLICATES))
            flat = promised + 2 * error < _SLOPE * tolerance
            still[rows] = ~flat & (promised < _SLOPE * tolerance)
            if effort == 1 and not climber.heavy:
                seen = _unseen(climber, block, table[rows]) < tolerance
                flat, still[rows] = flat & seen, still[rows] & seen
            passed[rows] |= flat
        undecided = still & undecided
    return passed & claimed


def _promise(slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a Newton step gains where the family is near the posterior, and its error, [n].

    In its own units the family's Fisher information is about one, and so is the curvature of
    the ELBO: the step gains half the square of the slope, of which there are estimates [R, n, ...].
    """
    slopes = slopes.flatten(2)
    mean, variance = slopes.mean(0), slopes.var(0) / slopes.shape[0]
    promised = 0.5 * (mean.square() - variance).sum(-1)
    error = (mean.square() * variance + 0.5 * variance.square()).sum(-1).sqrt()
    return promised, torch.nan_to_num(error, nan=torch.inf)


def _unseen(climber: Climber, block: Block, table: Tensor) -> Tensor:
    """Return how much of the ELBO lies beyond the reach of draws, along each axis, [n].

    An integrand such as exp(z) under a wide Gaussian has all its mean there, and its average over
    draws is then too good, whatever their spread says.
    """
    size = climber.blocks.num_noise
    middle = _REACH + _WIDTH * (torch.arange(_BINS, dtype=torch.float64) + 0.5)
    edges = _REACH + _WIDTH * torch.arange(_BINS + 1, dtype=torch.float64)
    mass = torch.special.ndtr(-edges).diff().neg()
    points = torch.cat([middle, -middle])
    noise = torch.einsum("k,ij->kij", points, torch.eye(size, dtype=torch.float64)).flatten(0, 1)
    weights = climber.log_weights(block, table, noise.to(table), 1).double()
    centre = climber.log_weights(block, table, torch.zeros_like(noise[:1]).to(table), 1).double()
    lost = (centre - weights).unflatten(0, (len(points), size)).sum(1)
    return torch.nan_to_num((torch.cat([mass, mass]).to(lost) @ lost).abs(), nan=torch.inf)
