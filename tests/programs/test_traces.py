"""Traces: which of their terms are not finite."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.traces import non_finite_sites


def test_non_finite_sites_are_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z / 0, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert non_finite_sites(model, guide, as_batch(torch.zeros(2))) == ["'x' of the model"]
