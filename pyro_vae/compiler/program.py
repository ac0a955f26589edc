"""The Python function that a replay runs: a graph's operations, one a line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.compiler.nodes import args_of, base_of, is_real, layout, nodes_in, viewed_by
from pyro_vae.torch_internals import Operator, called_directly

_aten = torch.ops.aten
_OF_ONE = ("abs", "clamp_min", "exp", "log", "neg", "relu", "sigmoid", "sqrt", "tanh")
# Have a form that writes its result over the first argument.
_IN_PLACE: dict[object, Operator] = {
    **{getattr(_aten, n).default: getattr(_aten, f"{n}_").default for n in _OF_ONE},
    **{
        getattr(_aten, n).Tensor: getattr(_aten, f"{n}_").Tensor
        for n in ("add", "div", "mul", "sub")
    },
    _aten.mul.Scalar: _aten.mul_.Scalar,
    _aten.pow.Tensor_Scalar: _aten.pow_.Scalar,
}
_COMMUTE = {_aten.add.Tensor, _aten.mul.Tensor}


def in_place(graph: fx.Graph) -> dict[fx.Node, tuple[Operator, tuple[Any, ...]]]:
    """Return the operations that may write over an argument which no later one reads.

    Each with the operator and the arguments to call it with. Numbers stay in the cache, and the
    results are the same.
    """
    last_use: dict[object, int] = {}  # of a tensor's memory
    for i, node in enumerate(graph.nodes):
        last_use.update((base_of(used), i) for used in node.all_input_nodes)
    found = {}
    for i, node in enumerate(graph.nodes):
        orders = [args_of(node)] if node.target in _IN_PLACE else []
        # In half precision a scalar may round.
        if node.target in _COMMUTE and not node.kwargs and all(map(is_real, node.args)):
            orders.append(args_of(node)[::-1])
        for args in orders:
            if last_use.get(args[0]) == i and _is_free(args, node):
                found[node] = _IN_PLACE[node.target], args
                break
    return found


def _is_free(args: tuple[Any, ...], node: fx.Node) -> bool:
    """Return whether a call may write its result into the memory of its first argument."""
    first, *others = args
    if first.op != "call_function" or viewed_by(first) is not None:
        return False  # an input or a constant, or the memory of another
    used = nodes_in(tuple(others))
    return layout(first) == layout(node) and all(base_of(other) is not first for other in used)


def _text(names: dict[fx.Node, str], bound: dict[str, Any], value: object) -> str:
    """Return the source of an argument; an object that has none is bound to a name."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        inner = "".join(f"{_text(names, bound, item)}, " for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if value is None or type(value) in (bool, int):
        return repr(value)
    bound[name := f"c{len(bound)}"] = value
    return name


def program(graph: fx.Graph) -> Callable[..., Sequence[Tensor | None]]:
    """Return a Python function of a graph's operations, one a line.

    What torch.fx generates looks each operator up by its full name at each call, and calls it
    through two layers of Python: twice the time of small operations.
    """
    names = {node: f"v{i}" for i, node in enumerate(graph.nodes)}
    last_use = {used: node for node in graph.nodes for used in node.all_input_nodes}
    over = in_place(graph)
    bound: dict[str, Any] = {}
    parameters, lines = list[str](), list[str]()
    text = functools.partial(_text, names, bound)
    for node in graph.nodes:
        name = names[node]
        if node.op == "placeholder":
            parameters.append(name)
        elif node.op == "get_attr":
            bound[name] = node.meta["constant"]
        elif node.op == "output":
            lines.append(f"return {text(list(args_of(node)[0]))}")
        else:
            target, args = over.get(node, (node.target, args_of(node)))
            function = called_directly(target) if isinstance(target, Operator) else target
            arguments = [*map(text, args), *(f"{n}={text(v)}" for n, v in node.kwargs.items())]
            lines.append(f"{name} = {text(function)}({', '.join(arguments)})")
            # The memory of what is read no more is for the next operations.
            done = [names[used] for used in node.all_input_nodes if last_use[used] is node]
            if done := [name for name in done if name not in bound]:
                lines.append(f"del {', '.join(done)}")
    # Bound as defaults: a local variable is found faster than a global one.
    signature = ", ".join([*parameters, *(f"{name}={name}" for name in bound)])
    source = f"def run({signature}):\n" + "".join(f"    {line}\n" for line in lines)
    exec(compile(source, "<pyro_vae graph>", "exec"), bound)
    run: Callable[..., Sequence[Tensor | None]] = bound["run"]
    return run
