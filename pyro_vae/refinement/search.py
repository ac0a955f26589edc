"""The best of several starts for each row: the likeliest first, then those that may end higher."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vae.refinement.ascent import CYCLE, Ascent, Budget, ascend
from pyro_vae.refinement.blocks import Block, per_row
from pyro_vae.refinement.climbing import Climber, Gain
from pyro_vae.refinement.starts import best_of

_RIVAL_CYCLES = 2  # of another start, before it is compared
_MARGIN, _MOST_MARGIN = 3.0, 10.0  # nats by which a start may lie below, and end higher
_PLAIN_CYCLES = 5  # before draws are sent into the tails
_MOST_HEAVY = 16  # coordinates of a datum whose tails draws can be sent into
_APART = 1.5  # starts: so many standard deviations, and twice as many of many coordinates
_POINT_WIDTH = 1e-3  # of a family of points, in standard deviations of the prior


@dataclass(frozen=True, slots=True)
class _Attempt:
    """The ascent from each row's best start."""

    climber: Climber
    todo: Tensor  # which rows, [N]
    starts: Tensor  # [C, N, P]
    chosen: Tensor  # the number of the best, [N]
    ended: Ascent


def search(climber: Climber, starts: Tensor, budget: Budget) -> Ascent:
    """Return the best table that starts lead to, and which rows have converged.

    Args:
        climber: of the family.
        starts: [C, N, P].
        budget: of a row from one start.
    """
    everything = torch.ones(starts.shape[1], dtype=torch.bool, device=starts.device)
    blocks = climber.blocks
    may_reach = blocks.family.has_density and blocks.size <= _MOST_HEAVY
    plain_steps = _PLAIN_CYCLES * CYCLE if may_reach else budget.max_steps
    first = replace(budget, max_steps=min(budget.max_steps, plain_steps))
    plain = _from_best(climber, starts, everything, first)
    table, converged = plain.ended.table, plain.ended.converged
    heavy = ~converged & may_reach
    attempts = [replace(plain, todo=~heavy)]
    if bool(heavy.any()):
        # What plain draws cannot settle may lie in tails that they do not reach.
        more = torch.cat([starts, table.unsqueeze(0)])
        reaching = Climber(blocks, heavy=True)
        attempts.append(_from_best(reaching, more, heavy, budget.more(budget.max_steps)))
    for attempt in attempts:
        if bool(attempt.todo.any()):
            best = _challenge(attempt, budget)
            table = torch.where(per_row(attempt.todo, table), best.table, table)
            converged = torch.where(attempt.todo, best.converged, converged)
    return Ascent(table, converged)


def _from_best(climber: Climber, starts: Tensor, todo: Tensor, budget: Budget) -> _Attempt:
    """Climb from the start where each row has the highest ELBO."""
    chosen = torch.zeros_like(todo, dtype=torch.long)
    for block in climber.blocks.at(torch.nonzero(todo).flatten()):
        chosen[block.rows] = best_of(climber, block, starts[:, block.rows])[0]
    table = starts[chosen, torch.arange(len(chosen), device=chosen.device)]
    return _Attempt(climber, todo, starts, chosen, ascend(climber, table, todo, budget))


def _challenge(attempt: _Attempt, budget: Budget) -> Ascent:
    """Try the other starts, where a row is in doubt or a start may end higher."""
    climber, todo = attempt.climber, attempt.todo
    table, converged = attempt.ended.table, attempt.ended.converged
    hopeful = _hopeful(attempt, budget.tolerance)
    for number, start in enumerate(attempt.starts):
        tried = todo & (attempt.chosen != number) & (~converged | hopeful[number])
        if not bool(tried.any()):
            continue
        steps = min(budget.max_steps, _RIVAL_CYCLES * CYCLE)
        rival = ascend(climber, start, tried, budget.more(steps))
        passed = rival.converged
        gain = _gain(climber, table, rival.table, tried, budget.tolerance)
        higher = tried & (gain.value > 2 * gain.error) & (gain.value > 0)
        if bool((unfinished := higher & ~passed).any()):
            rival = ascend(climber, rival.table, unfinished, budget.more(budget.max_steps))
            passed = passed | rival.converged
        better = higher | (tried & passed & ~converged & (gain.value > -budget.tolerance))
        table = torch.where(per_row(better, table), rival.table, table)
        converged = torch.where(better, passed, converged)
    return Ascent(table, converged)


def _hopeful(attempt: _Attempt, tolerance: float) -> Tensor:
    """Return for which rows a start is elsewhere, and not so low that it cannot win, [C, N]."""
    table, starts = attempt.ended.table, attempt.starts
    found = torch.zeros(starts.shape[:2], dtype=torch.bool, device=table.device)
    for block in attempt.climber.blocks.at(torch.nonzero(attempt.todo).flatten()):
        here, there = table[block.rows], starts[:, block.rows]
        _, elbos = best_of(attempt.climber, block, torch.cat([here.unsqueeze(0), there]))
        margin = min(_MARGIN + attempt.climber.blocks.size / 4, _MOST_MARGIN)
        higher = elbos[1:] > elbos[0] + tolerance
        apart = _apart(attempt.climber, block, here, there)
        found[:, block.rows] = higher | (apart & (elbos[1:] > elbos[0] - margin))
    return found


def _apart(climber: Climber, block: Block, here: Tensor, there: Tensor) -> Tensor:
    """Return which tables [C, n, P] lie far from one, in units of the narrower: [C, n]."""
    family, size = climber.blocks.family, climber.blocks.size
    noise = climber.noise(block, 2 * size + 2, here).spread(len(here))
    draws = family.from_noise(here, size, noise)
    centre = here.new_zeros(1, *noise.shape[1:])
    away = torch.cat([family.from_noise(t, size, centre) for t in there]) - draws.mean(0)
    width = _POINT_WIDTH * block.prior_scale
    if family.has_density:  # a narrow start within a wide answer is elsewhere too
        widths = [family.from_noise(t, size, noise).std(0) for t in there]
        width = torch.stack([torch.minimum(draws.std(0), w) for w in widths])
    distance = _APART if size <= _MOST_HEAVY else 2 * _APART
    return (away.abs() > distance * width).any(-1)


def _gain(climber: Climber, before: Tensor, after: Tensor, which: Tensor, tolerance: float) -> Gain:
    """Return what some rows gain from one table to another, [N] each; zero for the others."""
    found = before.new_zeros(2, before.shape[0], dtype=torch.float64)
    for block in climber.blocks.at(torch.nonzero(which).flatten()):
        rows = block.rows
        gain = climber.gain(block, before[rows], after[rows], tolerance, _RIVAL_CYCLES)
        found[:, rows] = torch.stack([gain.value, gain.error])
    return Gain(*found)
