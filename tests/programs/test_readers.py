"""Readers of torch's data: the rows that they read, in any order, and what has none."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pyro_vae.programs.readers import RowReader, read_all, tensors_of

X = torch.arange(12.0).reshape(6, 2)
Y = torch.arange(6)


class Named(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {"x": X[i], "y": Y[i]}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Unending(Dataset):
    def __getitem__(self, i):
        return X[0]


class Empty(Named):
    def __len__(self):
        return 0


def test_rows_in_any_order():
    reader = RowReader(Named())
    found = reader.read(torch.tensor([4, 0]))
    assert torch.equal(found["x"], X[[4, 0]])
    assert found["y"].tolist() == [4, 0]
    assert torch.equal(reader.read()["x"], X)
    assert reader.num_data == 6


def test_tensors_are_taken_as_they_are():
    data = TensorDataset(X, Y)
    assert all(a is b for a, b in zip(tensors_of(data), (X, Y), strict=True))
    x, y = tensors_of(Subset(data, [5, 1]))
    assert torch.equal(x, X[[5, 1]])
    assert y.tolist() == [5, 1]
    assert tensors_of(Named()) is None
    assert read_all(X) is X


@pytest.mark.parametrize("data", [Named(), Stream(), DataLoader(TensorDataset(X, Y), 4)])
def test_all_of_them(data):
    found = read_all(data)
    assert torch.equal(found["x"] if isinstance(found, dict) else found[0], X)


def test_what_has_no_rows_is_refused():
    with pytest.raises(TypeError, match="Unending is a torch Dataset without a length"):
        RowReader(Unending())
    with pytest.raises(ValueError, match="the Empty is empty: it has 0 rows"):
        RowReader(Empty())
    loader = DataLoader(TensorDataset(X, Y), 4, shuffle=True)
    with pytest.raises(TypeError, match="shuffles gives its rows in another order"):
        read_all(loader)
    assert torch.equal(read_all(loader, ordered=False)[0], X)
