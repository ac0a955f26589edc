"""Nodes of graphs: the text by which compiled code is found."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from pyro_vae.compiler import nodes as graph_nodes
from pyro_vae.compiler.tracing import trace
from tests.compiler.graphs import data, scaled


def test_equal_graphs_have_one_text():
    """The same operations on other tensors of the same kind."""
    one, other = (trace(scaled(data(4, seed=i), 2.0), [data(3, 4)]) for i in (1, 2))
    assert graph_nodes.text_of(one._graph) == graph_nodes.text_of(other._graph)


@pytest.mark.parametrize(
    "function",
    [
        scaled(data(4, seed=1), 3.0),
        lambda x: [(x * x).sum() * 2.0 + torch.tensor(2.0, dtype=x.dtype)],
        lambda x: [x.sum() * 2.0 + torch.tensor(2.0, dtype=x.dtype)],
    ],
)
def test_other_graphs_have_another_text(function):
    wanted = graph_nodes.text_of(trace(scaled(data(4, seed=1), 2.0), [data(3, 4)])._graph)
    assert graph_nodes.text_of(trace(function, [data(3, 4)])._graph) != wanted


def test_what_differs_in_a_constant_alone():
    def added(numbers: list[float]):
        return lambda x: [x + torch.tensor(numbers, dtype=x.dtype)]

    one, other = (trace(added([1.0, last]), [data(2)]) for last in (0.0, -0.0))
    assert graph_nodes.text_of(one._graph) != graph_nodes.text_of(other._graph)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.bfloat16])
def test_constants_of_any_layout_have_a_text(shape, dtype):
    for value in (0, 1):
        constant = torch.full((), value, dtype=dtype).expand(shape)
        one, other = fx.Graph(), fx.Graph()
        for graph, number in ((one, constant), (other, constant.clone())):
            graph.get_attr("constant").meta["constant"] = number
        same = constant.stride() == constant.clone().stride()
        assert (graph_nodes.text_of(one) == graph_nodes.text_of(other)) == same
