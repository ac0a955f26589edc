"""The nodes of a traced graph: which it may hold, which are inputs, and what is known of each."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae import torch_internals
from pyro_vae.torch_internals import Operator

_aten = torch.ops.aten
LIFTS: set[object] = {_aten.lift_fresh_copy.default, _aten.lift_fresh.default}
# Take nothing of their tensors but shape and kind.
LIKE: set[object] = {
    *(_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default),
    *(_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default),
}
# Share memory with their input, though their schemas do not say so.
_SILENT_VIEWS: set[object] = {torch_internals.UNSAFE_VIEW, _aten.lift_fresh.default}
# Read numbers of a tensor on the host, though their tags do not say so.
_WAITING = {_aten.multinomial.default, torch_internals.LINALG_CHECK}
_PUTS = {_aten.index_put.default, _aten.index_put_.default, torch_internals.PUT_UNCHECKED}


# --- one node


def value_of(node: object) -> Tensor | None:
    """Return the tensor that a node stood for in the trace; None for several, or for none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def constant_of(node: object) -> Tensor | None:
    """Return the tensor of a node that is the same whenever the graph runs; None for others."""
    constant: Tensor | None = node.meta.get("constant") if isinstance(node, fx.Node) else None
    return constant


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """Return the positional arguments of a call, whose types its operator says."""
    return node.args


def nodes_in(arguments: object) -> list[fx.Node]:
    """Return the nodes among the arguments of a call, those in lists too."""
    found: list[fx.Node] = []
    given: Any = arguments
    fx.node.map_arg(given, found.append)
    return found


def layout(node: object) -> tuple[torch.Size, tuple[int, ...], torch.dtype] | None:
    """Return how a node's numbers lie in memory: shape, strides and dtype."""
    value = value_of(node)
    return None if value is None else (value.shape, value.stride(), value.dtype)


def is_real(node: object) -> bool:
    """Return whether a node's numbers are float32 or float64, whose rounding IEEE 754 fixes."""
    value = value_of(node)
    return value is not None and value.dtype in (torch.float32, torch.float64)


def key_of(value: object) -> Hashable:
    """Return what tells an argument from others, those too that Python calls equal to it."""
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(key_of, value))
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # 0.0 == -0.0
    return type(value), value


# --- memory


def base_of(node: fx.Node) -> fx.Node:
    """Return the node whose memory a view shows; a node that is no view, itself."""
    while (source := viewed_by(node)) is not None:
        node = source
    return node


def viewed_by(node: fx.Node) -> fx.Node | None:
    """Return the node that another one is a view of; None for one with memory of its own."""
    target = node.target
    is_view = target in _SILENT_VIEWS or target is operator.getitem
    is_view = is_view or (isinstance(target, Operator) and torch_internals.shares_memory(target))
    first = node.args[0] if is_view and node.args else None
    return first if isinstance(first, fx.Node) else None


def written_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose memory some operation writes to."""
    found = set[fx.Node]()
    for node in calls(graph):
        target: Any = node.target
        written = torch_internals.written_values(target, node.args, node.kwargs, silently=True)
        found.update(map(base_of, nodes_in(tuple(written))))
    return found


def is_written(nodes: Iterable[fx.Node], written: set[fx.Node]) -> bool:
    """Return whether the memory of one of some nodes is among that of the written ones."""
    return any(base_of(node) in written for node in nodes)


def written_inputs(graph: fx.Graph) -> list[int]:
    """Return the inputs, by their number, whose memory the graph writes to."""
    written = written_nodes(graph)
    inputs = (node for node in graph.nodes if node.op == "placeholder")
    return [i for i, node in enumerate(inputs) if node in written]


# --- the graph


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """Return the calls of operators that a graph has now; it may be changed on the way."""
    nodes = list(graph.nodes)
    return (n for n in nodes if n.op == "call_function" and isinstance(n.target, Operator))


def waits(graph: fx.Graph) -> bool:
    """Return whether an operation makes the host wait for its device, to read numbers."""
    return any(
        node.target in _WAITING or (node.target in _PUTS and has_mask(args_of(node)[1]))
        for node in calls(graph)
    )


def has_mask(indices: Iterable[object]) -> bool:
    """Return whether one of some indices is a mask, of which the True are counted."""
    values = (value_of(index) for index in indices)
    return any(value is not None and value.dtype in (torch.bool, torch.uint8) for value in values)


def lift(traced: fx.GraphModule) -> tuple[fx.Graph, list[Tensor]]:
    """Make inputs of the tensors that a traced function found outside of its arguments.

    Returns:
        The graph, whose first inputs they are, and these tensors. Those that the function made
        itself (torch.tensor(3.0)) are constants of the graph.
    """
    made = {node.args[0] for node in traced.graph.nodes if node.target in LIFTS}
    graph, live = fx.Graph(), list[Tensor]()
    lifted, new = dict[int, fx.Node](), dict[fx.Node, fx.Node]()
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node not in made:
            tensor = getattr(traced, node.target)
            if id(tensor) not in lifted:
                lifted[id(tensor)] = graph.placeholder(f"live{len(live)}")
                lifted[id(tensor)].meta["val"] = tensor.detach()
                live.append(tensor)
            new[node] = lifted[id(tensor)]
    for node in traced.graph.nodes:
        if node not in new:
            new[node] = graph.node_copy(node, new.__getitem__)
            if node.op == "get_attr":
                constant = getattr(traced, node.target)
                new[node].meta.update(constant=constant, val=constant)
    return graph, live


def text_of(graph: fx.Graph) -> tuple[Hashable, ...]:
    """Return all that a graph says, constants included: equal for graphs that do the same."""
    index = {node: i for i, node in enumerate(graph.nodes)}

    def text(node: fx.Node) -> Hashable:
        """Return what tells a node from others: numbers, or operator and arguments."""
        if (constant := constant_of(node)) is not None:
            # A clone has strides of its own: those of an expanded tensor are zero.
            own = constant.detach().cpu().clone(memory_format=torch.contiguous_format)
            numbers = own.reshape(-1).view(torch.uint8).numpy().tobytes()
            return constant.shape, constant.stride(), constant.dtype, constant.device, numbers
        if node.op == "placeholder":
            return node.op
        arguments: Any = (node.args, sorted(node.kwargs.items()))
        named: Any = fx.node.map_arg(arguments, lambda n: ("node", index[n]))
        return node.target, key_of(named)

    return tuple(map(text, graph.nodes))
