"""A function of tensors run once, and the graph of the operations that it called."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae import torch_internals
from pyro_vae.compiler import nodes, recurrent_operators, simplify
from pyro_vae.compiler.graph import Graph, first_line
from pyro_vae.compiler.trace_constants import TraceConstants, one_hot
from pyro_vae.recording import recording
from pyro_vae.torch_internals import DispatchMode, Operator

_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__}
_NUMBERS = {Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__}
_MAKES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_READ = "Python reads a number out of a tensor, which may decide what it does next"


class UntraceableError(RuntimeError):
    """A function does what a graph of tensor operations cannot hold."""


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
    allowed = None if writable is None else frozenset(map(id, writable))
    constants = TraceConstants()

    def watched(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        with _Watch(allowed, constants):
            return tuple(function(*tensors))

    try:
        with _Answers(constants), recording():
            # Aliases: two inputs may be one tensor, and one may be known to the function besides.
            traced = torch_internals.traced(watched, [tensor.detach() for tensor in inputs])
        nodes.check(traced.graph)
        graph, live = nodes.lift(traced)
        recurrent_operators.keep_workspaces(graph)
        simplify.simplify(graph)
    except Exception as error:  # it ran before: what fails is the tracing, in whatever way
        raise UntraceableError(_reason(error) + _place(error)) from error
    return Graph(graph, live)


class _Answers(TorchFunctionMode):
    """Answers Tensor.item() by the tensor, and refuses reads of numbers that leave no trace.

    Args:
        constants: tensors whose numbers may be read.
    """

    def __init__(self, constants: TraceConstants) -> None:
        super().__init__()
        self._constants = constants

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.item or func in _READS or func in _NUMBERS:
            return self._read(func, args)
        if func is torch.nn.functional.one_hot:
            index, classes = _index_and_classes(*args, **kwargs)
            if classes > 0 and index.dtype == torch.int64:
                return one_hot(index, classes)
        if func in _MAKES and any(map(self._holds_tensors, (*args, *kwargs.values()))):
            raise UntraceableError(
                f"torch.{func.__name__}([...]) reads the numbers of the tensors in a list; "
                "torch.stack keeps them tensors"
            )
        return func(*args, **kwargs)

    def _read(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if args[0] in self._constants:
            return self._constants.read(func, *args)
        if func is Tensor.item:
            return args[0].detach()
        if func in _READS:
            raise UntraceableError(f"Tensor.{func.__name__} reads numbers out of a tensor")
        if _is_from_outside(args[0]):
            raise UntraceableError(_READ)
        return func(*args)

    def _holds_tensors(self, value: object) -> bool:
        """Return whether a list, or one in it, has tensors that are no constants."""
        return isinstance(value, (list, tuple)) and any(
            (isinstance(item, Tensor) and item not in self._constants) or self._holds_tensors(item)
            for item in value
        )


class _Watch(DispatchMode):
    """Refuses reads that would make constants of numbers, and writes that cannot be undone.

    Args:
        writable: the tensors, by identity, that may be written to though they are no input and
            were not made in the function; None for all.
        constants: tensors whose numbers may be read.
    """

    def __init__(self, writable: frozenset[int] | None, constants: TraceConstants) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._writable = writable
        self._constants = constants

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch_internals.READ_NUMBER and args[0] in self._constants:
            return self._constants.read(func, *args)
        if func is torch_internals.PACK_SEQUENCE:
            return self._pack(*args)
        reads = torch.Tag.data_dependent_output in func.tags
        if reads and any(map(_is_from_outside, args)):
            raise UntraceableError(_READ)
        self._check_writes(func, args, kwargs)
        result = func(*args, **kwargs)
        self._constants.note(func, args, kwargs, result)
        return result

    def _pack(self, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """Pack sequences of known lengths by operators that the compiler takes too."""
        if lengths not in self._constants:
            raise UntraceableError("the lengths of packed sequences are numbers in a tensor")
        return self._constants.packed(input, lengths, batch_first)

    def _check_writes(
        self, func: Operator, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        """Raise UntraceableError for a write that cannot be undone."""
        if self._writable is None or not torch_internals.is_mutable(func):
            return
        for value in torch_internals.written_values(func, args, kwargs):
            if _is_from_outside(value) and id(value) not in self._writable:
                raise UntraceableError(
                    "a tensor is written to that is neither a buffer of a module nor made in "
                    "the step; register it by register_buffer"
                )


def _index_and_classes(input: Tensor, num_classes: int = -1) -> tuple[Tensor, int]:
    """Return the arguments of torch.nn.functional.one_hot, by place or by name."""
    return input, num_classes


def _is_from_outside(value: object) -> bool:
    """Return whether a value is a tensor that is neither an input of the trace nor made in it."""
    if not isinstance(value, Tensor) or not torch_internals.is_tracing():
        return False
    return torch_internals.node_of(value) is None


# --- what is said of a trace that fails


def _reason(error: Exception) -> str:
    """Return why a trace failed."""
    text = f"{type(error).__name__}: {first_line(error)}"
    if "get value out of a tracing tensor" in text:
        return _READ
    if isinstance(error, (UntraceableError, nodes.ChangingShapesError)):
        return first_line(error)
    return text


def _place(error: BaseException) -> str:
    """Return where an error came from: the user's last line, or else the last not of PyTorch."""
    lines = list(_lines(error))
    users = [text for text, is_users in lines if is_users]
    texts = users or [text for text, _ in lines]
    return texts[-1] if texts else ""


def _lines(error: BaseException) -> Iterator[tuple[str, bool]]:
    """Yield the lines that an error passed through, PyTorch's aside: and whether a user's."""
    own = (__name__, nodes.__name__, simplify.__name__)
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = _module_of(frame)
        package = name.partition(".")[0]
        source = linecache.getline(frame.f_code.co_filename, line).strip()
        if package != "torch" and source and name not in own:
            text = f" ({Path(frame.f_code.co_filename).name}, line {line}: {source})"
            yield text, package not in ("pyro", "pyro_vae")


def _module_of(frame: FrameType) -> str:
    """Return the name of the module that a frame's code is of."""
    name: str = frame.f_globals.get("__name__", "")
    return name
