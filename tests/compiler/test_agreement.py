"""When a graph counts as right: by dtype, by order of sums, and where gradients vanish."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_vae.compiler.agreement import gradients_differ, losses_differ, numbers_agree, same_state

ONE = torch.tensor([1.0, -2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "exact", "inside", "outside"),
    [
        (torch.float64, True, 1e-11, 1e-9),
        (torch.float64, False, 1e-8, 1e-6),
        (torch.float32, True, 1e-6, 1e-4),
        (torch.float32, False, 1e-5, 1e-2),
    ],
)
def test_tolerances(dtype, exact, inside, outside):
    wanted = ONE.to(dtype)
    for gap, right in ((inside, True), (outside, False)):
        found = (ONE * (1 + gap)).to(dtype)
        assert numbers_agree([wanted], [found], [wanted], exact=exact) is right
        assert (losses_differ(wanted[0], found[0], exact=exact) is None) is right


def test_a_loss_of_float32_is_a_sum_and_is_told_from_one_of_another_weight():
    """Of 200 nats and a KL of 20: a weight of 0.51 in place of 0.50 is a thousandth of the loss."""
    loss, other = torch.tensor(200 + 0.50 * 20), torch.tensor(200 + 0.51 * 20)
    assert losses_differ(loss, other, exact=False) is not None
    assert losses_differ(loss, loss * (1 + 1e-5), exact=False) is None
    assert numbers_agree([loss], [other], [loss], exact=False)  # each number of many may round so
    torch.set_float32_matmul_precision("high")  # of products in TF32, a loss is as coarse
    try:
        assert losses_differ(loss, other, exact=False) is None
    finally:
        torch.set_float32_matmul_precision("highest")


def test_float64_made_of_float32_is_as_coarse():
    found = ONE * (1 + 1e-6)
    assert numbers_agree([ONE], [found], [ONE.float()], exact=True)
    assert not numbers_agree([ONE], [found], [ONE], exact=True)


def test_a_result_that_is_missing_does_not_agree():
    assert not numbers_agree([ONE], [None], [], exact=True)


def test_losses_that_are_not_finite_agree_with_one_another_alone():
    nan, infinite, one = (torch.tensor(x) for x in (math.nan, math.inf, 1.0))
    assert losses_differ(nan, infinite, exact=True) is None
    told = losses_differ(one, nan, exact=True)
    assert told == "its loss is nan, and 1 in an eager step"


def test_gradients_by_the_largest():
    """A gradient that vanishes counts as a thousandth of the largest, or of 1 + |loss|."""
    loss, large, none = torch.tensor(2.0).double(), 100 * ONE, torch.zeros(2).double()
    assert gradients_differ(loss, [large, none], [large, none + 1e-11], exact=True) is None
    told = gradients_differ(loss, [large, none], [large, none + 1e-9], exact=True)
    assert told == "the gradients of parameter 1, of shape (2,), differ by 1e-09"
    told = gradients_differ(loss, [large, None], [large, none], exact=True)
    assert told == "parameter 1 has a gradient in one and none in the other"
    broken = torch.tensor(math.nan)
    assert gradients_differ(broken, [large], [large + 1], exact=True) is None


def test_states():
    assert same_state([ONE, ONE * math.nan], [ONE + 1e-9, ONE * math.nan])
    assert not same_state([ONE], [ONE + 1e-3])
