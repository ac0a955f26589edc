"""Data that are read part by part: PyTorch's datasets and loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

__all__ = ["BatchReader", "RowReader", "read_all", "reader_of"]


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
        return default_collate([self._dataset[i] for i in numbers])


class BatchReader:
    """Reads the batches of a loader, in the order in which it gives them.

    Attributes:
        num_data: rows in all; None where the loader does not know.
        num_batches: batches of an epoch; None likewise.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        try:
            self.num_batches: int | None = len(loader)
            self.num_data: int | None = len(loader.dataset)  # type: ignore[arg-type]
        except TypeError:  # of an IterableDataset without a length
            self.num_batches = self.num_data = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


def reader_of(data: Any, batch_size: int, drop_last: bool) -> RowReader | BatchReader | None:
    """Return what reads a dataset or a loader; None for other data, which are there already."""
    if isinstance(data, DataLoader):
        return BatchReader(data)
    if isinstance(data, IterableDataset):
        return BatchReader(DataLoader(data, batch_size=batch_size, drop_last=drop_last))
    if isinstance(data, Dataset) and tensors_of(data) is None:
        return RowReader(data)
    return None


def tensors_of(data: Any) -> tuple[Tensor, ...] | None:
    """Return the tensors of a TensorDataset, or of a subset of one; None for other data."""
    if isinstance(data, TensorDataset):
        return tuple(data.tensors)
    if isinstance(data, Subset):
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
    if (tensors := tensors_of(data)) is not None:
        return tensors
    if isinstance(data, DataLoader):
        if ordered and not isinstance(data.sampler, SequentialSampler):
            raise TypeError(
                "a DataLoader that shuffles gives its rows in another order each time, and a "
                "result for each datum needs to know which is which; pass its dataset, or a "
                "DataLoader with shuffle=False"
            )
        return read_all(data.dataset, ordered=ordered)
    if isinstance(data, IterableDataset):
        return default_collate(list(data))
    if isinstance(data, Dataset):
        return RowReader(data).read()
    return data
