"""Blocks of data, each looked at when it is its turn, and chunks of draws for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from pyro_vae.particles.estimators import LogWeights
from pyro_vae.particles.pair_runner import PairRunner, first_block
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import on_rows, row_guide
from pyro_vae.programs.on_demand import OnDemand
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import DataPlate, Particles, Program, Values


@dataclass(frozen=True, slots=True)
class Chunk:
    """Draws of some particles for some data, and their log weights.

    Attributes:
        rows: which data.
        particles: which particles.
        values: latent site (the guide's auxiliary ones too) to ``[K, *plates, *event]``.
        weights: the LogWeights, [K, N] of this chunk.
    """

    rows: slice
    particles: slice
    values: Values
    weights: LogWeights


class BlockRunner(PairRunner):
    """A PairRunner of a batch in memory, or of one of which a block of rows is read at a time.

    Args:
        pair_of: from a batch in memory, the first block of rows, to the pair on it.
        guide: of the pair.
        batch: the batch.
        seed: as in :class:`PairRunner`.
        particles: as in :class:`PairRunner`.
    """

    def __init__(
        self,
        pair_of: Callable[[Batch], Pair],
        guide: Program,
        batch: Batch,
        seed: int,
        particles: Particles,
    ) -> None:
        if not isinstance(batch, OnDemand):
            super().__init__(pair_of(batch), seed, particles)
            return
        rows = torch.arange(first_block(batch.count))
        with on_rows(guide, rows), _in_parts():
            super().__init__(pair_of(batch.head(len(rows))), seed, particles)
            self._widen(batch)

    def _widen(self, batch: OnDemand) -> None:
        """Go on from the first rows to all of them, which are read as they are needed."""
        if not self.splittable:
            raise ValueError("model and guide do not say of some of the rows what they say of all")
        self._looked_at = slice(0, self.num_data), self.structure
        table = row_guide(self.pair.user_guide)
        self._speaks_for = table if table is not None and table.speaks_for_data else None
        self.structure = self.structure.of_size(batch.count)
        self.guide, self.model = (replace(r, batch=batch) for r in (self.guide, self.model))
        if self.pair.masked:
            # Those of the first rows are known: masks come with the draws of each block.
            self.masks_by_draw, self.guide.masks = True, {}

    def structure_of(self, rows: slice) -> Structure:
        """Return the structure of the model on a block of data, with the values of its sites.

        Raises:
            ValueError: where these rows, read on demand, hold what is refused of any data: NaN,
                values outside the support of their likelihood, data that the rows of a guide were
                not fitted to.
        """
        if not isinstance(self.batch, OnDemand):
            return self.structure
        known, found = self._looked_at
        if (known.start, known.stop) != (rows.start, rows.stop):
            plate, batch = self.structure.data_plate, self.batch.rows(rows)
            name = False if plate is None else plate.name
            with on_rows(self.guide.program, torch.arange(rows.start, rows.stop)):
                looks = ModelLooks(self.pair.model, batch)
                found = looks.structure(name, strict=True, latents_needed=False)
                if self._speaks_for is not None:
                    self._speaks_for.check_same(batch)
            if not self.pair.structure.is_like(found):
                raise ValueError(
                    f"rows {rows.start} to {rows.stop - 1}: the model has other sites, or other "
                    "shapes of them, than on the first rows"
                )
            self._looked_at = rows, found
        return found


def worth_parts(batch: Batch, data_plate: DataPlate) -> Batch:
    """Return a batch, in memory where it is read on demand but all is one datum, or one block."""
    if not isinstance(batch, OnDemand):
        return batch
    one_block = batch.count <= first_block(batch.count)
    return batch.whole() if one_block or data_plate is False else batch


@contextlib.contextmanager
def _in_parts() -> Iterator[None]:
    """Say of what is raised inside the context that it is about the first rows."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        error.add_note(
            "these data are read in parts, and model and guide are run on the first rows alone "
            "to see what they are. Where they take all rows at once only, pass these in memory"
        )
        raise
