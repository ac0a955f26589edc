"""Defensive importance sampling: unbiased, bounded weights, and what a guide misses shows."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.particles.estimators import Estimate
from pyro_vae.sampling.importance import weigh
from pyro_vae.sampling.prepare import ready


def gamma_poisson(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 0.5))
        pyro.sample("x", dist.Poisson(z), obs=x)


def square(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 2.0))
        pyro.sample("x", dist.Normal(z.square(), 0.5), obs=x)


def counts():
    return torch.tensor([0.0, 1.0, 4.0, 12.0], dtype=torch.float64)


def weighed(model, guide, x, num_particles=4000, seed=0):
    made = ready(model, guide, (x,), None, None, seed, False)
    ((rows, block),) = made.each()
    return weigh(made, rows, block, num_particles)


def local(model, x, loc=0.0, log_scale=0.0):
    guide = pv.LocalGuide(model, num_data=len(x), example=x)
    with torch.no_grad():
        guide.table[..., 0], guide.table[..., 1] = loc, log_scale
    return guide


def test_the_mean_weight_is_the_evidence():
    """Negative binomial evidence of a Gamma-Poisson pair, to four standard errors, all data."""
    x = counts()
    found = weighed(gamma_poisson, local(gamma_poisson, x, loc=1.0), x, num_particles=20_000)
    exact = dist.NegativeBinomial(2.0, probs=torch.tensor(1 / 1.5, dtype=torch.float64)).log_prob(x)
    estimate = Estimate.iwae(found.log_weights)
    assert ((estimate.value - exact).abs() < 4 * estimate.std_error).all()
    assert (estimate.std_error < 0.02).all()


def test_weights_are_bounded_by_those_of_the_base():
    """q holds at least 0.8 of the mixture: w <= p / (0.8 q), for the exact posterior 1.25 p(x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0], dtype=torch.float64)
    guide = local(model, x, log_scale=0.5 * math.log(0.5))
    with torch.no_grad():
        guide.table[:, 0, 0] = x / 2
    found = weighed(model, guide, x)
    evidence = dist.Normal(torch.zeros_like(x), 2**0.5).log_prob(x)
    assert (found.log_weights <= evidence + math.log(1.25) + 1e-9).all()


def test_a_missed_mode_shows():
    """A guide at one of two modes, 36 widths apart: by its own draws all is well, by these not."""
    x = torch.tensor([9.0], dtype=torch.float64)
    guide = local(square, x, loc=3.0, log_scale=math.log(0.083))
    alone = pv.iwae_bound(square, guide, x, num_particles=4000, seed=0)
    assert float(alone.ess) > 2000
    found = weighed(square, guide, x)
    # The other mode holds half of the posterior.
    assert float(found.elsewhere) == pytest.approx(0.5, abs=0.1)
    assert not found.is_whole
    both = weighed(square, local(square, x, log_scale=math.log(3.0)), x)
    assert float(both.elsewhere) == 0 and both.is_whole


def absolute(x):
    """Modes at all signs of z, equally high, and a tenth wide."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.abs(), 0.1).to_event(1), obs=x)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_one_of_many_modes_is_not_all_of_a_posterior(size: int):
    """Draws of the prior hit no other mode: climbing from them does, for each of 40 data."""
    generator = torch.Generator().manual_seed(1)
    x = 0.7 + torch.rand(40, size, generator=generator, dtype=torch.float64)
    guide = local(absolute, x, log_scale=math.log(0.1))
    with torch.no_grad():
        guide.table[..., 0] = x / 1.01
    found = weighed(absolute, guide, x, 1000)
    effective = 1 / found.log_weights.softmax(0).square().sum(0)
    # A third mode that the prior's draws hit takes nearly all of the weight.
    assert not (found.is_whole & (effective > 100)).any()
    # Else the mixture has two of them, which weigh alike.
    assert ((found.elsewhere > 0.3) & (found.elsewhere < 0.7)).float().mean() > 0.5


@pytest.mark.parametrize(
    ("dtype", "concentration", "resolved"),
    [(torch.float32, 0.05, False), (torch.float32, 2.0, True), (torch.float64, 2.0, True)],
)
def test_a_posterior_at_the_edge_of_its_support_is_not_whole(dtype, concentration, resolved):
    """Beta(a + 10, a): at a = 0.05 it has 0.43 above 1 - 6e-8, where single precision says 1."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(x.new_tensor(concentration), concentration))
            pyro.sample("x", dist.Binomial(10, z), obs=x)

    x = torch.tensor([10.0, 5.0], dtype=dtype)
    guide = local(model, x, loc=4.0, log_scale=1.0)
    found = weighed(model, guide, x)
    assert found.is_whole.tolist() == [resolved, True]
    assert float(found.unresolved[1]) < 1e-3


@pytest.mark.parametrize("num_particles", [1000, 1001, 1337])
def test_shapes(num_particles: int):
    x = counts()
    found = weighed(gamma_poisson, local(gamma_poisson, x), x, num_particles)
    assert found.z.shape == (num_particles, 4, 1)
    assert found.log_weights.shape == (num_particles, 4)
    assert found.log_weights.dtype == torch.float64


def test_a_seed_decides():
    x = counts()
    guide = local(gamma_poisson, x)
    one, same, other = (weighed(gamma_poisson, guide, x, 1000, seed).z for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_masked_latent_has_no_prior_draws():
    """A latent that a mask leaves out for some data: the evidence of the others is right."""

    def model(x, there):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=there):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    there = torch.tensor([True, False, True])
    guide = pv.LocalGuide(model, num_data=3, example=(x, there))
    made = ready(model, guide, (x, there), None, None, 0, False)
    ((rows, block),) = made.each()
    estimate = Estimate.iwae(weigh(made, rows, block, 4000).log_weights)
    exact = torch.where(there, dist.Normal(torch.zeros_like(x), 2**0.5).log_prob(x), 0.0)
    assert ((estimate.value - exact).abs() < 4 * estimate.std_error + 1e-9).all()


def normals(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("num_particles", [400, 2000])
def test_the_error_of_draws_with_fixed_shares_is_their_spread_over_runs(num_particles):
    """Of the exact posterior the densities' mean weights differ, which is no error of a mean with
    fixed shares: taken for one, errors are 1.7 times too wide."""

    def posterior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    x = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = dist.Normal(x.new_zeros(()), 2**0.5).log_prob(x).sum(1)
    runs = [weighed(normals, posterior, x, num_particles, seed) for seed in range(20)]
    found = [Estimate.iwae(run.log_weights).stratified(run.counts) for run in runs]
    apart = torch.stack([each.value - exact for each in found])
    errors = torch.stack([each.std_error for each in found])
    ratio = errors.square().mean().sqrt() / apart.square().mean().sqrt()
    assert 0.9 < float(ratio) < 1.1  # of 600 distances
    pooled = torch.stack([Estimate.iwae(run.log_weights).std_error for run in runs])
    assert float(pooled.mean() / errors.mean()) > 1.5
