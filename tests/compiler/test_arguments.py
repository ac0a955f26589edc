"""Signatures of arguments: equal where one graph serves both, and tensors put back in order."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from pyro_vae.compiler.arguments import check_compile, form_of, layout_of, rebuilt


class Pair(NamedTuple):
    x: torch.Tensor
    scale: float


def form(value):
    return form_of(value, [])


def test_layouts_tell_apart_all_but_the_numbers():
    x = torch.zeros(2, 3)
    assert layout_of(x) == layout_of(torch.ones(2, 3))
    others = [x.double(), x.T.contiguous().T, x[:1], x.clone().requires_grad_(), x[None]]
    assert all(layout_of(other) != layout_of(x) for other in others)


def test_forms_are_of_layouts_and_plain_values():
    x = torch.zeros(2)
    assert form({"x": x, "n": 3}) == form({"x": x + 1, "n": 3})
    assert form((x, 1)) != form((x, 2))
    assert form((x, 1)) != form((x, 1.0))  # equal to Python, and another operation to torch
    assert form((x, 1)) != form([x, 1])
    assert form({"x": x}) != form({"y": x})


@pytest.mark.parametrize("value", [torch.zeros(2).to_sparse(), object(), {"x": object()}, [{1}]])
def test_what_no_graph_serves_has_none(value):
    assert form(value) is None


def test_tensors_are_collected_and_put_back_in_one_order():
    a, b, c = (torch.full((2,), float(i)) for i in range(3))
    value = {"pair": Pair(a, 0.5), "rest": [b, (c, "text")]}
    inputs = []
    form_of(value, inputs)
    assert [t is other for t, other in zip(inputs, (a, b, c), strict=True)] == [True] * 3
    again = rebuilt(value, iter([a + 10, b + 10, c + 10]))
    assert isinstance(again["pair"], Pair)
    assert again["pair"].scale == 0.5 and again["rest"][1][1] == "text"
    assert again["pair"].x.tolist() == [10.0, 10.0] and again["rest"][1][0].tolist() == [12.0] * 2


def test_other_values_can_be_replaced():
    found = rebuilt((1, [2.5, "a"]), iter("xy"), replaces=lambda value: isinstance(value, float))
    assert found == (1, ["x", "a"])


@pytest.mark.parametrize("compile", ["auto", "replay", True, False])
def test_ways_to_run(compile):
    check_compile(compile)


@pytest.mark.parametrize("compile", ["eager", None, 1])
def test_other_ways_are_refused(compile):
    with pytest.raises(ValueError, match=f"compile={compile!r}: 'auto', 'replay', True or False"):
        check_compile(compile)
