"""The ascent of a table: to the optimum, however thin the posterior."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv


def test_posteriors_of_any_scale():
    """Steps are in units of the guide's width: scales from 1e-3 to 1e3 all converge."""
    scales = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), scales).to_event(1))
            pyro.sample("x", dist.Normal(z, scales).to_event(1), obs=x)

    x = torch.randn(5, 3, dtype=torch.float64) * scales
    guide = pv.refine(model, pv.LocalGuide(model, num_data=5, example=x), x, seed=0)
    exact = torch.distributions.Normal(0.0, scales * 2**0.5).log_prob(x).sum(-1)
    assert guide.converged.all()
    bound = pv.elbo(model, guide, x, num_particles=100, seed=0)
    torch.testing.assert_close(bound.value, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("thin", [1e-4, 1e-9])
@pytest.mark.parametrize("family", [pv.families.FullRankNormal(), pv.families.Normal()], ids=repr)
def test_nearly_singular_posteriors(family, thin):
    """Correlation 1 - thin in two dimensions: Gaussian posteriors, with closed forms."""
    covariance = torch.tensor([[1, 1 - thin], [1 - thin, 1]], dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance)

    def model(x):
        with pyro.plate("data", len(x)):
            prior = dist.MultivariateNormal(torch.zeros(2, dtype=x.dtype), scale_tril=factor)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    start = pv.LocalGuide(model, num_data=2, example=x, family=family)
    guide = pv.refine(model, start, x, seed=0)
    # Along (1, 1) and (1, -1) prior and likelihood are independent.
    turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    prior = torch.tensor([2 - thin, thin], dtype=torch.float64)
    evidence = torch.distributions.Normal(0.0, (prior + 1).sqrt()).log_prob(x @ turn).sum(1)
    precision = turn @ (1 / prior + 1).diag() @ turn
    gap = 0.0
    if family == pv.families.Normal():
        gap = 0.5 * (precision.diagonal().log().sum() - (1 / prior + 1).log().sum())
    bound = pv.elbo(model, guide, x, num_particles=2000, seed=0)
    assert guide.converged.all()
    assert ((bound.value - (evidence - gap)).abs() < 5 * bound.std_error + 1e-3).all()
