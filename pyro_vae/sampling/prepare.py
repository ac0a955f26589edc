"""A pair made ready for chains: the data in blocks, and a base density near each posterior."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.guides.base import of_family
from pyro_vae.guides.exact import ExactGuide
from pyro_vae.guides.local import LocalGuide
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.particles.global_latents import Given
from pyro_vae.particles.pair_runner import first_block
from pyro_vae.programs.on_demand import OnDemand
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Program, Values
from pyro_vae.refinement.blocks import Block, Blocks
from pyro_vae.refinement.starts import answer_of
from pyro_vae.sampling.streams import Stream

logger = logging.getLogger(__name__)

# From an edge inwards: from there on a value is at least three units of rounding away from it.
_AT_EDGE = 1.0
_SCALE_DRAWS = 256  # of the base density, whose spread is the first scale of its coordinates


@dataclass(frozen=True, slots=True)
class Ready:
    """What chains of a batch need.

    Attributes:
        evaluator: of the pair.
        given: the values that global latents were fixed at.
        guide: of the base's family: where coordinates of latent sites lie.
        blocks: the data, each with a guide of the base's family.
        table: the base's parameters, [N, P].
        lost: the data that the guide has no answer for, [N], and the prior's moments stand in.
        stand_in: a guide with all of these answers, where the user's own has not all of them.
    """

    evaluator: Evaluator
    given: Given
    guide: LocalGuide
    blocks: Blocks
    table: Tensor
    lost: Tensor
    stand_in: LocalGuide | None = None

    def each(self, most: int | None = None) -> Iterator[tuple[slice, Block]]:
        """Yield blocks of the data, with the rows that each holds.

        Args:
            most: data in a block, where the model takes some of them.
        """
        num_data = self.table.shape[0]
        if isinstance(self.evaluator.batch, OnDemand):  # a block at a time is in memory
            most = min(most or num_data, first_block(num_data))
        elif most is None or not self.evaluator.splittable:
            most = num_data
        for start in range(0, num_data, most):
            stop = min(start + most, num_data)
            for block in self.blocks.at(torch.arange(start, stop, device=self.table.device)):
                yield slice(start, start + len(block.rows)), block
                start += len(block.rows)

    def base_draws(self, rows: slice, noise: Tensor) -> Tensor:
        """Return draws [K, n, D] of the base density, made of noise [K, n, num_noise]."""
        return self.blocks.family.from_noise(self.table[rows], self.blocks.size, noise)

    def base_centre(self, rows: slice) -> Tensor:
        """Return the middle of the base density, [n, D]: the draw of no noise."""
        shape = 1, rows.stop - rows.start, self.blocks.num_noise
        return self.base_draws(rows, self.table.new_zeros(shape))[0]

    def prior_draws(self, rows: slice, num_draws: int, key: tuple[int, ...]) -> Tensor:
        """Return draws [K, n, D] of the prior's unconstrained coordinates.

        Raises:
            ValueError: where a mask of the model leaves a latent out.
        """
        if masked := self.evaluator.pair.masked:
            raise ValueError(
                f"start='prior': a mask of the model leaves draws of {sorted(masked)} out "
                "for some data, which have no prior there; start='guide' takes them"
            )
        return self.coordinates_of(self.evaluator.draw_prior(rows, num_draws, key))

    def coordinates_of(self, values: Values) -> Tensor:
        """Return the unconstrained coordinates [K, n, D] of values as the evaluator draws them."""
        return self.coordinates_of_single(self.evaluator.single_values(values))

    def coordinates_of_single(self, values: Values) -> Tensor:
        """Return the unconstrained coordinates [K, n, D] of values ``[K, *batch, *event]``."""
        return torch.cat([c.rows(c.unconstrained(values)) for c in self.guide.coordinates], -1)

    def is_at_edge(self, z: Tensor) -> Tensor:
        """Return which coordinates [K, n, D] are of values that are rounded to an edge, [K, n]."""
        low, high = self._edges
        return ((z < low + _AT_EDGE) | (z > high - _AT_EDGE)).any(-1)

    @property
    def _edges(self) -> Tensor:
        """The smallest and the largest coordinates whose values the dtype tells apart, [2, D]."""
        return torch.cat([c.edges(self.table) for c in self.guide.coordinates], -1)

    def values_of(self, rows: slice, z: Tensor, key: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the values of coordinates [K, n, D] by site, ``[K, n, ...]``.

        What the model sums out is drawn from its exact posterior given these.

        Args:
            rows: of which data.
            z: their coordinates.
            key: tells the random numbers from others.
        """
        evaluator = self.evaluator
        # A guide of no family knows no preimages of draws, such as the logarithm of a rate.
        known = evaluator.guide.shapes
        single = {n: v for n, v in self.guide.values_of(z).items() if n in known}
        values = evaluator.from_single(single)
        values = {**values, **evaluator.draw_summed_out(rows, values, key)}
        sites = evaluator.structure.sites
        return evaluator.by_datum({name: v for name, v in values.items() if name in sites})

    def base_scale(self, rows: slice) -> Tensor:
        """Return the standard deviation of the base's coordinates, [n, D]."""
        shape = _SCALE_DRAWS, rows.stop - rows.start, self.blocks.num_noise
        stream = Stream(self.evaluator.seed, Purpose.BASE_SCALE, rows.start)
        return self.base_draws(rows, stream.normal(self.table.new_empty(shape))).std(0)


def ready(
    model: Program,
    guide: Program,
    batch: tuple[Any, ...],
    given: GivenValues | None,
    data_plate: DataPlate,
    seed: int | None,
    compile: Compile,
) -> Ready:
    """Return what chains of a batch need; the base is the guide's own answer, in its own family.

    A guide of no family, and one of points, is stood for by independent Gaussians with the moments
    of its draws. Where it gives some data no answer (parameters that are no numbers, or scales of
    zero) it is replaced by a guide of the same answers for the others, and a Gaussian with the
    prior's moments for these; a logged warning names them.

    Raises:
        ValueError: for what :func:`pyro_vae.refine` refuses, and for an ExactGuide.
    """
    options = given, data_plate, seed, compile
    try:
        made = _ready(model, guide, batch, *options)
    except ValueError as error:
        # Distributions refuse parameters that are no numbers, of all data together.
        if (unchecked := _unchecked(model, guide, batch, options)) is None:
            raise
        made = unchecked
        logger.debug("an answer of the guide is refused: %s", error)
    if not bool(made.lost.any()):
        return made
    rows = torch.nonzero(made.lost).flatten().tolist()
    name = getattr(guide, "__name__", type(guide).__name__)
    logger.warning(
        "the guide %s has no answer for data %s%s (parameters that are not finite, or scales of "
        "zero): a Gaussian with the prior's moments stands in for it there",
        name,
        rows[:10],
        " and others" if len(rows) > 10 else "",
    )
    with torch.no_grad():
        made.guide.table.copy_(made.table)
    again = _ready(model, made.guide, batch, dict(made.given), *options[1:])
    return dataclasses.replace(again, lost=made.lost, stand_in=made.guide)


def _unchecked(
    model: Program,
    guide: Program,
    batch: tuple[Any, ...],
    options: tuple[GivenValues | None, DataPlate, int | None, Compile],
) -> Ready | None:
    """Return what a guide gives whose parameters are not validated; None if that is no cause."""
    with pyro.validation_enabled(False):
        try:
            made = _ready(model, guide, batch, *options)
        except ValueError:  # for another cause, which the first error says
            return None
        parts = [slice(0, made.evaluator.num_data)]
        if isinstance(made.evaluator.batch, OnDemand):
            parts = made.evaluator.data_blocks()
        drawn = (made.evaluator.draw(rows, 2, (Purpose.BASE_KIND,)) for rows in parts)
        log_guide = torch.cat([each for _, each in drawn], 1)
    lost = made.lost | ~log_guide.isfinite().all(0)
    return dataclasses.replace(made, lost=lost) if bool(lost.any()) else None


def _ready(
    model: Program,
    guide: Program,
    batch: tuple[Any, ...],
    given: GivenValues | None,
    data_plate: DataPlate,
    seed: int | None,
    compile: Compile,
) -> Ready:
    """Do what :func:`ready` does, but for the warning and the stand-in."""
    if isinstance(guide, ExactGuide):
        raise ValueError(
            "an ExactGuide is the exact posterior of discrete latents: there is nothing to sample "
            "or to mend; pyro_vae.to_arviz draws from it, and its bounds are log p(x)"
        )
    with contextlib.ExitStack() as stack:
        if isinstance(guide, LocalGuide):  # rows of other data may be a start too
            stack.enter_context(guide.for_any_data())
            given = {**guide.given, **(given or {})}
        evaluator, fixed = prepare(model, guide, batch, given, data_plate, seed)
        pair = evaluator.pair
        if pair.summed_out and not pair.guide_sites & set(evaluator.structure.sites):
            raise ValueError(
                "all latents of the model are discrete and summed out: there is nothing to sample "
                "or to mend, and pyro_vae.elbo of this model and guide is log p(x)"
            )
        # Before the looks are used: this shows, too, whether the model's plate is subsampled.
        evaluator.pair.part_agrees(evaluator.structure.data_plate)
        guide = evaluator.pair.user_guide
        family = guide.family if of_family(guide) and guide.family.has_density else None
        if of_family(guide) and guide.annealing is not None:
            # The base, with the moments of draws at the end of their steps.
            family = guide.annealing.family.base
        looks = evaluator.pair.looks
        local = LocalGuide(
            evaluator.pair.model,
            num_data=evaluator.num_data,
            example=looks,
            family=family,
            data_plate=data_plate,
        )
        table = answer_of(local, guide, evaluator)
    local = local.to(table)
    size, family = local.num_coordinates, local.family
    with torch.no_grad(), pyro.validation_enabled(False):
        noise = table.new_zeros(1, len(table), family.num_noise(size))
        centre = family.from_noise(table, size, noise)
        height = family.conditional(table, size, centre[..., :0], slice(0, size)).log_prob(centre)
    lost = ~(table.flatten(1).isfinite().all(1) & height[0].isfinite())
    table = torch.where(lost.reshape(-1, *[1] * (table.ndim - 1)), local.table.detach(), table)
    blocks = Blocks(looks, evaluator, local, data_plate, compile)
    return Ready(evaluator, fixed, local, blocks, table.detach(), lost)
