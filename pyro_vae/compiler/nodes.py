"""The nodes of a traced graph: which it may hold, which are inputs, and what is known of each."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from pyro_vae.recording import SILENTLY_WRITTEN, writes_to_arguments

__all__ = [
    "ChangingShapesError",
    "base_of",
    "calls",
    "check",
    "is_real",
    "key_of",
    "lift",
    "text_of",
    "viewed_by",
    "waits",
    "written_inputs",
    "written_nodes",
]

_aten = torch.ops.aten
# Share memory with their input, though their schemas do not say so.
_SILENT_VIEWS = {_aten._unsafe_view.default, _aten.lift_fresh.default}


# Read numbers of a tensor on their way, without saying so.
_WAITING = {_aten.multinomial.default, _aten._linalg_check_errors.default}
_PUTS = {_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class ChangingShapesError(RuntimeError):
    """An operation's result has a shape that depends on the numbers in its input."""


def check(graph: fx.Graph) -> None:
    """Raise ChangingShapesError for shapes that depend on numbers: a graph has but one shape."""
    for node in calls(graph):
        if node.target is _aten.index.Tensor:
            masks = [i for i in node.args[1] if i is not None and _is_mask(i)]
            if not masks:
                continue
        elif torch.Tag.dynamic_output_shape not in node.target.tags:
            continue
        raise ChangingShapesError(
            f"the shape of what {node.target} returns depends on the numbers in its input"
        )


def waits(graph: fx.Graph) -> bool:
    """Whether an operation waits for its device: to check numbers, or to count those of a mask."""
    return any(
        node.target in _WAITING
        or (node.target in _PUTS and any(i is not None and _is_mask(i) for i in node.args[1]))
        for node in calls(graph)
    )


def _is_mask(node: Any) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


def lift(traced: fx.GraphModule) -> tuple[fx.Graph, list[Tensor]]:
    """Make inputs of the tensors that a traced function found outside of its arguments.

    Returns:
        The graph, whose first inputs they are, and these tensors. Those that the function made
        itself (torch.tensor(3.0)) are constants of the graph.
    """
    made = {
        node.args[0]
        for node in traced.graph.nodes
        if node.target in (_aten.lift_fresh_copy.default, _aten.lift_fresh.default)
    }
    graph, live = fx.Graph(), list[Tensor]()
    lifted: dict[int, Any] = {}
    new: dict[Any, Any] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node not in made:
            tensor = getattr(traced, node.target)
            if id(tensor) not in lifted:
                lifted[id(tensor)] = graph.placeholder(f"live{len(live)}")
                lifted[id(tensor)].meta["val"] = tensor.detach()
                live.append(tensor)
            new[node] = lifted[id(tensor)]
    for node in traced.graph.nodes:
        if node in new:
            continue
        new[node] = graph.node_copy(node, lambda old: new[old])
        if node.op == "get_attr":
            new[node].meta["constant"] = getattr(traced, node.target)
            new[node].meta["val"] = new[node].meta["constant"]
    return graph, live


def written_inputs(graph: fx.Graph) -> list[int]:
    """Return the inputs, by their number, whose memory the graph writes to."""
    written = written_nodes(graph)
    inputs = (node for node in graph.nodes if node.op == "placeholder")
    return [i for i, node in enumerate(inputs) if node in written]


def text_of(graph: fx.Graph) -> tuple[Any, ...]:
    """Return all that a graph says, constants included: equal for graphs that do the same."""
    index = {node: i for i, node in enumerate(graph.nodes)}

    def told(node: Any) -> Any:
        if (constant := node.meta.get("constant")) is not None:
            # A clone has strides of its own: those of an expanded tensor are zero.
            flat = constant.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
            numbers = flat.view(torch.uint8).numpy().tobytes()
            return constant.shape, constant.stride(), constant.dtype, constant.device, numbers
        if node.op == "placeholder":
            return node.op
        named = fx.node.map_arg((node.args, node.kwargs), lambda n: ("node", index[n]))
        return node.target, key_of((named[0], tuple(sorted(named[1].items()))))

    return tuple(told(node) for node in graph.nodes)


def key_of(value: Any) -> Any:
    """Return what tells an argument from others, also those that Python calls equal to it."""
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(key_of, value))
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # 0.0 == -0.0
    return type(value), value


def calls(graph: fx.Graph) -> Iterator[Any]:
    """Return the calls of operators that a graph has now: it may be changed on the way."""
    return (
        node
        for node in list(graph.nodes)
        if node.op == "call_function" and isinstance(node.target, OpOverload)
    )


def base_of(node: Any) -> Any:
    """Return the node whose memory a view is a view of; a node that is no view, itself."""
    while (source := viewed_by(node)) is not None:
        node = source
    return node


def viewed_by(node: Any) -> Any:
    """Return what a node is a view of; None for one with memory of its own."""
    if node.target is operator.getitem:
        return node.args[0]
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    returns = node.target._schema.returns
    shares = node.target in _SILENT_VIEWS or any(r.alias_info is not None for r in returns)
    first = node.args[0] if node.args else None
    return first if shares and isinstance(first, fx.Node) else None


def written_nodes(graph: fx.Graph) -> set[Any]:
    """Return the nodes whose memory some operation writes to."""
    found = set[Any]()
    for node in calls(graph):
        schema = node.target._schema
        if not writes_to_arguments(node.target):
            continue
        named = {
            argument.name: value
            for argument, value in zip(schema.arguments, node.args, strict=False)
        }
        named.update(node.kwargs)
        for argument in schema.arguments:
            told = argument.alias_info is not None and argument.alias_info.is_write
            if not told and argument.name not in SILENTLY_WRITTEN:
                continue
            value = named.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            found.update(base_of(v) for v in values if isinstance(v, fx.Node))
    return found


def is_real(node: Any) -> bool:
    """Whether a tensor's numbers are float32 or float64, of which the rules are known."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)
