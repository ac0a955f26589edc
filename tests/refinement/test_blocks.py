"""Blocks of data: more than one of them change nothing."""

from __future__ import annotations

import pyro_vae as pv
from tests.models import factor_analysis
from tests.refinement.guides import amortized, exact_elbo


def test_more_data_than_a_block():
    model = factor_analysis("orthogonal")
    x = model.data(300)
    guide = pv.refine(model, amortized(model, x), x, seed=0)
    assert (model.log_evidence(x) - exact_elbo(model, x, guide)).max() < 1e-3
