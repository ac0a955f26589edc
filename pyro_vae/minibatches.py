"""Training data: minibatches shuffled or drawn anew, and ELBOs per datum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_vae.batches import Batch, EpochData, StepData, as_batch
from pyro_vae.running import preserved_rng
from pyro_vae.sites import inspect

__all__ = ["TrainingData", "mean_elbo"]


class TrainingData:
    """Which data each step sees, and how many data its loss speaks for.

    Args:
        model: a Pyro model.
        data: a batch, a :class:`StepData` or an :class:`EpochData`.
        batch_size: data in a minibatch.
        device: where batches go; None leaves them.
        data_plate: as in :func:`pyro_vae.sites.inspect`.

    Attributes:
        batch: all the data; of the first look, where they are drawn anew for each epoch; what
            each step draws from, where it does.
        whole: whether a step takes all of them, for there is one datum, or the model
            draws its own minibatches.
        batch_size: data in a minibatch.
        steps_per_epoch: minibatches.
        first_rows: the rows of the first minibatch that was looked at; None for all.

    Raises:
        ValueError: for data that are empty, hold NaN, or lie outside their support.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        data: Any,
        batch_size: int,
        device: torch.device | str | None,
        data_plate: str | bool | None,
    ) -> None:
        self._drawing = data if isinstance(data, StepData) else None
        self._fresh = data if isinstance(data, EpochData) and self._drawing is None else None
        self._device = device
        if self._drawing is not None:
            self.batch = self._made(data.source)
        elif self._fresh is not None:
            # An epoch drawn to look at: the epochs to come have a generator of their own.
            self.batch = self._made(data.epoch(torch.Generator().manual_seed(0)))
        else:
            self.batch = self._made(data)
        # All of them at once: values outside a likelihood's support are refused here.
        plate = inspect(model, self._look(self.batch), data_plate=data_plate).data_plate
        size = self.batch.size
        self.whole = size is None or plate is None or plate.drawn
        self.batch_size = (size or 1) if self.whole else min(batch_size, size or 1)
        self._now = self.batch  # of the present epoch
        self.steps_per_epoch = 1 if self.whole else math.ceil((size or 1) / self.batch_size)
        self.first_rows = None if self.whole else torch.arange(self.batch_size)
        self._plate: str | bool = False if plate is None else plate.name
        # How many data the loss is scaled to; None where it is the sum of its minibatch.
        self._full_size: int | None = 1 if plate is None else plate.full_size
        if self.first_rows is not None:
            few = inspect(model, self.example, data_plate=self._plate)
            if few.data_plate is not None and few.data_plate.size == few.data_plate.full_size:
                self._full_size = None

    def _made(self, data: Any) -> Batch:
        batch = as_batch(data)
        return batch if self._device is None else batch.to(self._device)

    @property
    def example(self) -> Batch:
        """The first minibatch that was looked at, as model and guide get it."""
        first = self.batch if self.first_rows is None else self.batch.rows(self.first_rows)
        return self._look(first)

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
        """The object that draws in each step, whose attributes a step depends on; or nothing."""
        return () if self._drawing is None else (self._drawing,)

    def validation(self, model: Callable[..., Any], data: Any) -> Batch:
        """Return validation data, checked like the training data."""
        batch = self._made(data)
        try:
            inspect(model, batch, data_plate=self._plate)
        except ValueError as error:
            error.add_note("in validation_data")
            raise
        return batch

    def epoch(self) -> Iterator[tuple[Tensor | None, Batch]]:
        """Yield each minibatch of an epoch and its rows; None for all of them."""
        self._now = self.batch
        if self._fresh is not None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()).item()))
            self._now = self._made(self._fresh.epoch(generator))
        size = self._now.size
        if self.whole or size is None:
            yield None, self._now
            return
        # Sent to the device at once: to send each part would be to wait for the step before.
        order = torch.randperm(size).to(self._now.device)
        for index in order.split(self.batch_size):
            yield index, self.minibatch(index)

    def minibatch(self, index: Tensor | None) -> Batch:
        """Return these rows of the present epoch's data; None for all of them."""
        return self._now if index is None else self._now.rows(index)

    def size_of(self, index: Tensor | None) -> int | None:
        """Return the number of data in a minibatch; None where no tensor has rows."""
        return self._now.size if index is None else index.shape[0]

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
