"""Weights that are no numbers."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv


def test_weights_that_are_not_numbers_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("bad", torch.where(z > 4, torch.nan, 0.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(2.0, 1.0))

    with pytest.raises(ValueError, match=r"log weights of data .* through log p\(x \| z\)"):
        pv.elbo(model, guide, torch.zeros(3), num_particles=50, seed=0)
