"""Coordinates of a datum: where each site's lie, back to its support; moments to start from."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.guides.coordinates import (
    coordinates_of,
    middle_moments,
    normal_moments,
    prior_moments,
)
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.structure import ModelLooks
from tests.models import NormalModel, log_normal_model
from tests.runs import structure_of

X = torch.zeros(4, 3, dtype=torch.float64)


def model(x):
    """A share of three, a positive number in two inner entries, and a vector: 2 + 2 + 5 reals."""
    with pyro.plate("data", len(x), dim=-2):
        p = pyro.sample("p", dist.Dirichlet(x.new_ones(3)))
        with pyro.plate("inner", 2, dim=-1):
            pyro.sample("rate", dist.Gamma(x.new_ones(()), 1.0))
        pyro.sample("v", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(p, 1.0).to_event(1), obs=x.unsqueeze(1))


@pytest.fixture
def found():
    structure = structure_of(model, X, data_plate="data")
    return {one.name: one for one in coordinates_of(structure, "LocalGuide")}


def test_columns_lie_side_by_side_in_the_order_of_the_model(found):
    assert {name: (one.columns.start, one.columns.stop) for name, one in found.items()} == {
        "p": (0, 2),
        "rate": (2, 4),
        "v": (4, 9),
    }
    assert [found[name].is_identity for name in ("p", "rate", "v")] == [False, False, True]
    assert [found[name].is_plain for name in ("p", "rate", "v")] == [True, False, True]


def test_values_come_back(found):
    """Of three particles, by the maps of PyTorch."""
    values = {
        "p": dist.Dirichlet(torch.ones(3).double()).sample((3, 4, 1)),
        "rate": torch.rand(3, 4, 2).double() + 0.1,
        "v": torch.randn(3, 4, 1, 5).double(),
    }
    for name, value in values.items():
        one = found[name]
        rows = one.rows(one.unconstrained(values))
        assert rows.shape == (3, 4, one.columns.stop - one.columns.start)
        again = one.value(one.arrange(one.spread(rows)))
        torch.testing.assert_close(again, value)
    torch.testing.assert_close(
        found["rate"].rows(found["rate"].unconstrained(values)), values["rate"].log()
    )


def test_each_row_is_of_its_datum(found):
    """Inner entries of a datum lie in its own row."""
    value = torch.arange(24.0).reshape(3, 4, 2)
    assert torch.equal(found["rate"].rows(value), value)


def bounded(x):
    with pyro.plate("data", len(x)):
        low = torch.arange(4.0, dtype=x.dtype)
        pyro.sample("z", dist.Uniform(low, low + 1))
        pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)


def discrete(x):
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
        pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (bounded, "its support differs from datum to datum"),
        (discrete, r"no latent site is continuous, only latent site 'c' \(Bernoulli\): AGuide"),
    ],
)
def test_refusals(program, message):
    with pytest.raises(ValueError, match=message):
        coordinates_of(structure_of(program, X), "AGuide")


def test_light_tails_have_their_moments():
    rows = 2 + 3 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    mean, std = middle_moments(rows)
    assert torch.equal(mean, rows.mean(0)) and torch.equal(std, rows.std(0))


def test_heavy_tails_have_those_of_the_middle():
    """A Cauchy variable: median 5, and half the distance of its 16 % and 84 % quantiles, 1.82."""
    uniform = (torch.arange(9999, dtype=torch.float64) + 0.5) / 9999
    rows = 5 + torch.tan(math.pi * (uniform - 0.5)).unsqueeze(1)
    mean, std = middle_moments(rows)
    assert abs(mean.item() - 5) < 1e-2
    assert abs(std.item() - math.tan(math.pi * 0.34)) < 2e-2


def test_values_that_are_not_finite_count_for_nothing():
    rows = torch.cat([torch.full((10, 1), math.inf), torch.linspace(-1, 1, 100).unsqueeze(1)])
    mean, std = middle_moments(rows)
    assert abs(mean.item()) < 0.05 and abs(std.item() - 0.68) < 0.05


def test_half_precision():
    rows = torch.linspace(-1, 1, 101).unsqueeze(1).to(torch.bfloat16)
    mean, std = middle_moments(rows)
    assert mean.dtype == torch.bfloat16 and abs(float(std) - 0.58) < 0.02


def test_normals_are_read_off_where_they_are_alike():
    def node(loc, fn=dist.Normal):
        return {"fn": fn(torch.tensor([loc, 0.0]), 2.0).to_event(1)}

    loc, scale = normal_moments([node(1.0), node(1.0)])
    assert loc.tolist() == [1.0, 0.0] and scale.tolist() == [2.0, 2.0]
    assert normal_moments([node(1.0), node(2.0)]) is None
    assert normal_moments([node(1.0, dist.Laplace)]) is None


def of_prior(model, x):
    looks = ModelLooks(model, as_batch(x))
    structure = looks.structure()
    return prior_moments(looks, structure, coordinates_of(structure, "a guide"))


def test_the_prior_in_unconstrained_coordinates():
    """Of z ~ Normal(0, 1), and of log s for s ~ LogNormal(0, 1): 0 and 1 to 1000 draws a datum."""
    state = torch.get_rng_state()
    for model in (NormalModel(), log_normal_model):
        mean, std = of_prior(model, torch.ones(20, dtype=torch.float64))
        assert mean.shape == std.shape == (1,)
        assert abs(mean.item()) < 0.15 and abs(std.item() - 1) < 0.15
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_are_where_a_dtype_tells_values_apart_no_more(found, dtype):
    """A logit near 1: log(1 / eps) to rounding; a logarithm near 0: that of the smallest float."""
    like = torch.zeros(1, dtype=dtype)
    info = torch.finfo(dtype)
    low, high = found["rate"].edges(like)
    assert low.shape == (2,)
    torch.testing.assert_close(low.max().item(), math.log(info.tiny), rtol=1e-3, atol=0)
    assert (high > 88).all()
    low, high = found["p"].edges(like)
    assert low.shape == (2,) and (low < -15).all()
    assert high.min().item() == pytest.approx(-math.log(info.eps), abs=1.0)
    low, high = found["v"].edges(like)
    assert low.tolist() == [-math.inf] * 5 and high.tolist() == [math.inf] * 5
