"""The best of several starts for each row: cycles from each until rows converge, and checks."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vae.refinement.blocks import Block, per_row
from pyro_vae.refinement.climbing import Climber, Cycle
from pyro_vae.refinement.starts import best_of

_CYCLE = 200  # steps between two comparisons
_SHORTER, _SHORTEST = 4.0, 1 / 64  # steps, after a cycle that lost
_MORE_EFFORT = 4  # for rows of which a first look at the slope cannot tell
_REPLICATES = 8  # of the slope
_SLOPE = 4.0  # what a step down the slope may promise, in tolerances
_REACH = 3.75  # standard deviations: of the draws of a check hardly one lies beyond
_WIDTH, _BINS = 1.5, 4  # of the tail
_RIVAL_CYCLES = 2  # of another start, before it is compared
_MARGIN, _MOST_MARGIN = 3.0, 10.0  # nats by which a start may lie below, and end higher
_PLAIN_CYCLES = 5  # before draws are sent into the tails
_MOST_HEAVY = 16  # coordinates of a datum whose tails draws can be sent into
_APART = 1.5  # starts: so many standard deviations, and twice as many of many coordinates
_LOOKED_AT = 256  # draws of each start, before a row is given up
_POINT_WIDTH = 1e-3  # of a family of points, in standard deviations of the prior


@dataclass(frozen=True, slots=True)
class Ascent:
    """Where rows ended.

    Attributes:
        table: [N, P].
        converged: which rows have, [N].
    """

    table: Tensor
    converged: Tensor


def ascend(climber: Climber, start: Tensor, todo: Tensor, max_steps: int) -> Ascent:
    """Run cycles from a start [N, P] until each row to do, [N], has converged.

    A cycle that loses is undone, and is no attempt that could have gained: the row's next one
    takes shorter steps.
    """
    table, settled = start.clone(), ~todo
    rate = torch.ones(table.shape[0], dtype=torch.float64, device=table.device)
    cycle, left, tolerance = 0, max_steps, climber.tolerance
    while left > 0 and not bool(settled.all()):
        # Data that have settled leave the batch, where the model takes fewer.
        steps = min(_CYCLE, left)
        cycled = functools.partial(_cycled, climber, table, rate, steps, cycle)
        for rows, done in climber.blocks.over(torch.nonzero(~settled).flatten(), cycled):
            before, open_rows = table[rows], ~settled[rows]
            better = per_row(open_rows & (done.gain > 0), before)
            table[rows] = torch.where(better, done.after, before)
            settled[rows] |= done.sound & (done.gain + 2 * done.error < tolerance)
            longer = torch.where(done.gain > tolerance, 2 * rate[rows], rate[rows]).clamp(max=1.0)
            shorter = (rate[rows] / _SHORTER).clamp(min=_SHORTEST)
            rate[rows] = torch.where(done.sound, longer, shorter)
        left, cycle = left - steps, cycle + 1
        climber.bar.update(steps)
        climber.bar.set_postfix_str(f"{int(settled.sum())} of {len(settled)} data have settled")
    return Ascent(table, _certified(climber, table, settled & todo))


def _cycled(
    climber: Climber, table: Tensor, rate: Tensor, steps: int, number: int, block: Block
) -> Cycle:
    return climber.cycle(block, table[block.rows], steps, number, rate[block.rows])


def _certified(climber: Climber, table: Tensor, claimed: Tensor) -> Tensor:
    """Return which of the rows that claim to have converged pass the checks, [N]."""
    if not climber.blocks.family.has_density:
        return claimed
    passed, undecided = torch.zeros_like(claimed), claimed
    for effort in (1, _MORE_EFFORT):
        if not bool(undecided.any()):
            break
        still = torch.zeros_like(claimed)
        decided = functools.partial(_decided, climber, table, effort)
        rows = torch.nonzero(undecided).flatten()
        for some, (flat, unsure) in climber.blocks.over(rows, decided):
            still[some] = unsure
            passed[some] |= flat
        undecided = still & undecided
    return passed & claimed


def _decided(climber: Climber, table: Tensor, effort: int, block: Block) -> tuple[Tensor, Tensor]:
    """Return which rows of a block pass, and of which that cannot be told, [n] each."""
    rows = table[block.rows]
    promised, error = promise(climber, block, rows, effort)
    most = _SLOPE * climber.tolerance
    flat = promised + 2 * error < most
    unsure = ~flat & (promised < most)
    if effort == 1 and not climber.heavy:
        seen = _unseen(climber, block, rows) < climber.tolerance
        flat, unsure = flat & seen, unsure & seen
    return flat, unsure


def promise(
    climber: Climber, block: Block, table: Tensor, effort: int = 1
) -> tuple[Tensor, Tensor]:
    """Return what a Newton step gains where the family is near the posterior, and its error, [n].

    In its own units the family's Fisher information is about one, and so is the curvature of
    the ELBO: the step gains half the square of the slope, of which independent estimates are taken.
    """
    slopes = climber.slopes(block, table, effort * _REPLICATES).flatten(2)
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
    steps = torch.arange(_BINS + 1, dtype=torch.float64)
    middle = _REACH + _WIDTH * (steps[:-1] + 0.5)
    mass = torch.special.ndtr(-(_REACH + _WIDTH * steps)).diff().neg()
    points = torch.cat([middle, -middle])
    noise = torch.einsum("k,ij->kij", points, torch.eye(size, dtype=torch.float64)).flatten(0, 1)
    weights = climber.log_weights(block, table, noise.to(table), 1).double()
    centre = climber.log_weights(block, table, torch.zeros_like(noise[:1]).to(table), 1).double()
    lost = (centre - weights).unflatten(0, (len(points), size)).sum(1)
    return torch.nan_to_num((torch.cat([mass, mass]).to(lost) @ lost).abs(), nan=torch.inf)


def search(climber: Climber, starts: Tensor, max_steps: int) -> Ascent:
    """Return the best table that starts [C, N, P] lead to, and which rows have converged.

    A row takes ``max_steps`` at most from one start.
    """
    everything = ~_hopeless(climber, starts)
    may_reach = climber.blocks.family.has_density and climber.blocks.size <= _MOST_HEAVY
    plain_steps = min(max_steps, _PLAIN_CYCLES * _CYCLE) if may_reach else max_steps
    chosen, ended = _from_best(climber, starts, everything, plain_steps)
    heavy = everything & ~ended.converged & may_reach
    best = _challenge(climber, everything & ~heavy, starts, chosen, ended, max_steps)
    if not bool(heavy.any()):
        return best
    # What plain draws cannot settle may lie in tails that they do not reach.
    climber, starts = replace(climber, heavy=True), torch.cat([starts, ended.table.unsqueeze(0)])
    chosen, ended = _from_best(climber, starts, heavy, climber.more(max_steps))
    reached = _challenge(climber, heavy, starts, chosen, ended, max_steps)
    table = torch.where(per_row(heavy, best.table), reached.table, best.table)
    return Ascent(table, torch.where(heavy, reached.converged, best.converged))


def _hopeless(climber: Climber, starts: Tensor) -> Tensor:
    """Return for which rows the model has no density at any draw of any start, [N].

    Draws into the tails are among them. A datum that the model does not allow is such: no slope
    says where its posterior might be, and no number of steps finds it.
    """
    found = torch.zeros(starts.shape[1], dtype=torch.bool, device=starts.device)
    may_reach = climber.blocks.family.has_density and climber.blocks.size <= _MOST_HEAVY
    ways = (climber, replace(climber, heavy=True)) if may_reach else (climber,)

    def lost(block: Block) -> Tensor:
        _, elbos = best_of(climber, block, starts[:, block.rows])
        low = elbos.isneginf().all(0)  # of one draw without density it is minus infinity
        for way in ways if bool(low.any()) else ():
            _, noise = way.noise(_LOOKED_AT)
            for start in starts[:, block.rows]:
                weights = way.log_weights(block, start, noise, 1)
                low &= ~weights.isfinite().any(0)
        return low

    for rows, low in climber.blocks.over(torch.arange(len(found), device=found.device), lost):
        found[rows] = low
    return found


def _from_best(
    climber: Climber, starts: Tensor, todo: Tensor, max_steps: int
) -> tuple[Tensor, Ascent]:
    """Climb from the start where each row has the highest ELBO; return their numbers too, [N]."""
    chosen = torch.zeros_like(todo, dtype=torch.long)

    def best(block: Block) -> Tensor:
        return best_of(climber, block, starts[:, block.rows])[0]

    for rows, number in climber.blocks.over(torch.nonzero(todo).flatten(), best):
        chosen[rows] = number
    table = starts[chosen, torch.arange(len(chosen), device=chosen.device)]
    return chosen, ascend(climber, table, todo, max_steps)


def _challenge(
    climber: Climber, todo: Tensor, starts: Tensor, chosen: Tensor, ended: Ascent, max_steps: int
) -> Ascent:
    """Try the starts not chosen, where a row to do is in doubt or a start may end higher."""
    table, converged = ended.table, ended.converged
    hopeful = _hopeful(climber, todo, starts, table)
    for number, start in enumerate(starts):
        tried = todo & (chosen != number) & (~converged | hopeful[number])
        if not bool(tried.any()):
            continue
        rival = ascend(climber, start, tried, climber.more(min(max_steps, _RIVAL_CYCLES * _CYCLE)))
        passed = rival.converged
        gain, error = table.new_zeros(2, len(table), dtype=torch.float64)
        gained = functools.partial(_gained, climber, table, rival.table)
        for rows, found in climber.blocks.over(torch.nonzero(tried).flatten(), gained):
            gain[rows], error[rows] = found
        higher = tried & (gain > 2 * error) & (gain > 0)
        if bool((unfinished := higher & ~passed).any()):
            rival = ascend(climber, rival.table, unfinished, climber.more(max_steps))
            passed = passed | rival.converged
        better = higher | (tried & passed & ~converged & (gain > -climber.tolerance))
        table = torch.where(per_row(better, table), rival.table, table)
        converged = torch.where(better, passed, converged)
    return Ascent(table, converged)


def _gained(climber: Climber, table: Tensor, rival: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    return climber.gain(block, table[block.rows], rival[block.rows], _RIVAL_CYCLES)


def _hopeful(climber: Climber, todo: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """Return for which rows a start is elsewhere, and not so low that it cannot win, [C, N]."""
    found = torch.zeros(starts.shape[:2], dtype=torch.bool, device=table.device)
    margin = min(_MARGIN + climber.blocks.size / 4, _MOST_MARGIN)

    def hopeful(block: Block) -> Tensor:
        here, there = table[block.rows], starts[:, block.rows]
        _, elbos = best_of(climber, block, torch.cat([here.unsqueeze(0), there]))
        higher = elbos[1:] > elbos[0] + climber.tolerance
        apart = _apart(climber, block, here, there)
        return higher | (apart & (elbos[1:] > elbos[0] - margin))

    for rows, some in climber.blocks.over(torch.nonzero(todo).flatten(), hopeful):
        found[:, rows] = some
    return found


def _apart(climber: Climber, block: Block, here: Tensor, there: Tensor) -> Tensor:
    """Return which tables [C, n, P] lie far from one, in units of the narrower: [C, n]."""
    family, size = climber.blocks.family, climber.blocks.size
    noise = climber.noise(2 * size + 2)[1].unsqueeze(1).expand(-1, len(here), -1)
    draws = family.from_noise(here, size, noise)
    centre = here.new_zeros(1, *noise.shape[1:])
    away = torch.cat([family.from_noise(t, size, centre) for t in there]) - draws.mean(0)
    width = _POINT_WIDTH * block.prior_scale
    if family.has_density:  # a narrow start within a wide answer is elsewhere too
        widths = [family.from_noise(t, size, noise).std(0) for t in there]
        width = torch.stack([torch.minimum(draws.std(0), w) for w in widths])
    distance = _APART if size <= _MOST_HEAVY else 2 * _APART
    return (away.abs() > distance * width).any(-1)
