"""Guides and models with something of their own for each row, by its place in the data."""

from __future__ import annotations

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.training.minibatches import TrainingData

BY_PLACE = "parameters or values of its own for each row, by its place"


@pytest.fixture(autouse=True)
def _own_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def model(x):
    """z ~ Normal(0, 3), x ~ Normal(z, 1/2): log p(x) is that of Normal(0, sqrt(9.25))."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 3.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def counts(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x.abs().round())


def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    means = pyro.sample("means", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)


def make_data(num_data=30, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(num_data, generator=generator, dtype=dtype)


def column(*layers):
    return nn.Sequential(nn.Unflatten(0, (-1, 1)), *layers)


def look(model, guide, data, batch_size=128, **options):
    return TrainingData(model, guide, data, batch_size, None, None, **options)


def table(x):
    loc = pyro.param("loc", lambda: torch.zeros(len(x)))
    scale = pyro.param("scale", lambda: torch.ones(len(x)), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


def wrapped_autoguide():
    guide = autoguide.AutoNormal(model)
    return lambda x: guide(x)


class ByParity(nn.Module):
    """Two rows of parameters, equal at the start, taken by turns."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc[torch.arange(len(x)) % 2], 1.0))


BOUND = {
    "normal": lambda: (model, autoguide.AutoNormal(model)),
    "diagonal": lambda: (model, autoguide.AutoDiagonalNormal(model)),
    "low rank": lambda: (model, autoguide.AutoLowRankMultivariateNormal(model)),
    "delta": lambda: (model, autoguide.AutoDelta(model)),
    "iaf": lambda: (model, autoguide.AutoIAFNormal(model)),
    "structured": lambda: (model, autoguide.AutoStructured(model)),
    "positive": lambda: (counts, autoguide.AutoNormal(counts)),
    "table": lambda: (model, table),
    "wrapped": lambda: (model, wrapped_autoguide()),
    "parity": lambda: (model, ByParity()),
}


@pytest.mark.parametrize("name", BOUND)
@pytest.mark.parametrize(("num_data", "batch_size"), [(30, 128), (30, 8), (30, 1)])
def test_guides_with_parameters_for_each_row_keep_the_order(name, num_data, batch_size):
    """Fresh ones, whose rows are all equal, too."""
    x = make_data(num_data)
    data = look(*BOUND[name](), x, batch_size)
    assert data.bound
    assert data.whole
    assert data.steps_per_epoch == 1
    ((index, batch),) = data.epoch()
    assert index is None
    assert torch.equal(batch.args[0], x)


def noisy(x):
    """Random numbers beside the sites' own: it cannot be told, and amortized is the rule."""
    slope = pyro.param("slope", lambda: torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x + torch.randn(len(x)), 1.0))


def by_hand(x):
    slope = pyro.param("slope", lambda: torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 1.0))


def amortized(family, fn=model):
    encoder = column(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5))
    return pv.AmortizedGuide(fn, encoder, example=make_data(), family=family)


FREE = {
    "hand": lambda: (model, by_hand),
    "noise": lambda: (model, noisy),
    "normal": lambda: (model, amortized(None)),
    "full rank": lambda: (counts, amortized(pv.families.FullRankNormal(), counts)),
    "point": lambda: (model, amortized(pv.families.Delta())),
    "local": lambda: (model, pv.LocalGuide(model, num_data=30, example=make_data())),
    "globals": lambda: (mixture, autoguide.AutoNormal(pyro.poutine.block(mixture, hide=["c"]))),
    "points of globals": lambda: (
        mixture,
        autoguide.AutoDelta(pyro.poutine.block(mixture, hide=["c"])),
    ),
}


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("batch_size", [128, 8])
def test_other_guides_get_shuffled_minibatches(name, batch_size):
    data = look(*FREE[name](), make_data(), batch_size)
    assert data.bound == ""
    assert data.steps_per_epoch == (1 if batch_size == 128 else 4)
    index, _ = next(iter(data.epoch()))
    assert not torch.equal(index, torch.arange(len(index)))


def test_a_table_whose_rows_the_batch_names():
    """Rows of (x, their numbers) keep together, whatever their order."""
    embedding = nn.Embedding(30, 1)

    def indexed(x, number):
        model(x)

    def guide(x, number):
        pyro.module("embedding", embedding)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(embedding(number)[:, 0], 1.0))

    assert look(indexed, guide, (make_data(), torch.arange(30)), 8).bound == ""


def closing_over(noise):
    def closed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 3.0))
            pyro.sample("x", dist.Normal(z, noise[: len(x)]), obs=x)

    return closed


@pytest.mark.parametrize("batch_size", [128, 8])
def test_a_model_that_closes_over_values_of_each_row(batch_size):
    noise = torch.linspace(0.5, 2.0, 30)
    data = look(closing_over(noise), by_hand, make_data(), batch_size)
    assert data.bound == f"the model has {BY_PLACE}"


def test_the_look_leaves_parameters_and_random_numbers_alone():
    state = torch.get_rng_state()
    look(model, table, make_data())
    assert not list(pyro.get_param_store().keys())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("compile", "num_data"), [(False, 30), ("replay", 150)])
def test_an_autoguide_reaches_the_evidence(compile, num_data, caplog):
    """Its family holds the exact posterior; with its rows shuffled it ends at -17."""
    x = make_data(num_data, torch.float64)
    guide = autoguide.AutoNormal(model)
    with caplog.at_level(logging.WARNING):
        result = pv.fit(
            *(model, guide, x),
            loss=pv.ELBO(estimator="stl"),
            optim=lambda parameters: torch.optim.Adam(parameters, lr=0.2),
            epochs=150,
            compile=compile,
            progress=False,
        )
    assert result.steps == 150
    exact = dist.Normal(0.0, 9.25**0.5).log_prob(x)
    elbo = pv.elbo(model, guide, x, num_particles=20, seed=0).value
    assert (elbo - exact).abs().max() < 0.05
    assert result.history["elbo"][-1] == pytest.approx(float(exact.mean()), abs=0.05)
    told = [record for record in caplog.records if "in their order" in record.message]
    assert len(told) == (num_data > 128)


def test_validation_data_have_no_rows_there():
    x = make_data()
    with pytest.raises(ValueError, match=r"validation_data: .*the guide has parameters or values"):
        pv.fit(model, autoguide.AutoNormal(model), x, validation_data=x[:10], progress=False)


def test_a_loader_cannot_give_all_rows_in_order():
    loader = DataLoader(TensorDataset(make_data()), batch_size=10)
    with pytest.raises(ValueError, match=r"batches of a loader.*by its place.*Pass tensors"):
        pv.fit(model, table, loader, epochs=1, progress=False)


def test_a_bound_of_fewer_rows_says_so():
    x = make_data()
    guide = autoguide.AutoNormal(model)
    guide(x)
    told = "proposes 30 values of 'z.*' along plate 'data', and the batch has 10 data"
    with pytest.raises(ValueError, match=told):
        pv.elbo(model, guide, x[:10], num_particles=5)


def test_an_offset_of_the_last_row_is_seen_in_minibatches_of_two(caplog):
    """A part of two rows is one row, which has no order."""

    def guide(x):
        last = torch.zeros(len(x)).index_fill(0, torch.tensor(len(x) - 1), 1.0)
        offset = pyro.param("offset", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + offset * last, 0.5))

    with caplog.at_level(logging.WARNING):
        pv.fit(model, guide, make_data(), batch_size=2, max_steps=2, progress=False)
    assert BY_PLACE in caplog.text


def test_what_a_step_refuses_is_not_taken_for_rows_that_cannot_be_cut():
    """Of the first rows each latent is masked, and the likelihood depends on it all the same."""

    def absent(x):
        with pyro.plate("data", len(x)):
            with pyro.poutine.mask(mask=x > 0):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 3.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + loc, 0.5))

    x = -make_data(20).abs()
    x[-1] = 1.0
    with pytest.raises(ValueError, match="that the model masks everywhere"):
        pv.fit(absent, guide, x, batch_size=2, max_steps=2, seed=0, progress=False)
