"""Observed values: inside their support, of the likelihood's shape."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from tests.runs import structure_of


def bernoulli(x, validate_args=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z, validate_args=validate_args), obs=x)


def test_data_outside_the_support_are_refused_with_their_rows():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Binomial(16, logits=z.unsqueeze(-1)).to_event(1), obs=x)

    x = torch.zeros(6, 2)
    x[1, 0], x[4, 1] = 17, 0.5
    with pytest.raises(ValueError, match=r"'x'.*Binomial.*\(0, 16\).*rows 1, 4 \(2 of 6\)"):
        structure_of(model, x)


def test_masked_values_may_lie_outside_the_support():
    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Bernoulli(logits=z), obs=x)

    x = torch.tensor([0.0, 1.0, 9.0])
    structure_of(model, x, torch.tensor([True, True, False]))
    with pytest.raises(ValueError, match="rows 2"):
        structure_of(model, x, torch.tensor([True, True, True]))


def test_deterministic_sites_are_no_observations():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert list(structure_of(model, torch.zeros(2)).sites) == ["z", "x"]


@pytest.mark.parametrize("columns", [1, 4])
def test_observed_values_of_another_shape_are_refused(columns):
    """One column would be broadcast, and silently count three times."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    structure_of(model, torch.zeros(5, 3))
    message = rf"'x': its value has shape \[5, {columns}\], but its Normal likelihood .* \[5, 3\]"
    with pytest.raises(ValueError, match=message):
        structure_of(model, torch.zeros(5, columns))


def test_values_are_looked_at_where_a_library_switched_validation_off():
    """As zuko does for the whole process when it is imported."""
    x = torch.tensor([0.0, 9.0])
    before = torch.distributions.Distribution._validate_args
    try:
        torch.distributions.Distribution.set_default_validate_args(False)
        with pytest.raises(ValueError, match="rows 1"):
            structure_of(bernoulli, x)
        structure_of(functools.partial(bernoulli, validate_args=False), x)
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)
    with pytest.raises(ValueError, match="rows 1"):
        structure_of(bernoulli, x)
    structure_of(functools.partial(bernoulli, validate_args=False), x)


@pytest.mark.parametrize("of", ["latent", "likelihood"])
def test_a_column_beside_values_is_refused(of):
    """[N, 1] and [N] make [N, N], and each datum counts N times: by name, as Pyro does."""
    x, column = torch.linspace(-1, 1, 6), torch.zeros(6, 1)

    def model(x, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c if of == "latent" else 0 * x, 1.0))
            pyro.sample("x", dist.Normal(z + c, 0.5), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + (c if of == "latent" else 0), 1.0))

    with pytest.raises(ValueError, match="invalid log_prob shape"):
        pyro.infer.Trace_ELBO().loss(model, guide, x, column)
    for refuses in (
        lambda: pv.ELBO().loss(model, guide, x, column),
        lambda: pv.IWAE(3).loss(model, guide, x, column),
        lambda: pv.elbo(model, guide, (x, column), num_particles=2),
        lambda: pv.describe(model, (x, column)),
        lambda: pv.LocalGuide(model, num_data=6, example=(x, column)),
    ):
        with pytest.raises(ValueError, match=r"'x'.*dim -2 is in no plate.*count 6 times"):
            refuses()
    pv.elbo(model, guide, (x, column.squeeze(-1)), num_particles=2)
