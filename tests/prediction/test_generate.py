"""Data that models make by themselves: their moments by algebra, and what a model must allow."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from tests.models import MEANS, WEIGHTS, GammaPoisson, HierarchicalNormal, NormalModel, mixture
from tests.prediction.test_predict import classes, is_right, regression

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def test_a_model_without_data():
    found = pv.generate(NormalModel(), 4000, seed=0)
    is_right(found, "x", 0.0, 2**0.5, 0.05)
    is_right(found, "z", 0.0, 1.0, 0.05)
    assert found["x"].dims == ("draw",) and found.sizes["draw"] == 4000
    assert abs(np.corrcoef(found["x"], found["z"])[0, 1] - 0.5**0.5) < 0.05


def test_observed_values_of_an_example_are_not_looked_at():
    """A rate of mean 2 and variance 2: counts of mean 2 and variance 4."""
    found = pv.generate(GammaPoisson(), 3000, like=1e6 + X.round(), sites="x", seed=0)
    is_right(found, "x", 2.0, 2.0, 0.08)
    assert set(found) == {"x", "x_mean", "x_mean_se", "x_sd"}


def test_covariates_of_an_example_are_taken_row_by_row():
    found = pv.generate(regression, 6, like=(X, X), sites=["y"], given={"slope": 3.0}, seed=0)
    assert (np.abs(found["y"] - 3 * X.repeat(2).numpy()) < 5 * 0.5).all()
    with pytest.raises(ValueError, match="more from its arguments than how many"):
        pv.generate(regression, 6, seed=0)


def test_each_draw_has_global_latents_of_its_own():
    """Unless they are given: x then varies about them by the width of a datum."""
    model = HierarchicalNormal()
    found = pv.generate(model, 800, seed=0)
    is_right(found, "mu", 0.0, 3.0, 0.1)
    is_right(found, "x", 0.0, 11**0.5, 0.1)
    assert len(np.unique(found["mu"])) == 800
    given = pv.generate(model, 4000, given={"mu": 1.0}, seed=0)
    is_right(given, "x", 1.0, 2**0.5, 0.05)
    assert "mu" not in given


def test_whole_data_sets():
    model = HierarchicalNormal()
    found = pv.generate(model, 500, like=X, data_plate=False, coords={"data": list("abc")}, seed=0)
    assert found["x"].dims == ("draw", "data") and found["mu"].dims == ("draw",)
    together = np.corrcoef(found["x"].values.T)[0, 1]
    assert abs(together - 9 / 11) < 0.1
    with pytest.raises(ValueError, match="nothing says of which size"):
        pv.generate(model, 5, data_plate=False)


def test_classes():
    found = pv.generate(mixture, 4000, seed=0)
    error = found["c_probability_se"].values
    assert (np.abs(found["c_probability"] - WEIGHTS.numpy()) < 5 * error).all() and (
        error > 0
    ).all()
    mean = float(WEIGHTS @ MEANS)
    is_right(found, "x", mean, (1 + float(WEIGHTS @ MEANS**2) - mean**2) ** 0.5, 0.05)
    made = pv.generate(classes, 20, seed=0)
    assert made["y_probability"].dims == ("y_class",) and "z_mean" in made


def test_masks_and_missing_values():
    def model(x, lengths):
        seen = torch.arange(3) < lengths.unsqueeze(-1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            normal = dist.Normal(z.unsqueeze(-1), torch.ones(3)).mask(seen)
            pyro.sample("x", normal.to_event(1), obs=x)

    found = pv.generate(model, 4, like=(torch.zeros(2, 3), torch.tensor([3, 1])), seed=0)
    gone = [[False] * 3, [False, True, True]] * 2
    assert (found["x"].isnull() == gone).all()
    x = torch.full((2,), torch.nan, dtype=torch.float64)
    assert pv.generate(pv.MissingData(NormalModel()), 5, like=x, seed=0)["x"].notnull().all()


def test_one_seed_and_the_state_outside():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (pv.generate(NormalModel(), 5, seed=1) for _ in range(2))
    assert one.equals(two) and torch.equal(before, torch.get_rng_state())
    assert not one.equals(pv.generate(NormalModel(), 5, seed=2))
    found = pv.generate(NormalModel(), 3, dims={"x": []}, coords={"draw": list("abc")}, seed=0)
    assert list(found["draw"].values) == list("abc")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_draws": 0}, "num_draws=0"),
        ({"sites": ["w"]}, r"draws no \['w'\]"),
        ({"sites": []}, "name some of"),
        ({"given": {"w": 1.0}}, r"no sites \['w'\]"),
        ({"coords": {"item": [1]}}, "coords names"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        pv.generate(NormalModel(), **options)


def test_a_factor_cannot_be_drawn():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", -z.square())

    with pytest.raises(ValueError, match="factor"):
        pv.generate(model, 3, like=X)


# --- names, shapes, and what is taken from arguments


def loadings(x):
    """A matrix shared by all data, and a number for each gene beside the data's own plate."""
    means = torch.tensor([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]])
    matrix = pyro.sample("matrix", dist.Normal(means, 0.01).to_event(2))
    with pyro.plate("gene", 3):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ matrix + shift, 1.0).to_event(1), obs=x)


def test_global_latents_keep_the_order_of_their_dimensions():
    found = pv.generate(loadings, 5, seed=0)
    means = [[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]
    np.testing.assert_allclose(found["matrix_mean"], means, atol=0.05)
    assert found["matrix"].dims == ("draw", "matrix_dim_0", "matrix_dim_1")
    assert found["shift"].dims == ("draw", "gene") and found["x"].shape == (5, 3)


def by_sign(x, c):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(torch.where(c > 0, z + 9, z - 9), 1.0), obs=x)


def by_own_sign(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.poutine.mask(mask=x > 0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("num_draws", [1, 7])
@pytest.mark.parametrize(("model", "site"), [(by_sign, "x"), (by_own_sign, "x")])
def test_values_that_nan_would_hide_need_an_example(model, site, num_draws):
    """A comparison with NaN is false, and all data would be on one side of it."""
    with pytest.raises(ValueError, match=rf"draws of '{site}' changes with their values.* like="):
        pv.generate(model, num_draws, seed=0)


def test_missing_data_need_no_example():
    found = pv.generate(pv.MissingData(NormalModel()), 2000, seed=0)
    is_right(found, "x", 0.0, 2**0.5, 0.05)


def test_one_draw_has_no_spread():
    found = pv.generate(NormalModel(), 1, seed=0)
    assert found["x_sd"].isnull() and found["x_mean_se"].isnull() and found["x"].notnull().all()
