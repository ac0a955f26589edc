"""Coordinates of a datum: where each site's lie, and back to its shape and support."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.guides.coordinates import coordinates_of
from pyro_vae.programs.structure import inspect

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
    structure = inspect(model, X, data_plate="data")
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
        coordinates_of(inspect(program, X), "AGuide")
