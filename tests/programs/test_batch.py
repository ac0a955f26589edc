"""What a batch may be, how it is cut, and what is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pyro_vae.programs.batch import (
    Batch,
    EpochData,
    RowReader,
    StepData,
    arguments,
    as_batch,
    read_all,
    rows_text,
    tensors_of,
)

X, Y = torch.arange(6.0).reshape(3, 2), torch.arange(3)


@pytest.mark.parametrize(
    ("passed", "args", "kwargs"),
    [
        ((X,), (X,), {}),
        ((X, Y), (X, Y), {}),
        (((X, Y),), (X, Y), {}),
        (([X, Y],), (X, Y), {}),
        (({"x": X, "y": Y},), (), {"x": X, "y": Y}),
        ((Batch((X,), {"y": Y}),), (X,), {"y": Y}),
        ((X, 0.5), (X, 0.5), {}),
        ((), (), {}),
    ],
)
def test_forms(passed, args, kwargs):
    batch = as_batch(*passed)
    assert len(batch.args) == len(args)
    assert all(found is wanted for found, wanted in zip(batch.args, args, strict=True))
    assert {k: id(v) for k, v in batch.kwargs.items()} == {k: id(v) for k, v in kwargs.items()}
    assert batch.size == (3 if passed else None)


def test_cut_repeat_and_convert():
    """Tensors with rows are cut; a 0-dimensional tensor and others pass through untouched."""
    scalar, flag, name = torch.tensor(2.0), True, None
    batch = Batch((X, scalar), {"y": Y, "flag": flag, "name": name})
    index = torch.tensor([2, 0])
    cut = batch.rows(index)
    assert torch.equal(cut.args[0], X[index])
    assert torch.equal(cut.kwargs["y"], Y[index])
    assert cut.args[1] is scalar
    assert cut.kwargs["flag"] is flag
    assert cut.kwargs["name"] is None
    assert torch.equal(batch.rows(slice(1, 3)).args[0], X[1:])
    twice = batch.repeat(2)
    assert torch.equal(twice.args[0], torch.cat([X, X]))
    assert torch.equal(twice.kwargs["y"], torch.cat([Y, Y]))
    assert twice.args[1] is scalar
    moved = batch.to("meta")
    assert moved.device.type == "meta"
    assert moved.kwargs["y"].device.type == "meta"
    assert batch.device.type == "cpu"
    assert as_batch(0.5).device.type == "cpu"


def test_refusals():
    with pytest.raises(
        ValueError, match=r"same first dimension.*argument 0 has 3 rows, argument 'y' has 2 rows"
    ):
        Batch((X,), {"y": Y[:2]})
    with pytest.raises(ValueError, match="the batch is empty: argument 0 has 0 rows"):
        as_batch(X[:0])
    with pytest.raises(TypeError, match=r"the batch is a path, 'x.npy'; open the file"):
        as_batch("x.npy")
    with pytest.raises(ValueError, match="the batch is empty"):
        as_batch(X).rows(slice(3, 6))
    with pytest.raises(TypeError, match=r"argument 'x' .* NumPy array; pass torch.as_tensor"):
        Batch((), {"x": np.zeros((3, 2))})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_named(bad):
    x = torch.zeros(10, 2, 2)
    x[3, 1, 0] = x[7, 0, 1] = bad
    message = "argument 'x' of the batch holds NaN or infinite values in rows 3, 7 (2 of 10)"
    with pytest.raises(ValueError, match=re.escape(message)):
        as_batch({"y": Y.repeat(4)[:10], "x": x}).check_finite()


def test_finite_values_pass():
    """So do integers, and a tensor without features."""
    as_batch(X, Y, torch.zeros(3, 0), torch.tensor(math.nan)).check_finite()


def test_long_lists_of_rows_are_cut():
    assert rows_text(torch.ones(9, dtype=torch.bool)) == "rows 0, 1, 2, 3, 4, ... (9 of 9)"


def test_epoch_data_is_told_by_its_method():
    class Fresh:
        def epoch(self, generator):
            return X

    assert isinstance(Fresh(), EpochData)
    assert not isinstance(X, EpochData)


def test_step_data_are_told_by_source_and_method():
    class Drawn:
        source = X

        def draw(self, x):
            return x

    assert isinstance(Drawn(), StepData)
    assert not isinstance(X, StepData)


def test_a_tensor_dataset_is_a_tuple_of_its_tensors():
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    batch = as_batch(torch.utils.data.TensorDataset(x, y))
    assert batch.args[0] is x and batch.args[1] is y and batch.size == 3


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(3, 2),
        np.arange(6, dtype=np.float32).reshape(3, 2)[::-1],
        np.arange(3, dtype=np.uint16),
        np.arange(3, dtype=">f8"),
        np.broadcast_to(np.float32(2.0), (3, 2)),
        np.array([True, False, True]),
        pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0]}),
        pd.Series([1, 2, 3], index=["p", "q", "r"]),
    ],
)
def test_arrays_and_tables_become_tensors(array):
    batch = as_batch({"x": array, "y": Y, "flag": np.float64(0.5)})
    x = batch.kwargs["x"]
    assert torch.is_tensor(x)
    assert np.array_equal(x.numpy(), np.asarray(array))
    assert x.dtype in (torch.float32, torch.float64, torch.int64, torch.bool)
    assert batch.kwargs["flag"] == 0.5
    assert len(batch.rows(slice(0, 2)).kwargs["x"]) == 2


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (pd.DataFrame({"a": [1.0], "name": ["x"]}), r"argument 1 .* DataFrame of dtype object"),
        (np.array(["a", "b"]), r"argument 1 .* ndarray of dtype <U1, where numbers"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), r"masked array.*MissingData"),
        ([1.0, 2.0, 3.0], r"argument 1 .* list of 3 entries beside tensors of 3 rows"),
        (range(3), r"argument 1 .* range of 3 entries"),
        (iter([X]), r"argument 1 .* iterator.*IterableDataset or DataLoader"),
    ],
)
def test_values_that_are_no_rows_are_refused(value, told):
    with pytest.raises(TypeError, match=told):
        as_batch(X, value)


@pytest.mark.parametrize(
    "sparse", [scipy.sparse.coo_array(X.numpy()), scipy.sparse.csr_matrix(X.numpy()), X.to_sparse()]
)
def test_sparse_matrices_become_dense(sparse):
    assert torch.equal(as_batch({"x": sparse}).kwargs["x"], X)


def test_the_arguments_of_a_loss_are_dense():
    """It runs the model on what it is given."""
    for sparse in (scipy.sparse.csr_matrix(np.eye(3)), torch.eye(3).to_sparse()):
        with pytest.raises(TypeError, match=r"is sparse \(.*pass (x.to_dense|torch.as_tensor)"):
            Batch((sparse,), {}).check_kinds()


def test_rows_of_a_part_are_named_by_their_numbers():
    x = torch.zeros(4)
    x[2] = math.nan
    batch = Batch((x,), {}, numbers=torch.tensor([7, 3, 90, 5]))
    with pytest.raises(ValueError, match=r"in rows 90 \(1 of 4\)"):
        batch.check_finite()
    part = batch.rows(torch.tensor([2, 0])).rows(slice(0, 1)).to("cpu")
    with pytest.raises(ValueError, match=r"in rows 90 \(1 of 1\)"):
        part.check_finite()


def test_a_tuple_or_a_short_list_is_handed_on():
    sizes = (3, 4, 5)
    assert as_batch(X, sizes, [8, 8]).rows(slice(0, 2)).args[1:] == (sizes, [8, 8])
    assert as_batch(X[:1], [8]).args[1] == [8]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {"x": X[i], "y": int(Y[i])}


def test_datasets_are_read_whole():
    subset = torch.utils.data.Subset(torch.utils.data.TensorDataset(X, Y), [2, 0])
    assert torch.equal(as_batch(subset).args[0], X[[2, 0]])
    assert torch.equal(as_batch(torch.utils.data.Subset(subset, [1])).args[1], Y[[0]])
    for data in (Rows(), torch.utils.data.DataLoader(Rows(), batch_size=2)):
        batch = as_batch(data)
        assert torch.equal(batch.kwargs["x"], X) and torch.equal(batch.kwargs["y"], Y)
    with pytest.raises(TypeError, match=r"DataLoader that shuffles.*pass its dataset"):
        as_batch(torch.utils.data.DataLoader(Rows(), shuffle=True))


def test_arguments_of_other_first_dimensions_have_no_rows():
    batch = arguments((X, torch.zeros(2)), {})
    assert batch.size is None
    assert batch.rows(slice(0, 1)).args[0] is X
    assert arguments((X, Y), {}).size == 3


def test_a_list_of_numbers_is_no_list_of_arguments():
    with pytest.raises(TypeError, match=r"a list of 3 numbers.*pass torch.tensor\(...\) of it"):
        as_batch([1.0, 2.0, 3])


# --- readers of torch's data: the rows that they read, in any order

ROWS = torch.arange(12.0).reshape(6, 2)
LABELS = torch.arange(6)


class Named(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {"x": ROWS[i], "y": LABELS[i]}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(ROWS, LABELS, strict=True))


class Unending(Dataset):
    def __getitem__(self, i):
        return ROWS[0]


class Empty(Named):
    def __len__(self):
        return 0


@pytest.mark.parametrize("index", [[2, 0, 2], [-1, 0], [True, False, True, False, False, False]])
@pytest.mark.parametrize("kind", ["dense", "transposed", "expanded", "integers"])
def test_rows_by_a_tensor_are_those_of_indexing(index, kind):
    """Negative numbers and masks too, however the numbers lie in memory."""
    whole = {
        "dense": torch.arange(12.0).reshape(6, 2),
        "transposed": torch.arange(12.0).reshape(2, 6).T,
        "expanded": torch.arange(6.0)[:, None].expand(6, 3),
        "integers": torch.arange(6),
    }[kind]
    index = torch.tensor(index)
    assert torch.equal(as_batch(whole).rows(index).args[0], whole[index])


def test_rows_in_any_order():
    reader = RowReader(Named())
    found = reader.read(torch.tensor([4, 0]))
    assert torch.equal(found["x"], ROWS[[4, 0]])
    assert found["y"].tolist() == [4, 0]
    assert torch.equal(reader.read()["x"], ROWS)
    assert reader.num_data == 6


def test_tensors_are_taken_as_they_are():
    data = TensorDataset(ROWS, LABELS)
    assert all(a is b for a, b in zip(tensors_of(data), (ROWS, LABELS), strict=True))
    x, y = tensors_of(Subset(data, [5, 1]))
    assert torch.equal(x, ROWS[[5, 1]])
    assert y.tolist() == [5, 1]
    assert tensors_of(Named()) is None
    assert read_all(ROWS) is ROWS


@pytest.mark.parametrize("data", [Named(), Stream(), DataLoader(TensorDataset(ROWS, LABELS), 4)])
def test_all_of_them(data):
    found = read_all(data)
    assert torch.equal(found["x"] if isinstance(found, dict) else found[0], ROWS)


@pytest.mark.parametrize("data", [Stream(), Named()])
def test_a_loader_collates_as_it_is_told(data):
    """A stream has no sampler that shuffles; what a loader makes of rows is not left out."""

    def doubled(rows):
        found = torch.utils.data.default_collate(rows)
        return (2 * found["x"], found["y"]) if isinstance(found, dict) else (2 * found[0], found[1])

    x, y = as_batch(DataLoader(data, batch_size=4, collate_fn=doubled)).args
    assert torch.equal(x, 2 * ROWS) and torch.equal(y, LABELS)
    assert as_batch(DataLoader(Stream(), batch_size=4)).size == 6
    with pytest.raises(TypeError, match="leaves out a last batch"):
        as_batch(DataLoader(Named(), batch_size=4, collate_fn=doubled, drop_last=True))


def test_what_has_no_rows_is_refused():
    with pytest.raises(TypeError, match="Unending is a torch Dataset without a length"):
        RowReader(Unending())
    with pytest.raises(ValueError, match="the Empty is empty: it has 0 rows"):
        RowReader(Empty())
    loader = DataLoader(TensorDataset(ROWS, LABELS), 4, shuffle=True)
    with pytest.raises(TypeError, match="shuffles gives its rows in another order"):
        read_all(loader)
    assert torch.equal(read_all(loader, ordered=False)[0], ROWS)
