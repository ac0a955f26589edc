"""Scales of importance weights: outside the logarithm, one for each datum."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.particles.estimators import iwae_bound
from pyro_vae.programs.handlers import LatentScale
from tests.losses.normal import (
    LOSSES,
    NOISE,
    NORMAL,
    WEIGHT,
    X,
    drawn_minibatch,
    drawn_posterior,
    guide,
    latent,
    log_weights_by_hand,
    model,
    parts,
    posterior,
    subsampled,
    subsampled_guide,
    value,
)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_the_scale_of_a_subsampled_plate_stands_outside(name, vectorize):
    """200 / 5 times the minibatch's loss, exactly, and unbiased for the whole data."""
    loss = LOSSES[name](6, vectorize_particles=vectorize)
    alone = value(LOSSES[name](6, vectorize_particles=vectorize), model, guide, X)
    assert value(loss, subsampled, subsampled_guide, X) == pytest.approx(40 * alone, rel=1e-12)
    assert value(loss, subsampled, guide, X) == pytest.approx(40 * alone, rel=1e-12)
    wanted = -40 * NORMAL.log_evidence(X).sum().item()
    assert value(loss, subsampled, posterior, X) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_scaled_as_the_loss_is(name):
    def gradient(model, scale_guide):
        torch.manual_seed(0)
        slope = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

        def proposal(x):
            with pyro.plate("data", 200, subsample=x) if scale_guide else pyro.plate("data", 5):
                pyro.sample("z", dist.Normal(slope * x, 0.7))

        LOSSES[name](6).loss_and_grads(model, proposal, X)
        return slope.grad

    alone = gradient(model, False)
    assert abs(alone) > 0.01
    for scale_guide in (True, False):
        torch.testing.assert_close(
            gradient(subsampled, scale_guide), 40 * alone, rtol=1e-10, atol=0
        )


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "scale",
    [2.5, torch.tensor(2.5).double(), torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0]).double()],
    ids=["number", "scalar tensor", "one for each datum"],
)
def test_a_scale_on_the_model_weighs_the_data(name, vectorize, scale):
    scaled = poutine.scale(model, scale=scale)
    bounds = iwae_bound(log_weights_by_hand(X, 6))
    loss = LOSSES[name](6)
    assert value(loss, scaled, guide, X) == pytest.approx(-(scale * bounds).sum().item(), rel=1e-12)
    loss = LOSSES[name](6, vectorize_particles=vectorize)
    wanted = -(scale * NORMAL.log_evidence(X)).sum().item()
    assert value(loss, scaled, posterior, X) == pytest.approx(wanted, rel=1e-12)
    # What the guide says of scales does not count.
    for other in (scale, 7.0):
        assert value(loss, scaled, poutine.scale(posterior, scale=other), X) == pytest.approx(
            wanted, rel=1e-12
        )


def test_a_scale_on_the_guide_alone_makes_no_difference():
    wanted = value(pv.IWAE(6), model, guide, X)
    for scale in (3.0, torch.arange(1.0, 6.0).double()):
        scaled = poutine.scale(guide, scale=scale)
        assert value(pv.IWAE(6), model, scaled, X) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("factor", [0.3, torch.tensor(0.3).double(), 0.0])
@pytest.mark.parametrize("name", LOSSES)
def test_warm_up_of_the_kl_stands_in_the_weight(name, factor):
    """log w = log p(x | z) + beta (log p(z) - log q(z | x)), the plate's scale outside."""
    likelihood, prior, proposal = parts(X, 6)
    wanted = -iwae_bound(likelihood + factor * (prior - proposal)).sum().item()
    scaled = [LatentScale(factor)(fn) for fn in (model, guide)]
    assert value(LOSSES[name](6), *scaled, X) == pytest.approx(wanted, rel=1e-12)
    both = [LatentScale(factor)(fn) for fn in (subsampled, subsampled_guide)]
    assert value(LOSSES[name](6), *both, X) == pytest.approx(40 * wanted, rel=1e-12)


def test_warm_up_of_the_elbo():
    likelihood, _, _ = parts(X, 6)
    kl = torch.distributions.kl_divergence(
        dist.Normal(0.3 * X, 0.7), dist.Normal(torch.zeros_like(X), 1.0)
    )
    scaled = [LatentScale(0.3)(fn) for fn in (subsampled, subsampled_guide)]
    wanted = -40 * (likelihood.mean(0) - 0.3 * kl).sum().item()
    assert value(pv.ELBO(6), *scaled, X) == pytest.approx(wanted, rel=1e-12)


def test_a_tempered_likelihood_stands_in_the_weight_too():
    """Observed sites of different scales: each within, the plate's scale outside."""

    def tempered(x):
        with pyro.plate("data", 200, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(WEIGHT * z, NOISE), obs=x)
            with poutine.scale(scale=0.1):
                pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    torch.manual_seed(0)
    z = dist.Normal(0.3 * X, torch.full_like(X, 0.7)).rsample((6,))
    log_w = log_weights_by_hand(X, 6) + 0.1 * dist.Normal(z, 1.0).log_prob(X)
    wanted = -40 * iwae_bound(log_w).sum().item()
    assert value(pv.IWAE(6), tempered, guide, X) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_model_that_draws_its_own_minibatch(name):
    """All particles see one minibatch; over the draws the loss is that of all data."""
    loss, pair = LOSSES[name](4), (drawn_minibatch(latent), drawn_minibatch(drawn_posterior))
    found = []
    for seed in range(60):
        found.append(value(loss, *pair, X, seed=seed))
        torch.manual_seed(seed)
        rows = poutine.trace(pair[1]).get_trace(X).nodes["data"]["value"]
        wanted = -2.5 * NORMAL.log_evidence(X[rows]).sum().item()
        assert found[-1] == pytest.approx(wanted, abs=1e-11)
    found = torch.tensor(found)
    error = found.std().item() / math.sqrt(60)
    assert abs(found.mean().item() + NORMAL.log_evidence(X).sum().item()) < 4 * error


def test_scales_that_differ_in_the_last_bit_are_one():
    """A plate of size 3 multiplies a scale by 3 and divides by 3: not the same number."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 1).double(), torch.randn(4, 3).double()
    weight = torch.rand(4, 1).double() + 0.5

    def model(x, y, weight):
        data = pyro.plate("data", 40, subsample=x, dim=-2)
        with data, poutine.scale(scale=weight):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        with data, pyro.plate("features", 3, dim=-1), poutine.scale(scale=weight):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(x, y, weight):
        total = x + y.sum(-1, keepdim=True)
        with pyro.plate("data", 40, subsample=x, dim=-2):
            pyro.sample("z", dist.Normal(total / 5, 5**-0.5))

    covariance = torch.eye(4).double() + 1
    exact = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance)
    wanted = -(10 * weight.squeeze(-1) * exact.log_prob(torch.cat([x, y], -1))).sum().item()
    loss = pv.IWAE(5, data_plate="data").loss(model, guide, x, y, weight)
    assert loss == pytest.approx(wanted, rel=1e-12)
