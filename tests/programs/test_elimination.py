"""Sums over discrete variables: against sums over all their values, written out."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch

from pyro_vae.programs.elimination import Factor, Variable, eliminate, to_plates


class Frame(NamedTuple):
    name: str


A, B, C = ("enum", 0), ("enum", 1), ("enum", 2)
INNER, DATA = ("plate", "inner"), ("plate", "data")


def tensor(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def variables(**frames):
    axes = {"a": A, "b": B, "c": C}
    return {
        axes[name]: Variable(name, axes[name], tuple(map(Frame, plates)))
        for name, plates in frames.items()
    }


def test_a_chain_is_the_sum_over_all_paths():
    """log of sum over a, b, c of exp(f(a) + g(a, b) + h(b, c))."""
    f, g, h = tensor(2), tensor(2, 3, seed=1), tensor(3, 4, seed=2)
    factors = [
        Factor((A,), f, frozenset("a")),
        Factor((A, B), g, frozenset("b")),
        Factor((B, C), h, frozenset("c")),
    ]
    (left,), _ = eliminate(factors, variables(a=(), b=(), c=()))
    paths = itertools.product(range(2), range(3), range(4))
    by_hand = torch.stack([f[i] + g[i, j] + h[j, k] for i, j, k in paths]).logsumexp(0)
    torch.testing.assert_close(left.tensor, by_hand)
    assert (left.axes, left.sites) == ((), frozenset("abc"))


def test_a_plate_is_a_product_inside_the_sum():
    """sum_a exp f(a) prod_i sum_b exp g(i, a, b)."""
    f, g = tensor(2), tensor(5, 2, 3, seed=1)
    factors = [Factor((A,), f, frozenset("a")), Factor((INNER, A, B), g, frozenset("b"))]
    (left,), _ = eliminate(factors, variables(a=(), b=("inner",)))
    by_hand = (f + g.logsumexp(-1).sum(0)).logsumexp(0)
    torch.testing.assert_close(left.tensor, by_hand)


def test_the_conditionals_are_those_of_the_joint():
    """p(b | a) and p(a), from the joint table."""
    joint = tensor(2, 3)
    _, tables = eliminate(
        [Factor((A, B), joint, frozenset("ab"))], variables(a=(), b=()), conditionals=True
    )
    (b, of_b), (a, of_a) = tables
    assert (a.name, b.name) == ("a", "b")
    torch.testing.assert_close(of_b.tensor, joint.log_softmax(1))
    torch.testing.assert_close(of_a.tensor, joint.logsumexp(1).log_softmax(0))


def test_what_is_impossible_has_density_zero_and_a_gradient_of_zero():
    f = torch.full((3,), -torch.inf, dtype=torch.float64, requires_grad=True)
    (left,), _ = eliminate([Factor((A,), f, frozenset("a"))], variables(a=()))
    assert left.tensor.item() == -torch.inf
    left.tensor.backward()
    assert f.grad.tolist() == [0.0, 0.0, 0.0]


def test_maxima_that_lie_apart_do_not_underflow():
    f, g = torch.tensor([0.0, -2000.0]).double(), torch.tensor([-2000.0, -1.0]).double()
    factors = [Factor((A,), f, frozenset("a")), Factor((A,), g, frozenset("b"))]
    (left,), _ = eliminate(factors, variables(a=()))
    assert left.tensor.item() == pytest.approx(-2000.0 + math.log1p(math.exp(-1.0)))


def test_plates_that_are_not_nested_are_refused():
    shared = Factor((A, B), tensor(2, 3), frozenset("x"))
    with pytest.raises(ValueError, match=r"'b' and 'a' lie in plates that are not nested.*\['x'\]"):
        eliminate([shared], variables(a=("rows",), b=("columns",)))


def test_groups_that_share_nothing_stay_apart():
    factors = [Factor((A,), tensor(2), frozenset("a")), Factor((B,), tensor(3), frozenset("b"))]
    left, _ = eliminate(factors, variables(a=(), b=()))
    assert sorted(sorted(factor.sites) for factor in left) == [["a"], ["b"]]


def test_a_factor_is_laid_out_as_its_plates_are():
    value = tensor(4, 2)
    factor = Factor((INNER, DATA), value, frozenset("x"))
    found = to_plates(factor, {DATA: -1, INNER: -3})
    assert found.shape == (4, 1, 2)
    torch.testing.assert_close(found.squeeze(1), value)
    assert to_plates(factor, {DATA: -3, INNER: -1}).shape == (2, 1, 4)
