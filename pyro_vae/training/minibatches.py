"""Training data: which rows each step sees, and ELBOs per datum."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.handlers import FullSize
from pyro_vae.programs.observed import unvalidated
from pyro_vae.programs.on_demand import OnDemand, on_demand
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.processes import Processes, Share
from pyro_vae.programs.sites import Plate, Structure, names_of
from pyro_vae.programs.state import Look, batch_norms
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.traces import drawn_by, run_pair, under_guide
from pyro_vae.programs.types import DataPlate, Program
from pyro_vae.training.data_source import Shuffle, source_of
from pyro_vae.training.plate_scale import minibatch_scale
from pyro_vae.training.row_order import NotSetUpError, PairOnRows, set_up_before

logger = logging.getLogger(__name__)

_TRIED = 32  # data on which processes try what they are to share, if not more processes


class TrainingData:
    """Which data each step sees, and how many data its loss speaks for.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        data: as in :func:`pyro_vae.fit`.
        batch_size: data in a minibatch.
        device: where batches go; None leaves them.
        data_plate: as in :meth:`ModelLooks.structure`.
        drop_last: whether an epoch leaves out a last minibatch that is smaller.
        shuffle: as in :func:`pyro_vae.fit`.
        processes: that share each minibatch.
        as_svi: whether the loss asks for no more than pyro.infer.SVI does: the model may then be
            one that runs under the guide's draws alone, and have no data plate.

    Attributes:
        batch: all the data; of the first look, where they are drawn anew for each epoch; what
            each step draws from, where it does; the first minibatch, where they are read part
            by part.
        num_data: how many data there are; None where that is not known.
        whole: whether a step takes all of them, in order: there is one datum, the model draws
            its own minibatches, or model or guide has parameters for each row.
        bound: why rows keep their order; empty where they need not.
        batch_size: data in a minibatch.
        source: where minibatches come from.
        structure: of the model on what was looked at first.

    Raises:
        ValueError: for data that are empty, hold NaN, or lie outside their support; for what
            minibatches cannot be right for.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: Any,
        batch_size: int,
        device: torch.device | str | None,
        data_plate: DataPlate,
        drop_last: bool = False,
        *,
        shuffle: Shuffle = "rows",
        processes: Processes | None = None,
        as_svi: bool = False,
    ) -> None:
        self.model, self.guide, self._plate = model, guide, data_plate
        self._drop_last, self._as_svi = drop_last, as_svi
        self.source = source_of(data, batch_size, device, drop_last, shuffle)
        self.processes = self.source.processes = processes or Processes()
        self.batch, self.num_data = self.source.batch, self.source.num_data
        self._run: Structure | None = None  # of the model under its prior
        self._pair: Pair | None = None  # on the first rows, where runs of it have shown enough
        # All of them at once: values outside a likelihood's support are refused here.
        structure = self.structure = self._inspect(self.source.example(self.batch))
        self._loose: set[str] = set()  # sites that a warning was given for
        self._warn_of_loose(structure)
        plate = structure.data_plate
        self._plate = False if plate is None else plate.name
        self.batch_size = min(batch_size, self.batch.size or 1)
        self.bound = ""
        self.whole = self.batch.size is None or plate is None or plate.drawn
        if not self.whole:
            self._find_order()
        if self.whole:
            plate = self._take_whole(plate)
        # How many data the loss is scaled to; None where it is the sum of its minibatch.
        self._full_size: int | None = 1 if plate is None else plate.full_size
        self._scaled: FullSize | None = None
        if not self.whole:
            self._find_scale()
        self._looked = self.whole or self.source.seen  # at each minibatch

    def _warn_of_loose(self, structure: Structure) -> None:
        loose = [name for name in unvalidated(structure) if name not in self._loose]
        self._loose.update(loose)
        if loose:
            logger.warning(
                "observed sites %s have values outside the support of their likelihoods, which do "
                "not validate them: they are trained on. No bound on log p(x) takes them",
                loose,
            )

    # --- looks

    def _inspect(self, batch: Batch) -> Structure:
        """Return the model's structure on a batch; under the guide's draws, if only there."""
        try:
            looks = ModelLooks(self.model, batch)
            structure = looks.structure(self._plate, latents_needed=False)
            self._run = looks.run
            return structure
        except Exception as error:
            plates: tuple[DataPlate, ...] = (None, False) if self._plate is None else (self._plate,)
            for plate in plates if self._as_svi else ():
                with Look():
                    model = under_guide(self.model, self.guide)
                    found = ModelLooks(model, batch).structure(plate)
                    if found.data_plate is None and self._plate is None:
                        text = "each step takes all data, for there is no data plate: %s"
                        logger.warning(text, error)
                    return found
            raise

    @property
    def _share_size(self) -> int:
        """Data of a minibatch that one process runs, at most."""
        return self.batch_size if self.whole else -(-self.batch_size // self.processes.size)

    def _few(self) -> Batch:
        """Return the first rows, at least two, as model and guide get them."""
        return self.source.example(self.source.some(max(2, self._share_size)))

    def _all(self) -> Batch:
        return self.source.example(self.source.all())

    def _on_rows(self, few: Batch, plate: Plate) -> PairOnRows:
        return PairOnRows(self.model, self.guide, few, plate, self.rows)

    def _first_rows_of_table(self, few: Batch) -> contextlib.AbstractContextManager[None]:
        """Give a guide with a row per datum no more of its table than the first rows need.

        Of a table of millions of rows, gradients by all of it would be many times the memory.
        """
        if not isinstance(self.guide, RowGuide):
            return contextlib.nullcontext()
        table = self.guide.in_force
        first = table[: few.size].detach().clone().requires_grad_(table.requires_grad)
        return self.guide.using(first)

    def _find_order(self) -> None:
        """Find out whether each step must take all rows, in their order."""
        few = self._few()
        with Look() as look:
            try:
                with contextlib.nullcontext() if self.source.streamed else set_up_before():
                    who, norms = self._bound_role(few)
            except NotSetUpError:
                # Pyro's autoguides make their parameters for the first batch that they see.
                run_pair(self.model, self.guide, self._all())
                who, norms = self._bound_role(few)
        if look.error is not None:
            with Look() as whole:  # what it raises is no matter of minibatches
                if not self.source.streamed:
                    run_pair(self.model, self.guide, self._all())
            if self.source.streamed or whole.error is not None:
                return  # the first step says what is wrong
            text = f"{type(look.error).__name__}: {look.error}".splitlines()[0]
            self.bound = f"they cannot take {few.size} of the data alone ({text})"
        elif who is not None:
            self.bound = f"the {who} has parameters or values of its own for each row, by its place"
        else:
            self._check_last(sorted(name for name, count in norms.items() if count == few.size))
            return
        self.whole = True
        with Look():
            if not self.source.streamed and self._plate in drawn_by(self.guide, self._all()):
                self.bound = ""  # the guide draws the minibatch, of all the data that it is given

    def _bound_role(self, few: Batch) -> tuple[str | None, dict[str, int]]:
        """Return which of the pair is bound to the order of rows, and what BatchNorms saw."""
        with self._first_rows_of_table(few), self.rows(torch.arange(few.size or 0)):
            pair, refused = Pair(self.model, self.guide, few, gradients=True), False
            with batch_norms() as norms:
                try:
                    pair.looks.know_run(pair.single.run, self._run)
                except ValueError:  # what a loss refuses, its first step says
                    run_pair(self.model, self.guide, few)
                    refused = True
            plate = pair.looks.structure(self._plate, latents_needed=False).data_plate
            if not refused and pair.part_agrees(plate):
                self._pair = pair
                return None, norms
            role = None if plate is None else self._on_rows(few, plate).bound_to_order()
            return role, norms

    def _find_scale(self) -> None:
        """Find the number of data that a minibatch's loss is scaled to."""
        example, pair = self.example, self._pair
        part = None
        if pair is None or example.size != pair.batch.size:
            structure = self._inspect(example)
        else:
            structure, part = pair.looks.structure(self._plate, latents_needed=False), pair.part

        def divides(plate: Plate, names: list[str]) -> bool:
            few = self._few()
            with self._first_rows_of_table(few):
                return self._on_rows(few, plate).divides_by_size(names)

        self._full_size, self._scaled = minibatch_scale(
            self.model, example, structure, self.num_data, divides, part
        )
        if self._scaled is not None:
            name, count, shared = self._plate, self._scaled.num_data, structure.global_latents
            logger.warning(
                f"the plate {name!r} has the size of a minibatch, and the latent sites "
                f"{names_of(shared)} are shared by all data: what is in the plate is scaled by "
                f"num_data / its size ({count} / {structure.num_data}), as "
                f"pyro.plate({name!r}, {count}, subsample=x) in the model says it"
            )

    def _take_whole(self, plate: Plate | None) -> Plate | None:
        """Let each step take all the data, in their order; return the data plate of them."""
        if self.source.streamed:
            why = self.bound or "the whole is one datum, or the model draws its own minibatches"
            what = (
                "the data come in batches of a loader, and each step would have to take all of them"
            )
            raise ValueError(f"{what} at once: {why}. Pass tensors, or the loader's dataset")
        if not self.source.seen:
            self.batch = self.source.all()
            plate = self._inspect(self.batch).data_plate
        if self.bound and self.num_data is not None and self.num_data > self.batch_size:
            logger.warning(
                f"each step takes all {self.num_data} data, in their order, and batch_size is not "
                f"used: {self.bound}. Minibatches are for models whose plate takes its size from "
                "the batch, and guides such as pyro_vae.AmortizedGuide, or LocalGuide"
            )
        self.batch_size = self.num_data or 1
        return plate

    def _check_last(self, norms: Sequence[str]) -> None:
        """Raise ValueError for a minibatch of one datum, which these cannot normalize."""
        if self.num_data is None or self.source.streamed or not norms:
            return
        size = self.batch_size
        last = self.num_data % size or size
        if last == 1 and not (self._drop_last and size > 1):
            raise ValueError(
                f"the last minibatch of an epoch has 1 datum ({self.num_data} data, batch_size="
                f"{size}), which {', '.join(norms)} in training mode cannot normalize; pass "
                f"{'' if size == 1 else 'drop_last=True, or '}another batch_size"
            )

    # --- what a step sees

    @property
    def first_rows(self) -> Tensor | None:
        """The rows of the first minibatch that was looked at; None for all, or where not known."""
        if self.whole or self.source.streamed:
            return None
        return torch.arange(self._share_size)

    @property
    def example(self) -> Batch:
        """The first minibatch that was looked at, as model and guide get it."""
        part = self.batch if self.first_rows is None else self.source.some(self._share_size)
        return self.source.example(part)

    @property
    def is_scaled(self) -> bool:
        """Whether the loss of a minibatch is scaled to all data."""
        return self._full_size is not None and not self.whole

    def common(self) -> tuple[Batch, Share]:
        """Return some data that all processes have, and the part of this one."""
        return self.source.common(self.num_tried)

    @property
    def num_tried(self) -> int:
        """Data on which processes try whether parts of them add up."""
        return min(self.batch_size, max(_TRIED, 2 * self.processes.size + 1))

    def looked_at(self) -> Pair | None:
        """Return the pair on the example, with what runs of it have shown, once; None without."""
        pair, self._pair = self._pair, None
        return pair if pair is not None and pair.batch.size == self._share_size else None

    def rows(self, index: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a guide with a row per datum uses these; None for all."""
        if isinstance(self.guide, RowGuide) and index is not None:
            # Checked as a whole: to check them here would be to wait for the device.
            return self.guide.rows_as_given(index)
        return contextlib.nullcontext()

    def full_size(self, program: Program) -> Program:
        """Return a model or guide whose minibatches count as many times as there are in all."""
        return program if self._scaled is None else self._scaled(program)

    def validation(self, data: Any) -> Batch:
        """Return validation data, checked like the training data.

        Raises:
            ValueError: also where model or guide speak for the training data alone.
        """
        if self.bound:
            what = "model and guide are for the training data alone, in their order"
            advice = "Use an AmortizedGuide, or leave validation_data out"
            raise ValueError(f"validation_data: {what}: {self.bound}. {advice}")
        try:
            batch = on_demand(data, ordered=False)
            if self.source.device is not None:
                batch = batch.to(self.source.device)
            if isinstance(batch, OnDemand) and self.whole:
                batch = batch.whole()
            parts = self.parts(batch) if isinstance(batch, OnDemand) else [batch]
            for part in parts:
                self._inspect(part)
        except Exception as error:
            error.add_note("in validation_data")
            raise
        return batch

    @property
    def steps_per_epoch(self) -> int | None:
        """Minibatches of an epoch; None where a loader does not know."""
        return 1 if self.whole else self.source.num_batches(self.batch_size)

    def epoch(
        self, skip: int = 0, ready: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Tensor | None, Batch]]:
        """Yield each minibatch of an epoch and its rows; None for all, or where not known.

        Args:
            skip: how many of the first ones to leave out.
            ready: called when these are passed, before the next one is read.
        """
        size = None if self.whole else self.batch_size
        for index, batch in self.source.epoch(size, skip, ready):
            if not self._looked:
                self._warn_of_loose(self._inspect(batch))
            yield index, batch
        self._looked = True

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """Yield a batch in parts of the size of a minibatch, in order."""
        if self.whole or batch.size is None:
            yield batch
            return
        for start in range(0, batch.size, self.batch_size):
            yield batch.rows(slice(start, start + self.batch_size))

    def elbo(self, loss: float, size: int | None) -> MinibatchELBO:
        """Return the ELBO per datum of a loss of so many data."""
        counted = 1 if self.whole else size or 1
        return MinibatchELBO(-loss / (self._full_size or counted), counted)


class MinibatchELBO(NamedTuple):
    """The ELBO of a minibatch.

    Attributes:
        value: in nats per datum.
        size: for how many data it counts in a mean; 0 for a step that was skipped.
    """

    value: float
    size: int


def mean_elbo(elbos: Sequence[MinibatchELBO]) -> tuple[float, float]:
    r"""Return the mean of minibatches' ELBOs, weighted by their sizes, and its standard error.

    .. math::
        \bar e = \frac{\sum_b n_b e_b}{\sum_b n_b}, \quad
        \mathrm{se}^2 = \frac{B}{B - 1} \frac{\sum_b n_b^2 (e_b - \bar e)^2}{(\sum_b n_b)^2}

    Args:
        elbos: of B minibatches, skipped ones aside; the standard error is nan for a single one,
            and both are for none.

    Returns:
        Mean and standard error, in nats per datum.
    """
    elbos = [elbo for elbo in elbos if elbo.size]
    count, total = len(elbos), sum(elbo.size for elbo in elbos)
    if not count:
        return math.nan, math.nan
    mean = sum(elbo.value * elbo.size for elbo in elbos) / total
    if count < 2:
        return mean, math.nan
    apart = [(elbo.value - mean) * elbo.size for elbo in elbos]
    squares = sum(each * each for each in apart)  # inf where a power would raise OverflowError
    return mean, math.sqrt(squares * count / (count - 1)) / total
