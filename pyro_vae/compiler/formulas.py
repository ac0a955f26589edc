"""A formula that compiled code does faster, in a copy of a graph for the compiler."""

from __future__ import annotations

import torch
from torch import fx

from pyro_vae.compiler.nodes import args_of, calls, is_real

_aten = torch.ops.aten


def for_compiler(graph: fx.Graph) -> fx.GraphModule:
    """Return a copy of a graph as a module, with a formula that compiled code does faster.

    Results are the same to rounding.
    """
    root, own, new = torch.nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    own.output(own.graph_copy(graph, new))
    for node in own.nodes:
        if node.op == "get_attr":
            setattr(root, node.target, node.meta["constant"])
    module = fx.GraphModule(root, own)
    for node in calls(module.graph):
        with module.graph.inserting_before(node):
            value = _sum_by_products(node)
        if value is not None:
            node.replace_all_uses_with(value)
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def _sum_by_products(node: fx.Node) -> fx.Node | None:
    r"""Take few logarithms in a sum of log densities of Bernoulli variables with given logits l.

    The sum of log(1 + exp(-|l|)) over a group is the logarithm of a product, and a logarithm
    costs more than all the rest:

    .. math:: \log p(x | l) = x l - \max(l, 0) - \log(1 + e^{-|l|})
    """
    loss, is_negative = _bernoulli_loss(node)
    if loss is None:
        return None
    logits, x = args_of(loss)[:2]
    shape = logits.meta["val"].shape
    groups = _num_factors(shape[-1]) if args_of(node)[1] in ([-1], [len(shape) - 1]) else 0
    if not groups:
        return None
    call = node.graph.call_function
    parts = [*shape[:-1], groups, shape[-1] // groups]
    size = call(_aten.neg.default, (call(_aten.abs.default, (logits,)),))
    factor = call(_aten.add.Tensor, (call(_aten.exp.default, (size,)), 1.0))
    factor = call(_aten.reshape.default, (factor, parts))
    logs = call(_aten.log.default, (call(_aten.prod.dim_int, (factor, len(shape) - 1)),))
    positive = call(_aten.clamp_min.default, (logits, 0.0))
    rest = call(_aten.sub.Tensor, (call(_aten.mul.Tensor, (x, logits)), positive))
    # In the products' order, so that both are one loop over the numbers.
    rest = call(_aten.sum.dim_IntList, (call(_aten.reshape.default, (rest, parts)), [-2]))
    value = call(_aten.sum.dim_IntList, (call(_aten.sub.Tensor, (rest, logs)), [-1]))
    return value if is_negative else call(_aten.neg.default, (value,))


def _bernoulli_loss(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """Return the binary cross entropy that a node sums, number by number, and whether negated."""
    if node.target is not _aten.sum.dim_IntList or len(node.args) != 2 or node.kwargs:
        return None, False
    source = args_of(node)[0]
    is_negative = source.target is _aten.neg.default
    loss = args_of(source)[0] if is_negative else source
    if loss.target is not _aten.binary_cross_entropy_with_logits.default or loss.kwargs:
        return None, False
    logits, _, *weights = args_of(loss)
    if weights not in ([None, None, 0],) or not is_real(logits):
        return None, False  # in half precision, products would overflow
    return loss, is_negative


def _num_factors(size: int) -> int:
    """Return how many factors to multiply before a logarithm; 0 where there is nothing to gain.

    Products of 64 numbers of at most two are far from overflow, and slices of a multiple of
    eight fill vectors.
    """
    able = [g for g in range(2, 65) if size % g == 0 and size // g >= 16]
    return max(able, key=lambda g: (size // g % 8 == 0, g), default=0)
