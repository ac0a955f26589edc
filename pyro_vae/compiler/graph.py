"""Graphs of tensor operations: traced once from a function, then replayed or compiled.

A graph knows nothing of Pyro. It holds the operations that the function called on tensors, in
their order, those of autograd included; Python that led to them is gone.
"""

from __future__ import annotations

import linecache
import logging
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.compiler import formulas as graph_formulas
from pyro_vae.compiler import nodes as graph_nodes
from pyro_vae.compiler import recurrent_operators
from pyro_vae.compiler import simplify as graph_simplification
from pyro_vae.compiler.arguments import layout_of
from pyro_vae.compiler.cuda_graph import CudaGraph, is_capturable
from pyro_vae.compiler.trace_constants import TraceConstants, one_hot
from pyro_vae.recording import recording

__all__ = ["Graph", "UntraceableError", "trace"]

logger = logging.getLogger(__name__)

_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__}
_MAKES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_PACK = torch.ops.aten._pack_padded_sequence.default
_NUMBERS = {Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__}


class UntraceableError(RuntimeError):
    """A function does what a graph of tensor operations cannot hold."""


_READ = "Python reads a number out of a tensor, which may decide what it does next"
# What an operation and a number that it writes cost more in a replay than compiled, and what
# compiling costs, in seconds, taken for all machines.
_SECONDS_PER_OPERATION = 4e-6
_SECONDS_PER_ELEMENT = 3e-10
_SECONDS_PER_SLOW_ELEMENT = 2e-9
_SLOW = {
    torch.ops.aten.binary_cross_entropy_with_logits.default,
    torch.ops.aten.log_sigmoid_forward.default,
    torch.ops.aten.softplus.default,
    torch.ops.aten.tanh.default,
}
_SECONDS_TO_COMPILE = 6.0  # to import the compiler, above all
_SECONDS_TO_COMPILE_OPERATION = 0.03

_MOVES = 8  # of the tensors that a graph reads, after which it is captured no more


class _Answers(TorchFunctionMode):
    """Answers Tensor.item() by the tensor, and refuses the ways to numbers that leave no trace.

    Args:
        constants: tensors whose numbers may be read.
    """

    def __init__(self, constants: TraceConstants) -> None:
        super().__init__()
        self.constants = constants

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func is Tensor.item or func in _READS or func in _NUMBERS
        if reads and args[0] in self.constants:
            return self.constants.read(func, *args)
        if func is torch.nn.functional.one_hot:
            index, classes = _index_and_classes(*args, **(kwargs or {}))
            if classes > 0 and index.dtype == torch.int64:
                return one_hot(index, classes)
        if func is Tensor.item:
            return args[0].detach()
        if func in _READS:
            raise UntraceableError(f"Tensor.{func.__name__} reads numbers out of a tensor")
        if func in _NUMBERS and _is_live(args[0]):
            raise UntraceableError(_READ)
        lists = (*args, *(kwargs or {}).values()) if func in _MAKES else ()
        if any(_holds_tensors(a, self.constants) for a in lists):
            raise UntraceableError(
                f"torch.{func.__name__}([...]) reads the numbers of the tensors in a list; "
                "torch.stack keeps them tensors"
            )
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    """Refuses what PyTorch would take for constant, and writes to what is nobody's.

    Args:
        writable: the tensors, by identity, that may be written to though they are no input and
            were not made in the function; None for all.
        constants: tensors whose numbers may be read.
    """

    def __init__(self, writable: frozenset[int] | None, constants: TraceConstants) -> None:
        super().__init__()
        self.writable = writable
        self.constants = constants

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0] in self.constants:
            return self.constants.read(func, *args)
        if func is _PACK and args[1] not in self.constants:
            raise UntraceableError("the lengths of packed sequences are numbers in a tensor")
        if func is _PACK:  # of known lengths: rows that the compiler can take too
            return self.constants.packed(*args)
        if torch.Tag.data_dependent_output in func.tags and any(
            isinstance(a, Tensor) and _is_live(a) for a in args
        ):
            raise UntraceableError(_READ)
        if self.writable is not None and func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if not written or not isinstance(value, Tensor) or not _is_live(value):
                    continue
                if id(value) not in self.writable:
                    raise UntraceableError(
                        "a tensor is written to that is neither a buffer of a module nor made in "
                        "the step; register it by register_buffer"
                    )
        result = func(*args, **(kwargs or {}))
        self.constants.note(func, args, kwargs, result)
        return result


def _index_and_classes(input: Tensor, num_classes: int = -1) -> tuple[Tensor, int]:
    """Return the arguments of torch.nn.functional.one_hot, by place or by name."""
    return input, num_classes


def _holds_tensors(value: Any, constants: TraceConstants) -> bool:
    """Whether a list, or one in it, has tensors that are no constants."""
    return isinstance(value, (list, tuple)) and any(
        (isinstance(item, Tensor) and item not in constants) or _holds_tensors(item, constants)
        for item in value
    )


def _is_live(tensor: Tensor) -> bool:
    """Whether a tensor is neither an input of the trace nor made in it."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot

    mode = get_proxy_mode()
    return mode is not None and not has_proxy_slot(tensor, mode.tracer)


class Graph:
    """A straight line of tensor operations; see :func:`trace`.

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
        self._graph = graph
        self._live = live
        self.num_operations = sum(node.op == "call_function" for node in graph.nodes)
        self.num_elements = sum(map(_elements, graph.nodes))
        slow = (node for node in graph.nodes if node.target in _SLOW)
        self.num_slow_elements = sum(map(_elements, slow))
        self.compiled = self.uncompilable = False
        self._run: Callable[..., Any] = _program(graph)
        self.capturable = not graph_nodes.waits(graph) and is_capturable(_tensors_of(graph))
        self._moves = 0  # of the live tensors, under a capture
        self._captured: CudaGraph | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        """Do what the function would: return its tensors, and None where it had none.

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
                self.capturable = self._moves < _MOVES  # where the tensors are now
            return tuple(self._run(*self._live, *inputs))

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
        if not adopt and max(graph_nodes.written_inputs(self._graph), default=-1) >= len(
            self._live
        ):
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

    def pays(self, calls: float, *, again: bool = False) -> bool:
        """Whether compiling takes less time than it saves in so many calls.

        By a model of the machine, not by a measurement: else a run would not be the same twice,
        to the last bit.

        Args:
            calls: to come.
            again: whether the same run has compiled another graph before.
        """
        saved = _SECONDS_PER_OPERATION * self.num_operations
        saved += _SECONDS_PER_ELEMENT * (self.num_elements - self.num_slow_elements)
        saved += _SECONDS_PER_SLOW_ELEMENT * self.num_slow_elements
        cost = _SECONDS_TO_COMPILE_OPERATION * self.num_operations
        cost += 0.0 if again else _SECONDS_TO_COMPILE
        return not (self.compiled or self.uncompilable) and saved * calls > cost

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
            raise RuntimeError(f"{type(error).__name__}: {_first_line(error)}") from error
        self.compiled = True
        if self._captured is not None:  # of the operations one by one
            self.release()
            self.capturable = True


# What was compiled in this process, by all that it depends on: the same operations on the same
# kind of tensors, whoever's they are.
_code: dict[Any, Callable[..., Any]] = {}
_CODES = 64  # that are kept


def _compiled(graph: fx.Graph, arguments: list[Tensor]) -> Callable[..., Any]:
    """Return a graph's compiled code: a function of the arguments."""
    import torch._inductor as inductor

    places = [tensor.untyped_storage().data_ptr() for tensor in arguments]
    if any(places.count(places[i]) > 1 for i in graph_nodes.written_inputs(graph)):
        raise RuntimeError("a tensor that is written to shares its memory with another")
    key = (
        graph_nodes.text_of(graph),
        *map(layout_of, arguments),
        *((tensor.is_conj(), tensor.is_neg()) for tensor in arguments),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )
    code = _code.pop(key, None)
    if code is None:
        module = graph_formulas.for_compiler(graph)
        code = inductor.compile(module, list(arguments), options=_options())
    _code[key] = code  # the last used is the last to go
    while len(_code) > _CODES:
        del _code[next(iter(_code))]
    return code


def trace(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor],
    *,
    writable: Iterable[Tensor] | None = None,
) -> Graph:
    """Run a function once and return the graph of its tensor operations.

    Args:
        function: of the inputs, to tensors (or None). It may differentiate inside.
            Tensor.item() gives it the tensor itself, detached.
        inputs: tensors; a graph is for their shapes, dtypes and devices.
        writable: tensors that the function may write to, beside those that it makes; by default
            any.

    Raises:
        UntraceableError: for a function whose operations depend on the numbers in its tensors
            (control flow, shapes), or that leaves PyTorch's operators.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    allowed = None if writable is None else frozenset(map(id, writable))

    constants = TraceConstants()

    def watched(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        with _Watch(allowed, constants):
            return tuple(function(*tensors))

    try:
        with _Answers(constants), recording():
            # Aliases: two inputs may be one tensor, and one may be known to the function besides.
            traced = make_fx(watched)(*(tensor.detach() for tensor in inputs))
        graph_nodes.check(traced.graph)
        graph, live = graph_nodes.lift(traced)
        recurrent_operators.keep_workspaces(graph)
        graph_simplification.simplify(graph)
    except Exception as error:  # it ran before: what fails is the tracing, in whatever way
        text = f"{type(error).__name__}: {_first_line(error)}"
        if "get value out of a tracing tensor" in text:
            text = _READ
        elif isinstance(error, (UntraceableError, graph_nodes.ChangingShapesError)):
            text = _first_line(error)
        raise UntraceableError(text + _place(error)) from error
    return Graph(graph, live)


def _options() -> dict[str, Any]:
    """Return the compiler's options: PyTorch's random numbers, and a tanh made of exp."""
    from torch._inductor import config

    options: dict[str, Any] = {"fallback_random": True}
    if hasattr(config.cpp, "use_decompose_tanh"):  # a third of the time, and a rounding more
        options["cpp.use_decompose_tanh"] = True
    return options


def _tensors_of(graph: fx.Graph) -> list[Tensor]:
    """Return the graph's tensors, but constants of one number: kernels are told the number."""
    nodes = [(node, node.meta.get("val")) for node in graph.nodes]
    return [
        value
        for node, value in nodes
        if isinstance(value, Tensor) and not (node.op == "get_attr" and value.ndim == 0)
    ]


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if node.op == "call_function" and isinstance(value, Tensor) else 0


def _place(error: BaseException) -> str:
    """Say where an error came from: the last line of the user's, or the last outside of PyTorch."""
    found, is_users = "", False
    own = (__name__, graph_nodes.__name__, graph_simplification.__name__)
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get("__name__", "")
        package = name.partition(".")[0]
        source = linecache.getline(frame.f_code.co_filename, line).strip()
        users = package not in ("torch", "pyro", "pyro_vae")
        if package == "torch" or not source or name in own:
            continue
        if users or not is_users:
            found = f" ({Path(frame.f_code.co_filename).name}, line {line}: {source})"
            is_users = users
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
    over = graph_simplification.in_place(graph)
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
            target, args = over.get(node, (node.target, node.args))
            operator = target._op if isinstance(target, OpOverload) else target
            arguments = [text(argument) for argument in args]
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
