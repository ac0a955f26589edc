"""The function of a replay: results written over what no later operation reads."""

from __future__ import annotations

import pytest
import torch

from pyro_vae.compiler.program import in_place
from tests.compiler.graphs import checked, data


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: [(x + 1).exp().neg()], 2),
        (lambda x: [(1 - (x + 1).tanh()) * x], 2),
        (lambda x: [x * (x + 1)], 1),  # over its second argument
        (lambda x: [x - (x + 1)], 0),
        (lambda x: [(y := x + 1).exp(), y], 0),
        (lambda x: [(y := x + 1).exp() * y], 1),
        (lambda x: [(y := x + 1) - y.T], 0),
        (lambda x: [(y := x + 1) - y], 0),
        (lambda x: [(v := (y := x + 1).T), y.exp(), v * 2], 0),
        (lambda x: [(x + 1)[0].exp()], 0),
        (lambda x: [(x + 1)[:, :1] * x], 0),
        (lambda x: [x.sum(0) + (x + 1)], 1),
        (lambda x: [torch.tensor(3.0, dtype=x.dtype).exp() * x], 0),
        (lambda x: [x.long().mul(2).div(3)], 1),
        (lambda x: [(x + 1).mul(2.0).pow(2), x.add(x + 1, alpha=3)], 1),  # which is one x + 1
    ],
)
def test_in_place(function, count):
    """Where the argument is the function's own, whole, and not looked at again."""
    x = data(3, 3)
    before = x.clone()
    graph = checked(function, x, others=[(data(3, 3, seed=1),)])
    assert torch.equal(x, before)
    assert len(in_place(graph._graph)) == count
