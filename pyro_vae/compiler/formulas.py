"""Formulas that compiled code does faster, in a copy of a graph for the compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pyro_vae.compiler.nodes import calls, is_real

__all__ = ["for_compiler"]

_aten = torch.ops.aten


def for_compiler(graph: fx.Graph) -> fx.GraphModule:
    """Return a copy of a graph as a module, with formulas that compiled code does faster.

    Results are the same to rounding.
    """
    root, own, new = torch.nn.Module(), fx.Graph(), dict[Any, Any]()
    own.output(own.graph_copy(graph, new))
    for node in own.nodes:
        if node.op == "get_attr":
            setattr(root, node.target, node.meta["constant"])
    module = fx.GraphModule(root, own)
    for node in calls(module.graph):
        _add_bias_last(module.graph, node)
        _sum_by_products(module.graph, node)
    module.graph.lint()
    module.recompile()
    return module


def _add_bias_last(graph: fx.Graph, node: Any) -> None:
    """Add a bias where a product is used: addmm writes it all over its result before it begins."""
    if node.target is not _aten.addmm.default or len(node.args) != 3 or node.kwargs:
        return
    bias, left, right = node.args
    if not is_real(node) or bias.meta["val"].ndim != 1:
        return
    with graph.inserting_before(node):
        product = graph.call_function(_aten.mm.default, (left, right))
        value = graph.call_function(_aten.add.Tensor, (product, bias))
    for new in (product, value):
        new.meta.update(node.meta)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _sum_by_products(graph: fx.Graph, node: Any) -> None:
    r"""Take few logarithms in a sum of log densities of Bernoulli variables with given logits l.

    The sum of log(1 + exp(-|l|)) over a group is the logarithm of a product, and a logarithm
    costs more than all the rest:

    .. math:: \log p(x | l) = x l - \max(l, 0) - \log(1 + e^{-|l|})
    """
    if node.target is not _aten.sum.dim_IntList or len(node.args) != 2 or node.kwargs:
        return
    source: Any = node.args[0]
    dims = node.args[1]
    negative = isinstance(source, fx.Node) and source.target is _aten.neg.default
    loss: Any = source.args[0] if negative else source
    if (
        not isinstance(loss, fx.Node)
        or loss.target is not _aten.binary_cross_entropy_with_logits.default
        or any(used is not None for used in loss.args[2:4])
        or loss.args[4:] != (0,)
        or loss.kwargs
    ):
        return
    logits: Any = loss.args[0]
    x = loss.args[1]
    if not is_real(logits):
        return  # products would overflow
    shape = logits.meta["val"].shape
    groups = _groups(shape[-1]) if dims in ([-1], [len(shape) - 1]) else 0
    if not groups:
        return

    def call(target: Any, *args: Any) -> Any:
        return graph.call_function(target, args)

    with graph.inserting_before(node):
        parts = [*shape[:-1], groups, shape[-1] // groups]
        factor = call(_aten.exp.default, call(_aten.neg.default, call(_aten.abs.default, logits)))
        factor = call(_aten.reshape.default, call(_aten.add.Tensor, factor, 1.0), parts)
        logs = call(_aten.log.default, call(_aten.prod.dim_int, factor, len(shape) - 1))
        rest = call(_aten.mul.Tensor, x, logits)
        rest = call(_aten.sub.Tensor, rest, call(_aten.clamp_min.default, logits, 0.0))
        # In the products' order, so that both are one loop over the numbers.
        rest = call(_aten.sum.dim_IntList, call(_aten.reshape.default, rest, parts), [-2])
        value = call(_aten.sum.dim_IntList, call(_aten.sub.Tensor, rest, logs), [-1])
        if not negative:
            value = call(_aten.neg.default, value)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _groups(size: int) -> int:
    """Return how many factors to multiply before a logarithm; 0 where there is nothing to gain.

    Products of 64 numbers of at most two are far from overflow, and slices of a multiple of
    eight fill vectors.
    """
    able = [g for g in range(2, 65) if size % g == 0 and size // g >= 16]
    return max(able, key=lambda g: (size // g % 8 == 0, g), default=0)
