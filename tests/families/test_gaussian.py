"""Points: closed forms, in the user's parametrization. Gaussians: correlated ones in reach."""

from __future__ import annotations

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from tests.models import factor_analysis, log_normal_model


def points(model, x, **options):
    guide = pv.LocalGuide(model, num_data=len(x), example=x, family=pv.families.Delta())
    return pv.refine(model, guide, x, seed=0, **options)


def log_joint(model, x, **latents):
    conditioned = pyro.condition(model, data=latents)
    return poutine.trace(conditioned).get_trace(x).log_prob_sum()


def gamma_model(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.5), x.new_tensor(0.5)))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def log_normal_mode(x):
    """Where d/ds [-log(s)^2 / 2 - log s - (x - s)^2 / 2] is zero, by bisection."""
    low, high = torch.full_like(x, 1e-6), torch.full_like(x, 10.0)
    # From the right, where the derivative is negative: x < 10 here.
    for _ in range(200):
        middle = (low + high) / 2
        rises = -(middle.log() + 1) / middle + x - middle > 0
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    return low


@pytest.mark.parametrize("kind", ["orthogonal", "correlated"])
def test_of_a_gaussian_it_is_the_mean(kind):
    """The mode of a Gaussian posterior is its mean, exactly, correlated or not."""
    model = factor_analysis(kind)
    x = model.data(40)
    guide = points(model, x)
    assert guide.converged.all()
    mean = model.posterior_mean(x)
    torch.testing.assert_close(guide.table[..., 0].detach(), mean, rtol=0, atol=1e-6)
    value = pv.elbo(model, guide, x, num_particles=1, seed=0).value
    torch.testing.assert_close(value.sum(), log_joint(model, x, z=mean))


def test_its_value_is_the_height_of_a_density_and_no_bound():
    """log p(x, z) = log p(x) + log p(z | x): above log p(x) by the height of a narrow posterior."""
    model = factor_analysis()
    x = model.data(5)
    guide = points(model, x)
    precision = model.posterior_precision
    height = 0.5 * torch.logdet(precision / (2 * torch.pi))
    assert height > 0.5
    for bound in (
        pv.elbo(model, guide, x, num_particles=1, seed=0),
        pv.iwae_bound(model, guide, x, num_particles=7, seed=0),
    ):
        torch.testing.assert_close(bound.value, model.log_evidence(x) + height)


def test_a_positive_latent_has_the_mode_of_its_own_density():
    """Gamma-Poisson: (a + x - 1) / (b + 1); the mode of the log rate would be (a + x) / (b + 1)."""
    x = torch.tensor([0.0, 1.0, 4.0, 30.0], dtype=torch.float64)
    guide = points(gamma_model, x)
    assert guide.converged.all()
    torch.testing.assert_close(guide(x)["rate"].detach(), (2.5 + x - 1) / 1.5)


def test_a_log_normal_latent():
    x = torch.tensor([3.0, 4.0, 6.0], dtype=torch.float64)
    guide = points(log_normal_model, x)
    torch.testing.assert_close(guide(x)["s"].detach(), log_normal_mode(x), rtol=1e-7, atol=0)


def test_posteriors_of_any_scale():
    """A point has no width to step by: scales from 1e-3 to 1e3 all the same, to 1e-6 of each."""
    scales = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), scales).to_event(1))
            pyro.sample("x", dist.Normal(z, scales).to_event(1), obs=x)

    x = torch.randn(5, 3, dtype=torch.float64) * scales
    guide = points(model, x)
    assert guide.converged.all()
    assert ((guide.table[..., 0] - x / 2) / scales).abs().max() < 1e-6


def test_pyros_auto_delta_gives_the_same_number():
    x = torch.tensor([3.0, 4.0, 6.0], dtype=torch.float64)
    auto = pyro.infer.autoguide.AutoDelta(
        log_normal_model, create_plates=lambda x: pyro.plate("data", len(x))
    )
    auto(x)
    loss = pyro.infer.Trace_ELBO()(log_normal_model, auto)
    optimizer = torch.optim.LBFGS(auto.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)
    guide = points(log_normal_model, x)
    torch.testing.assert_close(
        guide(x)["s"].detach(), auto.median(x)["s"].detach(), rtol=1e-5, atol=0
    )
    ours, theirs = (
        pv.elbo(log_normal_model, g, x, num_particles=1, seed=0).value for g in (guide, auto)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.sum(), -loss(x).detach())


def test_pyros_point_is_a_start_for_other_families():
    """An AutoDelta has no width; a Normal family starts at its point with the prior's width."""
    x = torch.tensor([3.0, 4.0, 6.0], dtype=torch.float64)
    auto = pyro.infer.autoguide.AutoDelta(
        log_normal_model, create_plates=lambda x: pyro.plate("data", len(x))
    )
    auto(x)
    refined = pv.refine(log_normal_model, auto, x, family=pv.families.Normal(), seed=0)
    assert refined.converged.all() and torch.isfinite(refined.table).all()
    again = pv.refine(log_normal_model, auto, x, family=pv.families.Delta(), seed=0)
    torch.testing.assert_close(again(x)["s"].detach(), log_normal_mode(x), rtol=1e-7, atol=0)


def test_a_linear_encoder_reaches_the_map_of_a_linear_model():
    """The posterior mean is linear in x, so that the amortized point has no gap."""
    model = factor_analysis()
    torch.manual_seed(0)
    x = model.data(200)
    guide = pv.AmortizedGuide(model, nn.Identity(), example=x, family=pv.families.Delta())
    pv.fit(
        model,
        guide,
        x,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        batch_size=200,
        max_steps=600,
        progress=False,
    )
    found = guide.family_params(x)[..., 0].detach()
    torch.testing.assert_close(found, model.posterior_mean(x), rtol=0, atol=5e-3)
    refined = pv.refine(model, guide, x, seed=0)
    assert refined.family == pv.families.Delta() and refined.converged.all()
    torch.testing.assert_close(
        refined.table[..., 0].detach(), model.posterior_mean(x), rtol=0, atol=1e-6
    )


def test_more_data_than_a_block():
    x = torch.poisson(torch.full((300,), 4.0, dtype=torch.float64))
    guide = points(gamma_model, x)
    torch.testing.assert_close(guide(x)["rate"].detach(), (2.5 + x - 1) / 1.5)


def test_what_has_not_converged_is_said(caplog):
    x = torch.linspace(1.0, 6.0, 12, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        guide = points(log_normal_model, x, max_steps=1)
    left = int((~guide.converged).sum())
    assert left > 6
    assert f"{left} of 12 data have not converged" in caplog.text


@pytest.mark.parametrize(
    "family",
    [
        pv.families.FullRankNormal(),
        pytest.param(pv.families.LowRankNormal(2), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_a_correlated_posterior_is_within_reach(family):
    """The ELBO of each datum is log p(x) to 1e-3 nats; the mean field is 0.1 nats away."""
    model = factor_analysis("correlated")
    x = model.data(6)
    start = pv.LocalGuide(model, num_data=6, example=x)
    guide = pv.refine(model, start, x, family=family, tolerance=1e-3, seed=0)
    bound = pv.elbo(model, guide, x, num_particles=1000, seed=1)
    assert (bound.value - model.log_evidence(x)).abs().max() < 1e-3
    assert model.mean_field_gap > 0.1
    assert guide.converged.all()


def test_a_gaussian_thinner_than_its_numbers_are_fine_is_not_resolved():
    """A strip along the diagonal: float32 has 7 digits, float64 16; the scale does not matter."""
    family, unit = pv.families.FullRankNormal(), torch.tensor([1.0, 1.0])
    for thin, scale, wanted in ((1e-3, 1.0, True), (1e-3, 1e5, True), (1e-7, 1.0, False)):
        corner = torch.stack([unit, torch.tensor([1.0, 1.0 + thin])])
        factor = scale * torch.linalg.cholesky((corner @ corner.T).double()).float()
        factor[1, 1] = scale * thin
        params = family.from_gaussian(torch.zeros(2), factor)
        assert bool(family.is_resolved(params, 2)) is wanted
        assert bool(family.is_resolved(params.double(), 2))
    # Far from zero the same width is not resolved any more.
    far = family.initial(torch.tensor([1e8, 0.0]), unit)
    assert not bool(family.is_resolved(far, 2))
    assert pv.families.Normal().is_resolved(torch.zeros(5, 3, 2), 3).shape == (5,)
