"""What tells runs apart, and the random numbers that a run goes on with."""

from __future__ import annotations

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.training import run_state
from pyro_vae.training.data_source import source_of
from tests.training.runs import X, amortized


def structure_of(model, x=X):
    return ModelLooks(model, as_batch(x)).structure()


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(mu + k, 1.0), obs=x)


def test_the_outline_of_a_model():
    wanted = {
        "mu": "latent Normal in no plate",
        "k": "latent Bernoulli in data",
        "x": "observed Normal in data",
    }
    assert run_state.outline(structure_of(model, X[:, 0])) == wanted
    assert run_state.outline(structure_of(model, X[:4, 0])) == wanted, "of any number of data"


def test_settings_are_the_same_in_every_process():
    _, guide = amortized()
    found = run_state.pair_settings(guide, None)
    assert found == {"family": "Normal()"}
    assert run_state._text(pv.IWAE(5)) == "IWAE(num_particles=5, estimator='pathwise')"
    assert run_state._text(Trace_ELBO(3)) == "Trace_ELBO(num_particles=3)"
    assert run_state._text(RenyiELBO(0.5, 2)) == "RenyiELBO(num_particles=2, alpha=0.5)"


def test_differences_are_named():
    one = {"seed": 0, "sites": {"z": "a", "x": "b"}, "loss": "L"}
    assert run_state.differences(one, one) == []
    assert run_state.differences(one, {}) == [], "of the first format"
    assert run_state.differences(one, {**one, "seed": None}) == ["seed: None there, 0 here"]
    other = {**one, "sites": {"z": "c", "y": "b"}}
    assert run_state.differences(one, other) == [
        "site 'z': c there, a here",
        "site 'y': b there, none here",
        "site 'x': none there, b here",
    ]


def draw(generator):
    return (
        torch.randn(3).tolist(),
        np.random.randn(3).tolist(),  # noqa: NPY002
        [random.random(), random.gauss(0, 1)],
        torch.randn(2, generator=generator).tolist(),
    )


@pytest.mark.parametrize("before", [0, 1, 700])
def test_all_generators_come_back(before):
    generator = torch.Generator().manual_seed(1)
    source = source_of(
        DataLoader(TensorDataset(X), shuffle=True, generator=generator), 8, None, False
    )
    for _ in range(before):
        draw(generator)
    np.random.randn()  # noqa: NPY002 - of two normals that are made at once, one waits
    states = run_state.random_states(source)
    wanted = draw(generator)
    draw(generator)
    run_state.set_random_states(states, source)
    assert draw(generator) == wanted
