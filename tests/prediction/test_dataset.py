"""Names and labels of dimensions."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from tests.models import HierarchicalNormal, factor_analysis

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def test_names_and_labels():
    model = factor_analysis()
    x = torch.zeros(2, 6, dtype=torch.float64)
    coords = {"datum": ["a", "b"], "feature": list("uvwxyz")}
    found = pv.predict(
        model, model.posterior, x, num_draws=4, coords=coords, dims={"x": ["feature"]}, seed=0
    )
    assert found["x"].dims == ("draw", "datum", "feature")
    assert found["x_mean_se"].sel(datum="b", feature="w").shape == ()
    np.testing.assert_array_equal(found["draw"], np.arange(4))
    assert found["pareto_k"].sel(datum="a").shape == ()


def test_data_that_are_drawn_jointly_are_data_all_the_same():
    model = HierarchicalNormal()
    found = pv.predict(
        model, model.posterior, X, sites=["z", "mu"], num_draws=4, coords={"datum": list("abc")},
        seed=0,
    )  # fmt: skip
    assert found["z_mean"].dims == ("datum",) and found["mu"].dims == ("draw",)
    assert list(found["datum"].values) == list("abc")


def two_names(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("x_mean", dist.Normal(z, 1.0), obs=x)


def number_of_draw(x):
    with pyro.plate("data", len(x)):
        draw = pyro.sample("draw", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(draw, 1.0), obs=x)


@pytest.mark.parametrize(("model", "name"), [(two_names, "x_mean"), (number_of_draw, "draw")])
def test_two_things_of_one_name_are_refused(model, name):
    with pytest.raises(ValueError, match=rf"\['{name}'\] would name two things"):
        pv.generate(model, 3, like=X, seed=0)


@pytest.mark.parametrize("name", ["datum", "draw", "x", "x_mean", "pareto_k"])
def test_dimensions_with_the_name_of_something_else_are_refused(name):
    model, x = factor_analysis(), torch.zeros(6, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"\['{name}'\] would name two things"):
        pv.predict(model, model.posterior, x, num_draws=6, dims={"x": [name]}, seed=0)
