"""Cycles of optimisation of a table's rows, all data of a block at once, and what they gain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.particles.estimators import elbo, elbo_influence, std_error
from pyro_vae.refinement.blocks import Block, Blocks, ScoredGuide, per_row
from pyro_vae.refinement.lbfgs import minimize_rows
from pyro_vae.refinement.noise import Noise, heavy_noise, orthogonal_noise

__all__ = ["Climber", "Gain", "PointCycle", "climb_points"]

_MOST_REPLICATES = 32  # of the first comparison; twice as many of each one after
_DOUBLINGS = 3
_CHECK_PARTICLES = 32  # in a replicate of a comparison
_REPLICATES = 8  # at least: their spread gives the standard error
_UNDECIDED = 0.1  # the share of the data for which no more replicates are taken
_LEARNING_RATE = 0.1  # in the family's units: standard deviations of the start
_SECOND_MOMENT_DECAY = 0.95  # forgets the steep way down within a cycle
_COLDEST = 0.01  # the power of p(x, z) that annealing begins with
_HEAVY = 16  # particles for each coordinate, where they go into the tails
# First in the key of a stream of random numbers, after the seed: what it is for.
_STEPS, _GAINS, _STARTS, _SLOPES = 1, 2, 4, 5


@dataclass(frozen=True, slots=True)
class Gain:
    """What rows gained in ELBO, in nats.

    Attributes:
        value: [n]; minus infinity for a row that has gone astray.
        error: its standard error, [n].
    """

    value: Tensor
    error: Tensor


@dataclass(frozen=True, slots=True)
class Climber:
    """Moves rows of a table uphill, and measures how high they are.

    Attributes:
        blocks: the data, and the family.
        heavy: whether expectations are over draws that reach far into the tails, and are weighted.
    """

    blocks: Blocks
    heavy: bool = False

    def climb(
        self,
        block: Block,
        start: Tensor,
        steps: int,
        num_particles: int,
        cycle: int,
        rate: Tensor,
    ) -> Tensor:
        """Run one cycle of Adam on every row at once; return the new rows.

        Args:
            block: of the data.
            start: the rows, [n, P].
            steps: of Adam; the learning rate falls to nothing over them.
            num_particles: of a gradient.
            cycle: its number, which random numbers depend on.
            rate: factors on the learning rate, [n].
        """
        annealed = self.blocks.family.anneals and cycle == 0
        shift = torch.zeros_like(start, requires_grad=True)
        # The average of the second half of the path has less noise than its end.
        average = torch.zeros_like(start)
        optimizer = torch.optim.Adam(
            [shift], lr=_LEARNING_RATE, betas=(0.9, _SECOND_MOMENT_DECAY), fused=True
        )
        rate = per_row(rate, start).to(start)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = (
                _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
            noise = self.noise(block, num_particles, start, (_STEPS, cycle, step))
            # A tensor: a number would be a constant of the graph.
            power = start.new_ones(())
            if annealed:
                power.fill_(_COLDEST ** max(0.0, 1 - 1.4 * step / steps))
            inputs = [rate * shift.detach(), start, power, noise.weight, noise.values]
            (shift.grad,) = block.run(slope, block.scored, inputs, steps, check=step == 0)
            optimizer.step()
            if step >= steps // 2:
                average += (shift.detach() - average) / (step - steps // 2 + 1)
        with torch.no_grad():
            return block.scored.shifted(start, rate * average)

    def slopes(self, block: Block, table: Tensor, replicates: range) -> Tensor:
        """Return independent estimates of the ELBO's slope in the family's units, [R, n, P].

        Args:
            block: of the data.
            table: their rows, [n, P].
            replicates: their numbers, which random numbers depend on.
        """
        shift, power = torch.zeros_like(table), table.new_ones(())
        found = []
        for i in replicates:
            noise = self.noise(block, _CHECK_PARTICLES, table, (_SLOPES, i))
            inputs = [shift, table, power, noise.weight, noise.values]
            found.append(-block.run(slope, block.scored, inputs, 32, check=i == 0)[0])
        return torch.stack(found).double()

    @torch.no_grad()
    def gain(
        self, block: Block, before: Tensor, after: Tensor, tolerance: float, cycle: int
    ) -> Gain:
        """Return the gain in ELBO from before to after, of common random numbers.

        With more and more particles, until nearly every gain is plainly above or below the
        tolerance.

        Args:
            block: of the data.
            before: their rows, [n, P].
            after: [n, P].
            tolerance: in nats.
            cycle: its number: later ones may take more particles.
        """
        most = _MOST_REPLICATES << min(cycle, _DOUBLINGS)
        gains = before.new_zeros(0, block.evaluator.num_data, dtype=torch.float64)
        while True:
            replicates = range(len(gains), max(_REPLICATES, 2 * len(gains)))
            gains = torch.cat([gains, *self._gains(block, before, after, cycle, replicates)])
            gain, error = elbo(gains), std_error(elbo_influence(gains))
            undecided = (gain - tolerance).abs() < 2 * error
            if float(undecided.double().mean()) < _UNDECIDED or len(gains) >= most:
                break
        # A row gone astray has a gain of nan or -inf: it goes back to where it was.
        return Gain(torch.nan_to_num(gain, nan=-math.inf, neginf=-math.inf), error)

    def _gains(
        self, block: Block, before: Tensor, after: Tensor, cycle: int, replicates: range
    ) -> Iterator[Tensor]:
        """Yield estimates of the gain by some replicates, [R, n] at a time."""
        # Few data take several replicates at once: a call costs what it costs.
        pairs = _CHECK_PARTICLES * block.evaluator.num_data
        at_once = max(1, block.evaluator.chunk_pairs // pairs)
        for begin in range(0, len(replicates), at_once):
            some = replicates[begin : begin + at_once]
            noises = [self.noise(block, _CHECK_PARTICLES, before, (_GAINS, cycle, i)) for i in some]
            noise = torch.cat([one.values for one in noises])
            weight = torch.cat([one.weight for one in noises])
            calls = 2 * _MOST_REPLICATES // len(some)  # of all comparisons, about
            high = self.log_weights(block, after, noise, calls, check=begin == 0)
            low = self.log_weights(block, before, noise, calls)
            gain = weight.unsqueeze(1).double() * (high.double() - low)
            yield gain.unflatten(0, (len(some), -1)).mean(1)

    @torch.no_grad()
    def log_weights(
        self, block: Block, table: Tensor, noise: Tensor, calls: int, *, check: bool = False
    ) -> Tensor:
        """Return the log weights of draws made of given noise, [K, n].

        Args:
            block: of the data.
            table: their rows, [n, P].
            noise: [K, num_noise].
            calls: how many are to be expected.
            check: whether this is the block's first call.
        """
        guide, evaluator = block.scored.guide, block.evaluator.without_gradients()
        scored = ScoredGuide(evaluator, guide)
        return block.run(log_weights, scored, [table, noise], calls, check=check)[0]

    def noise(
        self, block: Block, num_particles: int, like: Tensor, key: tuple[int, ...] = (_STARTS,)
    ) -> Noise:
        """Return noise to make draws of.

        Args:
            block: of the data.
            num_particles: K; where draws go into the tails, at least as many.
            like: a tensor of the noise's dtype and device.
            key: tells the random numbers from others; by default those that compare starts.
        """
        size = self.blocks.family.num_noise(block.size)
        key = (block.evaluator.seed, *key)
        if self.heavy:
            return heavy_noise(max(num_particles, _HEAVY * (size + 3)), size, key).to(like)
        return orthogonal_noise(num_particles, size, key).to(like)


def slope(
    scored: ScoredGuide,
    shift: Tensor,
    start: Tensor,
    power: Tensor,
    weight: Tensor,
    noise: Tensor,
) -> list[Tensor]:
    """Return the slope of minus the ELBO by a shift of the rows, one tensor [n, P]."""
    shift = shift.detach().requires_grad_()
    weights = scored.log_weights(scored.shifted(start, shift), noise, power)
    loss = -(weight.unsqueeze(1) * weights).mean(0).sum()
    # By the rows alone: the model's parameters collect no gradients.
    return list(torch.autograd.grad(loss, [shift]))


def log_weights(scored: ScoredGuide, table: Tensor, noise: Tensor) -> list[Tensor]:
    """Return the log weights of draws made of given noise, one tensor [K, n]."""
    return [scored.log_weights(table, noise)]


@dataclass(frozen=True, slots=True)
class PointCycle:
    """Where a cycle brought points.

    Attributes:
        after: the rows, [n, P].
        gain: in log p(x, z), [n]; minus infinity for a row that has gone astray.
        promised: what the last direction of each promised, [n].
    """

    after: Tensor
    gain: Tensor
    promised: Tensor


def climb_points(block: Block, start: Tensor, steps: int) -> PointCycle:
    """Run one cycle of L-BFGS on every row's log p(x, z), for a family of points.

    Args:
        block: of the data.
        start: the rows, [n, P].
        steps: iterations.
    """
    noise = start.new_zeros(1, block.scored.guide.family.num_noise(block.size))

    def loss(rows: Tensor) -> Tensor:
        return -block.scored.log_weights(rows.reshape(start.shape), noise)[0]

    flat = start.flatten(1)
    found = minimize_rows(loss, flat, steps)
    with torch.no_grad():
        gain = torch.nan_to_num((loss(flat) - loss(found.rows)).double(), nan=-math.inf)
    return PointCycle(found.rows.reshape(start.shape), gain, found.promised)
