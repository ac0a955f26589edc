"""Per-datum optimisation: to the family's optimum, told honestly, never below the start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.programs.batch import as_batch
from pyro_vae.refinement.refine import promised_gain
from tests.models import factor_analysis, log_normal_model
from tests.refinement import whole
from tests.refinement.guides import amortized, exact_elbo


def test_where_the_family_holds_the_posterior_the_elbo_is_the_evidence():
    """Orthogonal loadings: a diagonal posterior, so log p(x) within 1e-4 nats per datum."""
    model = factor_analysis("orthogonal")
    torch.manual_seed(1)
    x = model.data(40)
    guide = pv.refine(model, amortized(model, x), x, seed=0)
    evidence = model.log_evidence(x)
    assert guide.converged.all()
    assert (evidence - exact_elbo(model, x, guide)).max() < 1e-4
    for num_particles in (1, 10, 1000):
        bound = pv.iwae_bound(model, guide, x, num_particles=num_particles, seed=0)
        # One draw of a nearly exact guide: the weight is off by the root of its KL.
        assert (bound.value - evidence).abs().max() < 0.02 / num_particles**0.5 + 1e-4


def test_elsewhere_it_is_the_optimum_of_the_family():
    """Correlated loadings: the closed form of the best diagonal Gaussian within 1e-3."""
    model = factor_analysis("correlated")
    torch.manual_seed(1)
    x = model.data(40)
    guide = pv.refine(model, amortized(model, x), x, seed=0)
    optimum = model.log_evidence(x) - model.mean_field_gap
    assert guide.converged.all() and model.mean_field_gap > 0.1
    gap = optimum - exact_elbo(model, x, guide)
    assert (gap > -1e-10).all() and gap.max() < 1e-3
    # Reverse KL: the variances are 1 / diag of the precision.
    variance = 1 / model.posterior_precision.diagonal()
    torch.testing.assert_close(
        (2 * guide.table[..., 1]).exp().detach(), variance.expand(40, -1), rtol=0.05, atol=0
    )


def test_the_model_and_the_guide_it_starts_from_stay_as_they_are():
    torch.manual_seed(0)
    model = pv.zoo.VAE(5, 2, hidden=[4])
    x = (torch.rand(6, 5) > 0.5).float()
    guide = pv.AmortizedGuide(model, nn.Linear(5, 4), example=x)
    before = {n: p.clone() for m in (model, guide) for n, p in m.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    pv.refine(model, guide, x, max_steps=20, seed=0)
    for module in (model, guide):
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, before[name]) and parameter.grad is None
    assert torch.equal(torch.rand(2), expected)


def test_a_positive_latent():
    """The best Gaussian on log s of the LogNormal model has median 2.115 at x = 3."""
    x = torch.tensor([3.0], dtype=torch.float64)
    guide = pv.LocalGuide(log_normal_model, num_data=1, example=x)
    refined = pv.refine(log_normal_model, guide, x, seed=0, tolerance=1e-3)
    assert refined.table[0, 0, 0].exp().item() == pytest.approx(2.115, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_steps": 0}, "max_steps=0"), ({"tolerance": 0.0}, "tolerance=0.0: a positive")],
)
def test_bad_numbers_are_refused(options, message):
    model = factor_analysis()
    x = model.data(3)
    with pytest.raises(ValueError, match=message):
        pv.refine(model, model.posterior, x, **options)


def test_bars_say_how_far_it_is(capsys):
    model = factor_analysis("orthogonal")
    x = model.data(3)
    pv.refine(model, model.posterior, x, seed=0, progress=False)
    assert capsys.readouterr().err == ""


def test_an_infinite_tolerance_takes_one_cycle():
    model = factor_analysis("correlated")
    x = model.data(5)
    guide = amortized(model, x)
    assert pv.refine(model, guide, x, tolerance=math.inf, progress=False).converged.all()


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"tolerance": 0.0}])
def test_limits_are_refused_before_anything_is_drawn(options):
    model = factor_analysis("correlated")
    x = model.data(5)
    guide = amortized(model, x)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="="):
        pv.refine(model, guide, x, **options)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_data", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_all_latents_of_a_model_jointly(num_data):
    """101 and 501 of them, by a Gaussian of any covariance: the posterior, by algebra."""
    x = whole.data(num_data)
    guide = pv.refine(whole.model, whole.full_rank(x), x, data_plate=False, seed=0, progress=False)
    off = whole.off(guide, x)
    assert guide.converged.all()
    assert off.nats < 0.02 and off.mean < 0.02
    assert (off.widths - 1).abs().max() < 0.01


def test_what_is_left_to_gain_is_told_by_the_slope():
    """From 0.5 nats below the optimum, wider in all directions by one ratio: by algebra."""
    x = whole.data(20)
    guide = pv.refine(whole.model, whole.full_rank(x), x, data_plate=False, seed=0, progress=False)
    at_optimum, error = promised_gain(whole.model, guide, as_batch(x))
    assert abs(at_optimum) < 4 * error + 1e-3
    with torch.no_grad():
        guide.table[:, 21:42] += 0.15  # logarithms of the widths
    below = whole.off(guide, x).nats
    promised, error = promised_gain(whole.model, guide, as_batch(x))
    assert 0.3 < below < 0.8
    # Half the square of the slope, with the curvature of 1 that the Fisher information has.
    assert below / 3 < promised < 3 * below and error < promised / 3
