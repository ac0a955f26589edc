"""What a trace's sample statements are, through wrappers, masks and plates."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_vae.programs.nodes import (
    batch_nesting,
    drawn_subsamples,
    guide_factors,
    is_circular,
    is_enumerable,
    is_point,
    latent_nodes,
    left_out,
    plain_distribution,
    sample_nodes,
)

CPU = torch.device("cpu")


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as index, pyro.plate("inner", 3, dim=-4):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])
    pyro.factor("tilt", torch.zeros(()))


def test_subsamples_are_no_sites():
    trace = poutine.trace(model).get_trace(torch.zeros(5))
    assert [name for name, _ in sample_nodes(trace)] == ["mu", "z", "twice", "x", "tilt"]
    assert [name for name, _ in latent_nodes(trace)] == ["mu", "z"]
    assert guide_factors(trace) == ["tilt"]


def test_nesting_is_that_of_the_outermost_plate():
    assert batch_nesting(poutine.trace(model).get_trace(torch.zeros(5))) == 4
    wide = poutine.trace(lambda: pyro.sample("w", dist.Normal(torch.zeros(2, 1, 3), 1.0)))
    assert batch_nesting(wide.get_trace()) == 3


def test_subsamples_that_are_drawn_and_given():
    with drawn_subsamples() as drawn:
        model(torch.zeros(5))
    assert drawn == {"data"}
    given = poutine.trace(model).get_trace(torch.zeros(5))
    with drawn_subsamples() as drawn:
        poutine.replay(model, trace=given)(torch.zeros(5))
    assert drawn == set()


def test_wrappers_are_looked_through():
    normal = dist.Normal(torch.zeros(2, 3), 1.0)
    wrapped = normal.to_event(1).mask(torch.tensor([True, False]))
    assert plain_distribution(wrapped) is normal
    assert type(plain_distribution(wrapped.expand([4, 2]))) is dist.Normal
    assert not is_point(wrapped)
    assert is_point(dist.Delta(torch.zeros(2, 3)).to_event(1).mask(True))
    assert is_circular(dist.VonMises(0.0, 1.0).expand([3]).to_event(1))


@pytest.mark.parametrize(
    ("fn", "listed"),
    [
        (dist.Categorical(torch.ones(3)), True),
        (dist.Bernoulli(0.5).expand([2]).mask(False), True),
        (dist.Binomial(4, 0.5), True),
        (dist.Binomial(torch.tensor([4.0, 5.0]), 0.5), False),  # of different totals
        (dist.Poisson(1.0), False),
        (dist.Empirical(torch.zeros(2), torch.zeros(2)), False),
    ],
)
def test_whose_values_can_be_listed(fn, listed):
    assert is_enumerable(fn) is listed


def test_values_that_masks_leave_out():
    """A mask on the statement, and one inside the distribution below an event dimension."""
    inner = torch.tensor([[True, True, False], [True, True, True]])
    fn = dist.Normal(torch.zeros(2, 3), 1.0).mask(inner).to_event(1)
    found = left_out(fn, torch.tensor([True, False]), CPU)
    assert found.tolist() == [[False, False, True], [True, True, True]]
    assert not left_out(fn.base_dist.base_dist, None, CPU).any()
