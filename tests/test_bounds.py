"""Bounds: exact on exact guides, streaming equal to direct, honest standard errors."""

from __future__ import annotations

import math

import pytest
import torch
from models import encoder, factor_analysis
from pyro import poutine

import pyro_vae as pv


@pytest.fixture
def setting():
    model = factor_analysis()
    torch.manual_seed(0)
    x = model.data(6)
    return model, x, pv.AmortizedGuide(model, encoder(6), example=x)


@pytest.mark.parametrize("num_particles", [1, 2, 50])
def test_with_the_exact_posterior_every_bound_is_the_evidence(setting, num_particles):
    model, x, _ = setting
    for bound in (pv.elbo, pv.iwae_bound):
        found = bound(model, model.posterior, x, num_particles=num_particles)
        torch.testing.assert_close(found.value, model.log_evidence(x), rtol=0, atol=1e-10)
        assert found.value.dtype == torch.float64 and found.num_particles == num_particles
        if num_particles == 1:
            assert found.std_error.isnan().all()
        else:
            assert (found.std_error < 1e-7).all()


def test_streaming_is_the_reduction_of_the_log_weights(setting):
    model, x, guide = setting
    weights = pv.log_weights(model, guide, x, num_particles=500, seed=2).total
    elbo = pv.elbo(model, guide, x, num_particles=500, seed=2, chunk_size=77)
    iwae = pv.iwae_bound(model, guide, x, num_particles=500, seed=2, chunk_size=77)
    torch.testing.assert_close(elbo.value, weights.mean(0))
    torch.testing.assert_close(elbo.std_error, calibrated(weights))
    torch.testing.assert_close(iwae.value, torch.logsumexp(weights, 0) - math.log(500))
    relative = torch.exp(weights - iwae.value)
    torch.testing.assert_close(iwae.std_error, calibrated(relative))
    for bound in (elbo, iwae):
        torch.testing.assert_close(bound.pareto_k, pv.pareto_k(weights))
        torch.testing.assert_close(bound.ess, weights.softmax(0).square().sum(0).reciprocal())


def calibrated(x):
    """By hand: the standard error of a mean, wider by six times the squared skewness over K."""
    z = (x - x.mean(0)) / x.std(0, correction=0)
    return x.std(0) / len(x) ** 0.5 * (1 + 6 * z.pow(3).mean(0) ** 2 / len(x)).clamp(max=2.5)


def test_the_elbo_is_the_closed_form_within_its_standard_error(setting):
    model, x, guide = setting
    exact = model.elbo_of(x, *location_and_scale(guide.family_params(x)))
    bound = pv.elbo(model, guide, x, num_particles=20_000, seed=0)
    assert ((bound.value - exact).abs() < 4 * bound.std_error).all()
    assert abs(bound.mean - exact.mean()) < 4 * bound.mean_std_error


def location_and_scale(params):
    return params[..., 0].detach(), params[..., 1].exp().detach()


def test_standard_errors_are_those_of_repetition(setting):
    """200 repetitions: the spread is the error but for what skewness adds, to 25% (5 errors)."""
    model, x, _ = setting
    guide = pv.refine(model, setting[2], x, seed=0)
    for bound in (pv.elbo, pv.iwae_bound):
        found = [bound(model, guide, x, num_particles=200, seed=s) for s in range(200)]
        spread = torch.stack([f.value for f in found]).std(0)
        added = [(1 + 6 * f.skewness.square() / 200).clamp(max=2.5) for f in found]
        plain = [f.std_error / wider for f, wider in zip(found, added, strict=True)]
        reported = torch.stack(plain).square().mean(0).sqrt()
        assert ((spread / reported - 1).abs() < 0.25).all()
        means = torch.tensor([f.mean for f in found])
        assert abs(means.std() / found[0].mean_std_error - 1) < 0.3


def test_the_bound_tightens_with_particles(setting):
    """E[IWAE-K] grows with K to log p(x): by more than 4 standard errors at each step here."""
    model, x, guide = setting
    guide = pv.refine(model, guide, x, seed=0)
    weights = pv.log_weights(model, guide, x, num_particles=20_000, seed=0).total
    one = weights.reshape(20_000, -1)
    many = torch.logsumexp(weights.reshape(20, 1000, -1), 0) - math.log(20)
    low, high = one.mean(0), many.mean(0)
    error = (one.var(0) / len(one) + many.var(0) / len(many)).sqrt()
    assert (high - low > 4 * error).all()
    assert (model.log_evidence(x) - high > -4 * many.std(0) / len(many) ** 0.5).all()


def test_a_bound_prints_its_error(setting):
    model, x, guide = setting
    text = repr(pv.iwae_bound(model, guide, x, num_particles=10, seed=0))
    assert text.startswith("IWAE-10: ") and "±" in text and "(6 data)" in text


def test_float32_models_get_float32_weights_and_float64_bounds():
    model = factor_analysis()
    model = type(model)(model.loadings.float(), model.mean.float(), model.noise)
    x = model.data(4)
    bound = pv.iwae_bound(model, model.posterior, x, num_particles=64)
    assert bound.value.dtype == torch.float64
    torch.testing.assert_close(
        bound.value, model.log_evidence(x).double(), rtol=0, atol=1e-4
    )  # float32 rounding of numbers near 10


def test_a_point_is_said_to_be_no_bound(caplog):
    model = factor_analysis()
    x = model.data(3)
    guide = pv.LocalGuide(model, num_data=3, example=x, family=pv.families.Delta())
    found = pv.elbo(model, guide, x, num_particles=2)
    assert "'z', and a point has no entropy" in caplog.text
    trace = poutine.trace(poutine.condition(model, {"z": guide(x)["z"]})).get_trace(x)
    log_joint = sum(trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]) for name in "zx")
    torch.testing.assert_close(found.value, log_joint.detach())
    with pytest.raises(ValueError, match=r"guides\['map'\] proposes one point for \['z'\]"):
        pv.compare(model, {"map": guide}, x, num_particles=10)
