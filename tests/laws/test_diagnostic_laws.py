"""Laws of diagnostics over the data, for every reference model with its guide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_vae as pv
from tests.laws.registry import ENTRIES, FAMILIES, KINDS, every_model, pair


def measured(name, function, family=None, *, missing=False, **options):
    model, guide, batch = pair(name, family, missing=missing)
    args = (dict(batch.kwargs),) if batch.kwargs else batch.args
    return function(model, guide, *args, seed=0, **options)


def check(name, **options):
    """Rates of units sum to those of sites, these to the rate; with the distortion: -ELBO."""
    found = measured(name, pv.rate_distortion, num_particles=4, **options).dataset
    bound = measured(name, pv.elbo, num_particles=4, **options)
    np.testing.assert_allclose(found["code_length"], -bound.value, atol=1e-10)
    lengths = found["rate"] + found["distortion"]
    np.testing.assert_allclose(lengths, found["code_length"], atol=1e-10)
    np.testing.assert_allclose(found["site_rate"].sum("site"), found["rate"], atol=1e-10)
    for site in found["site"].values:
        units = found["unit_rate"].values[:, found["site_of"].values == site]
        np.testing.assert_allclose(units.sum(1), found["site_rate"].sel(site=site), atol=1e-10)
    return found


@every_model
def test_rates_sum_to_the_code_length(name):
    found = check(name)
    assert (found["num_dimensions"] > 0).all()


@pytest.mark.parametrize("family", ["full rank", "flow"])
@pytest.mark.parametrize("name", KINDS)
def test_rates_of_joint_families(name, family):
    check(name, family=FAMILIES[family])


@pytest.mark.parametrize("name", ["Bernoulli VAE", "deep Markov model"])
def test_missing_numbers_are_not_counted(name):
    whole, holes = check(name)["num_dimensions"], check(name, missing=True)["num_dimensions"]
    assert (whole - holes).values.tolist() == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "deep Markov model"])
def test_calibration_of_every_model(name):
    """20 simulations each of 6 rows' covariates: every site that the guide proposes has ranks."""
    few = {"num_simulations": 20, "num_draws": 19}
    data = measured(name, pv.sbc, **few).dataset
    assert (data["ranks"] >= 0).all() and (data["ranks"] <= 19).all()
    assert data["p_value"].notnull().all()
    rates = measured(name, pv.rate_distortion, num_particles=2).dataset
    assert set(data["site_of"].values) - {""} == set(rates["site"].values)
    covered = measured(name, pv.coverage, **few).dataset
    assert covered["p_value"].notnull().all()


def test_calibration_of_a_sequence_by_its_dream():
    """Steps are sites of their own, of one argument: the dream puts them together."""
    batch = pair("deep Markov model")[2]
    length = batch.args[1][torch.arange(20) % len(batch.args[1])]

    def dream(drawn):
        return torch.stack([drawn[f"x_{t}"] for t in (1, 2, 3)], 1), length

    found = measured("deep Markov model", pv.sbc, num_simulations=20, num_draws=19, dream=dream)
    counts = found.dataset["num_ranks"].to_series()
    assert counts["z_1[0]"] == 20
    assert counts["z_3[0]"] == int((length == 3).sum()) < 20
