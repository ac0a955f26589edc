"""Flows: two modes where a Normal has one."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv


def two_modes(x):
    """x is near z squared: the posterior of z has a mode on either side."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.square(), 0.2), obs=x)


@pytest.mark.slow
def test_a_flow_has_two_modes_and_a_normal_one():
    """By quadrature: half of the mass is lost to a Normal, about log 2 nats; not to a flow."""
    x = torch.tensor([0.4, 0.7], dtype=torch.float64)
    grid = torch.linspace(-6, 6, 100_001, dtype=torch.float64).unsqueeze(-1)
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid**2, 0.2).log_prob(x)
    exact = joint.logsumexp(0) + math.log(float(grid[1] - grid[0]))
    found = pv.compare(
        two_modes,
        {"normal": pv.families.Normal(), "flow": pv.families.Flow()},
        x,
        num_particles=4000,
        max_steps=1500,
        seed=0,
    ).dataset
    gaps = exact.numpy() - found["elbo"]
    errors = found["elbo_se"]
    normal, flow = (gaps.sel(guide=name) for name in ("normal", "flow"))
    assert (normal - 4 * errors.sel(guide="normal") > 0.35).all()
    assert (flow < 0.1 * normal).all()
    assert (flow > -4 * errors.sel(guide="flow")).all()
