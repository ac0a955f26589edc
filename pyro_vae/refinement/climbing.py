"""One cycle of optimisation of rows, all data at once, and the noise that draws are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.particles.estimators import Estimate
from pyro_vae.programs.purposes import RefinePurpose, bits_of
from pyro_vae.refinement.blocks import Block, Blocks, ScoredGuide, per_row
from pyro_vae.refinement.lbfgs import minimize_rows

_MOST_REPLICATES = 32  # of the first comparison; twice as many of each one after
_DOUBLINGS = 3  # of particles, in later cycles
_PARTICLES = 8  # of a gradient in the first two cycles
_NOISE = 0.02  # nats that the noise of so many costs at most; it falls as their number grows
_CHECK_PARTICLES = 32  # in a replicate of a comparison
_REPLICATES = 8  # at least: their spread gives the standard error
_UNDECIDED = 0.1  # the share of the data for which no more replicates are taken
_LEARNING_RATE = 0.1  # in the family's units: standard deviations of the start
# Parameters of a row up to which it is that. Adam moves each by as much, whatever its slope: the
# noise of all costs half their number times the square of the rate, in nats. Of more of them steps
# are shorter, and it costs the same.
_FULL_RATE = 2000
_SECOND_MOMENT_DECAY = 0.95  # forgets the steep way down within a cycle
_FEWEST_STEPS = 20  # of a cycle that could have gained something
_COLDEST = 0.01  # the power of p(x, z) that annealing begins with
_MANY_COORDINATES = 256  # of a datum
_HEAVY = 16  # particles for each coordinate, where they go into the tails
_WIDER = 3.0  # standard deviations there


@dataclass(frozen=True, slots=True)
class Cycle:
    """What a cycle did to rows.

    Attributes:
        after: the rows, [n, P].
        gain: in nats of the ELBO, of log p(x, z) for a family of points, [n]; minus infinity for a
            row that has gone astray.
        error: its standard error, [n].
        sound: for which rows it could have gained something, [n].
    """

    after: Tensor
    gain: Tensor
    error: Tensor
    sound: Tensor


@dataclass(frozen=True, slots=True)
class Climber:
    """Moves rows of a table uphill, and measures how high they are.

    Attributes:
        blocks: the data, and the family.
        tolerance: of the ELBO, in nats.
        bar: of progress, in steps.
        heavy: whether expectations are over draws that reach far into the tails, and are weighted.
    """

    blocks: Blocks
    tolerance: float
    bar: tqdm[Any]
    heavy: bool = False

    def more(self, steps: int) -> int:
        """Return the steps of another ascent, which the bar shows on top."""
        self.bar.total = (self.bar.total or 0) + steps
        return steps

    def cycle(self, block: Block, before: Tensor, steps: int, number: int, rate: Tensor) -> Cycle:
        """Run one cycle of some steps on all rows [n, P] of a block at once.

        The rate [n] is a factor on the learning rate. Random numbers depend on the number of the
        cycle, and later ones take more particles.
        """
        if not self.blocks.family.has_density:
            return self._climb_points(block, before, steps)
        after = self._climb(block, before, steps, number, rate)
        gain, error = self.gain(block, before, after, number)
        # What rounding makes of such draws has no density, and their ELBO may be any number.
        gain = torch.where(self.blocks.family.is_resolved(after, self.blocks.size), gain, -math.inf)
        return Cycle(after, gain, error, (gain > -self.tolerance) & (steps >= _FEWEST_STEPS))

    def _climb(self, block: Block, start: Tensor, steps: int, cycle: int, rate: Tensor) -> Tensor:
        """Run Adam on the ELBO, its learning rate falling to nothing; return the new rows."""
        doublings = 0
        if cycle:
            doublings = cycle - 1 + max(0, math.ceil(math.log2(_NOISE / self.tolerance)))
        num_particles = _PARTICLES << min(doublings, _DOUBLINGS)
        annealed = self.blocks.family.anneals and cycle == 0
        shift = torch.zeros_like(start, requires_grad=True)
        # The average of the second half of the path has less noise than its end.
        average = torch.zeros_like(start)
        optimizer = torch.optim.Adam([shift], betas=(0.9, _SECOND_MOMENT_DECAY), fused=True)
        (group,) = optimizer.param_groups
        highest = _LEARNING_RATE * min(1.0, (_FULL_RATE / start[0].numel()) ** 0.5)
        rate = per_row(rate, start).to(start)
        for step in range(steps):
            group["lr"] = highest * 0.5 * (1 + math.cos(math.pi * step / steps))
            cold = _COLDEST ** max(0.0, 1 - 1.4 * step / steps)
            # A tensor: a number would be a constant of the graph.
            power = start.new_full((), cold if annealed else 1.0)
            noise = self.noise(num_particles, (RefinePurpose.STEPS, cycle, step))
            inputs = [rate * shift.detach(), start, power, *noise]
            (shift.grad,) = block.run(slope, block.scored, inputs, steps, check=step == 0)
            optimizer.step()
            if step >= steps // 2:
                average += (shift.detach() - average) / (step - steps // 2 + 1)
        with torch.no_grad():
            return block.scored.shifted(start, rate * average)

    def _climb_points(self, block: Block, start: Tensor, steps: int) -> Cycle:
        """Run L-BFGS on log p(x, z), for a family of points, which has no noise."""
        noise = start.new_zeros(1, self.blocks.num_noise)

        def loss(rows: Tensor) -> Tensor:
            return -block.scored.log_weights(rows.reshape(start.shape), noise)[0]

        flat = start.flatten(1)
        found = minimize_rows(loss, flat, steps)
        with torch.no_grad():
            gain = torch.nan_to_num((loss(flat) - loss(found.rows)).double(), nan=-math.inf)
        sound = found.promised < self.tolerance
        return Cycle(found.rows.reshape(start.shape), gain, torch.zeros_like(gain), sound)

    def slopes(self, block: Block, table: Tensor, replicates: int) -> Tensor:
        """Return independent estimates of the ELBO's slope in the family's units, [R, n, P]."""
        shift, power = torch.zeros_like(table), table.new_ones(())
        found = []
        for i in range(replicates):
            inputs = [shift, table, power, *self.noise(_CHECK_PARTICLES, (RefinePurpose.SLOPES, i))]
            found.append(-block.run(slope, block.scored, inputs, 32, check=i == 0)[0])
        return torch.stack(found).double()

    @torch.no_grad()
    def gain(
        self, block: Block, before: Tensor, after: Tensor, cycle: int
    ) -> tuple[Tensor, Tensor]:
        """Return the gain in ELBO from rows [n, P] to others, and its error, [n].

        Of common random numbers; with more and more particles, until nearly every gain is plainly
        above or below the tolerance.
        """
        most = _MOST_REPLICATES << min(cycle, _DOUBLINGS)
        gains = before.new_zeros(0, block.evaluator.num_data, dtype=torch.float64)
        while True:
            replicates = range(len(gains), max(_REPLICATES, 2 * len(gains)))
            gains = torch.cat([gains, *self._gains(block, before, after, cycle, replicates)])
            estimate = Estimate.elbo(gains)
            gain, error = estimate.value, estimate.std_error
            undecided = (gain - self.tolerance).abs() < 2 * error
            if float(undecided.double().mean()) < _UNDECIDED or len(gains) >= most:
                break
        # A row gone astray has a gain of nan or -inf: it goes back to where it was.
        return torch.nan_to_num(gain, nan=-math.inf, neginf=-math.inf), error

    def _gains(
        self, block: Block, before: Tensor, after: Tensor, cycle: int, replicates: range
    ) -> Iterator[Tensor]:
        """Yield estimates of the gain by some replicates, [R, n] at a time."""
        # Few data take several replicates at once: a call costs what it costs.
        pairs = _CHECK_PARTICLES * block.evaluator.num_data
        at_once = max(1, block.evaluator.chunk_pairs // pairs)
        for begin in range(0, len(replicates), at_once):
            some = replicates[begin : begin + at_once]
            noises = [self.noise(_CHECK_PARTICLES, (RefinePurpose.GAINS, cycle, i)) for i in some]
            weight, noise = (torch.cat(parts) for parts in zip(*noises, strict=True))
            calls = 2 * _MOST_REPLICATES // len(some)  # of all comparisons, about
            high = self.log_weights(block, after, noise, calls, check=begin == 0)
            low = self.log_weights(block, before, noise, calls)
            gain = weight.unsqueeze(1).double() * (high.double() - low)
            yield gain.unflatten(0, (len(some), -1)).mean(1)

    @torch.no_grad()
    def log_weights(
        self, block: Block, table: Tensor, noise: Tensor, calls: int, *, check: bool = False
    ) -> Tensor:
        """Return log weights [K, n] of draws made of noise [K, num_noise] by rows [n, P].

        ``calls`` are to be expected, of which ``check`` says the first.
        """
        scored = ScoredGuide(block.evaluator.without_gradients(), block.scored.guide)
        return block.run(log_weights, scored, [table, noise], calls, check=check)[0]

    def noise(
        self, num_particles: int, key: tuple[int, ...] = (RefinePurpose.STARTS,)
    ) -> tuple[Tensor, Tensor]:
        """Return weights [K], and noise [K, num_noise]: their mean is that over normal noise.

        K may be more where draws go into the tails. The key tells the random numbers from others;
        by default they are those that compare starts.
        """
        size, key = self.blocks.num_noise, (self.blocks.seed, *key)
        if self.heavy:
            noise, weight = _heavy_noise(max(num_particles, _HEAVY * (size + 3)), size, key)
        else:
            noise = _orthogonal_noise(num_particles, size, key)
            weight = torch.ones(len(noise))
        return weight.to(self.blocks.like), noise.to(self.blocks.like)


def slope(
    scored: ScoredGuide, shift: Tensor, start: Tensor, power: Tensor, weight: Tensor, noise: Tensor
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


def _orthogonal_noise(num_particles: int, size: int, key: tuple[int, ...]) -> Tensor:
    """Return standard normal noise, [K, size]: mirrored pairs, in orthogonal directions.

    Each row is exactly normal. Together they cancel the gradient noise of a quadratic log
    density for the locations, and most of it for the scales.
    """
    pairs = (num_particles + 1) // 2
    generator = _generator(key)
    if size > _MANY_COORDINATES and pairs < size:  # whose whole basis costs more than a step
        some = torch.randn(size, pairs, generator=generator, dtype=torch.float64)
        directions = torch.linalg.qr(some).Q.mT
    else:
        turns = torch.randn(-(-pairs // size), size, size, generator=generator, dtype=torch.float64)
        directions = torch.linalg.qr(turns).Q.reshape(-1, size)[:pairs]
    radii = torch.randn(pairs, size, generator=generator, dtype=torch.float64).norm(dim=1)
    half = directions * radii.unsqueeze(1)
    return torch.cat([half, -half])[:num_particles]


def _heavy_noise(num_particles: int, size: int, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return noise that goes far into the tails of the standard normal, and its weights.

    Half of it is normal, and half is so but for one coordinate, which is wider, each in turn. The
    weights are the ratio of the normal density to that of this mixture (the balance heuristic);
    none is above 2.
    """
    count = -(-num_particles // (2 * size)) * size
    plain, reaching = (_orthogonal_noise(count, size, (*key, i)) for i in range(2))
    per_axis = count // size
    # Stratified along the axis: a tail has its share at each call.
    strata = torch.arange(per_axis, dtype=torch.float64).unsqueeze(1)
    uniform = torch.rand(per_axis, size, generator=_generator((*key, 2)), dtype=torch.float64)
    wide = _WIDER * torch.special.ndtri((strata + uniform) / per_axis)
    reaching[torch.arange(count), torch.arange(size).repeat(per_axis)] = wide.flatten()
    values = torch.cat([plain, reaching])
    ratio = (0.5 * (1 - _WIDER**-2) * values.square()).exp() / _WIDER
    return values, 2 / (1 + ratio.mean(1))


def _generator(key: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(bits_of(*key) >> 1)
