"""Batches that are read in parts hold what they would in memory."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.on_demand import OnDemand, example_of, on_demand, take

X = torch.from_numpy(np.random.default_rng(0).poisson(0.7, (50, 5)).astype("float32"))
SPARSE = scipy.sparse.csr_matrix(X.numpy())
LABELS = torch.arange(50)


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def same(batch, wanted):
    values = zip((*batch.args, *batch.kwargs.values()), wanted, strict=True)
    return all(torch.equal(a, b) if torch.is_tensor(b) else a is b for a, b in values)


def test_mixtures_with_tensors_and_plain_values(mapped):
    """Of a tuple or a mapping; what is no row per datum is handed on."""
    flag = "a flag"
    for batch in (
        on_demand(SPARSE, LABELS, mapped, flag),
        on_demand((SPARSE, LABELS, mapped, flag)),
    ):
        assert isinstance(batch, OnDemand)
        assert (batch.size, batch.count, batch.device.type) == (50, 50, "cpu")
        for index in (slice(10, 20), torch.tensor([40, 3, 3]), torch.arange(50) % 7 == 0):
            part = batch.rows(index)
            assert type(part) is Batch
            assert same(part, (X[index], LABELS[index], X[index], flag))
            assert torch.equal(part.numbers, LABELS[index])
        assert same(batch.whole(), (X, LABELS, X, flag))
    named = on_demand({"counts": SPARSE, "label": LABELS.numpy()})
    assert same(named.rows(slice(4, 6)), (X[4:6], LABELS[4:6]))
    assert list(named.rows(slice(4, 6)).kwargs) == ["counts", "label"]
    assert on_demand(named) is named
    assert type(on_demand(X, LABELS)) is Batch
    assert type(as_batch(named)) is Batch
    assert same(as_batch(named), (X, LABELS))


def test_fingerprints_are_those_of_the_batch_in_memory(monkeypatch):
    monkeypatch.setattr("pyro_vae.programs.on_demand._PART", 7)
    lazy, batch = on_demand(SPARSE, LABELS), as_batch(X, LABELS)
    assert [part.stop - part.start for part in lazy.parts()] == [7] * 7 + [1]
    for whole in (False, True):
        found, wanted = lazy.fingerprints(whole=whole), batch.fingerprints(whole=whole)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_parts_are_of_bounded_bytes(monkeypatch):
    monkeypatch.setattr("pyro_vae.programs.on_demand._PART_BYTES", 100)
    assert next(on_demand(SPARSE).parts()) == slice(0, 5)  # of 20 bytes each


def test_what_was_read_last_is_kept(monkeypatch):
    batch, read = on_demand(SPARSE), []
    rows = batch.args[0]
    monkeypatch.setattr(rows, "read", lambda index, old=rows.read: read.append(index) or old(index))
    assert torch.equal(batch.rows(slice(10, 30)).args[0], X[10:30])
    part = batch.rows(slice(15, 20))
    assert torch.equal(part.args[0], X[15:20])
    assert part.numbers.tolist() == [15, 16, 17, 18, 19]
    assert read == [slice(10, 30)]
    batch.rows(slice(25, 35))
    assert len(read) == 2


def test_on_a_device():
    batch = on_demand(SPARSE, LABELS).to("meta")
    assert batch.device.type == "meta"
    assert {value.device.type for value in batch.rows(slice(0, 3)).args} == {"meta"}


class Named(Dataset):
    def __init__(self, width=5):
        self.read, self.width = [], width

    def __len__(self):
        return 50

    def __getitem__(self, i):
        self.read.append(i)
        return {"x": X[i, : self.width], "y": int(LABELS[i])}


def test_a_large_dataset_is_read_by_rows():
    """All tensors of a datum at once; a small one is read at once."""
    data = Named()
    batch = on_demand(data, held=1000)
    assert isinstance(batch, OnDemand)
    data.read.clear()
    index = torch.tensor([9, 4])
    part = batch.rows(index)
    assert same(part, (X[index], LABELS[index]))
    assert data.read == [9, 4]
    assert type(on_demand(Named())) is Batch
    assert same(on_demand(Named()), (X, LABELS))
    tensors = TensorDataset(X, LABELS)
    assert on_demand(tensors, held=0).args[0] is X
    (part,) = on_demand(Named(), held=0).rows(slice(3, 5)).kwargs["x"].unbind(1)[:1]
    assert torch.equal(part, X[3:5, 0])


class Words(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return "word", X[i]


class Ragged(Named):
    def __getitem__(self, i):
        return X[i, : 5 - (i > 30)]


def test_refusals(mapped):
    with pytest.raises(
        ValueError, match=r"same first dimension.*argument 0 has 50 rows, argument 1 has 49 rows"
    ):
        on_demand(mapped, LABELS[:49])
    with pytest.raises(ValueError, match="the batch is empty: argument 0 has 0 rows"):
        on_demand(scipy.sparse.csr_matrix((0, 5)))
    with pytest.raises(TypeError, match=r"Words gives, of each datum, values that are no numbers"):
        on_demand(Words(), held=0)
    with pytest.raises(TypeError, match=r"argument 1 .* list of 50 entries beside tensors"):
        on_demand(mapped, [1.0] * 50)
    with pytest.raises(TypeError, match="DataLoader that shuffles"):
        on_demand(DataLoader(TensorDataset(X), shuffle=True))
    ragged = on_demand(Ragged(), held=0)
    with pytest.raises(
        ValueError, match=r"rows are not alike: \(4,\) where the first ones have \(5,\)"
    ):
        ragged.rows(slice(40, 45))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, LABELS, strict=True))


def test_a_stream_that_fits_is_read_once():
    assert same(on_demand(Stream()), (X, LABELS))
    assert same(on_demand(DataLoader(Stream(), batch_size=8)), (X, LABELS))


def test_a_chunk_is_opened_once(monkeypatch):
    """The rest of it is kept, unless it is large."""

    def reads(size):
        batch, read = on_demand(SPARSE), []
        rows = batch.args[0]
        rows.block = 16
        old = rows.read
        monkeypatch.setattr(rows, "read", lambda index: read.append(index) or old(index))
        for start in range(0, 50, 10):
            part = batch.rows(slice(start, start + 10))
            assert torch.equal(part.args[0], X[start : start + 10])
            assert part.numbers.tolist() == list(range(start, start + 10))
        return read

    assert reads(16) == [slice(0, 16), slice(10, 32), slice(30, 48), slice(40, 50)]
    monkeypatch.setattr("pyro_vae.programs.on_demand._PART_BYTES", 200)
    assert reads(16) == [slice(n, n + 10) for n in range(0, 50, 10)]


@pytest.mark.parametrize("rows", [slice(10, 40), slice(20, None), torch.tensor([3, 0, 49, 3])])
def test_some_rows_are_taken_without_reading_them(rows, mapped):
    """Again of what was taken, too."""
    found = take({"x": mapped, "label": LABELS.numpy(), "flag": "a flag"}, rows)
    batch = on_demand(found)
    assert isinstance(batch, OnDemand)
    assert same(batch.whole(), (X[rows], LABELS[rows], "a flag"))
    assert same(
        on_demand(take(found, slice(1, 3))).whole(), (X[rows][1:3], LABELS[rows][1:3], "a flag")
    )
    assert torch.equal(take(X, rows), X[rows])
    x, label = take((SPARSE, LABELS), rows)
    assert torch.equal(on_demand(x).whole().args[0], X[rows])
    assert torch.equal(label, LABELS[rows])


@pytest.mark.parametrize("rows", [3, [0.5], torch.tensor([[1, 2]])])
def test_what_is_no_rows(rows, mapped):
    with pytest.raises(TypeError, match=r"a slice, or whole numbers or booleans \[N\]"):
        take(mapped, rows)


def test_chunks_of_what_is_taken():
    batch = on_demand(SPARSE)
    batch.args[0].block = 10
    assert take(batch, slice(20, 40)).block == 10
    assert take(batch, slice(25, 40)).block == 1
    assert take(batch, torch.arange(50) % 2 == 0).shape == (25, 5)
    with pytest.raises(ValueError, match="the batch is empty"):
        take(batch, slice(60, 70))
    with pytest.raises(ValueError, match="the data have no rows"):
        take(0.5, slice(0, 2))
    with pytest.raises(IndexError):
        take(batch, torch.tensor([50]))


def test_shapes_are_read_off_the_first_rows(monkeypatch):
    monkeypatch.setattr("pyro_vae.programs.on_demand._EXAMPLE", 7)
    assert same(example_of({"x": SPARSE, "y": LABELS}), (X[:7], LABELS[:7]))
    assert example_of(X).args[0] is X


def test_another_dtype(tmp_path):
    """Of floating-point numbers, or of the arguments that are named."""
    np.save(tmp_path / "x.npy", X.double().numpy())
    data = {"x": np.load(tmp_path / "x.npy", mmap_mode="r"), "y": LABELS}
    found = take(data, dtype=torch.float32)
    assert found["x"].dtype is torch.float32
    batch = on_demand(found).rows(slice(3, 9))
    assert torch.equal(batch.kwargs["x"], X[3:9]) and batch.kwargs["x"].dtype is torch.float32
    assert batch.kwargs["y"].dtype is torch.int64
    x, y = take((SPARSE.astype("int16"), LABELS), slice(0, 5), dtype={0: torch.float32})
    assert on_demand(x).whole().args[0].dtype is torch.float32 and y.dtype is torch.int64
    assert take(LABELS, dtype={0: torch.float64}).dtype is torch.float64
    with pytest.raises(ValueError, match=r"dtype names \['z'\], the data have \['x', 'y'\]"):
        take(data, dtype={"z": torch.float32})


def test_a_sparse_matrix_of_keys_is_no_mapping_of_arguments():
    found = on_demand(scipy.sparse.dok_matrix(X.numpy()))
    assert isinstance(found, OnDemand) and torch.equal(found.whole().args[0], X)


class Drawn(Dataset):
    """Whose rows are drawn when they are read: a number, and the same once more."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        number = torch.rand(())
        return {"x": number, "same": number}


def test_rows_taken_of_a_dataset_that_draws_are_read_together():
    found = on_demand(take(on_demand(Drawn(), held=0), torch.tensor([7, 2, 2])))
    for index in (slice(0, 2), torch.tensor([2, 0])):
        part = found.rows(index)
        assert torch.equal(part.kwargs["x"], part.kwargs["same"])
    assert found.drawn_anew and not on_demand(take(SPARSE, slice(0, 2))).drawn_anew


class Uneven(Drawn):
    def __getitem__(self, i):
        return torch.ones(3 + (i > 7))


@pytest.mark.parametrize("held", [0, 2**20])
def test_rows_of_several_sizes_are_refused(held):
    with pytest.raises(ValueError, match="rows of the Uneven are not alike.*pad them"):
        on_demand(Uneven(), held=held).whole()
