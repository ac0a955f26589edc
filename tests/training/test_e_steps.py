"""E-steps by draws: importance weights and NUTS reach the maximum of the likelihood."""

from __future__ import annotations

import logging

import pyro
import pyro.distributions as dist
import pytest

import pyro_vae as pv
from pyro_vae.training.em import em
from tests.training.em_models import (
    half_steps,
    mixture,
    mixture_data,
    spread,
    spread_data,
    spread_evidence,
    wide,
)


@pytest.mark.parametrize(
    ("e_step", "options"),
    [
        ("importance", {"num_particles": 400}),
        pytest.param("nuts", {"num_particles": 200, "num_iterations": 8}, marks=pytest.mark.slow),
    ],
)
def test_monte_carlo_em_reaches_the_maximum_likelihood(e_step, options):
    """The evidence told is right within 4 errors, and that of the maximum to 2e-3 nats."""
    x = spread_data(40)
    result = em(spread, wide, x, e_step=e_step, progress=False, **options)
    mean, scale = (pyro.param(name).detach() for name in ("mean", "scale"))
    exact = spread_evidence(x, mean, scale)
    best = spread_evidence(x, x.mean(), (x.var(correction=0) - 1).sqrt())
    assert 0 < result.elbo_std_error < 0.02
    assert abs(result.elbo - exact) < 4 * result.elbo_std_error
    assert 0 <= best - exact < 2e-3
    assert half_steps(result, "E")[0] < result.elbo - 0.2


def test_noise_ends_a_run():
    """Sixteen draws cannot tell 1e-9 nats: that is said, and not called convergence."""
    x = spread_data(20)
    result = em(
        spread, wide, x, e_step="importance", num_particles=16, tolerance=1e-9, progress=False
    )
    assert result.stopped_by == "noise" and not result.converged
    assert result.iterations < 100


def test_a_guide_far_from_the_posterior_is_told(caplog):
    def far(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_full((), -8.0), 1.0))

    x = spread_data(20)
    with caplog.at_level(logging.WARNING):
        em(spread, far, x, e_step="importance", num_iterations=1, progress=False)
    assert "of 20 data had an effective sample size below 10" in caplog.text


def test_discrete_latents_have_no_nuts():
    x = mixture_data(5)
    with pytest.raises(ValueError, match=r"\['c'\] are discrete, and NUTS needs"):
        em(mixture, wide, x, e_step="nuts", progress=False)


@pytest.mark.parametrize("e_step", ["importance", "nuts"])
def test_points_propose_nothing(e_step):
    x = spread_data(5)
    guide = pv.LocalGuide(spread, num_data=5, example=x, family=pv.families.Delta())
    with pytest.raises(ValueError, match="is a point, which has none"):
        em(spread, guide, x, e_step=e_step, progress=False)
    auto = pyro.infer.autoguide.AutoDelta(
        spread, create_plates=lambda x: pyro.plate("data", len(x))
    )
    auto(x)
    with pytest.raises(ValueError, match="one and the same point each time"):
        em(spread, auto, x, e_step=e_step, progress=False)
