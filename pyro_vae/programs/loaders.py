"""Rows of a torch DataLoader or IterableDataset, read in the order that it gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import data as torch_data

from pyro_vae.programs.batch import Batch, as_batch, check_order, joined, tensors_of

_ROWS = 256  # of an IterableDataset without a loader that are collated at once


def rows_of_loader(data: Any, *, ordered: bool) -> Any:
    """Return what a loader's rows are read from: its dataset, or a loader that gives all in order.

    Args:
        data: a DataLoader or an IterableDataset.
        ordered: whether it matters which row is which.

    Raises:
        TypeError: where it does, and the loader shuffles, or its order is not known.
    """
    if not isinstance(data, torch_data.DataLoader):
        return torch_data.DataLoader(data, batch_size=_ROWS)
    dataset = data.dataset
    if isinstance(dataset, torch_data.IterableDataset):
        return data if data.batch_size is None else _in_order(data)
    if ordered:
        check_order(data)
    plain = data.collate_fn is torch_data.default_collate
    if plain and (tensors_of(dataset) is not None or not data.num_workers):
        return dataset
    if data.batch_size is None:
        return dataset if plain else data
    return _in_order(data)


def _in_order(data: torch_data.DataLoader[Any]) -> torch_data.DataLoader[Any]:
    """Return a loader of the same workers that gives all rows, in order."""
    return torch_data.DataLoader(
        data.dataset,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        pin_memory=data.pin_memory,
        timeout=data.timeout,
        worker_init_fn=data.worker_init_fn,
        multiprocessing_context=data.multiprocessing_context,
        prefetch_factor=data.prefetch_factor,
    )


class StreamReader:
    """Reads rows by their numbers from what can be gone through in order alone, again and again.

    Rows that follow those read last cost nothing more; earlier ones another pass. The first pass
    counts the rows, and keeps them where they are few.

    Args:
        stream: gives batches when it is iterated over, the same each time.
        held: bytes of all rows, at most, that are kept.

    Attributes:
        num_data: how many rows there are.
        whole: the batch of all rows; None where they are too many to be kept.

    Raises:
        ValueError: where there are none.
    """

    def __init__(self, stream: Iterable[Any], held: int) -> None:
        self._stream, self._what = stream, _name_of(stream)
        self.num_data, size = 0, 0
        kept: list[Batch] | None = []
        for batch in map(as_batch, stream):
            if not self.num_data:
                self._first = batch.fingerprints()
                self.example = batch.rows(slice(0, 2))
            self.num_data += batch.size or 0
            size += sum(value.nbytes for _, value in batch._named() if isinstance(value, Tensor))
            if size > held:
                kept = None
            if kept is not None:
                kept.append(batch)
        if not self.num_data:
            raise ValueError(f"the data are empty: the {self._what} gives no row")
        self.whole = None if kept is None else joined(kept)
        self._batches: Iterator[Batch] = iter(())
        self._now: Batch | None = None
        self._start = self.num_data  # of the batch at hand, among all rows

    def read(self, index: Tensor) -> Any:
        """Return rows, in a tuple or by the names of arguments.

        Raises:
            ValueError: where another pass gives other rows.
        """
        numbers, places = index.unique(return_inverse=True)
        parts = []
        while numbers.numel():
            batch = self._at(int(numbers[0]))
            here = numbers[numbers < self._start + (batch.size or 0)]
            parts.append(batch.rows(here - self._start))
            numbers = numbers[len(here) :]
        found = joined(parts).rows(places)
        return dict(found.kwargs) or found.args

    def _at(self, number: int) -> Batch:
        """Return the batch that holds a row, going on from the one at hand, or from the first."""
        if number < self._start or self._now is None:
            self._batches, self._now, self._start = map(as_batch, self._stream), None, 0
        while self._now is None or number >= self._start + (self._now.size or 0):
            self._start += 0 if self._now is None else self._now.size or 0
            first, self._now = self._now is None, next(self._batches, None)
            if self._now is None or (first and not self._is_first(self._now)):
                self._now = None
                raise ValueError(
                    f"the {self._what} gives other rows in another pass, and these are too many "
                    "to be kept in memory: it must give the same rows, in the same order, each "
                    "time it is iterated over. Write them to a file first (np.memmap, Zarr)"
                )
        return self._now

    def _is_first(self, batch: Batch) -> bool:
        number, length = batch.fingerprints()
        wanted, _ = self._first
        same = number.shape == wanted.shape
        return same and bool(((number - wanted).abs() <= 1e-6 * length).all())


def _name_of(stream: Any) -> str:
    dataset = getattr(stream, "dataset", stream)
    return f"{type(stream).__name__} of {type(dataset).__name__}"
