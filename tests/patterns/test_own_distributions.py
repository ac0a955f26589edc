"""Distributions of a user's own that lack what torch's have: expand, sample, a support."""

from __future__ import annotations

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import pyro_vae as pv

F64 = torch.float64
X = torch.tensor([0.3, -1.0, 2.0], dtype=F64)


class NoSample(dist.TorchDistribution):
    """Normal(loc, 1) that can be scored and no more."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.0).log_prob(value)


class NoExpand(NoSample):
    """The same with draws."""

    def sample(self, sample_shape=()):
        return self.loc + torch.randn(*sample_shape, *self.loc.shape, dtype=F64)


class NoSupport(NoExpand):
    """The same of which nobody knows where it lives."""

    support = property(lambda self: NoExpand.missing)  # an AttributeError


def model_of(prior, likelihood):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(torch.zeros(len(x), dtype=F64)))
            pyro.sample("x", likelihood(z), obs=x)

    return model


def posterior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def normal(loc):
    return dist.Normal(loc, 1.0)


EXACT = dist.Normal(0.0, 2**0.5).log_prob(X)


@pytest.mark.parametrize(
    ("prior", "likelihood"),
    [(normal, NoSample), (normal, NoExpand), (NoExpand, normal), (NoSupport, NoSupport)],
)
def test_the_exact_posterior_gives_the_evidence(prior, likelihood):
    model = model_of(prior, likelihood)
    weights = pv.log_weights(model, posterior, X, num_particles=4, seed=0)
    torch.testing.assert_close(weights.total, EXACT.expand(4, 3))
    for loss in (pv.ELBO(1, "sample"), pv.ELBO(3, "sample"), pv.IWAE(3), pv.IWAE(3, "dreg")):
        assert loss.loss(model, posterior, X) == pytest.approx(-EXACT.sum().item())


def test_a_prior_without_draws_is_refused_where_one_is_needed():
    model = model_of(NoSample, normal)
    # Pyro's kind of loss draws from the guide alone.
    assert pv.ELBO(1, "sample").loss(model, posterior, X) == pytest.approx(-EXACT.sum().item())
    for call in (
        lambda: pv.iwae_bound(model, posterior, X),
        lambda: pv.IWAE(3).loss(model, posterior, X),
        lambda: pv.LocalGuide(model, num_data=3, example=X),
        lambda: pv.describe(model, X),
    ):
        with pytest.raises(
            ValueError, match=r"latent site 'z': its prior NoSample cannot be drawn"
        ):
            call()


def test_a_latent_without_a_support_has_no_guide_of_ours():
    model = model_of(NoSupport, normal)
    with pytest.raises(ValueError, match=r"latent site 'z': NoSupport declares no support"):
        pv.LocalGuide(model, num_data=3, example=X)
    with pytest.raises(ValueError, match=r"latent site 'z': NoSupport declares no support"):
        pv.refine(model, posterior, X)
    assert "not declared" in str(pv.describe(model, X))


def test_draws_of_an_autoguide_that_round_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Dirichlet(torch.full((3,), 0.1, dtype=F64)))
            pyro.sample("x", dist.Multinomial(20, theta), obs=x)

    x = torch.tensor([[20.0, 0, 0]], dtype=F64)
    guide = AutoNormal(model, init_scale=1.0, create_plates=lambda x: pyro.plate("data", len(x)))
    guide(x)
    alpha = torch.full((3,), 0.1, dtype=F64)
    exact = torch.lgamma(alpha.sum()) - math.lgamma(20.3) + math.lgamma(20.1) - math.lgamma(0.1)
    bound = pv.iwae_bound(model, guide, x, num_particles=5000, seed=0)
    assert bound.value[0] < exact
    with torch.no_grad():
        guide.locs.theta.fill_(60.0)  # where a stick is broken off whole
    with pytest.raises(ValueError, match=r"draws of latent site 'theta' lie at the edge"):
        pv.iwae_bound(model, guide, x, num_particles=100, seed=0)
