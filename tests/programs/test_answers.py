"""What a pair says of each datum: the same for the same draws, in any order of the data."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.programs.answers import Answers, agree, largest_gap
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.sites import Plate
from pyro_vae.programs.traces import ReplaceDraws, trace_guide, trace_model
from tests.models import NormalModel

X = torch.tensor([0.3, -1.1, 2.0, 0.8], dtype=torch.float64)
INDEX = torch.tensor([2, 0, 3])
PLATE = Plate("data", -1, 4, 4)


def compared(model, guide):
    """Whose answers differ, by terms and by gradients."""
    with ReplaceDraws(torch.Tensor.detach):  # gradients by parameters at given draws
        guide_trace = trace_guide(guide, as_batch(X))
    model_trace = trace_model(model, guide_trace, as_batch(X))
    whole = Answers.of(model_trace, guide_trace, PLATE, 4)
    part = whole.given(model, guide, as_batch(X[INDEX]), INDEX)
    return whole.differs(part, INDEX), whole


def encoded(scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * scale, 0.7))

    return guide


def test_terms_are_the_log_densities_of_each_datum():
    model, guide = NormalModel(), encoded(torch.tensor(0.4, requires_grad=True))
    role, whole = compared(model, guide)
    assert role is None
    z = whole.draws["z"][0]["value"].detach()
    again = whole.given(model, guide, as_batch(X), torch.arange(4))
    assert not again.draws["z"][0]["value"].requires_grad
    found = whole.terms["guide"]["log density of z"]
    torch.testing.assert_close(found, dist.Normal(0.4 * X, 0.7).log_prob(z))
    torch.testing.assert_close(
        whole.terms["model"]["log density of x"], dist.Normal(z, 1.0).log_prob(X)
    )
    assert whole.sizes == {4}
    assert whole.run.sites["x"].plates == (PLATE,)


def test_a_table_by_place_is_found_by_its_terms():
    table = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(table[: len(x)], 0.7))

    assert compared(NormalModel(), guide)[0] == "guide"


def test_a_table_of_equal_rows_is_found_by_its_gradients():
    table = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(table[: len(x)], 0.7))

    assert compared(NormalModel(), guide)[0] == "guide"


def test_a_model_that_closes_over_its_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[: len(x)])

    assert compared(model, encoded(0.4))[0] == "model"


# --- equal to rounding


def test_rounding_is_that_of_the_reference():
    one = torch.tensor([1.0, -300.0])
    assert agree(one, one * (1 + 1e-5))
    assert not agree(one.double(), one.double() * (1 + 1e-5))
    assert agree(one.double(), one.double() * (1 + 1e-10))


def test_nan_equals_nan_and_nothing_else():
    one = torch.tensor([math.nan, math.inf, 0.0])
    assert agree(one, one.clone())
    assert not agree(one, torch.tensor([0.0, math.inf, 0.0]))
    assert not agree(one, torch.tensor([math.nan, -math.inf, 0.0]))


def test_shapes_and_whole_numbers_are_exact():
    assert not agree(torch.zeros(2), torch.zeros(1, 2))
    assert not agree(torch.tensor([10**6]), torch.tensor([10**6 + 1]))


def test_the_gap_is_the_largest_beyond_rounding():
    one, other = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0 + 1e-6, 1.25])
    assert largest_gap(one, other) == pytest.approx(1.0)  # of 1e-6, 0.25, 1 and 0.75
    assert largest_gap(one, one + 1e-6) == 0.0
