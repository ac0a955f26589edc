"""Likelihoods of a datum's features: what an encoder sees of them, and a user's own."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.zoo import likelihoods


def test_a_learned_sigma_goes_to_that_of_the_data():
    """Noise alone: the maximum of the likelihood is the root mean square."""
    torch.manual_seed(0)
    x = 0.25 * torch.randn(400, 3)
    model = pv.zoo.VAE(3, 1, hidden=[], likelihood=likelihoods.Gaussian())
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()  # and not given to the optimizer
    guide = pv.AmortizedGuide(model, model.make_encoder([2]), example=x)
    optim = torch.optim.Adam([*model.observation.parameters(), *guide.parameters()], lr=0.05)
    pv.fit(model, guide, x, optim=optim, batch_size=400, max_steps=150, progress=False)
    expected = x.square().mean().sqrt().item()
    assert model.observation.sigma.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_an_encoder_sees_a_category_as_an_indicator(shape):
    x = torch.randint(3, (7, *shape))
    seen = likelihoods.Categorical(3).make_input()(x)
    assert seen.shape == (7, 3 * shape[0], *shape[1:])
    by_category = seen.reshape(7, 3, *shape)
    assert torch.equal(by_category.argmax(1), x)
    assert torch.equal(by_category.sum(1), torch.ones(7, *shape))


def test_an_encoder_sees_counts_as_shares():
    seen = likelihoods.Binomial(16).make_input()(torch.tensor([[0.0, 4.0, 16.0]]))
    assert seen.tolist() == [[0.0, 0.25, 1.0]]


def test_a_likelihood_of_ones_own():
    class Poisson(likelihoods.Likelihood):
        def forward(self, params):
            return dist.Poisson(params[..., 0].exp())

    model = pv.zoo.VAE(3, 2, hidden=[4], likelihood=Poisson())
    x = model.simulate(20)
    guide = pv.AmortizedGuide(model, model.make_encoder(), example=x)
    assert bool(pv.elbo(model, guide, x, num_particles=5, seed=0).value.isfinite().all())
