"""What a batch is: tensors whose first dimension is the datum, and how to take rows of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

__all__ = ["Batch", "EpochData", "StepData", "as_batch"]

# How many offending rows an error message lists.
_ROWS_SHOWN = 5


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
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for name, value in self._named():
            if isinstance(value, np.ndarray):
                raise TypeError(
                    f"{name} of the batch is a NumPy array; pass torch.as_tensor(...) of it"
                )
            if _has_rows(value):
                sizes[name] = value.shape[0]
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name} has {size} rows" for name, size in sizes.items())
            raise ValueError(
                f"the tensors of a batch need the same first dimension, the datum: {found}"
            )
        if 0 in sizes.values():
            raise ValueError(f"the batch is empty: {', '.join(sizes)} has 0 rows")

    def __str__(self) -> str:
        told = {
            name: f"shape {list(value.shape)}" if isinstance(value, Tensor) else _short(value)
            for name, value in self._named()
        }
        return "a batch of " + ", ".join(f"{name}: {text}" for name, text in told.items())

    @property
    def size(self) -> int | None:
        """Number of data; None where no tensor has rows (the model closes over its data)."""
        for _, value in self._named():
            if _has_rows(value):
                return int(value.shape[0])
        return None

    @property
    def device(self) -> torch.device:
        """The device of the first tensor with rows; the CPU where there is none."""
        for _, value in self._named():
            if _has_rows(value):
                return value.device
        return torch.device("cpu")

    def rows(self, index: slice | Tensor) -> Batch:
        """Return the batch of these data."""
        if isinstance(index, Tensor) and index.device != self.device:
            index = index.to(self.device)
        return self._map(lambda value: value[index])

    def repeat(self, times: int) -> Batch:
        """Return the batch with its data repeated, all of them once, then all again."""
        return self._map(lambda value: value.repeat(times, *[1] * (value.ndim - 1)))

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return self._map(lambda value: value.to(device))

    def check_finite(self, *, missing: bool = False) -> None:
        """Raise ValueError, naming argument and rows, if there are NaN or infinite values.

        Args:
            missing: whether NaN is allowed, as a missing value.
        """
        for name, value in self._named():
            if not _has_rows(value) or not (value.is_floating_point() or value.is_complex()):
                continue
            by_row = value.reshape(value.shape[0], math.prod(value.shape[1:]))
            bad = (by_row.isinf() if missing else ~by_row.isfinite()).any(1)
            if bool(bad.any()):
                what = "infinite values" if missing else "NaN or infinite values"
                raise ValueError(
                    f"{name} of the batch holds {what} in {rows_text(bad)}; remove them, or mark "
                    "them as missing: NaN in observed values is, for pyro_vae.MissingData(model)"
                )

    def _named(self) -> list[tuple[str, Any]]:
        positional = [(f"argument {i}", value) for i, value in enumerate(self.args)]
        return positional + [(f"argument {name!r}", value) for name, value in self.kwargs.items()]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        def apply(value: Any) -> Any:
            return function(value) if _has_rows(value) else value

        return Batch(
            tuple(apply(value) for value in self.args),
            {name: apply(value) for name, value in self.kwargs.items()},
        )


def as_batch(*batch: Any) -> Batch:
    """Return the Batch of what a user passes: tensors, one tuple of them, or one mapping.

    Args:
        *batch: the arguments of the model; or a single tuple or list of them; or a
            single mapping from the model's argument names to them; or a TensorDataset.

    Raises:
        TypeError: for a NumPy array.
        ValueError: for tensors of different first dimension, or of none.

    Example:
        >>> import torch
        >>> as_batch(torch.zeros(3, 2)).size, as_batch({"x": torch.zeros(4)}).size
        (3, 4)
    """
    if len(batch) == 1:
        (only,) = batch
        if isinstance(only, Batch):
            return only
        if isinstance(only, Mapping):
            return Batch((), dict(only))
        if isinstance(only, (tuple, list)):
            return Batch(tuple(only), {})
        if isinstance(only, TensorDataset):  # indexed at once: a DataLoader collates row by row
            return Batch(tuple(only.tensors), {})
    return Batch(tuple(batch), {})


def rows_text(bad: Tensor) -> str:
    """Return 'rows 3, 17 (2 of 100)' for a boolean tensor [N]."""
    index = torch.nonzero(bad).flatten().tolist()
    shown = ", ".join(str(i) for i in index[:_ROWS_SHOWN])
    more = ", ..." if len(index) > _ROWS_SHOWN else ""
    return f"rows {shown}{more} ({len(index)} of {bad.shape[0]})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:36]} ..."


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
