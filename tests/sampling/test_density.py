"""Densities of blocks: f_0 integrates to one and f_1 to the evidence, slopes are gradients."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from tests.models import (
    BetaBernoulli,
    GammaPoisson,
    factor_analysis,
    log_normal_evidence,
    log_normal_model,
)
from tests.sampling.pairs import (
    density_of,
    dirichlet_evidence,
    dirichlet_model,
    integrals,
    local,
    masked_model,
    normal_mixture,
    normal_mixture_joint,
    only_block,
    two_sites,
    two_sites_evidence,
)

F64 = torch.float64
COUNTS = torch.tensor([0.0, 3.0, 8.0], dtype=F64)
REALS = torch.tensor([-1.0, 0.5, 3.0], dtype=F64)
BITS = torch.tensor([[0.0, 1, 1], [1, 1, 1], [0, 0, 0]], dtype=F64)
ROLLS = torch.tensor([[3.0, 3, 4], [0, 1, 9]], dtype=F64)
STARTS = ("guide", "prior")
FAMILIES = [
    pv.families.Normal(),
    pv.families.FullRankNormal(),
    pv.families.LowRankNormal(1),
    pv.families.Flow(bins=3, hidden=2),
]


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gradient(function, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(function(z).sum(), [z])[0]


# --- against the closed form


@pytest.mark.parametrize("start", STARTS)
def test_terms_and_slopes_of_factor_analysis(start):
    model = factor_analysis()
    x, z = model.data(4), some(5, 4, 3)
    guide = local(model, x)
    location, scale = guide.table.detach().unbind(-1)

    def prior(z):
        return dist.Normal(0.0, 1.0).log_prob(z).sum(-1)

    def likelihood(z):
        return dist.Normal(z @ model.loadings.T + model.mean, model.noise).log_prob(x).sum(-1)

    def proposal(z):
        return dist.Normal(location, scale.exp()).log_prob(z).sum(-1)

    base, ratio = prior, likelihood
    if start == "guide":
        base, ratio = proposal, lambda z: prior(z) + likelihood(z) - proposal(z)
    point = density_of(model, guide, x, start=start)(z)
    torch.testing.assert_close(point.base, base(z))
    torch.testing.assert_close(point.ratio, ratio(z))
    torch.testing.assert_close(point.base_slope, gradient(base, z))
    torch.testing.assert_close(point.ratio_slope, gradient(ratio, z))
    assert not point.base.requires_grad and not point.ratio_slope.requires_grad


@pytest.mark.parametrize("start", STARTS)
def test_terms_of_a_mapped_site(start):
    """Gamma-Poisson in u = log rate, by the formula."""
    model, z = GammaPoisson(), some(6, 3, 1)
    guide = local(model, COUNTS)
    location, scale = guide.table[:, 0].detach().unbind(-1)

    def prior(z):
        return (2 * z - z.exp())[..., 0]  # Gamma(2, 1), and the log determinant u

    def likelihood(z):
        return COUNTS * z[..., 0] - z[..., 0].exp() - torch.lgamma(COUNTS + 1)

    def proposal(z):
        return dist.Normal(location, scale.exp()).log_prob(z[..., 0])

    base, ratio = prior, likelihood
    if start == "guide":
        base, ratio = proposal, lambda z: prior(z) + likelihood(z) - proposal(z)
    point = density_of(model, guide, COUNTS, start=start)(z)
    torch.testing.assert_close(point.base, base(z))
    torch.testing.assert_close(point.ratio, ratio(z))
    torch.testing.assert_close(point.base_slope, gradient(base, z))
    torch.testing.assert_close(point.ratio_slope, gradient(ratio, z))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_every_family_is_its_own_base(family):
    """f_0 is the family's joint density, and f_1 does not depend on the family."""
    model = factor_analysis()
    x, z = model.data(4), some(5, 4, 3)
    guide = local(model, x, family=family)
    point = density_of(model, guide, x)(z)

    def proposal(z):
        whole = family.conditional(guide.table.detach(), 3, z[..., :0], slice(0, 3))
        return whole.log_prob(z)

    torch.testing.assert_close(point.base, proposal(z))
    torch.testing.assert_close(point.base_slope, gradient(proposal, z))
    other = density_of(model, guide, x, start="prior")(z)
    ones = torch.ones(4, dtype=F64)
    torch.testing.assert_close(point.height(ones), other.height(ones))
    torch.testing.assert_close(point.slope(ones), other.slope(ones))
    posterior = dist.MultivariateNormal(
        model.posterior_mean(x), precision_matrix=model.posterior_precision
    )
    exact = model.log_evidence(x) + posterior.log_prob(z)
    torch.testing.assert_close(point.height(ones), exact)


# --- by quadrature


@pytest.mark.parametrize("start", STARTS)
def test_integrals_over_positive_numbers(start):
    model = GammaPoisson()
    density = density_of(model, local(model, COUNTS), COUNTS, start=start)
    zeros = torch.zeros(3, dtype=F64)
    # The tail of a Gamma's logarithm goes down as exp(2 u).
    wide = {"low": -40.0, "high": 12.0, "count": 20_001}
    torch.testing.assert_close(integrals(density, 3, 0.0, **wide), zeros, rtol=0, atol=1e-8)
    found = integrals(density, 3, 1.0, **wide)
    torch.testing.assert_close(found, model.log_evidence(COUNTS), rtol=0, atol=1e-8)


@pytest.mark.parametrize("start", STARTS)
def test_integrals_of_a_log_normal(start):
    density = density_of(log_normal_model, local(log_normal_model, REALS), REALS, start=start)
    zeros = torch.zeros(3, dtype=F64)
    torch.testing.assert_close(integrals(density, 3, 0.0), zeros, rtol=0, atol=1e-8)
    exact = torch.tensor([log_normal_evidence(float(x)) for x in REALS], dtype=F64)
    torch.testing.assert_close(integrals(density, 3, 1.0), exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("start", STARTS)
def test_integrals_over_an_interval(start):
    model = BetaBernoulli()
    density = density_of(model, local(model, BITS), BITS, start=start)
    wide = {"low": -40.0, "high": 40.0, "count": 20_001}
    zeros = torch.zeros(3, dtype=F64)
    torch.testing.assert_close(integrals(density, 3, 0.0, **wide), zeros, rtol=0, atol=1e-6)
    exact = model.log_evidence(BITS)
    torch.testing.assert_close(integrals(density, 3, 1.0, **wide), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", STARTS)
def test_integrals_over_a_simplex(start):
    density = density_of(dirichlet_model, local(dirichlet_model, ROLLS), ROLLS, start=start)
    wide = {"size": 2, "low": -25.0, "high": 25.0, "count": 201}
    zeros = torch.zeros(2, dtype=F64)
    torch.testing.assert_close(integrals(density, 2, 0.0, **wide), zeros, rtol=0, atol=1e-4)
    found = integrals(density, 2, 1.0, **wide)
    torch.testing.assert_close(found, dirichlet_evidence(ROLLS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_what_is_discrete_is_summed_out(start):
    density = density_of(normal_mixture, local(normal_mixture, REALS), REALS, start=start)
    zeros = torch.zeros(3, dtype=F64)
    torch.testing.assert_close(integrals(density, 3, 0.0), zeros, rtol=0, atol=1e-6)
    exact = normal_mixture_joint(REALS).logsumexp(-1)
    torch.testing.assert_close(integrals(density, 3, 1.0), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", STARTS)
def test_two_sites_and_an_inner_plate(start):
    x = some(2, 2, seed=3)
    density = density_of(two_sites, local(two_sites, x), x, start=start)
    wide = {"size": 3, "low": -12.0, "high": 12.0, "count": 49}
    zeros = torch.zeros(2, dtype=F64)
    torch.testing.assert_close(integrals(density, 2, 0.0, **wide), zeros, rtol=0, atol=1e-4)
    found = integrals(density, 2, 1.0, **wide)
    torch.testing.assert_close(found, two_sites_evidence(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_all_latents_jointly_are_one_datum(start):
    """Three data of one latent each, as one datum of three coordinates."""
    guide = local(normal_mixture, REALS, data_plate=False)
    density = density_of(normal_mixture, guide, REALS, start=start, data_plate=False)
    point = density(some(5, 1, 3))
    assert point.base.shape == (5, 1) and point.base_slope.shape == (5, 1, 3)
    apart = density_of(normal_mixture, local(normal_mixture, REALS), REALS)
    one = torch.ones((), dtype=F64)
    z = some(5, 1, 3)
    torch.testing.assert_close(
        point.height(one)[:, 0], apart(z.squeeze(1).unsqueeze(-1)).height(one).sum(-1)
    )


# --- masks


def test_a_masked_coordinate_has_the_base_density_at_every_power():
    x, seen = REALS, torch.tensor([True, False, True])
    guide = pv.LocalGuide(masked_model, num_data=3, example=(x, seen)).double()
    density = density_of(masked_model, guide, x, seen)
    at = some(4, 3, 2)
    moved = at.clone()
    moved[:, 1, 1] += 1.3  # w of the datum without one
    one, other = density(at), density(moved)
    location, log_scale = guide.table[1, 1].detach()
    proposal = dist.Normal(location, log_scale.exp())
    change = proposal.log_prob(moved[:, 1, 1]) - proposal.log_prob(at[:, 1, 1])
    for power in (0.0, 0.3, 1.0):
        powers = torch.full((3,), power, dtype=F64)
        gained = other.height(powers) - one.height(powers)
        torch.testing.assert_close(gained[:, 1], change)
        torch.testing.assert_close(gained[:, [0, 2]], torch.zeros(4, 2, dtype=F64))
        slope = gradient(proposal.log_prob, at[:, 1, 1])
        torch.testing.assert_close(one.slope(powers)[:, 1, 1], slope)


def test_a_masked_latent_leaves_the_evidence():
    """The integral over both coordinates is that of the model without it, by quadrature."""
    x, seen = REALS, torch.tensor([True, False, True])
    guide = pv.LocalGuide(masked_model, num_data=3, example=(x, seen)).double()
    density = density_of(masked_model, guide, x, seen)
    found = integrals(density, 3, 1.0, size=2, low=-15.0, high=9.0, count=241)
    exact = dist.Normal(0.0, (1 + 0.49) ** 0.5).log_prob(x)
    torch.testing.assert_close(found[1], exact[1], rtol=0, atol=1e-6)
    w = torch.linspace(0, 30, 30_001, dtype=F64)
    inside = dist.Normal(w, 1.49**0.5).log_prob(x.unsqueeze(-1)) + w.clamp_min(1e-300).log() - w
    whole = inside.logsumexp(-1) + torch.tensor(0.001).log()
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]], rtol=0, atol=1e-5)


def test_steps_beyond_the_end_of_a_sequence_have_the_base_density():
    torch.manual_seed(0)
    model = pv.zoo.DeepMarkovModel(3, 2, hidden=[4]).double()
    x, lengths = some(2, 4, 3), torch.tensor([4, 2])
    guide = pv.LocalGuide(model, num_data=2, example=(x, lengths)).double()
    made, _, _ = only_block(model, guide, x, lengths)
    density = density_of(model, guide, x, lengths)
    at = some(3, 2, made.blocks.size)
    slope = density(at).slope(torch.ones(2, dtype=F64))
    location, scale = guide.table.detach().unbind(-1)
    own = (location - at) / scale.exp().square()
    free = (slope - own).abs().amax(0) < 1e-9
    assert free[1].sum() == 2 * 2 and free[0].sum() == 0  # two steps of two coordinates each


# --- graphs


@pytest.mark.parametrize("start", STARTS)
def test_graphs_change_nothing(start):
    model = factor_analysis()
    x = model.data(4)
    guide = local(model, x)
    eager = density_of(model, guide, x, start=start)
    recorded = density_of(model, guide, x, start=start, compile="replay")
    for seed in range(6):  # a graph takes over after the first ones
        z = some(5, 4, 3, seed=seed)
        one, other = eager(z), recorded(z)
        for name in ("z", "base", "ratio", "base_slope", "ratio_slope"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("start", STARTS)
def test_a_likelihood_that_is_flat_in_the_latent_has_no_slope(start):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(torch.where(z > 0, 1.0, -1.0).to(x), 1.0), obs=x)

    z = some(5, 3, 1)
    point = density_of(model, local(model, REALS), REALS, start=start)(z)
    torch.testing.assert_close(point.slope(torch.ones(3, dtype=F64)), -z)
    if start == "prior":
        assert (point.ratio_slope == 0).all()
