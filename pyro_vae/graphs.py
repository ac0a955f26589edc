"""Graphs of tensor operations: traced once from a function, then replayed or compiled.

A graph knows nothing of Pyro. It holds the operations that the function called on tensors, in
their order, those of autograd included; Python that led to them is gone.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from pyro_vae import graph_rules

__all__ = ["Graph", "UntraceableError", "is_recording", "trace"]

logger = logging.getLogger(__name__)

_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__}


class UntraceableError(RuntimeError):
    """A function does what a graph of tensor operations cannot hold."""


# How many traces are under way: a check that only raises errors has no place in a graph.
_under_way = [0]


def is_recording() -> bool:
    """Whether a function is being traced now.

    What it does with numbers in tensors would be no part of the graph. Checks that can but
    raise an error may be left out: they have been made in a run before.
    """
    return _under_way[0] > 0


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    _under_way[0] += 1
    try:
        yield
    finally:
        _under_way[0] -= 1


class _Answers(TorchFunctionMode):
    """Answers Tensor.item() by the tensor, and refuses the ways to numbers that leave no trace."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item:
            return args[0].detach()
        if func in _READS:
            raise UntraceableError(f"Tensor.{func.__name__} reads numbers out of a tensor")
        return func(*args, **(kwargs or {}))


class Graph:
    """A straight line of tensor operations; see :func:`trace`.

    Called with inputs of the shapes it was traced with, it returns what the function
    would: a tuple of tensors, or None where the function had none. No gradients are recorded.
    Parameters, buffers and other tensors that the function did not get as inputs are read
    where they are, and written to where the function does; so is the global random state.

    Attributes:
        num_operations: calls of an operator in a replay.
        num_elements: numbers that they write.
        compiled: whether the compiled code is in use.
        uncompilable: whether :meth:`compile` failed.
    """

    def __init__(self, graph: fx.Graph, live: list[Tensor], num_inputs: int) -> None:
        self._graph = graph
        self._live = live
        self._num_inputs = num_inputs
        self.num_operations = sum(node.op == "call_function" for node in graph.nodes)
        self.num_elements = sum(map(_elements, graph.nodes))
        self.compiled = self.uncompilable = False
        self._run: Callable[..., Any] = _program(graph)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        with torch.inference_mode():
            return tuple(self._run(*self._live, *inputs))

    def compile(self, *inputs: Tensor) -> None:
        """Compile the graph by TorchInductor, with PyTorch's own random numbers.

        Args:
            *inputs: of the shapes that the graph will be called with.

        Raises:
            RuntimeError: where there is no C++ compiler, or the graph cannot be compiled.
        """
        import torch._inductor as inductor

        root = torch.nn.Module()
        for node in self._graph.nodes:
            if node.op == "get_attr":
                setattr(root, node.target, node.meta["constant"])
        module = fx.GraphModule(root, self._graph)
        # Under no_grad alone: the compiler looks at its inputs' gradients if there may be any.
        arguments = [tensor.detach() for tensor in (*self._live, *inputs)]
        try:
            with torch.no_grad():
                run = inductor.compile(module, arguments, options={"fallback_random": True})
        except Exception as error:  # of whatever kind: the compiler's, the linker's, the system's
            self.uncompilable = True
            raise RuntimeError(f"{type(error).__name__}: {_first_line(error)}") from error
        # Detached once: they share their memory with what may require gradients.
        self._live = [tensor.detach() for tensor in self._live]
        self._run, self.compiled = run, True


def trace(function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor]) -> Graph:
    """Run a function once and return the graph of its tensor operations.

    Args:
        function: of the inputs, to tensors (or None). It may differentiate inside.
            Tensor.item() gives it the tensor itself, detached.
        inputs: tensors; a graph is for their shapes, dtypes and devices.

    Raises:
        UntraceableError: for a function whose operations depend on the numbers in its tensors
            (control flow, shapes), or that leaves PyTorch's operators.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with _Answers(), _recording():
            traced = make_fx(lambda *tensors: tuple(function(*tensors)))(*inputs)
        graph_rules.check(traced.graph)
    except Exception as error:  # it ran before: what fails is the tracing, in whatever way
        text = f"{type(error).__name__}: {_first_line(error)}"
        if "get value out of a tracing tensor" in text:
            text = "Python reads a number out of a tensor, which may decide what it does next"
        elif isinstance(error, (UntraceableError, graph_rules.ChangingShapesError)):
            text = str(error)
        raise UntraceableError(text + _place(error)) from error
    graph, live = graph_rules.lift(traced)
    graph_rules.simplify(graph)
    return Graph(graph, live, len(inputs))


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if node.op == "call_function" and isinstance(value, Tensor) else 0


def _place(error: BaseException) -> str:
    """Say where an error came from: the last line of the user's, or the last outside of PyTorch."""
    found, is_users = "", False
    for frame, line in traceback.walk_tb(error.__traceback__):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        users = package not in ("torch", "pyro", "pyro_vae")
        if package != "torch" and (users or not is_users):
            source = linecache.getline(frame.f_code.co_filename, line).strip()
            found = f" ({Path(frame.f_code.co_filename).name}, line {line}: {source})"
            is_users = is_users or users
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _program(graph: fx.Graph) -> Callable[..., Any]:
    """Return a Python function of a graph's operations, one a line.

    What torch.fx generates looks each operator up by its full name at each call, and calls it
    through two layers of Python: twice the time of small operations.
    """
    nodes = list(graph.nodes)
    names = {node: f"v{i}" for i, node in enumerate(nodes)}
    last_use = {used: i for i, node in enumerate(nodes) for used in node.all_input_nodes}
    bound: dict[str, Any] = {}

    def bind(value: Any) -> str:
        name = f"c{len(bound)}"
        bound[name] = value
        return name

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, (list, tuple)):
            inner = "".join(f"{text(item)}, " for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        return repr(value) if value is None or type(value) in (bool, int) else bind(value)

    parameters, lines = [], []
    for i, node in enumerate(nodes):
        if node.op == "placeholder":
            parameters.append(names[node])
        elif node.op == "get_attr":
            bound[names[node]] = node.meta["constant"]
        elif node.op == "call_function":
            operator = node.target._op if isinstance(node.target, OpOverload) else node.target
            arguments = [text(argument) for argument in node.args]
            arguments += [f"{name}={text(value)}" for name, value in node.kwargs.items()]
            lines.append(f"    {names[node]} = {bind(operator)}({', '.join(arguments)})")
            done = [names[n] for n in node.all_input_nodes if last_use[n] == i]
            if done := [name for name in done if name not in bound]:
                lines.append(f"    del {', '.join(done)}")  # its memory is for the next ones
        else:
            lines.append(f"    return {text(list(node.args[0]))}")
    # Bound as defaults: a local variable is found faster than a global one.
    signature = ", ".join([*parameters, *(f"{name}={name}" for name in bound)])
    source = f"def run({signature}):\n" + "\n".join(lines) + "\n"
    exec(compile(source, "<pyro_vae graph>", "exec"), bound)
    program: Callable[..., Any] = bound["run"]
    return program
