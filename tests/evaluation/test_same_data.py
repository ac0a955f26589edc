"""Models whose log p(x) do not compare are refused by name."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evaluation.same_data import check_same_data
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.structure import ModelLooks

X = torch.arange(12.0).reshape(4, 3)


def observing(likelihood=dist.Normal, name="x", of=lambda x: x, mask=None):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)).unsqueeze(-1)
            value = of(x)
            if likelihood is dist.Poisson:
                fn = dist.Poisson((0.1 * z).exp().expand(*z.shape[:-1], value.shape[-1]))
            else:
                fn = likelihood(z.expand(*z.shape[:-1], value.shape[-1]), 1.0)
            fn = fn if mask is None else fn.mask(mask)
            pyro.sample(name, fn.to_event(1), obs=value)

    return model


def check(**models):
    looks = {name: ModelLooks(model, as_batch(X)) for name, model in models.items()}
    check_same_data({name: look.structure() for name, look in looks.items()})


def inner_plate(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("features", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def in_two(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("first", dist.Normal(z, 1.0), obs=x[:, 0])
        pyro.sample("others", dist.Normal(z.unsqueeze(-1), x.new_ones(2)).to_event(1), obs=x[:, 1:])


def with_factor(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.factor("x", -((x.sum(-1) - z) ** 2))


@pytest.mark.parametrize(
    "other",
    [
        observing(),
        observing(dist.Laplace),
        observing(name="y"),
        observing(of=lambda x: x.double()),
        inner_plate,
    ],
    ids=["itself", "another density", "another name", "another dtype", "an inner plate"],
)
def test_takes_models_of_the_same_values(other):
    check(one=observing(), other=other)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (observing(of=lambda x: x / 16), "in other units"),
        (observing(of=lambda x: x[:, :2]), r"have shapes \[4, 3\] and \[4, 2\]"),
        (observing(dist.Poisson), "Normal, a density of continuous values.*Poisson, a probability"),
        (observing(mask=torch.tensor([True, True, False])), "leave out other values"),
        (in_two, r"observes 'x' \[4, 3\] and .* 'first' \[4\], 'others' \[4, 2\]"),
        (observing(name="y", of=lambda x: 2 * x), r"not the same values of each datum"),
        (with_factor, "pyro.factor 'x' does not say of what"),
    ],
    ids=["units", "shape", "discrete", "mask", "sites", "name and units", "factor"],
)
def test_refuses_others(other, says):
    with pytest.raises(ValueError, match=says):
        check(one=observing(), other=other)


def test_refuses_another_number_of_data():
    looks = {
        "rows": ModelLooks(observing(), as_batch(X)).structure(),
        "whole": ModelLooks(observing(), as_batch(X)).structure(False),
    }
    with pytest.raises(ValueError, match="sees 4 data in this batch and .* 1"):
        check_same_data(looks)


def test_missing_values_must_be_the_same():
    missing = X.clone()
    missing[1, 2] = math.nan
    models = {"left out": pv.MissingData(observing()), "again": pv.MissingData(observing())}
    looks = {n: ModelLooks(m, as_batch(missing)).structure() for n, m in models.items()}
    check_same_data(looks)
    more = pv.MissingData(observing(mask=torch.tensor([True, True, False])))
    looks["one more"] = ModelLooks(more, as_batch(missing)).structure()
    with pytest.raises(ValueError, match="leave out other values"):
        check_same_data(looks)


def test_what_a_density_in_other_units_would_do():
    """The refusal is of something: the same model of x / 16 gains log 16 for each number."""
    x, z = X.numpy().ravel(), np.random.default_rng(0).normal(size=12)

    def density(value, mean, scale):
        return -0.5 * ((value - mean) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))

    gain = density(x / 16, z / 16, 1 / 16) - density(x, z, 1.0)
    np.testing.assert_allclose(gain, math.log(16))
