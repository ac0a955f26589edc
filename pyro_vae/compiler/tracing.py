"""A function of tensors run once, and the graph of the operations that it called."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from pyro_vae import torch_internals
from pyro_vae.compiler import nodes, replacements, simplify
from pyro_vae.compiler.graph import Graph, first_line
from pyro_vae.recording import recording
from pyro_vae.torch_internals import Code, DispatchMode, Operator, storage_key, tensors_in

_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__}
_NUMBERS = {Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__}
_MAKES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_Function: TypeAlias = Callable[..., Any]
_Args: TypeAlias = tuple[Any, ...]
_Kwargs: TypeAlias = Mapping[str, Any] | None
_READ = "Python reads a number out of a tensor, which may decide what it does next"


class UntraceableError(RuntimeError):
    """A function does what a graph of tensor operations cannot hold."""


def trace(
    function: Code, inputs: Sequence[Tensor], *, writable: Iterable[Tensor] | None = None
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
    watch = _Watch(None if writable is None else frozenset(map(id, writable)))

    def watched(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        with watch:
            return tuple(function(*tensors))

    try:
        with _Answers(watch), recording():
            # Aliases: two inputs may be one tensor, and one may be known to the function besides.
            traced = torch_internals.traced(watched, [tensor.detach() for tensor in inputs])
        _check_shapes(traced.graph)
        graph, live = nodes.lift(traced)
        replacements.keep_workspaces(graph)
        simplify.simplify(graph)
    except Exception as error:  # it ran before: what fails is the tracing, in whatever way
        raise UntraceableError(_reason(error) + _place(error)) from error
    return Graph(graph, live)


class _Watch(DispatchMode):
    """Refuses reads that would make constants of numbers, and writes that cannot be undone.

    Tensors that depend on no input are the same whenever the graph runs, so Python may read their
    numbers: sizes that a function works out by tensors, for one.

    Args:
        writable: the tensors, by identity, that may be written to though they are no input and
            were not made in the function; None for all.
    """

    def __init__(self, writable: frozenset[int] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._writable = writable
        # Of constants, by their memory, which views share: kept, for its identity to stay its own.
        self._storages: dict[int, torch.UntypedStorage] = {}

    def is_constant(self, value: object) -> bool:
        """Return whether a value is a tensor made from nothing but plain numbers."""
        return isinstance(value, Tensor) and storage_key(value) in self._storages

    def __torch_dispatch__(
        self, func: Operator, types: Iterable[type], args: _Args = (), kwargs: _Kwargs = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch_internals.READ_NUMBER and self.is_constant(args[0]):
            return _untraced(func, *args)
        if func is torch_internals.PACK_SEQUENCE:
            return self._pack(*args)
        reads = torch.Tag.data_dependent_output in func.tags
        if reads and any(map(_is_from_outside, args)):
            raise UntraceableError(_READ)
        written = list(torch_internals.written_values(func, args, kwargs))
        if any(map(self._outlasts, written)):
            raise UntraceableError(
                "a tensor is written to that is neither a buffer of a module nor made in the step; "
                "register it by register_buffer"
            )
        result = func(*args, **kwargs)
        is_random = torch_internals.is_random(func) or "empty" in str(func)
        of_constants = all(map(self.is_constant, tensors_in((args, kwargs))))
        if (of_constants or func in nodes.LIFTS | nodes.LIKE) and not is_random:
            self._add(result)
        else:
            for tensor in tensors_in(written):
                self._storages.pop(storage_key(tensor), None)
        return result

    def _outlasts(self, value: object) -> bool:
        """Return whether what is written to a value stays there, and cannot be undone."""
        writable = self._writable
        return writable is not None and _is_from_outside(value) and id(value) not in writable

    def _add(self, made: object) -> None:
        self._storages.update((storage_key(t), t.untyped_storage()) for t in tensors_in(made))

    def _pack(self, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """Pack sequences, [T, N, ...], of constant lengths by operators that the compiler takes."""
        if not self.is_constant(lengths):
            raise UntraceableError("the lengths of packed sequences are numbers in a tensor")
        steps: list[int] = _untraced(Tensor.tolist, lengths)
        rows = input.transpose(0, 1) if batch_first else input
        going_on = [sum(length > t for length in steps) for t in range(max(steps))]
        index = [t * len(steps) + i for t, count in enumerate(going_on) for i in range(count)]
        data = rows.flatten(0, 1).index_select(0, torch.tensor(index, device=input.device))
        sizes = torch.tensor(going_on)
        self._add(sizes)
        return data, sizes


class _Answers(TorchFunctionMode):
    """Answers Tensor.item() by the tensor, and refuses reads of numbers that leave no trace.

    Args:
        watch: knows the tensors whose numbers may be read.
    """

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: _Function, types: Iterable[type], args: _Args = (), kwargs: _Kwargs = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.item or func in _READS or func in _NUMBERS:
            return self._read(func, args)
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **kwargs)
        if func in _MAKES and any(map(self._holds_tensors, (*args, *kwargs.values()))):
            raise UntraceableError(
                f"torch.{func.__name__}([...]) reads the numbers of the tensors in a list; "
                "torch.stack keeps them tensors"
            )
        return func(*args, **kwargs)

    def _read(self, func: _Function, args: _Args) -> Any:
        if self._watch.is_constant(args[0]):
            return _untraced(func, *args)
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
            (isinstance(item, Tensor) and not self._watch.is_constant(item))
            or self._holds_tensors(item)
            for item in value
        )


def _untraced(func: _Function, *args: Any) -> Any:
    """Call a function that reads numbers out of a constant, untraced."""
    with torch_internals.untraced():
        return func(*args)


def _one_hot(input: Tensor, num_classes: int = -1) -> Tensor:
    """Return what torch.nn.functional.one_hot does, which reads the numbers to check them.

    An index outside is an error here as well, of the operator that writes.
    """
    if num_classes <= 0 or input.dtype != torch.int64:
        return torch.nn.functional.one_hot(input, num_classes)
    zeros = input.new_zeros((*input.shape, num_classes))
    return zeros.scatter(-1, input.unsqueeze(-1), 1)


def _is_from_outside(value: object) -> bool:
    """Return whether a value is a tensor that is neither an input of the trace nor made in it."""
    if not isinstance(value, Tensor) or not torch_internals.is_tracing():
        return False
    return torch_internals.node_of(value) is None


# --- what is said of a trace that fails


def _check_shapes(graph: fx.Graph) -> None:
    """Raise UntraceableError for shapes that depend on numbers: a graph has but one shape."""
    for node in nodes.calls(graph):
        target: Any = node.target
        if torch.Tag.dynamic_output_shape in target.tags and (
            target is not torch.ops.aten.index.Tensor or nodes.has_mask(nodes.args_of(node)[1])
        ):
            raise UntraceableError(
                f"the shape of what {target} returns depends on the numbers in its input"
            )


def _reason(error: Exception) -> str:
    """Return why a trace failed."""
    if isinstance(error, UntraceableError):
        return first_line(error)
    text = f"{type(error).__name__}: {first_line(error)}"
    return _READ if "get value out of a tracing tensor" in text else text


def _place(error: BaseException) -> str:
    """Return where an error came from: the user's last line, or else the last not of PyTorch."""
    own = (__name__, nodes.__name__, simplify.__name__)
    found, is_users = "", False
    for frame, line in traceback.walk_tb(error.__traceback__):
        name: str = frame.f_globals.get("__name__", "")
        package = name.partition(".")[0]
        source = linecache.getline(frame.f_code.co_filename, line).strip()
        by_user = package not in ("pyro", "pyro_vae")
        if package != "torch" and source and name not in own and (by_user or not is_users):
            found = f" ({Path(frame.f_code.co_filename).name}, line {line}: {source})"
            is_users = by_user
    return found
