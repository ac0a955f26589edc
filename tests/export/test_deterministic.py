"""Deterministic sites in the posterior: their values, dimensions, and what is left out."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv


@pytest.mark.parametrize("size", [3, 300])  # as many data as entries of "three"; two blocks
@pytest.mark.parametrize("resample", [None, "psis"])
def test_deterministic_sites_are_in_the_posterior(size, resample, caplog):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            twice = pyro.deterministic("twice", 2 * z)
            pyro.deterministic("three", torch.stack([z, z**2, -z], -1), event_dim=1)
            pyro.deterministic("constant", x.new_tensor(3.0))
            pyro.sample("x", dist.Normal(twice, 1.0), obs=x)
        pyro.deterministic("outside", z.exp())
        pyro.deterministic("mean", z.mean(-1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.4 * x, 0.45))

    x = torch.randn(size, dtype=torch.float64)
    tree = pv.to_arviz(model, guide, x, num_draws=60, resample=resample, seed=0)
    posterior = tree["posterior"]
    z = posterior["z"].values
    np.testing.assert_allclose(posterior["twice"], 2 * z)
    np.testing.assert_allclose(posterior["outside"], np.exp(z))
    np.testing.assert_allclose(posterior["three"], np.stack([z, z**2, -z], -1))
    assert posterior["three"].dims == ("chain", "draw", "datum", "three_dim_0")
    assert posterior["constant"].shape == (1, 60) and (posterior["constant"] == 3).all()
    if size == 3 and resample is None:
        np.testing.assert_allclose(posterior["mean"], z.mean(-1))
    else:  # made of draws that belong to no one draw of the others
        assert "mean" not in posterior and "'mean' is" in caplog.text
    named = pv.to_arviz(model, guide, x, num_draws=4, dims={"three": ["power"]}, seed=0)
    assert named["posterior"]["three"].dims[-1] == "power"


def test_a_deterministic_site_that_is_wrong_for_particles_together_is_run_alone():
    """z - z.mean(0) over a dimension that particles take when they run together."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            centred = z.reshape(-1, len(x), 2)[0] if z.ndim == 3 else z
            pyro.deterministic("first", centred, event_dim=1)
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    x = torch.randn(5, dtype=torch.float64)
    guide = pv.LocalGuide(model, num_data=5, example=x)
    posterior = pv.to_arviz(model, guide, x, num_draws=20, seed=0)["posterior"]
    np.testing.assert_allclose(posterior["first"], posterior["z"])


def test_deterministic_sites_of_a_network_that_takes_no_particles():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.ConvTranspose1d(1, 1, 2)

        def forward(self, x):
            pyro.module("deterministic-conv", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                mean = pyro.deterministic("mean", self.net(z.unsqueeze(1)).squeeze(1), event_dim=1)
                pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    model, x = Model(), torch.randn(5, 4)
    guide = pv.AmortizedGuide(model, nn.Linear(4, 8), example=x)
    posterior = pv.to_arviz(model, guide, x, num_draws=6, seed=0)["posterior"]
    z = torch.as_tensor(posterior["z"].values[0])
    with torch.no_grad():
        wanted = torch.stack([model.net(draw.unsqueeze(1)).squeeze(1) for draw in z])
    np.testing.assert_allclose(posterior["mean"].values[0], wanted, atol=1e-6)
