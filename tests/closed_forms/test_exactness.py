"""Families and guides against evidences that are known in closed form."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from tests.models import BetaBernoulli, GammaPoisson, factor_analysis

N = 6


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.slow
def test_an_encoder_learns_a_correlated_posterior():
    """Amortized, the full-rank family comes closer than the mean field can."""
    model = factor_analysis("correlated")
    x = model.data(200)
    torch.manual_seed(1)
    encoder = torch.nn.Linear(6, 8).double()
    guide = pv.AmortizedGuide(model, encoder, example=x, family=pv.families.FullRankNormal())
    pv.fit(
        model,
        guide,
        x,
        loss=pv.ELBO(4, estimator="stl"),
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        max_steps=400,
        progress=False,
    )
    gap = (model.log_evidence(x) - pv.elbo(model, guide, x, num_particles=500, seed=0).value).mean()
    assert gap + 1e-3 >= 0
    assert gap < model.mean_field_gap / 4


@pytest.mark.parametrize(
    "family", [pv.families.Normal(), pv.families.Flow(bins=4, hidden=1)], ids=repr
)
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (GammaPoisson(10.0, 4.0), torch.tensor([0.0, 1.0, 2.0, 5.0, 9.0])),
        (BetaBernoulli(), torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]])),
    ],
    ids=["Gamma-Poisson", "Beta-Bernoulli"],
)
def test_constrained_latents_approach_the_evidence(model, x, family):
    x = x.double()
    start = pv.LocalGuide(model, num_data=len(x), example=x, family=family)
    guide = pv.refine(model, start, x, max_steps=250, seed=0)
    bound = pv.iwae_bound(model, guide, x, num_particles=20_000, seed=1)
    exact = model.log_evidence(x)
    assert (bound.std_error < 0.01).all()
    assert ((bound.value - exact).abs() < 4 * bound.std_error).all()
    elbo = pv.elbo(model, guide, x, num_particles=2000, seed=1)
    assert (elbo.value < exact + 4 * elbo.std_error).all()


def test_a_mixture_s_evidence_by_enumeration():
    logits = torch.tensor([0.2, -1.0, 0.5], dtype=torch.float64).log_softmax(-1)
    locs = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=logits))
            z = pyro.sample("z", dist.Normal(locs[c], 0.7))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def posterior(x):
        """Of z with c summed out: a mixture."""
        variance = 1 / (1 / 0.7**2 + 1 / 0.5**2)
        means = variance * (locs / 0.7**2 + x.unsqueeze(-1) / 0.5**2)
        shares = logits + dist.Normal(locs, math.hypot(0.7, 0.5)).log_prob(x.unsqueeze(-1))
        components = dist.Normal(means, variance**0.5)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=shares), components))

    x = torch.linspace(-3, 4, N, dtype=torch.float64)
    exact = (logits + dist.Normal(locs, math.hypot(0.7, 0.5)).log_prob(x.unsqueeze(-1))).logsumexp(
        -1
    )
    weights = pv.log_weights(model, posterior, x, num_particles=5, seed=0)
    torch.testing.assert_close(weights.total, exact.expand(5, N), rtol=1e-12, atol=1e-12)
