"""Arrays as tensors; rows on demand of those that are memory-mapped, chunked or sparse."""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

# NumPy's kinds of numbers: booleans, integers, floating point, complex.
_NUMBERS = "biufc"
# Packages whose arrays are read from a file, or made, a part at a time.
_READ_IN_PARTS = ("zarr", "h5py", "anndata", "dask")
_PAGES = 2**26  # bytes of a mapped file that are read before its pages are given back


def tensor_of(name: str, value: Any) -> Any:
    """Return the tensor of an array or a column or frame of a table; other values as they are.

    Raises:
        TypeError: for a masked array, and for one that holds no numbers.
        ValueError: for whole numbers that PyTorch's integers do not hold.
    """
    what = type(value).__name__
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} of the batch is a masked array, whose mask would be lost; pass "
            "x.filled(numpy.nan) with pyro_vae.MissingData(model)"
        )
    value = value.to_numpy() if hasattr(value, "to_numpy") else value
    if not isinstance(value, np.ndarray) or value.ndim == 0:
        return value
    _check_numbers(name, what, value.dtype)
    if value.dtype.kind == "u" and value.dtype.itemsize > 1:
        if value.size and value.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{name} of the batch holds numbers of 2**63 and more, beyond int64")
        value = value.astype(np.int64)  # PyTorch does not calculate with these
    if not value.flags.writeable or not value.dtype.isnative or min(value.strides) < 0:
        value = value.astype(value.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(value)


def matrix_of(value: Any) -> Any:
    """Return the matrix X of an AnnData; other values as they are.

    Raises:
        ValueError: for a view of a backed AnnData, of which anndata does not read the rows.
    """
    if type(value).__module__.partition(".")[0] != "anndata" or not hasattr(value, "obs"):
        return value
    try:
        return value.X
    except AttributeError as error:
        if not (value.is_view and value.isbacked):
            raise
        raise ValueError(
            "the batch is a view of an AnnData that is backed by a file, of whose sparse matrix no "
            "part is read; pass view.to_memory(), or all of it"
        ) from error


def _check_numbers(name: str, what: str, dtype: Any) -> None:
    if getattr(dtype, "kind", "") not in _NUMBERS:
        raise TypeError(
            f"{name} of the batch is a {what} of dtype {dtype}, where numbers of one type "
            "are needed; select the numeric columns, and give missing entries as NaN"
        )


class Rows(ABC):
    """What has a row per datum, and gives some of them as a dense tensor when they are asked for.

    Attributes:
        shape: of all rows.
        dtype: of the tensors.
        block: rows that lie together: reading one of them costs as much as reading all; 1 where
            rows are read one by one.
        device: of the tensors.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int = 1
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def read(self, index: slice | Tensor) -> Tensor:
        """Return rows, dense, of a slice without a step, or of numbers [n] in any order."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a dense row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


class ArrayRows(Rows):
    """Rows of an array that is sliced like one of NumPy: memory-mapped, Zarr, HDF5, sparse.

    Rows in any order are read in ascending order, each once: so a file is read forwards, and each
    chunk of it is opened once.

    Args:
        name: of the argument, for messages.
        array: with shape, dtype and ``array[rows]``; a sparse result has ``toarray()``.
    """

    def __init__(self, name: str, array: Any) -> None:
        _check_numbers(name, type(array).__name__, array.dtype)
        self._name, self._array = name, array
        self.shape = tuple(map(int, array.shape))
        # By way of no rows: the rule for dtypes is that of any array.
        self.dtype = tensor_of(name, np.empty((0, 1), array.dtype)).dtype
        chunks = getattr(array, "shards", None) or getattr(array, "chunks", None)
        if isinstance(chunks, tuple) and chunks:
            first = chunks[0][0] if isinstance(chunks[0], tuple) else chunks[0]
            self.block = max(1, min(int(first), self.shape[0]))
        self._mapped = _mapping_of(array)
        self._unreturned = 0

    def read(self, index: slice | Tensor) -> Tensor:
        """Return rows, dense."""
        if isinstance(index, slice):
            return self._read(index)
        wanted = index.numpy(force=True)
        if not wanted.size:
            return self._read(slice(0, 0))
        numbers, places = np.unique(wanted, return_inverse=True)
        first, last = int(numbers[0]), int(numbers[-1])
        if not 0 <= first <= last < self.shape[0]:
            what = f"rows {first} to {last} are asked for of {self._name}"
            raise IndexError(f"{what}, which has rows 0 to {self.shape[0] - 1}")
        together = last - first + 1 == len(numbers)
        found = self._read(slice(first, last + 1) if together else numbers)
        ascending = len(numbers) == len(wanted) and bool((places[1:] > places[:-1]).all())
        return found if ascending else found[torch.from_numpy(places)]

    def _read(self, key: slice | np.ndarray) -> Tensor:
        array = self._array
        if not isinstance(key, slice) and hasattr(array, "oindex"):  # of Zarr
            array = array.oindex
        part = array[key]
        part = part.toarray() if hasattr(part, "toarray") else part
        if self._mapped is not None:
            part = np.array(part)  # the pages behind it are given back
        found: Tensor = tensor_of(self._name, np.asarray(part))
        if self._mapped is not None:
            self._give_back(found.nbytes)
        return found

    def _give_back(self, count: int) -> None:
        """Return the pages of a mapped file to the system, once many have been read.

        They count as this process's memory otherwise, up to the size of the file. The file's own
        contents, written ones too, are not touched by that.
        """
        self._unreturned += count
        if self._mapped is not None and self._unreturned >= _PAGES:
            self._mapped.madvise(mmap.MADV_DONTNEED)
            self._unreturned = 0


def _mapping_of(array: Any) -> mmap.mmap | None:
    """Return the mapping of a file that an array shares; None of a copy on write, and of others."""
    if getattr(array, "mode", None) not in ("r", "r+", "w+"):
        return None
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


class SparseTensorRows(Rows):
    """Rows of a sparse tensor of PyTorch, of any layout.

    Args:
        tensor: with one dimension for the data, and any others.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        tensor, self.device = tensor.detach(), tensor.device
        if tensor.layout is torch.sparse_csr and tensor.ndim == 2:
            self._first, entry = tensor.crow_indices(), tensor.col_indices().unsqueeze(0)
            self._entry, self._values = entry, tensor.values()
        else:
            coo = (
                tensor if tensor.layout is torch.sparse_coo else tensor.to_sparse_coo()
            ).coalesce()
            counts = torch.bincount(coo.indices()[0], minlength=self.shape[0])
            self._first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            self._entry, self._values = coo.indices()[1:], coo.values()

    def read(self, index: slice | Tensor) -> Tensor:
        """Return rows, dense."""
        first = self._first
        if isinstance(index, slice):
            index = torch.arange(*index.indices(self.shape[0]))
        index = index.to(first.device)
        counts = first[index + 1] - first[index]
        row = torch.repeat_interleave(counts)
        start = first[index] - (counts.cumsum(0) - counts)
        place = torch.arange(len(row), device=row.device) + start[row]
        found = self._values.new_zeros(len(index), *self.shape[1:])
        found[(row, *self._entry[:, place])] = self._values[place]
        return found


class SparseFileRows(Rows):
    """Rows of a sparse matrix that lies by rows (csr) in an HDF5 file or a Zarr group.

    What AnnData has of a matrix in a file that it is backed by. Entries are read directly, in
    runs of rows that follow each other: of other matrices it reads all.

    Args:
        name: of the argument, for messages.
        dataset: with shape, dtype and a group of the arrays data, indices and indptr.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        _check_numbers(name, type(dataset).__name__, dataset.dtype)
        self._name, self._group = name, dataset.group
        self.shape = tuple(map(int, dataset.shape))
        self._first = np.asarray(self._group["indptr"][:]).astype(np.int64)
        self._made = np.dtype(dataset.dtype)
        self.dtype = tensor_of(name, np.empty((0, 1), self._made)).dtype

    def read(self, index: slice | Tensor) -> Tensor:
        """Return rows, dense."""
        if isinstance(index, slice):
            index = torch.arange(*index.indices(self.shape[0]))
        numbers, places = np.unique(index.numpy(force=True), return_inverse=True)
        found = np.zeros((len(numbers), self.shape[1]), self._made)
        runs = np.flatnonzero(np.diff(numbers) != 1) + 1
        for places_of_run in np.split(np.arange(len(numbers)), runs):
            if places_of_run.size:
                self._fill(found, numbers, places_of_run)
        part: Tensor = tensor_of(self._name, found)
        return part if np.array_equal(places, np.arange(len(places))) else part[places]

    def _fill(self, found: np.ndarray, numbers: np.ndarray, run: np.ndarray) -> None:
        """Write the entries of rows that follow each other."""
        bounds = self._first[numbers[run[0]] : numbers[run[-1]] + 2]
        entries = slice(int(bounds[0]), int(bounds[-1]))
        row = np.repeat(run, np.diff(bounds))
        column = np.asarray(self._group["indices"][entries])
        np.add.at(found, (row, column), np.asarray(self._group["data"][entries]))


class Chosen:
    """Which rows are taken of several arguments, by their numbers [n], in any order.

    The last ones are kept, so that arguments of one datum are read by one and the same index.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self._last: tuple[slice | Tensor, Tensor] | None = None

    def at(self, index: slice | Tensor) -> Tensor:
        """Return the numbers of some of them among all rows."""
        if self._last is None or self._last[0] is not index:
            self._last = index, self.numbers[index]
        return self._last[1]


class SomeRows(Rows):
    """Some of the rows of others, by their numbers.

    Args:
        rows: all of them.
        chosen: which; the same object for all arguments.
        dtype: of what is read; None leaves it.
    """

    def __init__(self, rows: Rows, chosen: Chosen, dtype: torch.dtype | None = None) -> None:
        self.whole, self._chosen, numbers = rows, chosen, chosen.numbers
        self.shape, self.dtype = (len(numbers), *rows.shape[1:]), dtype or rows.dtype
        self.device = rows.device
        first = int(numbers[0]) if len(numbers) else 0
        together = torch.equal(numbers, torch.arange(first, first + len(numbers)))
        self.block = rows.block if together and first % rows.block == 0 else 1

    def read(self, index: slice | Tensor) -> Tensor:
        """Return rows, dense."""
        return self.whole.read(self._chosen.at(index)).to(self.dtype)


def rows_of(name: str, value: Any) -> Rows | None:
    """Return the rows on demand of a value that is memory-mapped, chunked or sparse; else None.

    Raises:
        TypeError: for one that does not hold numbers, a group of arrays, and sparse columns in a
            file.
    """
    if isinstance(value, Rows):
        return value
    if isinstance(value, Tensor):
        sparse = value.layout is not torch.strided and value.ndim > 0
        return SparseTensorRows(value) if sparse else None
    if isinstance(value, np.memmap):
        return ArrayRows(name, value) if value.ndim else None
    if hasattr(value, "tocsr") and hasattr(value, "toarray"):
        if len(value.shape) != 2:
            return None
        csr = value.tocsr()
        if not csr.has_canonical_format:  # entries that are given several times
            csr = csr.copy()
            csr.sum_duplicates()
        return ArrayRows(name, csr)
    package, what = type(value).__module__.partition(".")[0], type(value).__name__
    if package not in _READ_IN_PARTS:
        return None
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(
            f"{name} of the batch is a {package} {what}, which is no array; pass its arrays, as "
            "a mapping from the model's argument names to them"
            + (", such as pyro_vae.datasets.cells(adata) makes" if package == "anndata" else "")
        )
    if getattr(value, "format", "") == "csc":
        raise TypeError(
            f"{name} of the batch is a sparse matrix in a file by columns (csc), of which each "
            "row would be a walk through all of it; write it by rows, X.tocsr()"
        )
    if package == "anndata" and hasattr(value, "group"):
        return SparseFileRows(name, value)
    return ArrayRows(name, value) if len(value.shape) else None
