"""The kinds of training data: at hand, drawn anew by epoch or step, read by rows or in batches."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pyro_vae.programs.batch import Batch, EpochData, StepData, as_batch, joined
from pyro_vae.programs.on_demand import OnDemand, on_demand
from pyro_vae.programs.processes import Processes, Share
from pyro_vae.programs.state import preserved_rng, seeded
from pyro_vae.torch_internals import tensors_in, version_of
from pyro_vae.training.block_order import ShuffledBlocks

logger = logging.getLogger(__name__)

# What is shuffled: rows; or the blocks that they lie in, and the rows of some of these together.
Shuffle: TypeAlias = Literal["rows", "blocks"]

_CPU = torch.device("cpu")
_LARGE = 2**26  # bytes of a file of which chunks are opened again and again


def _nothing() -> None:
    """Do nothing."""


class DataSource:
    """Data at hand. A subclass for each other kind overrides what differs.

    Attributes:
        batch: all the data; the part that is looked at first where they are not at hand.
        num_data: how many there are; None where no tensor has rows, or a loader does not know.
        seen: whether ``batch`` is all that training will ever see.
        streamed: whether minibatches come as a loader gives them, and cannot be read again.
        owners: objects whose attributes a step depends on.
        device: where batches go; None leaves them.
        shuffle: what of data that are read by rows is shuffled, rows or blocks of them.
        processes: that share each minibatch, one by default.
        share: the part of the present minibatch that is this process's.
        index: the rows of all of it; None where they are not known.
    """

    seen = True
    streamed = False
    owners: tuple[Any, ...] = ()
    processes = Processes()
    share = Share(0, 1, 1)
    index: Tensor | None = None

    def __init__(
        self,
        data: Any,
        batch_size: int,
        device: torch.device | str | None,
        drop_last: bool,
        shuffle: Shuffle = "rows",
    ) -> None:
        self._data, self.device, self._drop_last = data, device, drop_last
        self.shuffle = shuffle
        self.batch = self._now = self._first(batch_size)  # _now: the present epoch's
        self.num_data = self._count()

    def _first(self, batch_size: int) -> Batch:
        return self.made(self._data)

    def _count(self) -> int | None:
        return self.batch.size

    def made(self, data: Any) -> Batch:
        """Return data as a batch, on the device of training."""
        batch = as_batch(data)
        return batch if self.device is None else batch.to(self.device)

    def some(self, count: int) -> Batch:
        """Return the first rows, as many of them as there are; a loader's whole first batch."""
        return self.batch.rows(slice(0, count))

    def all(self) -> Batch:
        """Return all rows; a loader's first batch."""
        return self.batch

    @property
    def every(self) -> Batch | None:
        """All the data, read in parts where they are not at hand; None of a loader or Dataset."""
        return self.batch

    def drawn(self, batch: Batch) -> Batch:
        """Return the arguments of model and guide for a minibatch.

        Raises:
            ValueError: where another number of data was drawn for it.
        """
        return batch

    def example(self, batch: Batch) -> Batch:
        """Return the same, drawn by random numbers of its own."""
        return batch

    def num_batches(self, batch_size: int) -> int | None:
        """Return how many minibatches an epoch has; None where a loader does not know."""
        if self.num_data is None:
            return 1
        count, last = divmod(self.num_data, batch_size)
        return count + (last > 0 and not self._drop_last)

    def epoch(
        self, batch_size: int | None, skip: int = 0, ready: Callable[[], None] = _nothing
    ) -> Iterator[tuple[Tensor | None, Batch]]:
        """Yield the minibatches of an epoch, shuffled, each with its rows.

        Args:
            batch_size: None for all data at once, in their order: their rows are None then.
            skip: how many of the first ones to leave out, without reading their rows.
            ready: called when the order is drawn and these are passed, before the next is read.

        Raises:
            ValueError: where a loader gives none.
        """
        size = self._renew(whole=batch_size is None)
        if batch_size is None or size is None:
            self.share = Share(0, 1, 1)
            ready()
            if not skip:
                yield None, self._now
            return
        # Sent to the device at once: to send each part would be to wait for the step before.
        parts = self._order(size).to(self._now.device).split(batch_size)
        ready()
        for index in parts[skip:]:
            if self._drop_last and index.shape[0] < batch_size:
                break
            own = self.own(index)
            yield own, self.minibatch(own)

    def _order(self, size: int) -> Tensor:
        """Return the rows of an epoch, shuffled."""
        return torch.randperm(size)

    @property
    def generators(self) -> list[torch.Generator]:
        """Generators of random numbers that the data hold, beside PyTorch's own."""
        return []

    def own(self, index: Tensor) -> Tensor:
        """Return those rows of a minibatch that are this process's."""
        self.share, self.index = self.processes.share(len(index)), index
        return index[self.share.rows]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Read rows, which may draw: where each process has others, by numbers of its own."""
        if self.processes.size == 1:
            yield
            return
        with preserved_rng(_CPU):
            torch.manual_seed(int(torch.randint(2**62, ()).item()) + self.processes.rank)
            yield

    def common(self, count: int) -> tuple[Batch, Share]:
        """Return so many data that all processes have, and the part of this one.

        Raises:
            ValueError: where processes were given other data, or, by loaders, the same.
        """
        return common_rows(self.some(count), self.num_data, self.processes)

    def _renew(self, *, whole: bool) -> int | None:
        """Prepare the data of an epoch; return how many there are."""
        return self._now.size

    def minibatch(self, index: Tensor | None) -> Batch:
        """Return these rows of the present epoch's data; None for all of them."""
        return self._now if index is None else self._now.rows(index)


class _DrawnByEpoch(DataSource):
    def _first(self, batch_size: int) -> Batch:
        # The epochs to come have generators of their own.
        return self.made(self._data.epoch(torch.Generator().manual_seed(0)))

    def _renew(self, *, whole: bool) -> int | None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()).item()))
        self._now = self.made(self._data.epoch(generator))
        return self._now.size


class _DrawnByStep(DataSource):
    def _first(self, batch_size: int) -> Batch:
        self.owners = (self._data, self._data.draw)
        return self.made(self._data.source)

    def drawn(self, batch: Batch) -> Batch:
        drawn = as_batch(self._data.draw(*batch.args, **batch.kwargs))
        if drawn.size != batch.size:
            what = f"{type(self._data).__name__}.draw"
            raise ValueError(f"{what} was given {batch.size} data and returned {drawn.size}")
        return drawn

    def example(self, batch: Batch) -> Batch:
        copy = batch.repeat(1)
        tensors = tensors_in((copy.args, copy.kwargs))
        versions = list(map(version_of, tensors))
        with seeded(batch.device, 0):
            drawn = self.drawn(copy)
        if list(map(version_of, tensors)) != versions:
            what = "writes to the minibatch that it is given, the data themselves; return a new one"
            raise ValueError(f"{type(self._data).__name__}.draw {what}")
        return drawn


class _ReadByRows(DataSource):
    seen = False
    _data: OnDemand
    _blocks: ShuffledBlocks | None = None  # of the present epoch

    def _first(self, batch_size: int) -> Batch:
        return self.some(batch_size)

    def _count(self) -> int:
        return self._data.count

    def some(self, count: int) -> Batch:
        with preserved_rng(_CPU):  # a dataset may draw
            return self._data.head(count)

    def all(self) -> Batch:
        with preserved_rng(_CPU):
            return self._data.whole()

    @property
    def every(self) -> Batch | None:
        return None if self._data.drawn_anew else self._data

    def _renew(self, *, whole: bool) -> int:
        if whole and (self._data.drawn_anew or self._now.size != self._data.count):
            self._now = self._data.whole()
        return self._data.count

    def _order(self, size: int) -> Tensor:
        if self.shuffle == "rows":
            return super()._order(size)
        self._blocks = ShuffledBlocks(self._data)
        return self._blocks.order

    def minibatch(self, index: Tensor | None) -> Batch:
        if index is None:
            return self._now
        with self._reading():
            return self._data.rows(index) if self._blocks is None else self._blocks.rows(index)


class _Streamed(DataSource):
    seen = False
    streamed = True
    _data: DataLoader[Any]
    _num_batches: int | None
    _told = False  # that processes have batches of other numbers

    def _count(self) -> int | None:
        data: Any = self._data
        self._num_batches = None
        with contextlib.suppress(TypeError):  # of an IterableDataset without a length
            self._num_batches, count = len(data), len(data.dataset)
            return count
        return None

    def _first(self, batch_size: int) -> Batch:
        with preserved_rng(_CPU):
            first = next(iter(self._data), None)
        if first is None:
            raise ValueError("the data are empty: their loader gives no batch")
        return self.made(first)

    def some(self, count: int) -> Batch:
        return self.batch

    @property
    def every(self) -> None:
        return None

    def num_batches(self, batch_size: int) -> int | None:
        return self._num_batches

    @property
    def generators(self) -> list[torch.Generator]:
        inner = getattr(self._data.batch_sampler, "sampler", None)
        holders = (self._data, self._data.sampler, self._data.batch_sampler, inner)
        found = {id(each): each for h in holders if (each := getattr(h, "generator", None))}
        return list(found.values())

    def epoch(
        self, batch_size: int | None, skip: int = 0, ready: Callable[[], None] = _nothing
    ) -> Iterator[tuple[None, Batch]]:
        batches = iter(self._data)
        count = sum(1 for _ in itertools.islice(batches, skip))
        ready()
        while (given := self._next(batches)) is not None:
            count += 1
            yield None, given
        if not count:
            what = "a loader, or an IterableDataset, must give its rows anew each time"
            raise ValueError(f"the data gave no batch in this epoch: {what} it is iterated over")

    def _next(self, batches: Iterator[Any]) -> Batch | None:
        """Return the next batch; None at the end, which is where the first process has no more."""
        with self._reading():
            read = next(batches, None)
        batch = None if read is None else self.made(read)
        if self.processes.size == 1:
            return batch
        sizes = self.processes.gather(0 if batch is None else batch.size or 1)
        rank = self.processes.rank
        self.share = Share(sum(sizes[:rank]), sizes[rank], sum(sizes))
        if all(sizes) or not any(sizes):
            return batch
        if not self._told:
            self._told = True
            logger.warning(
                "the loader of process %d has fewer batches than others: epochs end there, and "
                "what others have left is not used. Give each as many: DistributedSampler does",
                sizes.index(0),
            )
        return None

    def common(self, count: int) -> tuple[Batch, Share]:
        processes = self.processes
        few = self.batch.rows(slice(0, max(2, count // processes.size)))
        found = processes.gather((few, self.batch.fingerprints()[0]))
        numbers = [numbers for _, numbers in found]
        for rank, one in enumerate(numbers):
            if any(torch.equal(one, other) for other in numbers[:rank]):
                raise ValueError(
                    f"the loader of process {rank} gives the same batches as that of another one, "
                    "and each is taken for a share of its own. Pass the dataset itself; or a "
                    "DataLoader with torch.utils.data.DistributedSampler; or have the "
                    "IterableDataset give each process (RANK, WORLD_SIZE) data of its own"
                )
        parts = [part for part, _ in found]
        sizes = [part.size or 0 for part in parts]
        rank = processes.rank
        return joined(parts), Share(sum(sizes[:rank]), sizes[rank], sum(sizes))


def common_rows(batch: Batch, num_data: int | None, processes: Processes) -> tuple[Batch, Share]:
    """Return the first of N data, and the part of this process.

    Raises:
        ValueError: where processes were given other data.
    """
    sizes = (num_data, [tensor.shape for tensor in tensors_in((batch.args, batch.kwargs))])
    found = processes.gather((sizes, batch.fingerprints()[0]))
    for rank, (theirs, numbers) in enumerate(found):
        if theirs != found[0][0] or not torch.equal(numbers, found[0][1]):
            raise ValueError(
                f"process {rank} was given other data than process 0 ({theirs[0]} and "
                f"{found[0][0][0]} of them). Each takes its share of a minibatch by itself: give "
                "all processes the same data, or a DataLoader with a DistributedSampler"
            )
    return batch, processes.share(batch.size or 0)


def source_of(
    data: Any,
    batch_size: int,
    device: torch.device | str | None,
    drop_last: bool,
    shuffle: Shuffle = "rows",
) -> DataSource:
    """Return where minibatches of a user's training data come from.

    Args:
        data: as in :func:`pyro_vae.fit`.
        batch_size: data in a minibatch.
        device: where batches go; None leaves them.
        drop_last: whether a last minibatch that is smaller is left out; a loader has its own.
        shuffle: as in :func:`pyro_vae.fit`.

    Raises:
        ValueError: for data that are empty, and another ``shuffle``.
        TypeError: for other types.
    """
    if shuffle not in get_args(Shuffle):
        raise ValueError(f"shuffle={shuffle!r}: one of {get_args(Shuffle)} is needed")
    kind: type[DataSource] = DataSource
    if isinstance(data, StepData):
        kind = _DrawnByStep
    elif isinstance(data, EpochData):
        kind = _DrawnByEpoch
    elif isinstance(data, DataLoader | IterableDataset):
        kind = _Streamed
        if not isinstance(data, DataLoader):
            data = DataLoader(data, batch_size=batch_size, drop_last=drop_last)
    else:
        data = on_demand(data, held=0)
        if isinstance(data, OnDemand):
            kind, data = _ReadByRows, data if device is None else data.to(device)
            _warn_of_chunks(data, batch_size, shuffle)
    # A Dataset may draw: of blocks that are read ahead, a run that resumes would have others.
    if not isinstance(data, OnDemand) or data.drawn_anew:
        shuffle = "rows"
    return kind(data, batch_size, device, drop_last, shuffle)


def _warn_of_chunks(data: OnDemand, batch_size: int, shuffle: Shuffle) -> None:
    """Log what shuffled rows of a large file in chunks cost."""
    chunks = min(batch_size, -(-data.count // data.block))
    if shuffle == "rows" and data.block > 1 and data.nbytes > _LARGE:
        logger.warning(
            "the data lie in chunks of %d rows, and a minibatch of %d rows opens up to %d of them; "
            "shuffle='blocks' opens each once in an epoch",
            data.block,
            batch_size,
            chunks,
        )
