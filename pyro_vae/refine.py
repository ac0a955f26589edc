"""Per-datum optimisation of a local guide: the best that a family can do for these data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.batches import as_batch
from pyro_vae.counts import as_count
from pyro_vae.estimators import elbo, elbo_influence, std_error
from pyro_vae.family import Family
from pyro_vae.family_guide import of_family
from pyro_vae.global_latents import fix_globals_of_pair
from pyro_vae.graphs import form_of, rebuilt
from pyro_vae.guides import LocalGuide
from pyro_vae.lbfgs import minimize_rows
from pyro_vae.recorder import Recorder
from pyro_vae.running import evaluation
from pyro_vae.scorer import Scorer

__all__ = ["refine", "refine_table"]

logger = logging.getLogger(__name__)

_CYCLE = 200  # steps between two comparisons
# In the first two cycles; each one after takes twice as many, up to 2**_DOUBLINGS times.
_PARTICLES = 8  # of a gradient
_DOUBLINGS = 3
# With so many their noise costs less than this, in nats; it falls as their number grows.
_NOISE = 0.02
_MOST_REPLICATES = 32  # of the first comparison; twice as many of each one after
_CHECK_PARTICLES = 32  # in a replicate of a comparison
_REPLICATES = 8  # at least: their spread gives the standard error
_PIECES = 4  # of one step, recorded at most
_UNDECIDED = 0.1  # the share of the data for which no more replicates are taken
_LEARNING_RATE = 0.1  # in the family's units: standard deviations of the start
_SECOND_MOMENT_DECAY = 0.95  # forgets the steep way down within a cycle
_COLDEST = 0.01  # the power of p(x, z) that annealing begins with
_START_DRAWS = 256  # of a guide whose parameters cannot be read off


def refine(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    family: Family | None = None,
    given: Mapping[str, Any] | None = None,
    max_steps: int = 4000,
    tolerance: float = 0.02,
    data_plate: str | bool | None = None,
    seed: int | None = None,
    compile: str | bool = "auto",
) -> LocalGuide:
    r"""Fit a guide with a row of parameters per datum to this batch.

    Maximises each datum's ELBO over the family's parameters, all data at once, from
    the guide's own answer. The model's parameters stay as they are. Gradients stick
    the landing (Roeder, Wu & Duvenaud 2017): where the family holds the posterior
    their noise vanishes at the optimum. Draws come in
    mirrored pairs and orthogonal directions, which leaves little noise where a
    posterior is nearly Gaussian.

    The optimiser works in cycles, each with a learning rate that falls to nothing.
    After each, a datum's gain in ELBO is measured on random numbers common to before
    and after; a datum has converged when a further cycle gained it less than
    ``tolerance``, two standard errors included. Those that have not go on, with
    more particles. A row never ends below the start, as far as the measurement can tell:
    where a cycle gains it nothing, the row stays as it was. (The start is the guide's own
    answer where the guide is of the family, and has the moments of its draws elsewhere.)
    What converges is a local optimum: another mode stays unseen.

    Global latents are held at the values given, else at the median of the guide's
    ``global_guide``.

    A family of points (families.Delta) has no noise: log p(x, z) is maximised by L-BFGS,
    each datum by itself, and the gain of a cycle is exact.

    Args:
        model: a Pyro model.
        guide: a Pyro guide to start from: amortized, local, or hand-written.
        *batch: their arguments.
        family: the variational family; the guide's own by default, else Normal().
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        max_steps: steps of a datum at most.
        tolerance: of the ELBO, in nats per datum.
        data_plate: the name of the plate of the data, where it is not plain.
        seed: of the draws; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`: "auto" records a step, and compiles it where
            there is enough to do for that to save time.

    Returns:
        A LocalGuide with a row per datum of the batch, and ``converged`` [N].

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses; max_steps < 1; a
            tolerance that is not positive.
    """
    max_steps = as_count("max_steps", max_steps)
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}: a positive number of nats is needed")
    arguments = as_batch(*batch)
    model, guide, _ = fix_globals_of_pair(model, guide, arguments, data_plate, given)
    scorer = Scorer(model, guide, arguments, data_plate=data_plate, seed=seed)
    if family is None and of_family(guide):
        family = guide.family
    local = LocalGuide(
        model, num_data=scorer.num_data, example=arguments, family=family, data_plate=data_plate
    )
    with torch.no_grad():
        start = _start(local, guide, scorer)
    local = local.to(start)
    with torch.no_grad():
        local.table.copy_(start)
    table, converged = refine_table(
        model, scorer, start, local.family, data_plate, max_steps, tolerance, compile
    )
    with torch.no_grad():
        local.table.copy_(table)
        local.converged.copy_(converged)
    if not bool(local.converged.all()):
        logger.warning(
            "refine: %d of %d data have not converged to within %g nats in %d steps",
            int((~local.converged).sum()),
            scorer.num_data,
            tolerance,
            max_steps,
        )
    return local


def refine_table(
    model: Callable[..., Any],
    scorer: Scorer,
    start: Tensor,
    family: Family,
    data_plate: str | bool | None,
    max_steps: int,
    tolerance: float,
    compile: str | bool = "auto",
) -> tuple[Tensor, Tensor]:
    """Optimise a table of parameters; what :func:`refine` does from a start.

    Args:
        model: a Pyro model.
        scorer: of the model on the batch, with any guide; its seed is that of the draws.
        start: [N, P].
        family: the variational family.
        data_plate: as in :func:`refine`.
        max_steps: as in :func:`refine`.
        tolerance: as in :func:`refine`.
        compile: as in :func:`refine`.

    Returns:
        The table, [N, P], and which rows converged, [N].
    """
    recorded = _Recorded(compile)
    table = start.clone()
    converged = torch.zeros(table.shape[0], dtype=torch.bool, device=table.device)
    cycle, left = 0, max_steps
    blocks: list[_Block] = []
    while left > 0 and not bool(converged.all()):
        # Data that have converged leave the batch, where the model takes fewer.
        active = torch.nonzero(~converged | (not scorer.splittable)).flatten()
        if active.numel() != sum(block.rows.numel() for block in blocks):
            blocks = [
                _Block.of(model, scorer, active[rows], table, family, data_plate)
                for rows in scorer.blocks_of(active.numel())
            ]
        recorded.num_blocks = len(blocks)
        steps, particles = min(_CYCLE, left), _particles(cycle, tolerance)
        for block in blocks:
            before = table[block.rows]
            if family.has_density:
                after = _climb(recorded, *block.pair, before, steps, particles, cycle)
                gain, error = _gain(recorded, *block.pair, before, after, tolerance, cycle)
            else:
                after, gain = _climb_points(*block.pair, before, steps)
                error = torch.zeros_like(gain)
            better = (gain > 0).reshape(-1, *[1] * (table.ndim - 1))
            table[block.rows] = torch.where(better, after, before)
            converged[block.rows] = gain + 2 * error < tolerance
        left, cycle = left - steps, cycle + 1
    return table, converged


def _start(local: LocalGuide, guide: Callable[..., Any], scorer: Scorer) -> Tensor:
    """Return the guide's own answer in the parameters of the local guide, [N, P]."""
    batch = scorer.batch
    with evaluation(guide), torch.no_grad():
        if (
            of_family(guide)
            and guide.family == local.family
            and guide.coordinates == local.coordinates
        ):
            return guide.family_params(*batch.args, **batch.kwargs).clone()
        values, _ = scorer.draw(slice(0, scorer.num_data), _START_DRAWS, (3,))
        start = local.params_from(scorer.guide_runs(2), scorer.single_values(values))
        # The draws of a point have no width to match: the prior's stands in.
        return torch.where(torch.isfinite(start), start, local.table.to(start))


@dataclass(frozen=True)
class _Block:
    """Some of the data, and what is made for them.

    Attributes:
        rows: which they are, by number.
        pair: a scorer of them, and the guide that it scores.
    """

    rows: Tensor
    pair: tuple[Scorer, LocalGuide]

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        whole: Scorer,
        rows: Tensor,
        table: Tensor,
        family: Family,
        data_plate: str | bool | None,
    ) -> _Block:
        """Make it; ``table`` tells dtype and device."""
        batch = whole.batch
        if rows.numel() < whole.num_data:
            batch = batch.rows(rows)
        guide = LocalGuide(
            model, num_data=rows.numel(), example=batch, family=family, data_plate=data_plate
        ).to(table)
        scorer = Scorer(model, guide, batch, data_plate=data_plate, seed=whole.seed, gradients=True)
        return cls(rows, (scorer, guide))


def _particles(cycle: int, tolerance: float) -> int:
    """Return how many particles a gradient is made of."""
    if cycle == 0:
        return _PARTICLES
    doublings = cycle - 1 + max(0, math.ceil(math.log2(_NOISE / tolerance)))
    return _PARTICLES << min(doublings, _DOUBLINGS)


class _Recorded:
    """Runs log weights and their slopes by graphs that blocks of data of one size share.

    Args:
        compile: as in :class:`pyro_vae.CompiledSVI`.

    Attributes:
        num_blocks: how many there are.
    """

    def __init__(self, compile: str | bool) -> None:
        self.num_blocks = 1
        self._recorder = Recorder("refining", compile)

    def __call__(
        self,
        name: str,
        scorer: Scorer,
        function: Callable[..., list[Tensor]],
        inputs: list[Tensor],
        calls: int,
        *,
        check: bool,
    ) -> Any:
        """Return the tensor that a function of a scorer and of tensors returns.

        Args:
            name: tells the function from others.
            scorer: of a block.
            function: of them.
            inputs: the tensors, particles' noise the last.
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
            return function(scorer, *inputs)[0]
        calls *= self.num_blocks
        return self._recorder((name, form), on_tensors, tensors, calls, check=check)[0]


def _climb(
    recorded: _Recorded,
    scorer: Scorer,
    guide: LocalGuide,
    start: Tensor,
    steps: int,
    num_particles: int,
    cycle: int,
) -> Tensor:
    """Run one cycle of Adam on every row at once; return the new rows."""
    units = guide.family.units(start, guide.num_coordinates)
    annealed = guide.family.anneals and cycle == 0
    shift = torch.zeros_like(start, requires_grad=True)
    # The average of the second half of the path has less noise than its end.
    average = torch.zeros_like(start)
    optimizer = torch.optim.Adam(
        [shift], lr=_LEARNING_RATE, betas=(0.9, _SECOND_MOMENT_DECAY), fused=True
    )

    def slope(
        scorer: Scorer, shift: Tensor, start: Tensor, units: Tensor, power: Tensor, noise: Tensor
    ) -> list[Tensor]:
        shift = shift.detach().requires_grad_()
        loss = -_log_weights(scorer, guide, start + units * shift, noise, power).mean(0).sum()
        # By the rows alone: the model's parameters collect no gradients.
        return list(torch.autograd.grad(loss, [shift]))

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (
            _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        noise = _orthogonal_noise(num_particles, guide, start, (scorer.seed, 1, cycle, step))
        # A tensor: a number would be a constant of the graph.
        power = start.new_ones(())
        if annealed:
            power.fill_(_COLDEST ** max(0.0, 1 - 1.4 * step / steps))
        inputs = [shift.detach(), start, units, power, noise]
        shift.grad = recorded("slope", scorer, slope, inputs, steps, check=step == 0)
        optimizer.step()
        if step >= steps // 2:
            average += (shift.detach() - average) / (step - steps // 2 + 1)
    return start + units * average


def _climb_points(
    scorer: Scorer, guide: LocalGuide, start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Run one cycle of L-BFGS on every row's log p(x, z); return the rows and their gains."""
    noise = start.new_zeros(1, guide.family.num_noise(guide.num_coordinates))

    def loss(rows: Tensor) -> Tensor:
        return -_log_weights(scorer, guide, rows.reshape(start.shape), noise)[0]

    flat = start.flatten(1)
    after, _ = minimize_rows(loss, flat, steps)
    with torch.no_grad():
        gain = (loss(flat) - loss(after)).double()
    return after.reshape(start.shape), torch.nan_to_num(gain, nan=-math.inf)


@torch.no_grad()
def _gain(
    recorded: _Recorded,
    scorer: Scorer,
    guide: LocalGuide,
    before: Tensor,
    after: Tensor,
    tolerance: float,
    cycle: int,
) -> tuple[Tensor, Tensor]:
    """Return the gain in ELBO from before to after and its standard error, [n].

    With more and more particles, until nearly every gain is plainly above or below the tolerance.
    """
    most = _MOST_REPLICATES << min(cycle, _DOUBLINGS)
    scorer = scorer.without_gradients()

    def log_weights(scorer: Scorer, table: Tensor, noise: Tensor) -> list[Tensor]:
        return [_log_weights(scorer, guide, table, noise)]

    # Few data take several replicates at once: a call costs what it costs.
    at_once = max(1, scorer.chunk_pairs // (_CHECK_PARTICLES * scorer.num_data))
    gains = before.new_zeros(0, scorer.num_data, dtype=torch.float64)
    while True:
        replicates = range(len(gains), max(_REPLICATES, 2 * len(gains)))
        for some in (replicates[i : i + at_once] for i in range(0, len(replicates), at_once)):
            noise = torch.cat(
                [
                    _orthogonal_noise(_CHECK_PARTICLES, guide, before, (scorer.seed, 2, cycle, i))
                    for i in some
                ]
            )
            high, low = (
                recorded(
                    "gain",
                    scorer,
                    log_weights,
                    [table, noise],
                    2 * _MOST_REPLICATES // len(some),  # of all comparisons, about
                    check=some.start == replicates.start and table is after,
                )
                for table in (after, before)
            )
            gain = (high.double() - low).unflatten(0, (len(some), -1)).mean(1)
            gains = torch.cat([gains, gain])
        gain, error = elbo(gains), std_error(elbo_influence(gains))
        undecided = (gain - tolerance).abs() < 2 * error
        if float(undecided.double().mean()) < _UNDECIDED or len(gains) >= most:
            break
    # A row gone astray has a gain of nan or -inf: it goes back to where it was.
    return torch.nan_to_num(gain, nan=-math.inf, neginf=-math.inf), error


def _log_weights(
    scorer: Scorer, guide: LocalGuide, table: Tensor, noise: Tensor, power: Tensor | float = 1.0
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


def _orthogonal_noise(
    num_particles: int, guide: LocalGuide, like: Tensor, key: tuple[int, ...]
) -> Tensor:
    """Return standard normal noise, [K, num_noise]: mirrored pairs, in orthogonal directions.

    Each row is exactly normal. Together they cancel the gradient noise of a quadratic log
    density for the locations, and most of it for the scales.
    """
    pairs = (num_particles + 1) // 2
    size = guide.family.num_noise(guide.num_coordinates)
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    )
    turns = torch.randn(-(-pairs // size), size, size, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(turns).Q.reshape(-1, size)[:pairs]
    radii = torch.randn(pairs, size, generator=generator, dtype=torch.float64).norm(dim=1)
    half = directions * radii.unsqueeze(1)
    return torch.cat([half, -half])[:num_particles].to(like)
