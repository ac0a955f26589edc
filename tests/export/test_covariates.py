"""Arguments that are not observed: in constant_data, by their names, and no others."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.export.covariates import covariates
from pyro_vae.particles.evaluator import prepare


def regression(x, u, *, scale=1.0):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + u.sum(-1), scale), obs=x)


def guide(x, *others, **named):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


TABLE = torch.arange(20.0).reshape(5, 4)
X, U = TABLE[:, 0], TABLE[:, 1:3]  # columns of one table share their memory


def found(model, *batch, taken=(), guide=guide, **options):
    return covariates(prepare(model, guide, batch, None, options.get("data_plate"), 0)[0], taken)


def test_in_constant_data_with_dims_and_coords(tmp_path):
    coords = {"datum": list("abcde"), "feature": ["age", "dose"]}
    options = {"dims": {"u": ["feature"]}, "coords": coords, "num_draws": 3, "seed": 0}
    for file in (None, tmp_path / "posterior.nc"):
        tree = pv.to_arviz(regression, guide, X, U, file=file, **options)
        u = tree["constant_data"]["u"]
        assert u.dims == ("datum", "feature")
        np.testing.assert_array_equal(u.sel(feature="dose"), U[:, 1])
        assert "x" not in tree["constant_data"] and "pareto_k" in tree["constant_data"]
    plain = pv.to_arviz(regression, guide, X, U, num_draws=3, seed=0)["constant_data"]["u"]
    assert plain.dims == ("datum", "u_dim_0")


def test_keywords_numbers_and_modules():
    class Module(nn.Module):
        def forward(self, x, u, *, scale=1.0):
            return regression(x, u, scale=scale)

    for model in (regression, Module(), pv.MissingData(regression)):
        names = found(model, {"x": X, "u": U, "scale": 2.0})
        assert list(names) == ["u", "scale"] and names["scale"] == 2
        assert list(found(model, X, U)) == ["u"]
    assert list(found(regression, X, U, taken=["u"])) == ["argument_u"]


def test_arguments_without_a_name():
    assert list(found(lambda *args: regression(*args), X, U)) == ["argument_1"]


def test_observed_arguments_are_left_out():
    def two(table, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample(
                "x", dist.Normal(z.unsqueeze(-1), torch.ones(4)).to_event(1), obs=table[:, :4]
            )
            pyro.sample("y", dist.Bernoulli(logits=z), obs=y.float())

    wide = torch.arange(30.0).reshape(5, 6)  # of which columns are observed
    assert found(two, wide, torch.tensor([0, 1, 0, 1, 1])) == {}


def test_missing_data_and_their_mask():
    x = X.clone()
    x[1] = torch.nan
    assert list(found(pv.MissingData(regression), x, U)) == ["u"]
    model, mask = pv.MissingData(regression, mask="mask", values="x"), torch.tensor([True] * 5)
    mask[2] = False
    names = found(model, {"x": X, "u": U, "mask": mask})
    assert list(names) == ["u", "mask"]
    np.testing.assert_array_equal(names["mask"], mask)


def test_as_one_datum():
    tree = pv.to_arviz(regression, guide, X, U, num_draws=3, data_plate=False, seed=0)
    assert tree["constant_data"]["u"].dims == ("u_dim_0", "u_dim_1")


def test_names_that_do_not_fit():
    with pytest.raises(ValueError, match=r"dims\['u'\]=\['a', 'b'\]: 1 names are needed"):
        pv.to_arviz(regression, guide, X, U, num_draws=3, dims={"u": ["a", "b"]}, seed=0)
    with pytest.raises(ValueError, match="dims names"):
        pv.to_arviz(regression, guide, X, U, num_draws=3, dims={"v": ["a"]}, seed=0)


def test_an_argument_with_the_name_of_a_site():
    """dims speaks of the site where there is one."""

    def scaled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1), obs=x / 10)

    tree = pv.to_arviz(scaled, guide, U, num_draws=3, dims={"x": ["feature"]}, seed=0)
    assert tree["observed_data"]["x"].dims == ("datum", "feature")
    np.testing.assert_array_equal(tree["constant_data"]["x"], U)
