"""Looks at a pair before training: its structure, and whether minibatches are right for it."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.handlers import FullSize
from pyro_vae.programs.looks import ModelRun
from pyro_vae.programs.observed import unvalidated
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.sites import Plate, Structure
from pyro_vae.programs.state import Look, batch_norms
from pyro_vae.programs.structure import ModelLooks, inspect
from pyro_vae.programs.traces import drawn_by, run_pair, under_guide
from pyro_vae.programs.types import DataPlate, Program
from pyro_vae.training.data_source import DataSource
from pyro_vae.training.plate_scale import minibatch_scale
from pyro_vae.training.row_order import (
    NotSetUpError,
    bound_to_order,
    divides_by_size,
    set_up_before,
)

__all__ = ["DataLooks", "RowOrder", "rows_of"]

logger = logging.getLogger(__name__)


def rows_of(guide: Program, index: Tensor | None) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a guide with a row per datum uses these; None for all."""
    if isinstance(guide, RowGuide) and index is not None:
        # Checked as a whole: to check them here would be to wait for the device.
        return guide.rows_as_given(index)
    return contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class RowOrder:
    """Whether each step must take all rows, in their order.

    Attributes:
        reason: why; empty where any minibatch is as good.
        norms: modules that normalize over the data of a batch, as an error names them.
    """

    reason: str = ""
    norms: tuple[str, ...] = ()


class DataLooks:
    """Runs a pair on its training data to find out what a minibatch may be.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        source: of the data.
        as_svi: whether the loss asks for no more than pyro.infer.SVI does: the model may then be
            one that runs under the guide's draws alone, and have no data plate.

    Attributes:
        plate: the name of the data plate, False for none, after :meth:`first`.
        pair: on the first rows, with what runs of it have shown; None where these did not suffice.
    """

    pair: Pair | None = None
    _run: ModelRun | None = None  # of the model under its prior

    def __init__(self, model: Program, guide: Program, source: DataSource, as_svi: bool) -> None:
        self._model, self._guide, self._source, self._as_svi = model, guide, source, as_svi
        self.plate: DataPlate = None

    def first(self, data_plate: DataPlate) -> Structure:
        """Return the structure of all data that are at hand, whose data plate is remembered.

        Raises:
            ValueError: for data that are empty, hold NaN, or lie outside their support.
        """
        self.plate = data_plate
        structure = self.structure(self._source.example(self._source.batch))
        if loose := unvalidated(structure):
            logger.warning(
                "observed sites %s have values outside the support of their likelihoods, which do "
                "not validate them: they are trained on as they are. No bound on log p(x) takes "
                "them, for they have no density",
                loose,
            )
        self.plate = False if structure.data_plate is None else structure.data_plate.name
        return structure

    def structure(self, batch: Batch) -> Structure:
        """Return the model's structure on a batch; under the guide's draws, if only there."""
        try:
            looks = ModelLooks(self._model, batch)
            structure = looks.structure(self.plate, latents_needed=False)
            self._run = looks.run
            return structure
        except Exception as error:
            found = self._under_guide(batch) if self._as_svi else None
            if found is None:
                raise
            if found.data_plate is None and self.plate is None:
                logger.warning("each step takes all data, for there is no data plate: %s", error)
            return found

    def _under_guide(self, batch: Batch) -> Structure | None:
        """Return the structure that a step sees; None where there is none either."""
        model = under_guide(self._model, self._guide)
        for plate in (self.plate,) if self.plate is not None else (None, False):
            with Look():
                return inspect(model, batch, data_plate=plate)
        return None

    def row_order(self, few: Batch) -> RowOrder:
        """Return whether rows must keep their order, looking at some of them."""
        norms: dict[str, int] = {}
        with Look() as look:
            role, norms = self._bound_role(few)
        if look.error is not None:
            if self._source.streamed or not self._takes_all():
                return RowOrder()  # the first step says what is wrong
            text = f"{type(look.error).__name__}: {look.error}".splitlines()[0]
            return RowOrder(f"they cannot take {few.size} of the data alone ({text})")
        if role is not None:
            return RowOrder(
                f"the {role} has parameters or values of its own for each row, by its place"
            )
        return RowOrder("", tuple(sorted(n for n, count in norms.items() if count == few.size)))

    def _bound_role(self, few: Batch) -> tuple[str | None, dict[str, int]]:
        """Return which of the pair is bound to the order of rows, and what BatchNorms saw."""

        def look() -> tuple[str | None, dict[str, int]]:
            with rows_of(self._guide, torch.arange(few.size or 0)):
                pair = Pair(self._model, self._guide, few, gradients=True)
                with batch_norms() as norms:
                    pair.looks.know_run(pair.single.run, self._run)
                plate = pair.looks.structure(self.plate, latents_needed=False).data_plate
                if pair.part_agrees(plate):
                    self.pair = pair
                    return None, norms
                return bound_to_order(self._model, self._guide, few, plate, self._rows), norms

        if self._source.streamed:
            return look()
        try:
            with set_up_before():
                return look()
        except NotSetUpError:
            # Pyro's autoguides make their parameters for the first batch that they see.
            run_pair(self._model, self._guide, self._all())
            return look()

    def guide_draws(self) -> bool:
        """Return whether the guide draws the minibatch, of all the data that it is given."""
        if self._source.streamed:
            return False
        with Look():
            return self.plate in drawn_by(self._guide, self._all())
        return False

    def _takes_all(self) -> bool:
        """Return whether the pair runs on all the data at once."""
        with Look() as look:
            run_pair(self._model, self._guide, self._all())
        return look.error is None  # whatever it is, it is no matter of minibatches

    def full_size(self, example: Batch, few: Batch) -> tuple[int | None, FullSize | None]:
        """Return what a minibatch counts for; see :func:`minibatch_scale`.

        Args:
            example: a minibatch.
            few: some rows of the data, the first ones, at least two.
        """
        num_data, pair = self._source.num_data, self.pair
        if pair is None or example.size != few.size:
            pair, structure = None, self.structure(example)
        else:
            structure = pair.looks.structure(self.plate, latents_needed=False)

        def divides(plate: Plate, names: list[str]) -> bool:
            return divides_by_size(self._model, self._guide, few, plate, names, self._rows)

        found, scaled = minibatch_scale(
            self._model, example, structure, num_data, divides, pair.part if pair else None
        )
        if scaled is not None:
            logger.warning(
                "the plate %r has the size of a minibatch, and the latent sites %s are shared by "
                "all data: what is in the plate is scaled by num_data / its size (%d / %d), as "
                "pyro.plate(%r, %d, subsample=x) in the model says it",
                self.plate,
                [site.name for site in structure.global_latents],
                scaled.num_data,
                structure.num_data,
                self.plate,
                scaled.num_data,
            )
        return found, scaled

    def _rows(self, index: Tensor) -> contextlib.AbstractContextManager[None]:
        return rows_of(self._guide, index)

    def _all(self) -> Batch:
        return self._source.example(self._source.all())
