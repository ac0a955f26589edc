"""Arguments of a graph: their signature, tensors put in their place, and numbers that vary."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Arguments that their value describes in full.
_PLAIN = (
    *(str, bytes, int, float, complex, type(None), enum.Enum),
    *(torch.dtype, torch.device, torch.Size),
)
_MAX_CONSTANTS = 3  # values of a number that have graphs of their own
_MAX_FORMS = 64  # of arguments that are remembered


def layout_of(tensor: Tensor) -> tuple[Hashable, ...]:
    """Return all of a tensor but its numbers: shape, strides, dtype, device, requires_grad."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def check_compile(compile: object) -> None:
    """Raise ValueError for what is no way to run a graph."""
    if not isinstance(compile, bool) and compile not in ("auto", "replay"):
        raise ValueError(f"compile={compile!r}: 'auto', 'replay', True or False is needed")


def form_of(value: Any, inputs: list[Tensor], numbers: list[int | float] | None = None) -> Hashable:
    """Return what two values have in common that one graph serves, and collect their tensors.

    The layouts of tensors, and plain values themselves; None where there is something else.

    Args:
        value: a tensor, a plain value, or nested tuples, lists and dicts of them.
        inputs: to which its tensors are added, in their order.
        numbers: to which its numbers are added, and then are no part of what is returned.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return None  # sparse: operations on it are no straight line
        inputs.append(value)
        return layout_of(value)
    if numbers is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
        numbers.append(value)
        return (type(value),)
    if type(value) is dict:
        parts = [form_of(item, inputs, numbers) for item in value.values()]
        return None if None in parts else (dict, *value, *parts)
    if type(value) in (tuple, list) or hasattr(value, "_fields"):
        parts = [form_of(item, inputs, numbers) for item in value]
        return None if None in parts else (type(value), *parts)
    return (type(value), value) if isinstance(value, _PLAIN) or callable(value) else None


def rebuilt(value: Any, new: Iterator[Any], kinds: type | tuple[type, ...] = Tensor) -> Any:
    """Return nested tuples, lists and dicts with others in the place of some values.

    Args:
        value: tuples, lists and dicts, and what is in them.
        new: what is put in, in the order of :func:`form_of`.
        kinds: of values that are replaced; by default, tensors are. Truth values never are.
    """
    if isinstance(value, kinds) and not isinstance(value, bool):
        return next(new)
    if isinstance(value, dict):
        return {name: rebuilt(item, new, kinds) for name, item in value.items()}
    if not isinstance(value, (tuple, list)) or isinstance(value, torch.Size):
        return value
    items = [rebuilt(item, new, kinds) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


@dataclass(slots=True)
class _Form:
    """Cached state for arguments that differ in their numbers alone.

    Attributes:
        first: the numbers when they were met first.
        varied: positions of numbers that were others later.
        num_values: how often new numbers were met.
        refused: whether numbers stay what they are.
    """

    first: list[int | float]
    varied: set[int] = field(default_factory=set)
    num_values: int = 1
    refused: bool = False


class VaryingNumbers:
    """Finds the numbers that vary, and puts tensors in their place.

    A number among the arguments is a constant of a graph, and another one asks for another graph.
    A KL weight that changes with each epoch would ask for as many as there are epochs; as a
    tensor it is an input of one.
    """

    def __init__(self) -> None:
        self._forms: dict[Hashable, _Form] = {}

    def as_tensors(
        self, value: Any, inputs: list[Tensor]
    ) -> tuple[Hashable, Any, tuple[int | float, ...]]:
        """Return the key of arguments without a graph, and them with tensors for varying numbers.

        The numbers that vary come last. Without numbers the key is None.

        Args:
            value: the arguments, of which note is taken.
            inputs: their tensors, by which the numbers' dtype and device are chosen.
        """
        numbers: list[int | float] = []
        key = form_of(value, [], numbers)
        if not numbers:
            return None, value, ()
        if key not in self._forms:
            while len(self._forms) >= _MAX_FORMS:
                del self._forms[next(iter(self._forms))]
            self._forms[key] = _Form(numbers)
        form = self._forms[key]
        pairs = zip(numbers, form.first, strict=True)
        if new := {i for i, (number, first) in enumerate(pairs) if number != first}:
            form.num_values += 1
            form.varied |= new
        if form.refused or form.num_values <= _MAX_CONSTANTS:
            return key, value, ()
        tensors = {i: _as_tensor(numbers[i], inputs) for i in sorted(form.varied)}
        new_values = iter([tensors.get(i, number) for i, number in enumerate(numbers)])
        return key, rebuilt(value, new_values, (int, float)), tuple(numbers[i] for i in tensors)

    def refuse(self, key: Hashable) -> None:
        """Leave the numbers of these arguments what they are: a function takes no tensors there."""
        self._forms[key].refused = True


def _as_tensor(number: int | float, inputs: list[Tensor]) -> Tensor:
    """Return a number as a tensor; a float as wide as some of the inputs."""
    is_double = any(tensor.dtype == torch.float64 for tensor in inputs)
    dtype = torch.float64 if is_double else torch.get_default_dtype()
    device = inputs[0].device if inputs else None
    return torch.tensor(number, dtype=None if isinstance(number, int) else dtype, device=device)
