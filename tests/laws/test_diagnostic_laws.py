"""Laws of diagnostics over the data, for every reference model with its guide."""

from __future__ import annotations

import numpy as np
import pytest

import pyro_vae as pv
from tests.laws.registry import FAMILIES, KINDS, every_model, pair


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
