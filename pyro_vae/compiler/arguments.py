"""Arguments of a graph: their signature, and other tensors put in their place."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

# Arguments that their value describes in full.
_PLAIN = (
    *(str, bytes, int, float, bool, complex, type(None), enum.Enum),
    *(torch.dtype, torch.device, torch.Size),
)


def layout_of(tensor: Tensor) -> tuple[Hashable, ...]:
    """Return all of a tensor but its numbers: shape, strides, dtype, device, requires_grad."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def check_compile(compile: object) -> None:
    """Raise ValueError for what is no way to run a graph."""
    if not isinstance(compile, bool) and compile not in ("auto", "replay"):
        raise ValueError(f"compile={compile!r}: 'auto', 'replay', True or False is needed")


def form_of(value: Any, inputs: list[Tensor]) -> Hashable:
    """Return what two values have in common that one graph serves, and collect their tensors.

    The layouts of tensors, and plain values themselves; None where there is something else.

    Args:
        value: a tensor, a plain value, or nested tuples, lists and dicts of them.
        inputs: to which its tensors are added, in their order.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return None  # sparse: operations on it are no straight line
        inputs.append(value)
        return layout_of(value)
    if type(value) is dict:
        parts = [form_of(item, inputs) for item in value.values()]
        return None if None in parts else (dict, *value, *parts)
    if type(value) in (tuple, list) or hasattr(value, "_fields"):
        parts = [form_of(item, inputs) for item in value]
        return None if None in parts else (type(value), *parts)
    return (type(value), value) if isinstance(value, _PLAIN) or callable(value) else None


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def rebuilt(value: Any, new: Iterator[Any], replaces: Callable[[object], bool] = _is_tensor) -> Any:
    """Return nested tuples, lists and dicts with others in the place of some values.

    Args:
        value: tuples, lists and dicts, and what is in them.
        new: what is put in, in the order of :func:`form_of`.
        replaces: whether a value is replaced; by default, tensors are.
    """
    if replaces(value):
        return next(new)
    if isinstance(value, dict):
        return {name: rebuilt(item, new, replaces) for name, item in value.items()}
    if not isinstance(value, (tuple, list)):
        return value
    items = [rebuilt(item, new, replaces) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
