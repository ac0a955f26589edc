"""What a batch is: tensors whose first dimension is the datum, and how to take rows of it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from pyro_vae.programs.rows import Rows, matrix_of, rows_of, tensor_of

# How many offending rows an error message lists, and how many arguments.
_ROWS_SHOWN = 5
_ARGUMENTS_SHOWN = 8
_ROWS = 2**16  # of all data, that are fingerprinted at a time
# Of PyTorch's errors for operands of different dtypes.
_DTYPE_WORDS = ("dtype", "scalar type", "Input type", "data type", "not implemented for")


@runtime_checkable
class EpochData(Protocol):
    """Data that are drawn anew for each epoch, for example binarized images."""

    def epoch(self, generator: torch.Generator) -> Any:
        """Return this epoch's batch (tensor, tuple or mapping) of all the data."""
        ...


@runtime_checkable
class StepData(Protocol):
    """Data of which each step draws values of its own, for example binarized images.

    What they are drawn from stays where it is, and the drawing is part of the recorded step.
    """

    @property
    def source(self) -> Any:
        """What minibatches are rows of: a tensor, tuple or mapping."""
        ...

    def draw(self, *args: Any, **kwargs: Any) -> Any:
        """Return what model and guide get (tensor, tuple or mapping) of a minibatch.

        By tensor operations, and PyTorch's global random numbers.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of model and guide: ``model(*args, **kwargs)``.

    A tensor with at least one dimension holds a row per datum. Anything else
    (a flag, a 0-dimensional tensor, None) is handed on as it is.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        has_rows: False where nothing is known to have a row per datum: all is handed on whole.
        numbers: of its rows among all data, [n], where they were read as a part of these; errors
            name rows by them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    has_rows: bool = True
    numbers: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        sizes = self.check_kinds() if self.has_rows else {}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name} has {size} rows" for name, size in sizes.items())
            raise ValueError(
                f"the tensors of a batch need the same first dimension, the datum: {found}. Let "
                "the model hold what is not a row per datum"
            )

    def check_kinds(self) -> dict[str, int]:
        """Return how many rows the tensors have, by argument.

        Raises:
            TypeError: for arguments that no rows can be taken of.
            ValueError: for no rows.
        """
        named = self._named()
        for name, value in named:
            _check_kind(name, value)
        sizes = {name: value.shape[0] for name, value in named if has_dimensions(value)}
        if sizes and not any(sizes.values()):
            raise ValueError(f"the batch is empty: {', '.join(sizes)} has 0 rows")
        return sizes

    def __str__(self) -> str:
        shown = [f"{name}: {_short(value)}" for name, value in self._named()]
        if (more := len(shown) - _ARGUMENTS_SHOWN) > 0:
            shown[_ARGUMENTS_SHOWN:] = [
                f"and {more} more (a list is taken to be the model's arguments; if its entries are "
                "rows, pass torch.stack or torch.tensor of it)"
            ]
        return "a batch of " + ", ".join(shown)

    @property
    def size(self) -> int | None:
        """Number of data; None where no tensor has rows (the model closes over its data)."""
        values = (*self.args, *self.kwargs.values())
        return next((int(value.shape[0]) for value in values if self._is_rows(value)), None)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor with rows, else of another; the CPU without tensors."""
        tensors = [value for _, value in self._named() if isinstance(value, Tensor)]
        with_rows = [value for value in tensors if value.ndim]
        return next((value.device for value in with_rows or tensors), torch.device("cpu"))

    def rows(self, index: slice | Tensor) -> Batch:
        """Return the batch of these data."""
        if isinstance(index, Tensor) and index.device != self.device:
            index = index.to(self.device)
        found = self._map(lambda value: _rows_of(value, index))
        if self.numbers is None:
            return found
        return replace(
            found, numbers=self.numbers[index if isinstance(index, slice) else index.cpu()]
        )

    def whole(self) -> Batch:
        """Return the batch with all rows in memory."""
        return self

    def fingerprints(self, *, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Return a number for each datum that tells it from others, and its length, [N] each.

        A projection on a fixed random direction: two data that are apart by a share of their length
        have numbers apart by about that; of another dtype or device they are nearly the same.

        Args:
            whole: whether all is one datum, so that N is 1.
        """
        size = 1 if whole else self.size or 0
        number, square = torch.zeros(2, size, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        for _, value in self._named():
            if not (_is_tensor(value) if whole else self._is_rows(value)):
                continue
            plain = value.detach().to_dense()
            plain = torch.view_as_real(plain) if plain.is_complex() else plain
            flat = plain.reshape(size, plain.numel() // size)
            direction = torch.randn(flat.shape[1], generator=generator, dtype=torch.float64)
            for start in range(0, size, _ROWS):  # so that no copy of all data is made
                part = slice(start, start + _ROWS)
                rows = flat[part].to("cpu", torch.float64)
                # A missing value is unlike any number.
                rows = torch.nan_to_num(rows, nan=-1 / 3, posinf=1e30, neginf=-1e30)
                number[part] += rows @ direction
                square[part] += rows.square().sum(1)
        return number, square.sqrt()

    def repeat(self, times: int) -> Batch:
        """Return the batch with its data repeated, all of them once, then all again."""
        return self._map(lambda value: value.repeat(times, *[1] * (value.ndim - 1)))

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return replace(self._map(lambda value: value.to(device)), numbers=self.numbers)

    def check_finite(self, *, missing: bool = False) -> None:
        """Raise ValueError, naming argument and rows, if there are NaN or infinite values.

        Args:
            missing: whether NaN is allowed, as a missing value.
        """
        for name, value in self._named():
            if not _is_tensor(value) or not (value.is_floating_point() or value.is_complex()):
                continue
            by_row = value.reshape(value.shape[0], math.prod(value.shape[1:]))
            bad = (by_row.isinf() if missing else ~by_row.isfinite()).any(1)
            if bool(bad.any()):
                what = "infinite values" if missing else "NaN or infinite values"
                where = rows_text(bad, self.numbers)
                raise ValueError(
                    f"{name} of the batch holds {what} in {where}; remove them, or mark "
                    "them as missing: NaN in observed values is, for pyro_vae.MissingData(model)"
                )

    def _named(self) -> list[tuple[str, Any]]:
        positional = [(f"argument {i}", value) for i, value in enumerate(self.args)]
        return positional + [(f"argument {name!r}", value) for name, value in self.kwargs.items()]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        def apply(value: Any) -> Any:
            return function(value) if self._is_rows(value) else value

        kwargs = {name: apply(value) for name, value in self.kwargs.items()}
        return Batch(tuple(map(apply, self.args)), kwargs, self.has_rows)

    def _is_rows(self, value: object) -> bool:
        return self.has_rows and has_dimensions(value)


def as_batch(*batch: Any) -> Batch:
    """Return the Batch of what a user passes: tensors, one tuple of them, or one mapping.

    NumPy arrays, pandas Series and frames become tensors of their dtype; sparse matrices and
    arrays in files become dense ones, all of them read into memory.

    Args:
        *batch: the arguments of the model; or a single tuple or list of them; or a
            single mapping from the model's argument names to them; or a torch Dataset, of
            which all rows are read.

    Raises:
        TypeError: for arrays that do not hold numbers, iterators, and a list of plain numbers.
        ValueError: for tensors of different first dimension, or of none.

    Example:
        >>> import torch
        >>> as_batch(torch.zeros(3, 2)).size, as_batch({"x": torch.zeros(4)}).size
        (3, 4)
    """
    if len(batch) == 1:
        (only,) = batch
        if isinstance(only, Batch):
            return only.whole()
        batch = (read_all(only),)
    return check_lists(Batch(*as_arguments(batch, _dense)))


def as_arguments(
    batch: tuple[Any, ...], convert: Callable[[str, Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments and keyword arguments of what a user passes, each converted.

    Args:
        batch: as in :func:`as_batch`, datasets read.
        convert: from the name of an argument and its value to what it becomes.

    Raises:
        TypeError: for a list of plain numbers, and for a path.
    """
    args = batch
    if len(batch) == 1:
        (only,) = batch
        if isinstance(only, str | os.PathLike):
            raise TypeError(
                f"the batch is a path, {os.fspath(only)!r}; open the file: "
                'numpy.load(path, mmap_mode="r"), zarr.open_array(path, mode="r")'
            )
        args = tuple(only) if isinstance(only, (tuple, list)) else (only,)
        # SciPy's matrix of keys and values is a dict of pairs of numbers.
        if isinstance(only, Mapping) and not hasattr(only, "tocsr"):
            return (), {n: convert(f"argument {n!r}", v) for n, v in only.items()}
        # A model of as many plain numbers is not met; a column of data in a list is.
        if len(args) > 1 and all(isinstance(value, (int, float)) for value in args):
            raise TypeError(
                f"the batch is a {type(only).__name__} of {len(args)} numbers, which would be as "
                "many arguments of the model; pass torch.tensor(...) of it"
            )
    return tuple(convert(f"argument {i}", v) for i, v in enumerate(args)), {}


def check_lists(found: Batch) -> Batch:
    """Return a batch; raise TypeError for lists in it, which would be passed whole with some rows.

    Those that are as long as the batch has rows.
    """
    size = found.size or 0
    for name, value in found._named():
        if isinstance(value, (list, range)) and len(value) == size and size > 1:
            raise TypeError(
                f"{name} of the batch is a {type(value).__name__} of {size} entries beside tensors "
                f"of {size} rows, of which no minibatch can be taken; pass torch.tensor(...) of "
                "it, or, if it is no row per datum, a tuple"
            )
    return found


def _dense(name: str, value: Any) -> Any:
    """Return a value as a dense tensor where it is an array of any kind, in memory or not."""
    value = matrix_of(value)
    rows = None if isinstance(value, np.ndarray) else rows_of(name, value)
    return tensor_of(name, value) if rows is None else rows.read(slice(0, rows.shape[0]))


def arguments(args: Any, kwargs: Any) -> Batch:
    """Return the Batch of a call's arguments; without rows where none can be taken of all of them.

    Where first dimensions differ, that is; of sparse tensors and arrays; and where there are none.
    """
    try:
        return Batch(tuple(args), kwargs)
    except (TypeError, ValueError):
        return Batch(tuple(args), kwargs, has_rows=False)


def rows_text(bad: Tensor, numbers: Tensor | None = None) -> str:
    """Return 'rows 3, 17 (2 of 100)' for a boolean tensor [N].

    Args:
        bad: which rows.
        numbers: of these rows among all, [N], where they are a part of them.
    """
    found = torch.nonzero(bad).flatten().cpu()
    known = numbers is not None and len(numbers) == len(bad)
    index = numbers[found].tolist() if known and numbers is not None else found.tolist()
    shown = ", ".join(str(i) for i in index[:_ROWS_SHOWN])
    more = ", ..." if len(index) > _ROWS_SHOWN else ""
    return f"rows {shown}{more} ({len(index)} of {bad.shape[0]})"


@contextlib.contextmanager
def dtype_errors(batch: Batch) -> Iterator[None]:
    """Raise TypeError, with what to do, where a run on a batch meets operands of other dtypes."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not any(word in text for word in _DTYPE_WORDS):
            raise
        seen = ", ".join(f"{n} is {v.dtype}" for n, v in batch._named() if isinstance(v, Tensor))
        raise TypeError(
            f"{text}. Of the batch, {seen or 'nothing is a tensor'}, and a network takes the dtype "
            "of its parameters, float32 unless you changed it: pass x.float(), or of data in a "
            "file pyro_vae.take(x, dtype=torch.float32); or make the networks double, "
            "model.double() and guide.double(), for data in float64"
        ) from error


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) < 40 else f"{text[:36]} ..."


def _check_kind(name: str, value: object) -> None:
    """Raise TypeError for what no rows can be taken of as of a tensor."""
    sparse = isinstance(value, Tensor) and value.layout is not torch.strided
    if sparse or (hasattr(value, "tocsr") and hasattr(value, "toarray")):
        what = f"{value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
        dense = "x.to_dense()" if isinstance(value, Tensor) else "torch.as_tensor(x.toarray())"
        raise TypeError(
            f"{name} of the batch is sparse ({what}), and a model gets dense tensors; pass "
            f"{dense}, or the matrix itself to pyro_vae.fit and to what evaluates a pair, which "
            "make rows dense as they need them"
        )
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(f"{name} of the batch is a NumPy array; pass torch.as_tensor(...) of it")
    if hasattr(value, "__next__"):
        raise TypeError(
            f"{name} of the batch is an iterator ({type(value).__name__}), which can be read once; "
            "pass tensors, or to pyro_vae.fit a torch IterableDataset or DataLoader"
        )


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim > 0


def has_dimensions(value: object) -> TypeGuard[Tensor | Rows]:
    """Return whether a value has a first dimension: a tensor, or rows on demand."""
    return isinstance(value, Rows) or _is_tensor(value)


# --- data that are read part by part: PyTorch's datasets and loaders


class RowReader:
    """Reads rows of a dataset (one with a length and ``dataset[i]``) by their numbers."""

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                f"{type(dataset).__name__} is a torch Dataset without a length; give it __len__, "
                "or make it an IterableDataset"
            )
        self._dataset = dataset
        self.num_data = len(dataset)
        if self.num_data == 0:
            raise ValueError(f"the {type(dataset).__name__} is empty: it has 0 rows")

    def read(self, index: Tensor | None = None) -> Any:
        """Return some rows, all by default, as PyTorch's loaders collate them."""
        numbers = range(self.num_data) if index is None else index.tolist()
        rows = [self._dataset[i] for i in numbers]
        try:
            return torch_data.default_collate(rows)
        except RuntimeError as error:
            if "equal size" not in str(error):
                raise
            raise ValueError(
                f"the rows of the {type(self._dataset).__name__} are not alike ({error}); pad them "
                "to one size, and give their lengths as an argument of their own"
            ) from error


def _rows_of(value: Tensor, index: slice | Tensor) -> Tensor:
    """Return these rows of a tensor."""
    if isinstance(index, Tensor) and index.dtype == torch.int64 and index.device.type == "cpu":
        plain = value.layout == torch.strided and value.is_contiguous() and index.ndim == 1
        if plain and len(index) and int(index.min()) >= 0:
            return value.index_select(0, index)  # takes a third of the time of value[index]
    return value[index]


def tensors_of(data: Any) -> tuple[Tensor, ...] | None:
    """Return the tensors of a TensorDataset, or of a subset of one; None for other data."""
    if isinstance(data, torch_data.TensorDataset):
        return tuple(data.tensors)
    if isinstance(data, torch_data.Subset):
        whole = tensors_of(data.dataset)
        index = torch.as_tensor(data.indices)
        return None if whole is None else tuple(tensor[index] for tensor in whole)
    return None


def read_all(data: Any, *, ordered: bool = True) -> Any:
    """Return all rows of a dataset or a loader, collated; other data as they are.

    Args:
        data: to read.
        ordered: whether it matters which row is which.

    Raises:
        TypeError: for a loader that shuffles, or does not end.
    """
    if isinstance(data, torch_data.DataLoader):
        stream = isinstance(data.dataset, torch_data.IterableDataset)
        if ordered and not stream:
            check_order(data)
        if stream or data.collate_fn is not torch_data.default_collate:
            return _read_stream(data, stream)
        data = data.dataset
    if (tensors := tensors_of(data)) is not None:
        return tensors
    if isinstance(data, torch_data.IterableDataset):
        return torch_data.default_collate(list(data))
    return RowReader(data).read() if isinstance(data, torch_data.Dataset) else data


def check_order(data: torch_data.DataLoader[Any]) -> None:
    """Raise TypeError for a loader whose rows come in another order each time."""
    if not isinstance(data.sampler, torch_data.SequentialSampler):
        raise TypeError(
            "a DataLoader that shuffles gives its rows in another order each time, and results "
            "for each datum need to know which is which; pass its dataset, or shuffle=False"
        )


def _read_stream(data: torch_data.DataLoader[Any], stream: bool) -> Any:
    """Return all rows that a loader gives, as it collates them."""
    if data.drop_last and not stream:
        what = "the DataLoader leaves out a last batch that is smaller, and with it data"
        raise TypeError(f"{what}; pass drop_last=False")
    batches = list(map(as_batch, data))
    if not batches:
        raise ValueError(f"the data are empty: {type(data.dataset).__name__} gives no row")
    found = joined(batches)
    return dict(found.kwargs) or found.args


def joined(batches: Sequence[Batch]) -> Batch:
    """Return the batch of the rows of several, one after the other."""

    def of(values: tuple[Any, ...]) -> Any:
        return torch.cat(values) if has_dimensions(values[0]) else values[0]

    args = tuple(map(of, zip(*(batch.args for batch in batches), strict=True)))
    kwargs = {name: of(tuple(b.kwargs[name] for b in batches)) for name in batches[0].kwargs}
    return Batch(args, kwargs)
