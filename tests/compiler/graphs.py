"""Graphs for the tests: traced and compared with the function to the last bit; what they hold."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.compiler import graph as graphs
from pyro_vae.compiler.tracing import trace

aten = torch.ops.aten


def data(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def operators(graph: graphs.Graph) -> list[str]:
    """The operators that a replay calls, in their order, without the namespace."""
    return [
        str(node.target).removeprefix("aten.")
        for node in graph._graph.nodes
        if node.op == "call_function"
    ]


def live(graph: graphs.Graph) -> list[int]:
    return [id(tensor) for tensor in graph._live]


def equal(found, wanted) -> None:
    """To the last bit."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if other is None:
            assert one is None
            continue
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)


def checked(function, *inputs: Tensor, others=()) -> graphs.Graph:
    """Trace a function, and compare replays with it on its inputs and on others."""
    graph = trace(function, inputs)
    for given in (inputs, *others):
        torch.manual_seed(3)
        wanted = [None if t is None else t.clone() for t in function(*given)]
        state = torch.get_rng_state()
        torch.manual_seed(3)
        found = graph(*given)
        assert torch.equal(torch.get_rng_state(), state)
        equal(found, wanted)
        equal(found, wanted)
    return graph


def scaled(parameter: Tensor, factor: float):
    def function(x: Tensor) -> list[Tensor]:
        return [(x * parameter).sum() * factor + torch.tensor(factor, dtype=x.dtype)]

    return function
