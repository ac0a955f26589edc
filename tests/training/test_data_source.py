"""Data that are read part by part, in fit."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import pyro_vae as pv
from pyro_vae.programs.batch import RowReader
from pyro_vae.training.data_source import DataSource, source_of
from tests.models import NormalModel

X = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))


model = NormalModel()


def make_guide():
    torch.manual_seed(0)
    return pv.AmortizedGuide(model, nn.Linear(1, 2), example=X[:5])


def fit(data, guide=None, **options):
    options = {"epochs": 2, "batch_size": 20, "progress": False, "compile": False, **options}
    return pv.fit(model, make_guide() if guide is None else guide, data, **options)


class Rows(Dataset):
    """Rows read one by one, each drawn anew with some noise."""

    def __init__(self, noise=0.0):
        self.noise, self.read = noise, []

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        self.read.append(i)
        return X[i] + self.noise * torch.randn(1) if self.noise else X[i]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


class Once(IterableDataset):
    """It is empty the second time."""

    def __init__(self):
        self.rows = iter(X)

    def __iter__(self):
        return self.rows


def test_rows_of_a_dataset_are_those_of_its_tensor():
    """The same shuffles, so the same training; each row once in an epoch."""
    data = Rows()
    result = fit(data)
    assert result.history["elbo"] == pytest.approx(fit(X).history["elbo"], rel=1e-6)
    assert result.steps == 6
    assert sorted(data.read[-50:]) == list(range(50))


def test_a_subset_of_tensors_is_taken_at_once():
    subset = Subset(TensorDataset(X), range(30))
    assert type(source_of(subset, 20, None, False)) is DataSource
    assert fit(subset).history["elbo"] == pytest.approx(fit(X[:30]).history["elbo"], rel=1e-6)


def test_rows_that_are_drawn_anew_are_read_anew():
    first, second = fit(Rows(1.0), epochs=2).history["elbo"]
    assert first != second


@pytest.mark.parametrize(
    ("data", "steps", "per_epoch"),
    [
        (DataLoader(TensorDataset(X), batch_size=16), 8, 4),
        (DataLoader(TensorDataset(X), batch_size=16, drop_last=True), 6, 3),
        (DataLoader(Rows(), batch_size=25, shuffle=True), 4, 2),
        (Stream(), 6, None),
    ],
)
def test_the_batches_of_a_loader_are_the_minibatches(data, steps, per_epoch):
    result = fit(data)
    assert result.steps == steps
    source = source_of(data, 20, None, False)
    assert source.streamed
    assert source.num_batches(20) == per_epoch


def test_a_loader_s_elbo_is_of_each_datum():
    """By hand: the loss of each batch over its size, weighted by it."""
    guide = make_guide()
    result = fit(
        DataLoader(TensorDataset(X), batch_size=16),
        guide,
        epochs=1,
        optim=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )
    torch.manual_seed(0)
    iter(DataLoader(TensorDataset(X)))  # which draws a seed
    loss = pv.ELBO()
    by_hand = -sum(loss.loss(model, guide, part) for part in X.split(16)) / len(X)
    assert result.history["elbo"][0] == pytest.approx(by_hand, rel=1e-5)


def test_one_seed_one_result_with_a_loader_that_shuffles():
    loader = DataLoader(TensorDataset(X), batch_size=16, shuffle=True)
    histories = [fit(loader, seed=seed).history["elbo"] for seed in (0, 0, 1)]
    assert histories[0] == histories[1] != histories[2]


def test_a_stream_of_unknown_length_ends_by_steps():
    result = fit(Stream(), epochs=None, max_steps=7, batch_size=16)
    assert result.stopped_by == "max_steps"
    assert result.steps == 7


def test_a_local_guide_is_told_the_rows_of_a_dataset():
    """Misaligned, its rows would be those of other data."""
    guide = pv.LocalGuide(model, num_data=50, example=X)
    fit(Rows(), guide, epochs=60, optim=lambda p: torch.optim.Adam(p, lr=0.1))
    means = guide.table[:, 0, 0].detach()
    assert torch.corrcoef(torch.stack([means, X[:, 0]]))[0, 1] > 0.95


def test_validation_data_may_be_any_of_them():
    for data in (Rows(), DataLoader(TensorDataset(X), shuffle=True), Stream()):
        result = fit(X, validation_data=data)
        wanted = fit(X, validation_data=X).history["validation_elbo"]
        assert result.history["validation_elbo"] == pytest.approx(wanted, abs=0.2)


class BadRow(Rows):
    def __getitem__(self, i):
        return X[i] * (float("nan") if i == 41 else 1.0)


@pytest.mark.parametrize(
    ("data", "options", "error", "told"),
    [
        (Once(), {}, ValueError, "no batch in this epoch.*anew each time"),
        (BadRow(), {}, ValueError, "NaN or infinite values"),
        (
            DataLoader(TensorDataset(X)),
            {"data_plate": False},
            ValueError,
            "batches of a loader.*all of them at once.*Pass tensors",
        ),
        (
            DataLoader(TensorDataset(X)),
            {"guide": pv.LocalGuide(model, num_data=50, example=X)},
            ValueError,
            "LocalGuide must know which rows a batch holds, and a DataLoader does not say",
        ),
        ((row for row in X), {}, TypeError, "iterator.*IterableDataset or DataLoader"),
        (X, {"validation_data": 0.2}, TypeError, "validation_data=0.2.*x\\[:800\\], x\\[800:\\]"),
        (Subset(Rows(), []), {}, ValueError, "is empty"),
    ],
)
def test_refusals(data, options, error, told):
    with pytest.raises(error, match=told):
        fit(data, **options)


def test_a_dataset_without_a_length():
    class Endless(Dataset):
        def __getitem__(self, i):
            return X[i]

    with pytest.raises(TypeError, match="Endless is a torch Dataset without a length"):
        RowReader(Endless())


# --- an epoch that is taken up again


def loader(**options):
    return DataLoader(TensorDataset(X), batch_size=20, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: X,
        Rows,
        Stream,
        lambda: loader(shuffle=True),
        lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    ],
)
@pytest.mark.parametrize("skip", range(4))
def test_an_epoch_goes_on_behind_the_batches_that_were_taken(make, skip):
    def epoch(*args):
        torch.manual_seed(1)
        source = source_of(make(), 20, None, False)
        return [(rows, batch.args[0]) for rows, batch in source.epoch(20, *args)]

    whole, called = epoch(), []
    rest = epoch(skip, lambda: called.append(torch.get_rng_state()))
    assert len(whole) == 3
    assert len(called) == 1
    for (rows, x), (same_rows, same_x) in zip(whole[skip:], rest, strict=True):
        assert rows is same_rows is None or torch.equal(rows, same_rows)
        assert torch.equal(x, same_x)


def test_rows_that_are_skipped_are_not_read():
    data = Rows()
    source = source_of(data, 20, None, False)
    data.read.clear()
    sizes = [batch.size for _, batch in source.epoch(20, 2, lambda: data.read.append(-1))]
    assert sizes == [10]
    assert data.read[0] == -1
    assert len(data.read) == 11


def test_the_generators_that_a_loader_holds():
    generator = torch.Generator()
    assert source_of(loader(shuffle=True, generator=generator), 20, None, False).generators == [
        generator
    ]
    assert source_of(loader(shuffle=True), 20, None, False).generators == []
    assert source_of(Stream(), 20, None, False).generators == []
    assert source_of(X, 20, None, False).generators == []


# --- rows on demand: the numbers of training are those of the same data in memory


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 4)

    def forward(self, x, shift, scale=1.0):
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            rate = (self.net(z) + shift.unsqueeze(-1)).exp() * scale
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


COUNTS = torch.from_numpy(np.random.default_rng(0).poisson(1.0, (90, 4)).astype("float32"))
SHIFT = torch.linspace(-1, 1, 90)


def mapped(x, folder):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def on_demand_of(kind, x, folder):
    return {
        "memmap": lambda: mapped(x.numpy(), folder),
        "scipy": lambda: scipy.sparse.csr_matrix(x.numpy()),
        "torch": lambda: x.to_sparse(),
    }[kind]()


def trained(data, local=False, **options):
    model = Counts()
    example = {"x": COUNTS[:4], "shift": SHIFT[:4]}
    if local:
        guide = pv.LocalGuide(model, num_data=90, example=example)
    else:
        guide = pv.AmortizedGuide(model, lambda x, shift: x, example=example)
    options = {"epochs": 3, "batch_size": 20, "progress": False, **options}
    result = pv.fit(model, guide, data, **options)
    return model, guide, result


@pytest.mark.parametrize("kind", ["memmap", "scipy", "torch"])
@pytest.mark.parametrize("local", [False, True])
def test_rows_on_demand_train_as_those_in_memory(kind, local, tmp_path):
    """Beside a tensor, to the bit; validation data too."""
    data = {"x": on_demand_of(kind, COUNTS, tmp_path), "shift": SHIFT}
    memory = {"x": COUNTS, "shift": SHIFT}
    held = {} if local else {"validation_data": data}
    wanted = {} if local else {"validation_data": memory}
    _, _, found = trained(data, local, **held)
    model, guide, result = trained(memory, local, **wanted)
    assert found.history == result.history
    if local:  # whose rows remember the data, wherever they are
        assert guide.speaks_for_data
        pv.elbo(model, guide, data, num_particles=2, seed=0)
        with pytest.raises(ValueError, match="not the data that this LocalGuide's rows were fit"):
            pv.elbo(model, guide, {"x": COUNTS.flip(0), "shift": SHIFT}, num_particles=2)


def test_no_step_reads_more_than_its_minibatch(monkeypatch):
    source = source_of((scipy.sparse.csr_matrix(COUNTS.numpy()), SHIFT), 20, None, False)
    rows, sizes = source.every.args[0], []
    read = rows.read
    monkeypatch.setattr(rows, "read", lambda i: sizes.append(len(read(i))) or read(i))
    seen = [index for index, _ in source.epoch(20)]
    assert sizes == [20, 20, 20, 20, 10]
    assert torch.cat(seen).sort().values.tolist() == list(range(90))
    assert source.num_batches(20) == 5


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (
            math.nan,
            r"argument 'x' of the batch holds NaN or infinite values in rows 77 \(1 of 20\)",
        ),
        (-1.0, r"outside the support of its Poisson likelihood .* in rows 77 \(1 of 20\)"),
    ],
)
def test_bad_values_are_named_by_their_row_when_they_are_read(bad, told):
    x = COUNTS.clone()
    x[77, 2] = bad
    data = {"x": scipy.sparse.csr_matrix(x.numpy()), "shift": SHIFT}
    with pytest.raises(ValueError, match=told):
        trained(data, epochs=1)
    good = {"x": COUNTS, "shift": SHIFT}
    with pytest.raises(ValueError, match=told) as error:
        trained(good, validation_data=data)
    assert "in validation_data" in error.value.__notes__


def test_what_takes_all_rows_gets_them():
    """An autoguide of Pyro's has parameters by place."""
    x = scipy.sparse.csr_matrix(X.abs().numpy())
    wanted, found = (
        pv.fit(
            model,
            pyro.infer.autoguide.AutoNormal(model, create_plates=None),
            data,
            epochs=2,
            batch_size=20,
            progress=False,
        )
        for data in (X.abs(), x)
    )
    assert found.steps == wanted.steps == 2
    # The guide's first values are drawn anew.
    assert found.history["elbo"] == pytest.approx(wanted.history["elbo"], abs=0.1)


@pytest.mark.parametrize("kind", ["zarr", "sharded"])
@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_a_zarr_of_counts_trains_as_memory_does(kind, shuffle, tmp_path):
    """Whole numbers, which become int64; the order is another one in blocks of 10 rows."""
    zarr = pytest.importorskip("zarr")
    x, shards = COUNTS.numpy().astype("u2"), (30, 4) if kind == "sharded" else None
    options = {"chunks": (10, 4), "shards": shards}
    array = zarr.create_array(str(tmp_path / "x.zarr"), shape=x.shape, dtype="u2", **options)
    array[:] = x

    class Whole(Counts):
        def forward(self, x, shift):
            assert x.dtype is torch.int64
            return super().forward(x, shift)

    def run(data):
        model = Whole()
        guide = pv.AmortizedGuide(
            model, lambda x, shift: x.float(), example={"x": COUNTS[:4].long(), "shift": SHIFT[:4]}
        )
        options = {"epochs": 3, "batch_size": 20, "progress": False, "shuffle": shuffle}
        return pv.fit(model, guide, {"x": data, "shift": SHIFT}, **options).history["elbo"]

    opened = zarr.open_array(str(tmp_path / "x.zarr"), mode="r")
    found, wanted = run(opened), run(x)
    if shuffle == "rows":
        assert found == wanted
    assert found == pytest.approx(wanted, rel=0.1)  # of other minibatches
    assert found == run(opened)


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_training_on_demand_is_taken_up_again(shuffle, tmp_path):
    """Within an epoch, to the last bit."""
    options = {"epochs": 3, "batch_size": 20, "progress": False, "shuffle": shuffle}
    data = {"x": mapped(COUNTS.numpy(), tmp_path), "shift": SHIFT}
    wanted = trained(data, **options)
    file = tmp_path / "fit.pt"

    class Cut(pv.callbacks.Callback):
        def on_step(self, step):
            if step.step == 8:
                raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        trained(data, checkpoint=file, checkpoint_every=1, callbacks=[Cut()], **options)
    found = trained(data, checkpoint=file, checkpoint_every=1, **options)
    assert found[2].history["elbo"] == wanted[2].history["elbo"]
    for a, b in zip(found[1].parameters(), wanted[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_workers_and_pinned_memory_serve():
    plain, workers = (
        DataLoader(TensorDataset(X), batch_size=16, num_workers=count) for count in (0, 2)
    )
    assert fit(workers).history["elbo"] == fit(plain).history["elbo"]
    found = fit(X, validation_data=workers).history["validation_elbo"]
    assert found == fit(X, validation_data=X).history["validation_elbo"]
