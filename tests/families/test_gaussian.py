"""Gaussian families: correlated posteriors within reach."""

from __future__ import annotations

import pytest

import pyro_vae as pv
from tests.models import factor_analysis


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
