"""Data that are read part by part: PyTorch's datasets and loaders."""

from __future__ import annotations

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
