"""Rows of loaders and streams are read in their order, in as few passes as will do."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.loaders import StreamReader, rows_of_loader
from pyro_vae.programs.on_demand import OnDemand, on_demand

X = torch.arange(100.0).reshape(50, 2)


class Stream(IterableDataset):
    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return ({"x": row, "y": number} for number, row in enumerate(X))


class Once(IterableDataset):
    def __init__(self):
        self.rows = iter(X)

    def __iter__(self):
        return self.rows


class Shuffled(IterableDataset):
    def __iter__(self):
        return iter(X[torch.randperm(50)])


class Rows(Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, i):
        return X[i], i


def doubled(rows):
    x, number = default_collate(rows)
    return 2 * x, number


def test_rows_in_order_take_one_pass():
    """And one more to count them; earlier rows another one."""
    data = Stream()
    batch = on_demand(DataLoader(data, batch_size=8), held=0)
    assert isinstance(batch, OnDemand)
    assert (batch.count, data.passes) == (50, 1)
    for start in range(0, 50, 20):
        rows = slice(start, min(start + 20, 50))
        part = batch.rows(rows)
        assert torch.equal(part.kwargs["x"], X[rows])
        assert part.kwargs["y"].tolist() == list(range(rows.start, rows.stop))
    assert data.passes == 2
    index = torch.tensor([41, 3, 3, 17])
    assert torch.equal(batch.rows(index).kwargs["x"], X[index])
    assert data.passes == 3


def test_few_rows_are_kept():
    reader = StreamReader(DataLoader(Stream(), batch_size=8), 10**6)
    assert type(reader.whole) is Batch
    assert torch.equal(reader.whole.kwargs["x"], X)
    assert StreamReader(DataLoader(Stream(), batch_size=8), 100).whole is None
    assert torch.equal(on_demand(Once()).args[0], X)


@pytest.mark.parametrize("data", [Once(), Shuffled()])
def test_other_rows_in_another_pass_are_refused(data):
    batch = on_demand(data, held=0)
    with pytest.raises(
        ValueError, match=rf"{type(data).__name__} gives other rows in another pass"
    ):
        batch.rows(slice(0, 10))


def test_the_dataset_of_a_plain_loader_is_read_by_its_rows():
    data = Rows()
    assert rows_of_loader(DataLoader(data, batch_size=8, drop_last=True), ordered=True) is data
    with pytest.raises(TypeError, match="DataLoader that shuffles"):
        rows_of_loader(DataLoader(data, shuffle=True), ordered=True)
    assert rows_of_loader(DataLoader(data, shuffle=True), ordered=False) is data
    tensors = TensorDataset(X)
    assert rows_of_loader(DataLoader(tensors, num_workers=2), ordered=True) is tensors
    sampler = BatchSampler(SequentialSampler(data), 7, drop_last=True)
    assert rows_of_loader(DataLoader(data, batch_sampler=sampler), ordered=True) is data


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_collates_in_its_workers(workers):
    """All rows, a smaller last batch too, as the loader makes them."""
    loader = DataLoader(
        Rows(), batch_size=8, drop_last=True, collate_fn=doubled, num_workers=workers
    )
    for held in (0, 10**6):
        batch = on_demand(loader, held=held)
        assert isinstance(batch, OnDemand) == (held == 0)
        part = batch.rows(slice(10, 50))
        assert torch.equal(part.args[0], 2 * X[10:])
        assert torch.equal(part.args[1], torch.arange(10, 50))


def test_an_empty_stream():
    class Empty(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(
        ValueError, match="the data are empty: the DataLoader of Empty gives no row"
    ):
        on_demand(Empty())
