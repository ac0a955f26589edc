"""Traces: which of their terms are not finite, and what a guide must be to its model."""

from __future__ import annotations

import re

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.traces import non_finite_sites
from tests.models import factor_analysis


def test_non_finite_sites_are_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z / 0, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert non_finite_sites(model, guide, as_batch(torch.zeros(2))) == ["'x' of the model"]


# --- what a guide must be to its model: the same sites, events and no factors


@pytest.fixture
def exact():
    model = factor_analysis()
    torch.manual_seed(1)
    return model, model.data(7)


def guide_with(*names):
    def guide(x):
        with pyro.plate("data", len(x)):
            for name in names:
                pyro.sample(name, dist.Normal(x.new_zeros(3), 1.0).to_event(1))

    return guide


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "the guide has no sample statement for the model's latent sites ['z']; it has []"),
        (("z", "u"), "the guide samples ['u'], which the model does not"),
        (("z", "x"), "the guide proposes ['x'], which the model observes"),
    ],
)
def test_a_guide_of_other_sites_is_refused(exact, names, message):
    model, x = exact
    with pytest.raises(ValueError, match=re.escape(message)):
        pv.log_weights(model, guide_with(*names), x, num_particles=2)


def test_another_event_dimension_in_the_guide_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.unsqueeze(1), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"'z' has 0 event dimensions .* 1 in the guide"):
        pv.log_weights(model, guide, torch.zeros(4, 3), num_particles=2, data_plate="data")


def test_a_factor_in_the_guide_is_refused():
    model = factor_analysis()

    def guide(x):
        model.posterior(x)
        with pyro.plate("more", len(x)):
            pyro.factor("adjust", torch.ones(len(x)), has_rsample=True)

    with pytest.raises(ValueError, match=r"pyro.factor statements \['adjust'\]"):
        pv.log_weights(model, guide, model.data(3), num_particles=2)
