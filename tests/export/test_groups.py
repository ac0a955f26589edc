"""The groups of blocks of data: log densities by PyTorch, coordinates, names, what masks hide."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td

import pyro_vae as pv
from pyro_vae.export.groups import joined
from tests.arviz_calls import groups


def model(x):
    """Every kind of support, one latent under another, in an inner plate and out of it."""
    with pyro.plate("data", len(x), dim=-2):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
        share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
        pyro.sample("turn", dist.VonMises(x.new_zeros(()), 1.0))
        with pyro.plate("inner", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(rate.log(), 1.0))
            unit = pyro.sample("unit", dist.Beta(x.new_tensor(2.0), 3.0))
            pyro.sample("x", dist.Normal(z * unit + share[..., 0], 0.5), obs=x)


@pytest.fixture(scope="module")
def made():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, dtype=torch.float64, generator=generator)
    guide = pv.LocalGuide(model, num_data=4, example=x, data_plate="data")
    return x, pv.to_arviz(model, guide, x, num_draws=6, data_plate="data", seed=0)


def of(tree, group):
    return {name: torch.tensor(v.values[0]) for name, v in tree[group].data_vars.items()}


def test_log_densities_are_pytorchs(made):
    x, tree = made
    draws, log_prior = of(tree, "posterior"), of(tree, "log_prior")
    rate = draws["rate"][..., 0]  # batch dimensions [N, 1]
    wanted = {
        "rate": td.Gamma(2.0, 1.0).log_prob(rate),
        "share": td.Dirichlet(torch.ones(3).double()).log_prob(draws["share"][:, :, 0]),
        "turn": td.VonMises(0.0, 1.0).log_prob(draws["turn"][..., 0]),
        "z": td.Normal(rate.log()[..., None], 1.0).log_prob(draws["z"]).sum(-1),
        "unit": td.Beta(2.0, 3.0).log_prob(draws["unit"]).sum(-1),
    }
    assert set(log_prior) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(log_prior[name], value.double())
        assert tree["log_prior"][name].dims == ("chain", "draw", "datum")
    mean = draws["z"] * draws["unit"] + draws["share"][..., 0]
    seen = td.Normal(mean, 0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(of(tree, "log_likelihood")["x"], seen)
    total = sum(log_prior.values()) + seen
    torch.testing.assert_close(of(tree, "sample_stats")["log_p"], total)


def test_coordinates_map_back_to_the_posterior(made):
    _, tree = made
    draws, found = of(tree, "posterior"), of(tree, "unconstrained_posterior")
    assert set(found) == {"rate", "share", "turn", "unit"}
    torch.testing.assert_close(found["rate"].exp(), draws["rate"])
    torch.testing.assert_close(found["unit"].sigmoid(), draws["unit"])
    torch.testing.assert_close(td.StickBreakingTransform()(found["share"]), draws["share"])
    names = {name: v.dims[2:] for name, v in tree["unconstrained_posterior"].data_vars.items()}
    assert names["unit"] == ("datum", "inner")
    assert names["share"] == ("datum", "share_dim_0", "share_coordinate_0")
    assert tree["posterior"]["share"].dims[2:] == ("datum", "share_dim_0", "share_dim_1")


def test_of_one_datum_terms_stand_for_each_entry():
    def pooled(x):
        scale = pyro.sample("scale", dist.HalfNormal(x.new_tensor(2.0)))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    guide = pv.LocalGuide(pooled, num_data=1, example=x, data_plate=False)
    tree = pv.to_arviz(pooled, guide, x, data_plate=False, num_draws=5, seed=0)
    draws, log_prior = of(tree, "posterior"), of(tree, "log_prior")
    assert tree["log_prior"]["scale"].dims == ("chain", "draw")
    assert tree["log_prior"]["z"].dims == ("chain", "draw", "rows")
    torch.testing.assert_close(log_prior["scale"], td.HalfNormal(2.0).log_prob(draws["scale"]))
    wanted = td.Normal(0.0, draws["scale"][:, None]).log_prob(draws["z"])
    torch.testing.assert_close(log_prior["z"], wanted)
    torch.testing.assert_close(of(tree, "unconstrained_posterior")["scale"].exp(), draws["scale"])


def test_what_a_mask_leaves_out_is_hidden():
    """A simplex has one coordinate less than values, and both are NaN where it is not there."""

    def masked(x, there):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=there):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(len(x), 3)))
            pyro.sample("x", dist.Normal(p[..., 0], 1.0), obs=x)

    x, there = torch.randn(4), torch.tensor([True, False, True, True])
    guide = pv.LocalGuide(masked, num_data=4, example=(x, there))
    tree = pv.to_arviz(masked, guide, x, there, num_draws=5, seed=0)
    for group in ("posterior", "unconstrained_posterior", "prior"):
        gone = np.isnan(tree[group]["p"].values).any((0, 1, 3))
        np.testing.assert_array_equal(gone, ~there.numpy())
    assert (tree["log_prior"]["p"].values[:, :, 1] == 0).all()


def test_a_support_that_differs_between_data_has_no_coordinates():
    def model(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Uniform(x.new_zeros(()), 1 + x.abs()))
            n = pyro.sample("n", dist.Poisson(x.new_ones(len(x))))
            pyro.sample("x", dist.Normal(u + n, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Uniform(x.new_zeros(()), 1 + x.abs()))
            pyro.sample("n", dist.Poisson(x.new_ones(len(x))))

    tree = pv.to_arviz(model, guide, torch.tensor([0.0, 2.0]), num_draws=3, seed=0)
    assert "unconstrained_posterior" not in groups(tree)
    assert set(tree["log_prior"].data_vars) == {"u", "n"}


def test_blocks_are_joined_along_the_data():
    blocks = [{"posterior": {"z": np.full((1, 2, n), n), "all": np.zeros((1, 2))}} for n in (2, 3)]
    found = joined(blocks, {"all"})["posterior"]
    assert found["z"].shape == (1, 2, 5) and found["all"].shape == (1, 2)
    assert found["z"][0, 0].tolist() == [2, 2, 3, 3, 3]


def test_the_datum_comes_first_where_an_inner_plate_stands_outside():
    def outside(x):
        with pyro.plate("inner", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.LogNormal(x.new_zeros(2, len(x)), 1.0))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x.expand(2, -1))

    x = torch.randn(3, dtype=torch.float64)
    guide = pv.LocalGuide(outside, num_data=3, example=x, data_plate="data")
    tree = pv.to_arviz(outside, guide, x, num_draws=5, data_plate="data", seed=0)
    assert tree["unconstrained_posterior"]["u"].dims == ("chain", "draw", "datum", "inner")
    found = of(tree, "unconstrained_posterior")["u"]
    torch.testing.assert_close(found.exp(), of(tree, "posterior")["u"])
