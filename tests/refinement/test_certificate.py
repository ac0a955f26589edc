"""Certificates: given where a row is at its optimum, tails that no draw reaches counted in."""

from __future__ import annotations

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from tests.models import GammaPoisson
from tests.refinement import certificates
from tests.refinement.guides import gamma_poisson_gap


def test_an_elbo_that_lies_in_the_tails():
    """Of the mean of a rate, exp(z) under a wide Gaussian, draws see nothing: x = 0, a = 0.1."""
    x = torch.zeros(1, dtype=torch.float64)
    model = GammaPoisson(0.1, 1.0)
    guide = pv.refine(model, pv.LocalGuide(model, num_data=1, example=x), x, seed=0)
    assert guide.converged.all()
    assert gamma_poisson_gap(0.1, x, guide).max() < 0.02


def test_what_has_not_converged_is_said(caplog):
    """A funnel, whose best Gaussian is far from that at its mode."""

    def model(x):
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=x.dtype), 2.0))
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), (v / 2).exp()))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.linspace(-5, 5, 12, dtype=torch.float64)
    start = pv.LocalGuide(model, num_data=12, example=x)
    with caplog.at_level(logging.WARNING):
        guide = pv.refine(model, start, x, max_steps=3, seed=0)
    assert not guide.converged.any()
    assert "12 of 12 data have not converged to within 0.02 nats in 3 steps" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Gamma(0.3)-Normal", "Beta(0.5, 0.5)-Binomial", "square, 0.3", "Student t(1)"]
)
def test_a_certificate_is_kept(name, capsys):
    """Against optima found apart from refine; `-m tests.refinement.certificates` takes all."""
    found = certificates.measure(name, num_data=4)
    with capsys.disabled():
        print("\n" + certificates.line(found))
    assert found["false"] == 0
    assert found["converged"] > 0.5 * found["rows"]
    assert found["below"] < 1e-3  # the optimum is one
