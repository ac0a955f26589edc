"""Cycles from one start until each row has converged, and the checks of those that seem to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.refinement.blocks import Block, per_row
from pyro_vae.refinement.certificate import slope_promises, unseen
from pyro_vae.refinement.climbing import Climber, Gain, climb_points

__all__ = ["CYCLE", "Ascent", "Budget", "ascend"]

CYCLE = 200  # steps between two comparisons
_FEWEST_STEPS = 20  # of a cycle that could have gained something
# In the first two cycles; each one after takes twice as many, up to 2**_DOUBLINGS times.
_PARTICLES = 8  # of a gradient
_DOUBLINGS = 3
# With so many their noise costs less than this, in nats; it falls as their number grows.
_NOISE = 0.02
_SHORTER, _SHORTEST = 4.0, 1 / 64  # steps, after a cycle that lost
_MORE_EFFORT = 4  # for rows of which a first look at the slope cannot tell


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


@dataclass(frozen=True, slots=True)
class _Cycle:
    """What a cycle did to rows: their new place, the gain, and whether it could have gained."""

    after: Tensor
    gain: Gain
    sound: Tensor


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
            done = _run_cycle(climber, block, before, steps, cycle, rate[rows], tolerance)
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


def _run_cycle(
    climber: Climber,
    block: Block,
    before: Tensor,
    steps: int,
    cycle: int,
    rate: Tensor,
    tolerance: float,
) -> _Cycle:
    if not climber.blocks.family.has_density:
        done = climb_points(block, before, steps)
        gain = Gain(done.gain, torch.zeros_like(done.gain))
        return _Cycle(done.after, gain, done.promised < tolerance)
    particles = _particles(cycle, tolerance)
    after = climber.climb(block, before, steps, particles, cycle, rate)
    gain = climber.gain(block, before, after, tolerance, cycle)
    return _Cycle(after, gain, (gain.value > -tolerance) & (steps >= _FEWEST_STEPS))


def _particles(cycle: int, tolerance: float) -> int:
    """Return how many particles a gradient is made of."""
    if cycle == 0:
        return _PARTICLES
    doublings = cycle - 1 + max(0, math.ceil(math.log2(_NOISE / tolerance)))
    return _PARTICLES << min(doublings, _DOUBLINGS)


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
            promise = slope_promises(climber, block, table[rows], tolerance, effort)
            little, open_ = promise.little, promise.undecided
            if effort == 1 and not climber.heavy:
                seen = unseen(climber, block, table[rows]) < tolerance
                little, open_ = little & seen, open_ & seen
            passed[rows] |= little
            still[rows] = open_
        undecided = still & undecided
    return passed & claimed
