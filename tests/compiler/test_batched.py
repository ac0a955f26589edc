"""A graph of several settings at once: the numbers of each alone, random ones included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_vae.compiler.batched import Batched
from pyro_vae.compiler.tracing import UntraceableError, trace

R = 3


def traced(function, *inputs):
    return trace(function, [tensor.clone() for tensor in inputs])


def test_each_setting_has_its_own_numbers():
    """Two own inputs and one in common; draws, dropout, and what is no result."""
    generator = torch.Generator().manual_seed(0)
    weights, x = (torch.randn(R, 4, 4, generator=generator) for _ in range(2))
    shift = torch.randn(4, generator=generator)

    def function(w, x, shift):
        hidden = nn.functional.dropout(torch.tanh(x @ w + shift), 0.5, training=True)
        return [(hidden + torch.randn(4, 4)).sum(), None, hidden.sum(0) * torch.rand(4)]

    graph = traced(function, weights[0], x[0], shift)
    batched = Batched(graph, frozenset({0, 1}), frozenset({1, 2}))
    noise, wanted = [], []
    for r in range(R):
        torch.manual_seed(r)
        noise.append(batched.draw({1: x[r], 2: shift}))
        after = torch.get_rng_state()
        torch.manual_seed(r)
        wanted.append(function(weights[r], x[r], shift))
        assert torch.equal(torch.get_rng_state(), after), "the stream goes on as it would"
    for _ in range(2):
        common = [torch.stack(same) for same in zip(*noise, strict=True)]
        total, nothing, sums = batched([weights, x, shift], common)
        assert nothing is None
        for r in range(R):
            torch.testing.assert_close(total[r], wanted[r][0])
            torch.testing.assert_close(sums[r], wanted[r][2])


def test_random_numbers_that_depend_on_a_setting_are_refused():
    def function(rate):
        return [torch.poisson(rate)]

    graph = traced(function, torch.ones(3))
    with pytest.raises(UntraceableError, match="drawn by what parameters say"):
        Batched(graph, frozenset({0}), frozenset())
    # Of a minibatch they are free to depend.
    batched = Batched(graph, frozenset({0}), frozenset({0}))
    torch.manual_seed(0)
    drawn = batched.draw({0: torch.full((3,), 5.0)})
    torch.manual_seed(0)
    assert torch.equal(drawn[0], torch.poisson(torch.full((3,), 5.0)))
