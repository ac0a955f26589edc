"""Graph: a straight line of tensor operations, replayed one by one, compiled, or launched at once.

A graph knows nothing of Pyro. It holds the operations that a function called on tensors, in their
order, those of autograd included; Python that led to them is gone.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor, fx

from pyro_vae import torch_internals
from pyro_vae.compiler import nodes, replacements
from pyro_vae.compiler.arguments import layout_of
from pyro_vae.compiler.cuda_graph import CudaGraph, is_capturable
from pyro_vae.torch_internals import Code, Operator

_aten = torch.ops.aten
# What an operation and a number that it writes cost more in a replay than compiled, and what
# compiling costs, in seconds, taken for all machines.
_SECONDS_PER_OPERATION = 4e-6
_SECONDS_PER_ELEMENT = 3e-10
_SECONDS_PER_SLOW_ELEMENT = 2e-9
_SLOW = {
    *(_aten.binary_cross_entropy_with_logits.default, _aten.log_sigmoid_forward.default),
    *(_aten.softplus.default, _aten.tanh.default),
}
# To import the compiler, and to read what it made in an earlier process, which takes 2; the first
# time it takes 10. The choice is the same both times, for a run to be the same to the last bit.
_SECONDS_TO_COMPILE = 3.5
_SECONDS_TO_COMPILE_OPERATION = 0.03

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

_MAX_MOVES = 8  # of the tensors that a graph reads, after which it is captured no more


class Graph:
    """A straight line of tensor operations; see :func:`pyro_vae.compiler.tracing.trace`.

    Args:
        graph: of operators alone; its first inputs are the live tensors.
        live: tensors that the function did not get as inputs: parameters, buffers and others.

    Attributes:
        num_operations: calls of an operator in a replay.
        num_elements: numbers that they write.
        num_slow_elements: those of them for which the compiler has a faster formula.
        compiled: whether the compiled code is in use.
        uncompilable: whether :meth:`compile` failed.
        capturable: whether :meth:`capture` makes sense: all is on one CUDA device, and no call
            is a single launch yet.
    """

    def __init__(self, graph: fx.Graph, live: list[Tensor]) -> None:
        keep_freed_memory()
        self._graph = graph
        self._live = live
        operations = [node for node in graph.nodes if node.op == "call_function"]
        self.num_operations = len(operations)
        values = {n: v for n in operations if (v := nodes.value_of(n)) is not None}
        self.num_elements = sum(value.numel() for value in values.values())
        self.num_slow_elements = sum(v.numel() for n, v in values.items() if n.target in _SLOW)
        self.compiled = self.uncompilable = False
        self._run = program(graph)
        self.capturable = not nodes.waits(graph) and is_capturable(_tensors_of(graph))
        self._moves = 0  # of the live tensors, under a capture
        self._captured: CudaGraph | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the tensors that the function would return, and None where it had none.

        Parameters, buffers and other tensors that the function did not get as inputs are read
        where they are, and written to where the function does; so is the global random state.
        No gradients are recorded.

        Args:
            *inputs: of the shapes, strides, dtypes and devices it was traced with.
        """
        with torch.no_grad():
            if self._captured is not None:
                if self._captured.holds():
                    return tuple(self._captured(*inputs))
                self.release()
                self._moves += 1
                self.capturable = self._moves < _MAX_MOVES  # where the tensors are now
            return tuple(self._run(*self._live, *inputs))

    @property
    def operations(self) -> tuple[fx.Graph, list[Tensor]]:
        """The graph, whose first inputs are the live tensors, and these."""
        return self._graph, self._live

    def capture(self, *inputs: Tensor, adopt: bool = False) -> None:
        """Launch all kernels at once from the next call on: as a CUDA graph.

        Results then lie in the same memory after each call, and the next one writes over them.

        Args:
            *inputs: of a call.
            adopt: whether each call hands in these very tensors.

        Raises:
            RuntimeError: for kernels that CUDA cannot capture, or that write to an input.
        """
        self.capturable = False
        written = nodes.written_inputs(self._graph)
        if not adopt and max(written, default=-1) >= len(self._live):
            raise RuntimeError("an input is written to")
        with torch.no_grad():
            self._captured = CudaGraph(self._run, self._live, inputs, adopt=adopt)

    @property
    def captured(self) -> bool:
        """Whether a call is a single launch."""
        return self._captured is not None

    def release(self) -> None:
        """Go back from one launch to the kernels one by one; undo :meth:`capture`."""
        self._captured, self.capturable = None, False

    def pays(self, calls: float, *, compiled_before: bool = False) -> bool:
        """Return whether compiling takes less time than it saves in so many calls.

        By a model of the machine, not by a measurement: with that, a run would not be the same
        twice, to the last bit.

        Args:
            calls: to come.
            compiled_before: whether the same run has compiled another graph.
        """
        saved = _SECONDS_PER_OPERATION * self.num_operations
        saved += _SECONDS_PER_ELEMENT * (self.num_elements - self.num_slow_elements)
        saved += _SECONDS_PER_SLOW_ELEMENT * self.num_slow_elements
        cost = _SECONDS_TO_COMPILE_OPERATION * self.num_operations
        cost += 0.0 if compiled_before else _SECONDS_TO_COMPILE
        return saved * calls > cost

    def compile(self, *inputs: Tensor) -> None:
        """Compile the graph by TorchInductor, with PyTorch's own random numbers.

        Args:
            *inputs: of the shapes that the graph will be called with.

        Raises:
            RuntimeError: where there is no C++ compiler, or the graph cannot be compiled.
        """
        # Under no_grad alone: the compiler looks at its inputs' gradients if there may be any.
        arguments = [tensor.detach() for tensor in (*self._live, *inputs)]
        try:
            with torch.no_grad():
                self._run = _compiled(self._graph, arguments)
        except Exception as error:  # of whatever kind: the compiler's, the linker's, the system's
            self.uncompilable = True
            raise RuntimeError(f"{type(error).__name__}: {first_line(error)}") from error
        self.compiled = True
        if self._captured is not None:  # of the operations one by one
            self.release()
            self.capturable = True


@functools.cache
def keep_freed_memory() -> None:
    """Have what operations free stay in the process, for the next operations.

    glibc gives large blocks back to the system when they are freed, and waits for the pages of new
    ones: a seventh of the time of a replay. It does so until a block as large has been freed: this
    one, of no more than it will keep (32 MiB), which is never written to.
    """
    torch.empty(33_000_000, dtype=torch.uint8)


# What was compiled in this process, by all that it depends on: the same operations on the same
# kind of tensors, of whatever model.
_code: dict[Hashable, Code] = {}
_MAX_CODES = 64  # that are kept


def _compiled(graph: fx.Graph, arguments: list[Tensor]) -> Code:
    """Return a graph's compiled code: a function of the arguments."""
    places = [tensor.untyped_storage().data_ptr() for tensor in arguments]
    if any(places.count(places[i]) > 1 for i in nodes.written_inputs(graph)):
        raise RuntimeError("a tensor that is written to shares its memory with another")
    key = (
        nodes.text_of(graph),
        *((*layout_of(tensor), tensor.is_conj(), tensor.is_neg()) for tensor in arguments),
        *(torch.get_default_dtype(), torch.get_num_threads()),
        *(torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
    )
    code = _code.pop(key, None)
    code = code or torch_internals.compiled(replacements.for_compiler(graph), arguments)
    _code[key] = code  # the last used is the last to go
    while len(_code) > _MAX_CODES:
        del _code[next(iter(_code))]
    return code


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its name where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def _tensors_of(graph: fx.Graph) -> list[Tensor]:
    """Return the graph's tensors, but constants of one number, which kernels get as numbers."""
    found = ((node.op == "get_attr", nodes.value_of(node)) for node in graph.nodes)
    return [t for is_constant, t in found if t is not None and (t.ndim or not is_constant)]


# --- the function that a replay runs


def in_place(graph: fx.Graph) -> dict[fx.Node, tuple[Operator, tuple[Any, ...]]]:
    """Return the operations that may write over an argument which no later one reads.

    Each with the operator and the arguments to call it with. Numbers stay in the cache, and the
    results are the same.
    """
    last_use: dict[object, int] = {}  # of a tensor's memory
    for i, node in enumerate(graph.nodes):
        last_use.update((nodes.base_of(used), i) for used in node.all_input_nodes)
    found = {}
    for i, node in enumerate(graph.nodes):
        orders = [nodes.args_of(node)] if node.target in _IN_PLACE else []
        # In half precision a scalar may round.
        if node.target in _COMMUTE and not node.kwargs and all(map(nodes.is_real, node.args)):
            orders.append(nodes.args_of(node)[::-1])
        for args in orders:
            if last_use.get(args[0]) == i and _is_free(args, node):
                found[node] = _IN_PLACE[node.target], args
                break
    return found


def _is_free(args: tuple[Any, ...], node: fx.Node) -> bool:
    """Return whether a call may write its result into the memory of its first argument."""
    first, *others = args
    if first.op != "call_function" or nodes.viewed_by(first) is not None:
        return False  # an input or a constant, or the memory of another
    used = map(nodes.base_of, nodes.nodes_in(others))
    return nodes.layout(first) == nodes.layout(node) and first not in used


def program(graph: fx.Graph) -> Code:
    """Return a Python function of a graph's operations, one a line.

    What torch.fx generates looks each operator up by its full name at each call, and calls it
    through two layers of Python: twice the time of small operations.
    """
    names = {node: f"v{i}" for i, node in enumerate(graph.nodes)}
    last_use = {used: node for node in graph.nodes for used in node.all_input_nodes}
    over = in_place(graph)
    bound: dict[str, Any] = {}
    parameters, lines = list[str](), list[str]()

    def text(value: object) -> str:
        """Return the source of an argument; an object that has none is bound to a name."""
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, (list, tuple)):
            inner = "".join(f"{text(item)}, " for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if value is None or type(value) in (bool, int):
            return repr(value)
        bound[name := f"c{len(bound)}"] = value
        return name

    for node in graph.nodes:
        name = names[node]
        if node.op == "placeholder":
            parameters.append(name)
        elif node.op == "get_attr":
            bound[name] = node.meta["constant"]
        elif node.op == "output":
            lines.append(f"return {text(list(nodes.args_of(node)[0]))}")
        else:
            target, args = over.get(node, (node.target, nodes.args_of(node)))
            if isinstance(target, Operator):
                target = torch_internals.called_directly(target)
            arguments = [*map(text, args), *(f"{n}={text(v)}" for n, v in node.kwargs.items())]
            lines.append(f"{name} = {text(target)}({', '.join(arguments)})")
            # The memory of what is read no more is for the next operations.
            done = [names[used] for used in node.all_input_nodes if last_use[used] is node]
            if done := [name for name in done if name not in bound]:
                lines.append(f"del {', '.join(done)}")
    # Bound as defaults: a local variable is found faster than a global one.
    signature = ", ".join([*parameters, *(f"{name}={name}" for name in bound)])
    source = f"def run({signature}):\n" + "".join(f"    {line}\n" for line in lines)
    exec(compile(source, "<pyro_vae graph>", "exec"), bound)
    return cast("Code", bound["run"])
