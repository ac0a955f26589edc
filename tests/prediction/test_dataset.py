"""Names and labels of dimensions."""

from __future__ import annotations

import numpy as np
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
