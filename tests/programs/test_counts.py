"""Whole numbers among the arguments: 1e3 is 1000 everywhere, or refused in one sentence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.programs.counts import as_count
from tests.models import factor_analysis


@pytest.mark.parametrize("value", [1000, 1e3, np.int64(1000), np.float32(1000), torch.tensor(1000)])
def test_a_whole_number_of_any_type_is_an_int(value):
    found = as_count("num_particles", value)
    assert found == 1000 and type(found) is int


@pytest.mark.parametrize("value", [0, -3, 2.5, math.nan, math.inf, "7", True, None, torch.ones(2)])
def test_what_is_none_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^num_draws=.*: a whole number of at least 1 is needed$"):
        as_count("num_draws", value)


def test_counts_written_as_floats_give_the_same_numbers():
    model = factor_analysis()
    x = model.data(3)
    guide = model.posterior
    for function in (pv.elbo, pv.iwae_bound):
        one, other = (function(model, guide, x, num_particles=k, seed=0) for k in (40, 4e1))
        assert torch.equal(one.value, other.value) and one.name == other.name
    weights = pv.log_weights(model, guide, x, num_particles=4e1, chunk_size=1e1, seed=0)
    assert weights.total.shape == (40, 3)
    compared = pv.compare(model, {"exact": guide}, x, num_particles=4e1, seed=0).dataset
    assert compared.attrs["log_evidence_from"] == "IWAE-40 through 'exact'"
    assert pv.to_arviz(model, guide, x, num_draws=1e1, seed=0)["posterior"].sizes["draw"] == 10
    assert pv.IWAE(1e1).loss(model, guide, x) == pytest.approx(pv.IWAE(10).loss(model, guide, x))
    local = pv.LocalGuide(model, num_data=3.0, example=x, family=pv.families.LowRankNormal(1.0))
    assert pv.refine(model, local, x, max_steps=1e1, seed=0).table.shape[0] == 3
    fitted = pv.fit(model, local, x, batch_size=2.0, epochs=1e0, max_steps=2.0, progress=False)
    assert fitted.steps == 2
