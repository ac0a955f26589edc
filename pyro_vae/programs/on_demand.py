"""Batches of which rows are read when they are asked for: data that need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import data as torch_data

from pyro_vae.programs.batch import (
    Batch,
    RowReader,
    as_arguments,
    as_batch,
    check_lists,
    has_dimensions,
    read_all,
    tensors_of,
)
from pyro_vae.programs.loaders import StreamReader, rows_of_loader
from pyro_vae.programs.rows import Chosen, Rows, SomeRows, matrix_of, rows_of, tensor_of
from pyro_vae.programs.state import preserved_rng

_HELD = 2**26  # bytes of a torch Dataset that evaluation reads at once, and keeps
_EXAMPLE = 256  # rows that shapes are read off
_PART, _PART_BYTES = 4096, 2**25  # rows, and bytes of them, that are read at once


@dataclass(frozen=True)
class OnDemand(Batch):
    """A batch with arguments whose rows lie elsewhere: in files, or in sparse matrices.

    ``rows`` reads some of them, and gives a plain Batch of dense tensors, which knows the numbers
    of its rows. What was read by a slice is kept until the next one.

    Attributes:
        target: the device of what is read; None leaves it where it is.
    """

    target: torch.device | str | None = None
    _held: list[tuple[int, int, Batch]] = field(default_factory=list, compare=False, repr=False)

    @property
    def count(self) -> int:
        """N, the number of data."""
        return self.size or 0

    @property
    def device(self) -> torch.device:
        """The device of what is read."""
        if self.target is not None:
            return torch.device(self.target)
        of_rows = (value for _, value in self._named() if has_dimensions(value))
        return next(value.device for value in of_rows)

    @property
    def drawn_anew(self) -> bool:
        """Whether rows may be others each time that they are read: those of a torch Dataset."""
        return any(isinstance(_origin(value), DatasetRows) for _, value in self._named())

    @property
    def block(self) -> int:
        """Rows that lie together: reading one of them costs as much as reading all."""
        return max(value.block for _, value in self._named() if isinstance(value, Rows))

    def rows(self, index: slice | Tensor) -> Batch:
        """Read these rows."""
        if isinstance(index, Tensor):
            index = index.cpu()
            if index.dtype == torch.bool:
                index = torch.nonzero(index).flatten()
            return self._read(index, index)
        start, stop, _ = index.indices(self.count)
        if self._held:
            first, last, held = self._held[0]
            if first <= start and stop <= last:
                return held.rows(slice(start - first, stop - first))
        self._held.clear()  # before the next are read
        last = self._end_of_chunk(start, stop)
        found = self._read(slice(start, last), torch.arange(start, last))
        self._held.append((start, last, found))
        return found.rows(slice(0, stop - start)) if last > stop else found

    def _end_of_chunk(self, start: int, stop: int) -> int:
        """Return where the chunk of a row ends, if it is few enough bytes: it is opened anyway."""
        last = min(-(-stop // self.block) * self.block, self.count)
        return last if (last - start) * self._row_bytes <= _PART_BYTES else stop

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that lie elsewhere, were they read."""
        return self.count * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return sum(value.row_bytes for _, value in self._named() if isinstance(value, Rows))

    def _read(self, index: slice | Tensor, numbers: Tensor) -> Batch:
        def of(value: Any) -> Any:
            if not has_dimensions(value):
                return value
            if isinstance(value, Rows):
                part = value.read(index)
            else:
                part = value[index if isinstance(index, slice) else index.to(value.device)]
            return part if self.target is None else part.to(self.target)

        kwargs = {name: of(value) for name, value in self.kwargs.items()}
        return Batch(tuple(map(of, self.args)), kwargs, numbers=numbers)

    def head(self, count: int) -> Batch:
        """Read the first rows."""
        return self.rows(slice(0, count))

    def whole(self) -> Batch:
        """Read all rows."""
        return self._read(slice(0, self.count), torch.arange(self.count))

    def parts(self) -> Iterator[slice]:
        """Yield all rows in parts of some megabytes."""
        step = max(1, min(_PART, _PART_BYTES // max(1, self._row_bytes)))
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))

    def fingerprints(self, *, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Return what :meth:`Batch.fingerprints` does, reading part after part."""
        if whole:
            return self.whole().fingerprints(whole=True)
        found = [self._read(part, torch.arange(0)).fingerprints() for part in self.parts()]
        number, length = (torch.cat(each) for each in zip(*found, strict=True))
        return number, length

    def to(self, device: torch.device | str) -> OnDemand:
        """Return the batch with what is read on a device."""
        return OnDemand(self.args, self.kwargs, target=device)

    def repeat(self, times: int) -> Batch:
        """Return all rows, repeated."""
        return self.whole().repeat(times)


def _origin(value: Any) -> Any:
    """Return what rows are taken of, of some rows of others."""
    while isinstance(value, SomeRows):
        value = value.whole
    return value


class DatasetRows(Rows):
    """One of the tensors that a torch Dataset gives of a datum; the others are read along.

    Args:
        reader: of the dataset.
        key: of the tensor in what is collated: a place in a tuple, a name, None for a tensor.
        example: the tensor of a few rows.
    """

    def __init__(self, reader: _LastRead, key: Any, example: Tensor) -> None:
        self._reader, self._key = reader, key
        self.shape, self.dtype = (reader.num_data, *example.shape[1:]), example.dtype

    def read(self, index: slice | Tensor) -> Tensor:
        """Return rows, collated."""
        found = self._reader.read(index)
        found = found if self._key is None else found[self._key]
        part: Tensor = tensor_of(f"argument {self._key or 0!r}", found)
        if not isinstance(part, Tensor) or part.shape[1:] != self.shape[1:]:
            shape = tuple(part.shape[1:]) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"the dataset's rows are not alike: {shape} where the first ones have "
                f"{self.shape[1:]}"
            )
        return part


class _LastRead:
    """Reads rows of a Dataset, all of its tensors at once; keeps the last for the next of them."""

    def __init__(self, reader: RowReader | StreamReader) -> None:
        self._reader, self.num_data = reader, reader.num_data
        self._index: slice | Tensor | None = None
        self._found: Any = None

    def read(self, index: slice | Tensor) -> Any:
        if self._index is not index:
            self._index = None
            if isinstance(index, slice):
                self._found = self._reader.read(torch.arange(*index.indices(self.num_data)))
            else:
                self._found = self._reader.read(index)
            self._index = index
        return self._found


def on_demand(*batch: Any, held: int = _HELD, ordered: bool = True) -> Batch:
    """Return the Batch of what a user passes, without reading what is not in memory.

    Memory-mapped arrays, Zarr and HDF5 arrays, sparse matrices and tensors, the matrix X of an
    AnnData, and torch Datasets and streams that are larger than ``held`` become an
    :class:`OnDemand`; anything else, what :func:`pyro_vae.programs.batch.as_batch` makes of it.

    Args:
        *batch: as in :func:`pyro_vae.programs.batch.as_batch`.
        held: bytes of a Dataset or a stream, at most, that are read at once, and kept.
        ordered: whether it matters which row is which.

    Raises:
        TypeError: as :func:`pyro_vae.programs.batch.as_batch`.
        ValueError: the same.
    """
    if len(batch) == 1:
        (only,) = batch
        if isinstance(only, Batch):
            return only
        if isinstance(only, torch_data.DataLoader | torch_data.IterableDataset):
            only = rows_of_loader(only, ordered=ordered)
        if isinstance(only, torch_data.DataLoader):
            return _of_stream(StreamReader(only, held))
        if isinstance(only, torch_data.Dataset) and tensors_of(only) is None:
            return _of_dataset(only, held)
        batch = (read_all(only),)
    args, kwargs = as_arguments(batch, _lazy)
    if any(isinstance(value, Rows) for value in (*args, *kwargs.values())):
        return check_lists(OnDemand(args, kwargs))
    return check_lists(Batch(args, kwargs))


def example_of(*batch: Any) -> Batch:
    """Return a batch to read shapes from: of data that are read on demand, the first rows."""
    found = on_demand(*batch)
    return found.head(_EXAMPLE) if isinstance(found, OnDemand) else found


def _lazy(name: str, value: Any) -> Any:
    value = matrix_of(value)
    rows = rows_of(name, value)
    return tensor_of(name, value) if rows is None else rows


def _of_dataset(data: Any, held: int) -> Batch:
    """Return a Dataset's rows, to be read as they are needed; of a small one all of them."""
    reader = _LastRead(RowReader(data))
    with preserved_rng(torch.device("cpu")):  # a dataset may draw
        first = reader.read(torch.arange(min(2, reader.num_data)))
    found = _of_reader(reader, first, type(data).__name__)
    row = sum(leaf.row_bytes for _, leaf in found._named() if isinstance(leaf, Rows))
    return found if row * reader.num_data > held else as_batch(read_all(data))


def _of_stream(stream: StreamReader) -> Batch:
    """Return the rows of a stream, kept in memory or to be read as they are needed."""
    if stream.whole is not None:
        return check_lists(stream.whole)
    few = stream.example
    return _of_reader(_LastRead(stream), dict(few.kwargs) or few.args, "the loader")


def _of_reader(reader: _LastRead, first: Any, what: str) -> OnDemand:
    """Return the batch of a reader of which the first rows are known."""
    keys: Sequence[Any] = [None]
    if isinstance(first, (tuple, list)):
        keys = range(len(first))
    elif isinstance(first, Mapping):
        keys = list(first)
    leaves = {}
    for key in keys:
        value = tensor_of("", first if key is None else first[key])
        if not isinstance(value, Tensor):
            told = f"{what} gives, of each datum, values that are no numbers"
            raise TypeError(f"{told} ({str(value)[:40]}); let it return tensors alone")
        leaves[key] = DatasetRows(reader, key, value)
    named = isinstance(first, Mapping)
    return OnDemand(() if named else tuple(leaves.values()), leaves if named else {})


def _numbers(rows: Any, size: int) -> Tensor:
    """Return the numbers of rows that a slice, numbers or booleans stand for, from 0."""
    if isinstance(rows, slice):
        return torch.arange(size)[rows]
    wanted = torch.as_tensor(rows).cpu()
    if wanted.dim() != 1 or (
        wanted.numel() and (wanted.is_floating_point() or wanted.is_complex())
    ):
        what = "a slice, or whole numbers or booleans [N] are needed; one row is slice(n, n + 1)"
        raise TypeError(f"rows={rows!r}: {what}")
    return torch.arange(size)[wanted if wanted.numel() else wanted.long()]


def take(
    data: Any,
    rows: slice | Tensor = slice(None),
    *,
    dtype: torch.dtype | Mapping[Any, torch.dtype] | None = None,
) -> Any:
    """Return some rows of data, in another dtype, without reading what is not in memory.

    For a part to train on and one to validate on, say: ``x[:900_000]`` of a Zarr array would be
    read at once, and so would ``x.astype("float32")``.

    Args:
        data: an array, a matrix or a tensor, a tuple or a mapping of them, first dimension the
            datum: what :func:`pyro_vae.fit` takes, but for loaders.
        rows: a slice, or numbers or booleans [N]; all by default.
        dtype: of floating-point numbers; or of each of some arguments, by its name or position,
            whole numbers too.

    Returns:
        The same, with these rows, in their order; what is in memory as tensors.

    Raises:
        ValueError: where there are none, and for a dtype of an argument that is not there.
        IndexError: for numbers that are out of range.
        TypeError: for rows that are no such numbers.

    Example:
        >>> import numpy as np, scipy.sparse
        >>> import pyro_vae as pv
        >>> counts = scipy.sparse.csr_matrix(np.eye(5))
        >>> train = pv.take({"x": counts, "label": np.arange(5)}, slice(0, 3))
        >>> train["x"].shape, train["label"]
        ((3, 5), tensor([0, 1, 2]))
    """
    batch = on_demand(data)
    if batch.size is None:
        raise ValueError("the data have no rows: no array with a first dimension is among them")
    numbers = _numbers(rows, batch.size)

    chosen = Chosen(numbers)

    def of(key: Any, value: Any) -> Any:
        if not has_dimensions(value):
            return value
        wanted = dtype.get(key) if isinstance(dtype, Mapping) else None
        if isinstance(dtype, torch.dtype) and value.dtype.is_floating_point:
            wanted = dtype
        if isinstance(value, Rows):
            return SomeRows(value, chosen, wanted)
        return value[rows if isinstance(rows, slice) else numbers.to(value.device)].to(wanted)

    named: dict[Any, Any] = {**dict(enumerate(batch.args)), **batch.kwargs}
    if isinstance(dtype, Mapping) and (unknown := dtype.keys() - named.keys()):
        raise ValueError(f"dtype names {sorted(map(str, unknown))}, the data have {list(named)}")
    found = {key: of(key, value) for key, value in named.items()}
    args = tuple(found.pop(position) for position in range(len(batch.args)))
    kwargs = found
    Batch(args, kwargs)  # which checks that there are some
    return kwargs or (args[0] if len(args) == 1 else args)
