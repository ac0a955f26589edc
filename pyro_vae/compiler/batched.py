"""A graph for several settings of its inputs at once, each with random numbers of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae import torch_internals
from pyro_vae.compiler import nodes
from pyro_vae.compiler.graph import Graph
from pyro_vae.compiler.tracing import UntraceableError, trace


class Batched:
    """A graph of R settings of some inputs, by torch.func.vmap; others are common to all.

    Random numbers are drawn before, setting by setting, each by the random state of its own, in the
    order of the graph: they are those that the graph of one setting would draw.

    Args:
        graph: of one setting.
        own: the numbers of the inputs, live tensors first, that have a setting each.

    Raises:
        UntraceableError: where random numbers depend on inputs other than ``free`` ones, or an
            operation has no rule for several at once.
    """

    def __init__(self, graph: Graph, own: frozenset[int], free: frozenset[int]) -> None:
        self._graph, _ = graph.operations
        self._own = own
        self._inputs = [node for node in self._graph.nodes if node.op == "placeholder"]
        self._free = {self._inputs[number] for number in free}
        self._random = [n for n in self._graph.nodes if _is_random(n)]
        self._needed = self._ancestors()
        self._output = next(node for node in self._graph.nodes if node.op == "output")
        self._given = [result is not None for result in self._output.args[0]]
        self._run: Graph | None = None

    def _ancestors(self) -> set[fx.Node]:
        """Return what the random numbers are drawn from."""
        found: set[fx.Node] = set()
        waiting = [a for node in self._random for a in node.all_input_nodes if not _is_empty(a)]
        while waiting:
            node = waiting.pop()
            if node in found or node in self._random:
                continue
            found.add(node)
            if node.op == "placeholder" and node not in self._free:
                raise UntraceableError("random numbers are drawn by what parameters say")
            waiting += node.all_input_nodes
        return found

    def draw(self, inputs: Mapping[int, Tensor]) -> list[Tensor]:
        """Return the random numbers of a setting, by the global random state.

        Args:
            inputs: the free ones, by their numbers.
        """
        found = {self._inputs[number]: tensor for number, tensor in inputs.items()}
        drawn = []
        for node in self._graph.nodes:
            if node in self._needed and node.op != "placeholder":
                found[node] = _called(node, found)
            elif node in self._random:
                for argument in node.all_input_nodes:
                    if _is_empty(argument):  # which a draw fills
                        found[argument] = _memory_like(argument)
                found[node] = _called(node, found)
                drawn.append(found[node])
        return drawn

    def __call__(self, inputs: Sequence[Tensor], noise: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the results, [R, ...] each.

        Args:
            inputs: all inputs; those with a setting each [R, ...].
            noise: the random numbers, [R, ...] each; they may be written over.
        """
        if self._run is None:
            axes = tuple(0 if i in self._own else None for i in range(len(inputs)))
            together = torch.func.vmap(self._one, (axes, 0 if noise else None))
            count = len(inputs)

            def function(*tensors: Tensor) -> Sequence[Tensor]:
                found: Sequence[Tensor] = together(tensors[:count], tensors[count:])
                return found

            # To trace is to run, and to write to what is given.
            self._run = trace(function, [tensor.clone() for tensor in (*inputs, *noise)])
        results = iter(self._run(*inputs, *noise))
        return [next(results) if given else None for given in self._given]

    def _one(self, inputs: Sequence[Tensor], noise: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the operations of a setting."""
        found: dict[fx.Node, Any] = dict(zip(self._inputs, inputs, strict=True))
        for node, value in zip(self._random, noise, strict=True):
            found[node] = value
            found.update(
                (argument, value) for argument in node.all_input_nodes if _is_empty(argument)
            )
        for node in self._graph.nodes:
            if node not in found and node.op != "output":
                found[node] = _called(node, found)
        results = self._output.args[0]
        return tuple(found[result] for result in results if result is not None)


def _is_random(node: fx.Node) -> bool:
    target: Any = node.target
    return (
        node.op == "call_function"
        and isinstance(target, torch_internals.Operator)
        and (torch_internals.is_random(target))
    )


def _is_empty(node: fx.Node) -> bool:
    """Return whether a node is memory without numbers."""
    return node.op == "call_function" and "empty" in str(node.target)


def _memory_like(node: fx.Node) -> Tensor:
    value = nodes.value_of(node)
    if value is None:
        raise UntraceableError("random numbers are drawn into memory of no known shape")
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _called(node: fx.Node, found: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return node.meta["constant"]
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    args: Any = fx.node.map_arg(node.args, found.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, found.__getitem__)
    return function(*args, **kwargs)
