"""Equality of log densities to rounding."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_vae.programs.agreement import agree, largest_gap


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
