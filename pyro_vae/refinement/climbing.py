"""One cycle of optimisation of a table of a family, all data at once, and what it gained."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.compiler.arguments import form_of, rebuilt
from pyro_vae.compiler.recorder import Recorder
from pyro_vae.families.base import Family
from pyro_vae.families.gaussian import Normal
from pyro_vae.guides.local import LocalGuide
from pyro_vae.particles.estimators import elbo, elbo_influence, std_error
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.refinement.lbfgs import minimize_rows

__all__ = ["Block", "Climber", "per_row"]

_MOST_REPLICATES = 32  # of the first comparison; twice as many of each one after
_DOUBLINGS = 3
_CHECK_PARTICLES = 32  # in a replicate of a comparison
_REPLICATES = 8  # at least: their spread gives the standard error
_PIECES = 4  # of one step, recorded at most
_UNDECIDED = 0.1  # the share of the data for which no more replicates are taken
_LEARNING_RATE = 0.1  # in the family's units: standard deviations of the start
_SECOND_MOMENT_DECAY = 0.95  # forgets the steep way down within a cycle
_COLDEST = 0.01  # the power of p(x, z) that annealing begins with
_FLAT = 8.0  # log of how many times wider than the prior a flat density is
_HEAVY = 16  # particles for each coordinate, where they go into the tails
_WIDER = 3.0  # standard deviations there
# First in the key of a stream of random numbers, after the seed: what it is for.
_STEPS, _GAINS, _STARTS, _SLOPES = 1, 2, 4, 5


@dataclass(frozen=True)
class Block:
    """Some of the data, and what is made for them.

    Attributes:
        rows: which they are, by number.
        scorer: of them.
        guide: which it scores, a table of the family.
    """

    rows: Tensor
    scorer: Evaluator
    guide: LocalGuide
    make: Callable[[Family], tuple[Evaluator, LocalGuide]]

    @functools.cached_property
    def flat(self) -> tuple[Evaluator, LocalGuide]:
        """A scorer, and independent Gaussians far wider than the prior: a nearly flat density."""
        scorer, guide = self.make(Normal())
        with torch.no_grad():
            guide.table[..., 1] += _FLAT
        return scorer, guide

    @property
    def prior_scale(self) -> Tensor:
        """The prior's standard deviations, [D]."""
        return (self.flat[1].table[0, :, 1].detach() - _FLAT).exp()


class Climber:
    """Moves rows of a table uphill, and measures how high they are.

    Args:
        model: a Pyro model.
        whole: a scorer of the model on all data, with any guide; its seed is that of the draws.
        family: the variational family.
        like: a tensor of the table's dtype and device.
        data_plate: as in :func:`pyro_vae.refine`.
        compile: as in :class:`pyro_vae.CompiledSVI`.

    Attributes:
        heavy: whether expectations are over draws that reach far into the tails, and are weighted.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        whole: Evaluator,
        family: Family,
        like: Tensor,
        data_plate: str | bool | None,
        compile: str | bool,
    ) -> None:
        self.whole, self.family = whole, family
        self.heavy = False
        self._model, self._data_plate, self._like = model, data_plate, like
        self._recorder = Recorder("refining", compile)
        # Those of all data, which come back, and the last ones of fewer.
        self._blocks: dict[bool, list[Block]] = {}
        self._num_blocks = 1

    @property
    def num_coordinates(self) -> int:
        """D."""
        return next(iter(self._blocks.values()))[0].guide.num_coordinates

    def into_the_tails(self) -> Climber:
        """Return a climber whose draws reach far into the tails; the data's blocks are shared."""
        other = copy.copy(self)
        other.heavy = True
        return other

    def blocks(self, rows: Tensor) -> list[Block]:
        """Return some of the data in blocks; all of them where the model does not take fewer."""
        if not self.whole.splittable:
            rows = torch.arange(self.whole.num_data, device=rows.device)
        fewer = rows.numel() < self.whole.num_data
        made = self._blocks.get(fewer)
        if made is None or not torch.equal(torch.cat([block.rows for block in made]), rows):
            made = [self._block(rows[some]) for some in self.whole.blocks_of(len(rows))]
            self._blocks[fewer] = made
        self._num_blocks = len(made)
        return made

    def _block(self, rows: Tensor) -> Block:
        batch = self.whole.batch
        if rows.numel() < self.whole.num_data:
            batch = batch.rows(rows)

        def make(family: Family) -> tuple[Evaluator, LocalGuide]:
            guide = LocalGuide(
                self._model,
                num_data=rows.numel(),
                example=batch,
                family=family,
                data_plate=self._data_plate,
            ).to(self._like)
            scorer = Evaluator(
                self._model,
                guide,
                batch,
                data_plate=self._data_plate,
                seed=self.whole.seed,
                gradients=True,
            )
            return scorer, guide

        return Block(rows, *make(self.family), make)

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
        guide = block.guide
        annealed = guide.family.anneals and cycle == 0
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
            draws = self.draws(block, num_particles, start, (_STEPS, cycle, step))
            # A tensor: a number would be a constant of the graph.
            power = start.new_ones(())
            if annealed:
                power.fill_(_COLDEST ** max(0.0, 1 - 1.4 * step / steps))
            shift.grad = self._slope(
                block, rate * shift.detach(), start, power, draws, steps, check=step == 0
            )
            optimizer.step()
            if step >= steps // 2:
                average += (shift.detach() - average) / (step - steps // 2 + 1)
        with torch.no_grad():
            return guide.family.shifted(start, guide.num_coordinates, rate * average)

    def _slope(
        self,
        block: Block,
        shift: Tensor,
        start: Tensor,
        power: Tensor,
        draws: tuple[Tensor, Tensor],
        calls: int,
        *,
        check: bool,
    ) -> Tensor:
        """Return the slope of minus the ELBO by a shift of the rows, [n, P]."""
        guide = block.guide

        def slope(
            scorer: Evaluator,
            shift: Tensor,
            start: Tensor,
            power: Tensor,
            weight: Tensor,
            noise: Tensor,
        ) -> list[Tensor]:
            shift = shift.detach().requires_grad_()
            table = guide.family.shifted(start, guide.num_coordinates, shift)
            weights = _log_weights(scorer, guide, table, noise, power)
            loss = -(weight.unsqueeze(1) * weights).mean(0).sum()
            # By the rows alone: the model's parameters collect no gradients.
            return list(torch.autograd.grad(loss, [shift]))

        noise, weight = draws
        inputs = [shift, start, power, weight, noise]
        return self._recorded("slope", block.scorer, slope, inputs, calls, check=check)[0]

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
            draws = self.draws(block, _CHECK_PARTICLES, table, (_SLOPES, i))
            found.append(-self._slope(block, shift, table, power, draws, 32, check=i == 0))
        return torch.stack(found).double()

    def climb_points(
        self, block: Block, start: Tensor, steps: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one cycle of L-BFGS on every row's log p(x, z).

        Returns:
            The rows, their gains, [n], and what their last directions promised, [n].
        """
        scorer, guide = block.scorer, block.guide
        noise = start.new_zeros(1, guide.family.num_noise(guide.num_coordinates))

        def loss(rows: Tensor) -> Tensor:
            return -_log_weights(scorer, guide, rows.reshape(start.shape), noise)[0]

        flat = start.flatten(1)
        after, promised, _ = minimize_rows(loss, flat, steps)
        with torch.no_grad():
            gain = (loss(flat) - loss(after)).double()
        return after.reshape(start.shape), torch.nan_to_num(gain, nan=-math.inf), promised

    @torch.no_grad()
    def gain(
        self, block: Block, before: Tensor, after: Tensor, tolerance: float, cycle: int
    ) -> tuple[Tensor, Tensor]:
        """Return the gain in ELBO from before to after and its standard error, [n].

        With more and more particles, until nearly every gain is plainly above or below the
        tolerance.
        """
        most = _MOST_REPLICATES << min(cycle, _DOUBLINGS)
        scorer = block.scorer
        # Few data take several replicates at once: a call costs what it costs.
        at_once = max(1, scorer.chunk_pairs // (_CHECK_PARTICLES * scorer.num_data))
        gains = before.new_zeros(0, scorer.num_data, dtype=torch.float64)
        while True:
            replicates = range(len(gains), max(_REPLICATES, 2 * len(gains)))
            for some in (replicates[i : i + at_once] for i in range(0, len(replicates), at_once)):
                drawn = [
                    self.draws(block, _CHECK_PARTICLES, before, (_GAINS, cycle, i)) for i in some
                ]
                noise, weight = (torch.cat(parts) for parts in zip(*drawn, strict=True))
                # The calls of all comparisons, about.
                calls = 2 * _MOST_REPLICATES // len(some)
                first = some.start == replicates.start
                high = self.log_weights(block, after, noise, calls, check=first)
                low = self.log_weights(block, before, noise, calls)
                gain = weight.unsqueeze(1).double() * (high.double() - low)
                gain = gain.unflatten(0, (len(some), -1)).mean(1)
                gains = torch.cat([gains, gain])
            gain, error = elbo(gains), std_error(elbo_influence(gains))
            undecided = (gain - tolerance).abs() < 2 * error
            if float(undecided.double().mean()) < _UNDECIDED or len(gains) >= most:
                break
        # A row gone astray has a gain of nan or -inf: it goes back to where it was.
        return torch.nan_to_num(gain, nan=-math.inf, neginf=-math.inf), error

    @torch.no_grad()
    def log_weights(
        self, block: Block, table: Tensor, noise: Tensor, calls: int, *, check: bool = False
    ) -> Tensor:
        """Return the log weights of draws made of given noise, [K, n]."""
        guide = block.guide

        def log_weights(scorer: Evaluator, table: Tensor, noise: Tensor) -> list[Tensor]:
            return [_log_weights(scorer, guide, table, noise)]

        scorer = block.scorer.without_gradients()
        return self._recorded("gain", scorer, log_weights, [table, noise], calls, check=check)[0]

    def draws(
        self, block: Block, num_particles: int, like: Tensor, key: tuple[int, ...] = (_STARTS,)
    ) -> tuple[Tensor, Tensor]:
        """Return noise, [K, num_noise], and weights, [K], which replace a mean over normal noise.

        Args:
            block: of the data.
            num_particles: K; where draws go into the tails, at least as many.
            like: a tensor of the noise's dtype and device.
            key: tells the random numbers from others; by default those that compare starts.
        """
        size = block.guide.family.num_noise(block.guide.num_coordinates)
        key = (block.scorer.seed, *key)
        if self.heavy:
            noise, weight = heavy_noise(max(num_particles, _HEAVY * (size + 3)), size, key)
        else:
            noise = orthogonal_noise(num_particles, size, key)
            weight = torch.ones(len(noise))
        return noise.to(like), weight.to(like)

    def heights(
        self, block: Block, z: Tensor, calls: int, *, prior: float = 1.0, check: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log p(x | z) + w (log p(z) + log |det dz / d coordinates|) and its gradient.

        Args:
            block: of the data.
            z: coordinates, [K, n, D].
            calls: how many are to be expected.
            prior: w, the weight of the prior.
            check: whether this is the block's first call.

        Returns:
            [K, n], up to a constant, and [K, n, D].
        """
        scorer, guide = block.flat

        def heights(scorer: Evaluator, prior: Tensor, z: Tensor) -> list[Tensor]:
            z = z.detach().requires_grad_()
            height = _heights(scorer, guide, z, prior)
            return [height.detach(), *torch.autograd.grad(height.sum(), [z])]

        # A tensor: a number would be a constant of the graph.
        inputs = [z.new_full((), prior), z]
        height, slope = self._recorded("height", scorer, heights, inputs, calls, check=check)
        return height, slope

    def curvature(self, block: Block, z: Tensor) -> Tensor | None:
        """Return minus the Hessian of :meth:`heights`, [n, D, D]; None where there is none.

        Args:
            block: of the data.
            z: coordinates, [n, D].
        """
        scorer, guide = block.flat
        num_data, size = z.shape
        step = max(1, scorer.chunk_pairs // num_data)
        rows = []
        with torch.enable_grad():
            for some in torch.eye(size, dtype=z.dtype, device=z.device).split(step):
                at = z.expand(len(some), num_data, size).clone().requires_grad_()
                try:
                    (slope,) = torch.autograd.grad(
                        _heights(scorer, guide, at).sum(), [at], create_graph=True
                    )
                    (row,) = torch.autograd.grad((slope * some.unsqueeze(1)).sum(), [at])
                except RuntimeError:  # an operation that can be differentiated once
                    return None
                rows.append(-row)
        found = torch.cat(rows).movedim(0, 1)
        return (found + found.mT) / 2

    def _recorded(
        self,
        name: str,
        scorer: Evaluator,
        function: Callable[..., list[Tensor]],
        inputs: list[Tensor],
        calls: int,
        *,
        check: bool,
    ) -> Sequence[Any]:
        """Return what a function returns, by a graph that blocks of data of one size share.

        Args:
            name: tells the function from others.
            scorer: of a block.
            function: of it and of tensors, to tensors.
            inputs: the tensors, that which has particles the last.
            calls: to be expected for this block.
            check: whether this is the block's first call.
        """
        given = (scorer.given(), inputs)
        tensors: list[Tensor] = []
        form = form_of(given, tensors)

        def on_tensors(*tensors: Tensor) -> list[Tensor]:
            block, inputs = rebuilt(given, iter(tensors))
            with scorer.on(*block) as other:
                return function(other, *inputs)

        # What is scored in many pieces would be a graph of as many times the operations.
        pieces = inputs[-1].shape[0] * scorer.num_data / scorer.chunk_pairs
        if form is None or (pieces > _PIECES and scorer.splittable):
            return function(scorer, *inputs)
        calls *= self._num_blocks
        return self._recorder((name, form), on_tensors, tensors, calls, check=check)


def per_row(numbers: Tensor, table: Tensor) -> Tensor:
    """Return numbers of rows, [n], in a shape that goes with a table's."""
    return numbers.reshape(-1, *[1] * (table.ndim - 1))


def _heights(
    scorer: Evaluator, guide: LocalGuide, z: Tensor, prior: Tensor | float = 1.0
) -> Tensor:
    """Return log p(x, z) in unconstrained coordinates, [K, n], the prior to a power.

    Up to a constant.

    Minus the log density of a nearly flat guide is the log determinant of the map to the
    supports, with the model's masks on it.
    """
    rows = slice(0, scorer.num_data)
    values = scorer.from_single(guide.values_of(z))
    log_likelihood, log_prior = scorer.score_model(rows, values)
    with guide.using(guide.table.detach()):
        return log_likelihood + prior * (log_prior - scorer.score_guide(rows, values))


def _log_weights(
    scorer: Evaluator, guide: LocalGuide, table: Tensor, noise: Tensor, power: Tensor | float = 1.0
) -> Tensor:
    """Return the log weights of draws made of given noise, [K, n]; of p(x, z) to a power.

    The gradient sticks the landing: the score of log q has expectation zero, so the
    density's own dependence on the parameters is left out, and only the path counts.
    """
    rows = slice(0, scorer.num_data)
    values = scorer.from_single(guide.from_noise(table, noise))
    log_likelihood, log_prior = scorer.score_model(rows, values)
    if not guide.family.has_density:
        return log_likelihood + log_prior
    with guide.using(table.detach()):
        log_guide = scorer.score_guide(rows, values)
    return power * (log_likelihood + log_prior) - log_guide


def orthogonal_noise(num_particles: int, size: int, key: tuple[int, ...]) -> Tensor:
    """Return standard normal noise, [K, size]: mirrored pairs, in orthogonal directions.

    Each row is exactly normal. Together they cancel the gradient noise of a quadratic log
    density for the locations, and most of it for the scales.
    """
    pairs = (num_particles + 1) // 2
    generator = torch.Generator().manual_seed(_seed_of(key))
    turns = torch.randn(-(-pairs // size), size, size, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(turns).Q.reshape(-1, size)[:pairs]
    radii = torch.randn(pairs, size, generator=generator, dtype=torch.float64).norm(dim=1)
    half = directions * radii.unsqueeze(1)
    return torch.cat([half, -half])[:num_particles]


def heavy_noise(num_particles: int, size: int, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return noise that goes far into the tails of the standard normal, and its weights.

    Half of it is normal, and half is so but for one coordinate, which is wider, each in turn. The
    weights, [K], are the ratio of the normal density to that of this mixture (the balance
    heuristic); none is above 2.
    """
    count = -(-num_particles // (2 * size)) * size
    plain, reaching = (orthogonal_noise(count, size, (*key, i)) for i in range(2))
    generator = torch.Generator().manual_seed(_seed_of((*key, 2)))
    per_axis = count // size
    # Stratified along the axis: a tail has its share at each call.
    strata = torch.arange(per_axis, dtype=torch.float64).unsqueeze(1)
    uniform = torch.rand(per_axis, size, generator=generator, dtype=torch.float64)
    wide = _WIDER * torch.special.ndtri((strata + uniform) / per_axis)
    axis = torch.arange(size).repeat(per_axis)
    reaching[torch.arange(count), axis] = wide.flatten()
    noise = torch.cat([plain, reaching])
    ratio = (0.5 * (1 - _WIDER**-2) * noise.square()).exp() / _WIDER
    return noise, 2 / (1 + ratio.mean(1))


def _seed_of(key: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
