"""The Python function that a replay runs: a graph's operations, one a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.compiler.nodes import args_of, base_of, is_real, layout, nodes_in, viewed_by
from pyro_vae.torch_internals import Operator, called_directly

_aten = torch.ops.aten
# Have a form that writes its result over the first argument.
_IN_PLACE: dict[object, Operator] = {
    _aten.abs.default: _aten.abs_.default,
    _aten.add.Tensor: _aten.add_.Tensor,
    _aten.clamp_min.default: _aten.clamp_min_.default,
    _aten.div.Tensor: _aten.div_.Tensor,
    _aten.exp.default: _aten.exp_.default,
    _aten.log.default: _aten.log_.default,
    _aten.mul.Scalar: _aten.mul_.Scalar,
    _aten.mul.Tensor: _aten.mul_.Tensor,
    _aten.neg.default: _aten.neg_.default,
    _aten.pow.Tensor_Scalar: _aten.pow_.Scalar,
    _aten.relu.default: _aten.relu_.default,
    _aten.sigmoid.default: _aten.sigmoid_.default,
    _aten.sqrt.default: _aten.sqrt_.default,
    _aten.sub.Tensor: _aten.sub_.Tensor,
    _aten.tanh.default: _aten.tanh_.default,
}
_COMMUTE = {_aten.add.Tensor, _aten.mul.Tensor}


def in_place(graph: fx.Graph) -> dict[fx.Node, tuple[Operator, tuple[Any, ...]]]:
    """Return the operations that may write over an argument which no later one reads.

    Each with the operator and the arguments to call it with. Numbers stay in the cache, and the
    results are the same.
    """
    last_use: dict[fx.Node, int] = {}  # of a tensor's memory
    for i, node in enumerate(graph.nodes):
        last_use.update((base_of(used), i) for used in node.all_input_nodes)
    found = {}
    for i, node in enumerate(graph.nodes):
        for args in _orders(node):
            is_last = isinstance(args[0], fx.Node) and last_use.get(args[0]) == i
            if is_last and _is_free(args, node):
                found[node] = _IN_PLACE[node.target], args
                break
    return found


def _orders(node: fx.Node) -> list[tuple[Any, ...]]:
    """Return the orders of its arguments in which a call can be written over the first."""
    if node.target not in _IN_PLACE:
        return []
    orders = [args_of(node)]
    # In half precision a scalar may round.
    if node.target in _COMMUTE and not node.kwargs and all(map(is_real, node.args)):
        orders.append(args_of(node)[::-1])
    return orders


def _is_free(args: tuple[Any, ...], node: fx.Node) -> bool:
    """Return whether a call may write its result into the memory of its first argument."""
    first, *others = args
    if first.op != "call_function" or viewed_by(first) is not None:
        return False  # an input or a constant, or the memory of another
    return layout(first) == layout(node) and all(
        base_of(other) is not first for other in nodes_in(tuple(others))
    )


def program(graph: fx.Graph) -> Callable[..., Sequence[Tensor | None]]:
    """Return a Python function of a graph's operations, one a line.

    What torch.fx generates looks each operator up by its full name at each call, and calls it
    through two layers of Python: twice the time of small operations.
    """
    return _Writer(graph).compiled()


class _Writer:
    """Writes the source of a graph's function, and keeps the objects that it names."""

    def __init__(self, graph: fx.Graph) -> None:
        self._names = {node: f"v{i}" for i, node in enumerate(graph.nodes)}
        self._last_use = {n: node for node in graph.nodes for n in node.all_input_nodes}
        self._in_place = in_place(graph)
        self._bound: dict[str, Any] = {}
        self._parameters: list[str] = []
        self._lines: list[str] = []
        for node in graph.nodes:
            self._write(node)

    def compiled(self) -> Callable[..., Sequence[Tensor | None]]:
        """Return the function."""
        # Bound as defaults: a local variable is found faster than a global one.
        signature = ", ".join([*self._parameters, *(f"{name}={name}" for name in self._bound)])
        source = f"def run({signature}):\n" + "\n".join(self._lines) + "\n"
        exec(compile(source, "<pyro_vae graph>", "exec"), self._bound)
        run: Callable[..., Sequence[Tensor | None]] = self._bound["run"]
        return run

    def _write(self, node: fx.Node) -> None:
        """Write the line of a node, and bind what it names."""
        name = self._names[node]
        if node.op == "placeholder":
            self._parameters.append(name)
        elif node.op == "get_attr":
            self._bound[name] = node.meta["constant"]
        elif node.op == "output":
            self._lines.append(f"    return {self._text(list(args_of(node)[0]))}")
        else:
            self._lines.append(f"    {name} = {self._call(node)}")
            self._delete(node)

    def _call(self, node: fx.Node) -> str:
        """Return the source of a call, in place where its first argument is free."""
        target: Any = node.target
        target, args = self._in_place.get(node, (target, args_of(node)))
        operator = called_directly(target) if isinstance(target, Operator) else target
        arguments = [self._text(argument) for argument in args]
        arguments += [f"{name}={self._text(value)}" for name, value in node.kwargs.items()]
        return f"{self._bind(operator)}({', '.join(arguments)})"

    def _delete(self, node: fx.Node) -> None:
        """Free what is read no more: its memory is for the next operations."""
        done = [self._names[n] for n in node.all_input_nodes if self._last_use[n] is node]
        if done := [name for name in done if name not in self._bound]:
            self._lines.append(f"    del {', '.join(done)}")

    def _bind(self, value: object) -> str:
        """Return a name for an object that has no source text."""
        name = f"c{len(self._bound)}"
        self._bound[name] = value
        return name

    def _text(self, value: object) -> str:
        """Return the source of an argument."""
        if isinstance(value, fx.Node):
            return self._names[value]
        if isinstance(value, (list, tuple)):
            inner = "".join(f"{self._text(item)}, " for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        return repr(value) if value is None or type(value) in (bool, int) else self._bind(value)
