"""Training data: minibatches shuffled or drawn anew, and ELBOs per datum."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.batch import Batch, EpochData, StepData, as_batch
from pyro_vae.programs.handlers import FullSize
from pyro_vae.programs.observed import unvalidated
from pyro_vae.programs.readers import BatchReader, RowReader, read_all, reader_of
from pyro_vae.programs.row_guide import RowGuide
from pyro_vae.programs.sites import Plate, Structure
from pyro_vae.programs.state import Look, batch_norms, preserved_rng
from pyro_vae.programs.structure import inspect
from pyro_vae.programs.traces import drawn_by, run_pair, under_guide
from pyro_vae.training.plate_scale import minibatch_scale
from pyro_vae.training.row_order import (
    NotSetUpError,
    bound_to_order,
    divides_by_size,
    set_up_before,
)

__all__ = ["TrainingData", "mean_elbo"]

logger = logging.getLogger(__name__)


class TrainingData:
    """Which data each step sees, and how many data its loss speaks for.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        data: a batch, a :class:`StepData`, an :class:`EpochData`, or one of PyTorch's datasets
            or loaders.
        batch_size: data in a minibatch.
        device: where batches go; None leaves them.
        data_plate: as in :func:`pyro_vae.programs.structure.inspect`.
        drop_last: whether an epoch leaves out a last minibatch that is smaller.
        as_svi: whether the loss asks for no more than pyro.infer.SVI does: the model may then be
            one that runs under the guide's draws alone, and have no data plate.

    Attributes:
        batch: all the data; of the first look, where they are drawn anew for each epoch; what
            each step draws from, where it does; the first minibatch, where they are read part
            by part.
        num_data: how many data there are; None where no tensor has rows, or nobody says.
        whole: whether a step takes all of them, in order: there is one datum, the model draws
            its own minibatches, or model or guide has parameters for each row.
        bound: why rows keep their order; empty where they need not.
        batch_size: data in a minibatch.
        steps_per_epoch: minibatches; None where nobody says how many there are.
        first_rows: the rows of the first minibatch that was looked at; None where there are
            none to be told.

    Raises:
        ValueError: for data that are empty, hold NaN, or lie outside their support; for what
            minibatches cannot be right for.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: Any,
        batch_size: int,
        device: torch.device | str | None,
        data_plate: str | bool | None,
        drop_last: bool = False,
        *,
        as_svi: bool = False,
    ) -> None:
        self._model, self._guide, self._device = model, guide, device
        self._drop_last, self._as_svi = drop_last, as_svi
        self._drawing = data if isinstance(data, StepData) else None
        self._fresh = data if isinstance(data, EpochData) and self._drawing is None else None
        self._reader = reader_of(data, batch_size, drop_last)
        self._looked = False  # at each minibatch that was read
        self._scaled: FullSize | None = None
        self.batch = self._first_of(data, batch_size)
        self.num_data = self.batch.size if self._reader is None else self._reader.num_data
        # All of them at once: values outside a likelihood's support are refused here.
        structure = self._inspect(self._look(self.batch), data_plate)
        if loose := unvalidated(structure):
            logger.warning(
                "observed sites %s have values outside the support of their likelihoods, which do "
                "not validate them: they are trained on as they are. No bound on log p(x) takes "
                "them, for they have no density",
                loose,
            )
        plate = structure.data_plate
        self._plate: str | bool = False if plate is None else plate.name
        self.batch_size = min(batch_size, self.batch.size or 1)
        self.bound = ""
        self.whole = self.batch.size is None or plate is None or plate.drawn
        if not self.whole:
            self.bound = self._why_bound()
            self.whole = bool(self.bound)
            if self.bound and self._guide_draws():
                self.bound = ""
        if self.whole:
            structure = self._take_whole(structure)
            plate = structure.data_plate
        # How many data the loss is scaled to; None where it is the sum of its minibatch.
        self._full_size: int | None = 1 if plate is None else plate.full_size
        if not self.whole:
            self._look_at_minibatch()
        self._now = self.batch  # of the present epoch

    # --- looks

    def _inspect(self, batch: Batch, data_plate: str | bool | None) -> Structure:
        try:
            return inspect(self._model, batch, data_plate=data_plate, latents_needed=False)
        except Exception as error:
            found = self._under_guide(batch, data_plate) if self._as_svi else None
            if found is None:
                raise
            if found.data_plate is None and data_plate is None:
                logger.warning("each step takes all data, for there is no data plate: %s", error)
            return found

    def _under_guide(self, batch: Batch, data_plate: str | bool | None) -> Structure | None:
        """Return the structure that a step sees; None where there is none either."""
        model = under_guide(self._model, self._guide)
        for plate in (data_plate,) if data_plate is not None else (None, False):
            with Look():
                return inspect(model, batch, data_plate=plate)
        return None

    def _first_of(self, data: Any, batch_size: int) -> Batch:
        """Return what is looked at first: all of the data, if they are at hand."""
        if self._drawing is not None:
            return self._made(self._drawing.source)
        if self._fresh is not None:
            # An epoch drawn to look at: the epochs to come have a generator of their own.
            return self._made(self._fresh.epoch(torch.Generator().manual_seed(0)))
        if isinstance(self._reader, RowReader):
            return self._peek(self._reader, batch_size)
        if self._reader is not None:
            with preserved_rng(torch.device("cpu")):
                first = next(iter(self._reader), None)
            if first is None:
                raise ValueError("the data are empty: their loader gives no batch")
            return self._made(first)
        return self._made(data)

    def _made(self, data: Any) -> Batch:
        batch = as_batch(data)
        return batch if self._device is None else batch.to(self._device)

    def _why_bound(self) -> str:
        """Return why rows must keep their order; empty where any minibatch is as good."""
        few = self._look(self._some(max(2, self.batch_size)))
        with Look() as look, batch_norms() as norms:
            role = self._bound_role(few)
        if look.error is not None:
            if isinstance(self._reader, BatchReader) or not self._takes_all():
                return ""  # the first step says what is wrong
            told = f"{type(look.error).__name__}: {look.error}".splitlines()[0]
            return f"they cannot take {few.size} of the data alone ({told})"
        if role is not None:
            return f"the {role} has parameters or values of its own for each row, by its place"
        self._check_last({name for name, values in norms.items() if values == few.size})
        return ""

    def _some(self, count: int) -> Batch:
        """Return the first rows, as many of them as there are; a loader's whole first batch."""
        if isinstance(self._reader, BatchReader):
            return self.batch
        if isinstance(self._reader, RowReader):
            return self._peek(self._reader, count)
        return self.batch.rows(slice(0, count))

    def _peek(self, reader: RowReader, count: int) -> Batch:
        """Read the first rows; what is drawn with them leaves the random state as it was."""
        with preserved_rng(torch.device("cpu")):
            return self._made(reader.read(torch.arange(min(count, reader.num_data))))

    def _bound_role(self, few: Batch) -> str | None:
        def look() -> str | None:
            with self.rows(torch.arange(few.size or 0)):
                plate = self._inspect(few, self._plate).data_plate
                return bound_to_order(self._model, self._guide, few, plate, self.rows)

        if isinstance(self._reader, BatchReader):
            return look()
        try:
            with set_up_before():
                return look()
        except NotSetUpError:
            # Pyro's autoguides make their parameters for the first batch that they see.
            batch = self._look(self._all())
            run_pair(self._model, self._guide, batch)
            return look()

    def _guide_draws(self) -> bool:
        """Return whether the guide draws the minibatch, of all the data that it is given."""
        if isinstance(self._reader, BatchReader):
            return False
        with Look():
            return self._plate in drawn_by(self._guide, self._look(self._all()))
        return False

    def _takes_all(self) -> bool:
        """Return whether the pair runs on all the data at once."""
        with Look() as look:
            run_pair(self._model, self._guide, self._look(self._all()))
        return look.error is None  # whatever it is, it is no matter of minibatches

    def _all(self) -> Batch:
        if isinstance(self._reader, RowReader):
            return self._peek(self._reader, self._reader.num_data)
        return self.batch

    def _take_whole(self, structure: Structure) -> Structure:
        """Let each step take all the data, in their order; return the model's structure on them."""
        if isinstance(self._reader, BatchReader):
            why = self.bound or "the whole is one datum, or the model draws its own minibatches"
            raise ValueError(
                f"the data come in batches of a loader, and each step would have to take all of "
                f"them at once: {why}. Pass tensors, or the loader's dataset"
            )
        if isinstance(self._reader, RowReader):
            self.batch = self._all()
            structure = self._inspect(self.batch, self._plate)
        if self.bound and self.num_data is not None and self.num_data > self.batch_size:
            logger.warning(
                "each step takes all %d data, in their order, and batch_size is not used: %s. "
                "Minibatches are for models whose plate takes its size from the batch, and guides "
                "such as pyro_vae.AmortizedGuide, or LocalGuide, which is told which rows it gets",
                self.num_data,
                self.bound,
            )
        self.batch_size = self.num_data or 1
        return structure

    def _look_at_minibatch(self) -> None:
        """Find out what a minibatch counts for."""
        few = self._inspect(self.example, self._plate)
        self._full_size, self._scaled = minibatch_scale(
            self._model, self.example, few, self.num_data, self._divides
        )
        if self._scaled is not None:
            logger.warning(
                "the plate %r has the size of a minibatch, and the latent sites %s are shared by "
                "all data: what is in the plate is scaled by num_data / its size (%d / %d), as "
                "pyro.plate(%r, %d, subsample=x) in the model says it",
                self._plate,
                [site.name for site in few.global_latents],
                self._scaled.num_data,
                few.num_data,
                self._plate,
                self._scaled.num_data,
            )

    def _divides(self, plate: Plate, names: list[str]) -> bool:
        few = self._look(self._some(max(2, self.batch_size)))
        return divides_by_size(self._model, self._guide, few, plate, names, self.rows)

    def _check_last(self, norms: set[str]) -> None:
        """Raise ValueError for a minibatch of one datum, which these cannot normalize."""
        if self.num_data is None or isinstance(self._reader, BatchReader):
            return
        dropped = self._drop_last and self.batch_size > 1
        last = self.num_data % self.batch_size or self.batch_size
        if last > 1 or dropped or not norms:
            return
        raise ValueError(
            f"the last minibatch of an epoch has 1 datum ({self.num_data} data, batch_size="
            f"{self.batch_size}), which {', '.join(sorted(norms))} in training mode cannot "
            f"normalize; pass {'' if self.batch_size == 1 else 'drop_last=True, or '}another "
            "batch_size"
        )

    def _look(self, batch: Batch) -> Batch:
        """Draw data to look at: the global random state stays as it is."""
        if self._drawing is None:
            return batch
        copy = batch.repeat(1)
        tensors = [t for t in (*copy.args, *copy.kwargs.values()) if isinstance(t, Tensor)]
        versions = [tensor._version for tensor in tensors]
        with preserved_rng(batch.device):
            torch.manual_seed(0)
            drawn = self.drawn(copy)
        if [tensor._version for tensor in tensors] != versions:
            raise ValueError(
                f"{type(self._drawing).__name__}.draw writes to the minibatch that it is given, "
                "which is the data themselves; return a new tensor"
            )
        return drawn

    # --- what a step sees

    @property
    def first_rows(self) -> Tensor | None:
        """The rows of the minibatch that is looked at first; None where all are, or none told."""
        if self.whole or isinstance(self._reader, BatchReader):
            return None
        return torch.arange(self.batch_size)

    @property
    def example(self) -> Batch:
        """The first minibatch that was looked at, as model and guide get it."""
        return self._look(self.batch if self.first_rows is None else self._some(self.batch_size))

    def rows(self, index: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Name the rows that a batch holds to a guide with a row per datum; None for all."""
        if isinstance(self._guide, RowGuide) and index is not None:
            # Checked as a whole: to check them here would be to wait for the device.
            return self._guide.rows_as_given(index)
        return contextlib.nullcontext()

    def full_size(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a model or guide whose minibatches count as many times as there are in all."""
        return fn if self._scaled is None else self._scaled(fn)

    def drawn(self, batch: Batch) -> Batch:
        """Return what model and guide get of a minibatch, drawn anew where data are that.

        Raises:
            ValueError: where another number of data was drawn.
        """
        if self._drawing is None:
            return batch
        drawn = as_batch(self._drawing.draw(*batch.args, **batch.kwargs))
        if drawn.size != batch.size:
            raise ValueError(
                f"{type(self._drawing).__name__}.draw was given {batch.size} data and returned "
                f"{drawn.size}"
            )
        return drawn

    @property
    def owners(self) -> tuple[Any, ...]:
        """What draws in each step, whose attributes a step depends on; or nothing."""
        return () if self._drawing is None else (self._drawing, self._drawing.draw)

    def validation(self, model: Callable[..., Any], data: Any) -> Batch:
        """Return validation data, checked like the training data.

        Raises:
            ValueError: also where model or guide speak for the training data alone.
        """
        if self.bound:
            raise ValueError(
                f"validation_data: model and guide are for the training data alone, in their "
                f"order: {self.bound}. Use an AmortizedGuide, or leave validation_data out"
            )
        try:
            batch = self._made(read_all(data, ordered=False))
            self._inspect(batch, self._plate)
        except Exception as error:
            error.add_note("in validation_data")
            raise
        return batch

    @property
    def steps_per_epoch(self) -> int | None:
        """Minibatches of an epoch; None where nobody says how many there are."""
        if self.whole:
            return 1
        if isinstance(self._reader, BatchReader):
            return self._reader.num_batches
        if self.num_data is None:
            return 1
        count, last = divmod(self.num_data, self.batch_size)
        return count + (last > 0 and not self._drop_last)

    @property
    def streamed(self) -> bool:
        """Whether a minibatch cannot be had again by its rows."""
        return isinstance(self._reader, BatchReader)

    def epoch(self) -> Iterator[tuple[Tensor | None, Batch]]:
        """Yield each minibatch of an epoch and its rows; None for all of them, or none told."""
        if isinstance(self._reader, BatchReader):
            yield from self._streamed(self._reader)
            return
        self._now = self.batch
        if self._fresh is not None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()).item()))
            self._now = self._made(self._fresh.epoch(generator))
        if isinstance(self._reader, RowReader) and self.whole:
            self._now = self._made(self._reader.read())
        size = self._now.size if self._reader is None else self.num_data
        if self.whole or size is None:
            yield None, self._now
            return
        # Sent to the device at once: to send each part would be to wait for the step before.
        order = torch.randperm(size).to(self._now.device)
        for index in order.split(self.batch_size):
            if self._drop_last and index.shape[0] < self.batch_size:
                break
            batch = self.minibatch(index)
            self._check_read(batch)
            yield index, batch
        self._looked = True

    def _streamed(self, reader: BatchReader) -> Iterator[tuple[None, Batch]]:
        empty = True
        for read in reader:
            batch = self._made(read)
            self._check_read(batch)
            empty = False
            yield None, batch
        if empty:
            raise ValueError(
                "the data gave no batch in this epoch: a loader, or an IterableDataset, must give "
                "its rows anew each time it is iterated over"
            )
        self._looked = True

    def _check_read(self, batch: Batch) -> None:
        """Look at a minibatch of the first epoch, where all the data were never at hand."""
        if self._reader is not None and not self._looked:
            self._inspect(batch, self._plate)

    def minibatch(self, index: Tensor | None) -> Batch:
        """Return these rows of the present epoch's data; None for all of them."""
        if index is None:
            return self._now
        if isinstance(self._reader, RowReader):
            return self._made(self._reader.read(index))
        return self._now.rows(index)

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """Yield a batch in parts of the size of a minibatch, in order."""
        if self.whole or batch.size is None:
            yield batch
            return
        for start in range(0, batch.size, self.batch_size):
            yield batch.rows(slice(start, start + self.batch_size))

    def elbo(self, loss: float, size: int | None) -> tuple[float, int]:
        """Return the ELBO per datum of a loss of so many data, and for how many it counts."""
        counted = 1 if self.whole else size or 1
        return -loss / (counted if self._full_size is None else self._full_size), counted


def mean_elbo(elbos: list[tuple[float, int]]) -> tuple[float, float]:
    """Return the mean of minibatches' ELBOs, weighted by their sizes, and its standard error.

    Args:
        elbos: what :meth:`TrainingData.elbo` returned for each; the standard error is nan
            for a single one.
    """
    count, total = len(elbos), sum(size for _, size in elbos)
    mean = sum(elbo * size for elbo, size in elbos) / total
    if count < 2:
        return mean, math.nan
    squares = sum(((elbo - mean) * size) ** 2 for elbo, size in elbos)
    return mean, math.sqrt(squares * count / (count - 1)) / total
