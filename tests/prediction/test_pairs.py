"""Which latents are drawn jointly, and which sites nobody knows."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.prediction.pairs import prepared
from tests.models import HierarchicalNormal, NormalModel

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def test_local_latents_alone_are_drawn_by_datum():
    model = NormalModel()
    ready = prepared(model, model.posterior, (X,), None, None, 0)
    assert ready.plate is None and ready.evaluator.num_data == 3 and ready.unknown == ()


def test_globals_that_the_guide_proposes_are_drawn_with_the_data():
    model = HierarchicalNormal()
    ready = prepared(model, model.posterior, (X,), None, None, 0)
    assert ready.plate.name == "data" and ready.evaluator.num_data == 1
    assert prepared(model, model.posterior, (X,), {"mu": X[0]}, None, 0).plate is None
    named = prepared(model, model.posterior, (X,), None, "data", 0)
    assert named.plate.name == "data"
    assert prepared(model, model.posterior, (X,), None, False, 0).plate is None


def test_globals_that_it_does_not_propose_need_values():
    model = HierarchicalNormal()

    def local(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="mu"):
        prepared(model, local, (X,), None, None, 0)
    assert prepared(model, local, (X,), {"mu": X[0]}, None, 0).given


def test_sites_without_values():
    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            k = pyro.sample("k", dist.Bernoulli(logits=z))
            pyro.sample("y", dist.Normal(z + k, 1.0), obs=y)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    ready = prepared(model, guide, (X, None), None, None, 0)
    assert ready.unknown == ("y",) and ready.evaluator.pair.summed_out == ("k",)
    assert prepared(model, guide, (X, X), None, None, 0).unknown == ()
    with pytest.raises(ValueError, match="y"):  # no argument is None
        pv.elbo(model, guide, X, num_particles=2)
