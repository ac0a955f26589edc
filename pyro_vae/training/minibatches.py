"""Training data: which rows each step sees, and ELBOs per datum."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.handlers import FullSize
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.readers import read_all
from pyro_vae.programs.sites import Plate
from pyro_vae.programs.types import DataPlate, Program
from pyro_vae.training.data_looks import DataLooks, rows_of
from pyro_vae.training.data_source import source_of

__all__ = ["MinibatchELBO", "TrainingData", "mean_elbo"]

logger = logging.getLogger(__name__)


class TrainingData:
    """Which data each step sees, and how many data its loss speaks for.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        data: as in :func:`pyro_vae.fit`.
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
        source: where minibatches come from.

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
        as_svi: bool = False,
    ) -> None:
        self._guide, self._drop_last = guide, drop_last
        self.source = source_of(data, batch_size, device, drop_last)
        self._looks = DataLooks(model, guide, self.source, as_svi)
        self.batch, self.num_data = self.source.batch, self.source.num_data
        # All of them at once: values outside a likelihood's support are refused here.
        plate = self._looks.first(data_plate).data_plate
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
            self._full_size, self._scaled = self._looks.full_size(self.example, self._few())
        self._looked = self.whole or self.source.seen  # at each minibatch

    def _few(self) -> Batch:
        """Return the first rows, at least two, as model and guide get them."""
        return self.source.example(self.source.some(max(2, self.batch_size)))

    def _find_order(self) -> None:
        """Find out whether each step must take all rows, in their order.

        Raises:
            ValueError: for a minibatch of one datum where BatchNorm is at work.
        """
        order = self._looks.row_order(self._few())
        self.whole = bool(order.reason)
        if not self.whole:
            self._check_last(order.norms)
        elif not self._looks.guide_draws():
            self.bound = order.reason

    def _take_whole(self, plate: Plate | None) -> Plate | None:
        """Let each step take all the data, in their order; return the data plate of them."""
        if self.source.streamed:
            why = self.bound or "the whole is one datum, or the model draws its own minibatches"
            raise ValueError(
                f"the data come in batches of a loader, and each step would have to take all of "
                f"them at once: {why}. Pass tensors, or the loader's dataset"
            )
        if not self.source.seen:
            self.batch = self.source.all()
            plate = self._looks.structure(self.batch).data_plate
        if self.bound and self.num_data is not None and self.num_data > self.batch_size:
            logger.warning(
                "each step takes all %d data, in their order, and batch_size is not used: %s. "
                "Minibatches are for models whose plate takes its size from the batch, and guides "
                "such as pyro_vae.AmortizedGuide, or LocalGuide, which is told which rows it gets",
                self.num_data,
                self.bound,
            )
        self.batch_size = self.num_data or 1
        return plate

    def _check_last(self, norms: Sequence[str]) -> None:
        """Raise ValueError for a minibatch of one datum, which these cannot normalize."""
        if self.num_data is None or self.source.streamed or not norms:
            return
        dropped = self._drop_last and self.batch_size > 1
        last = self.num_data % self.batch_size or self.batch_size
        if last > 1 or dropped:
            return
        raise ValueError(
            f"the last minibatch of an epoch has 1 datum ({self.num_data} data, batch_size="
            f"{self.batch_size}), which {', '.join(norms)} in training mode cannot "
            f"normalize; pass {'' if self.batch_size == 1 else 'drop_last=True, or '}another "
            "batch_size"
        )

    # --- what a step sees

    @property
    def first_rows(self) -> Tensor | None:
        """The rows of the first minibatch that was looked at; None for all, or where not known."""
        if self.whole or self.source.streamed:
            return None
        return torch.arange(self.batch_size)

    @property
    def example(self) -> Batch:
        """The first minibatch that was looked at, as model and guide get it."""
        whole = self.first_rows is None
        return self.source.example(self.batch if whole else self.source.some(self.batch_size))

    def looked_at(self) -> Pair | None:
        """Return the pair on the example, with what runs of it have shown, once; None without."""
        pair, self._looks.pair = self._looks.pair, None
        return pair if pair is not None and pair.batch.size == self.batch_size else None

    def rows(self, index: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a LocalGuide uses the rows of a minibatch; None for all."""
        return rows_of(self._guide, index)

    def full_size(self, program: Program) -> Program:
        """Return a model or guide whose minibatches count as many times as there are in all."""
        return program if self._scaled is None else self._scaled(program)

    def validation(self, data: Any) -> Batch:
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
            batch = self.source.made(read_all(data, ordered=False))
            self._looks.structure(batch)
        except Exception as error:
            error.add_note("in validation_data")
            raise
        return batch

    @property
    def steps_per_epoch(self) -> int | None:
        """Minibatches of an epoch; None where a loader does not know."""
        return 1 if self.whole else self.source.num_batches(self.batch_size, self._drop_last)

    def epoch(self) -> Iterator[tuple[Tensor | None, Batch]]:
        """Yield each minibatch of an epoch and its rows; None for all, or where not known."""
        size = None if self.whole else self.batch_size
        for index, batch in self.source.epoch(size, self._drop_last):
            if not self._looked:
                self._looks.structure(batch)
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
        of = counted if self._full_size is None else self._full_size
        return MinibatchELBO(-loss / of, counted)


@dataclass(frozen=True, slots=True)
class MinibatchELBO:
    """The ELBO of a minibatch.

    Attributes:
        value: in nats per datum.
        size: for how many data it counts in a mean.
    """

    value: float
    size: int


def mean_elbo(elbos: Sequence[MinibatchELBO]) -> tuple[float, float]:
    r"""Return the mean of minibatches' ELBOs, weighted by their sizes, and its standard error.

    .. math::
        \bar e = \frac{\sum_b n_b e_b}{\sum_b n_b}, \quad
        \mathrm{se}^2 = \frac{B}{B - 1} \frac{\sum_b n_b^2 (e_b - \bar e)^2}{(\sum_b n_b)^2}

    Args:
        elbos: of B minibatches; the standard error is nan for a single one.

    Returns:
        Mean and standard error, in nats per datum.
    """
    count, total = len(elbos), sum(elbo.size for elbo in elbos)
    mean = sum(elbo.value * elbo.size for elbo in elbos) / total
    if count < 2:
        return mean, math.nan
    squares = sum(((elbo.value - mean) * elbo.size) ** 2 for elbo in elbos)
    return mean, math.sqrt(squares * count / (count - 1)) / total
