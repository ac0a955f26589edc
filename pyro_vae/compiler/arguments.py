"""Arguments of a graph: their signature, and other tensors put in their place."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_compile", "form_of", "layout_of", "rebuilt"]


# Arguments whose value tells all of them.
_PLAIN = (
    *(str, bytes, int, float, bool, complex, type(None), enum.Enum),
    *(torch.dtype, torch.device, torch.Size),
)


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what a graph is for of an input: all but its numbers."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def check_compile(compile: Any) -> None:
    """Raise ValueError for what is no way to run a graph."""
    if not isinstance(compile, bool) and compile not in ("auto", "replay"):
        raise ValueError(f"compile={compile!r}: 'auto', 'replay', True or False is needed")


def form_of(value: Any, inputs: list[Tensor]) -> Any:
    """Return what tells one kind of arguments from another, and collect their tensors.

    None where something among them cannot be told apart.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return None  # sparse: operations on it are no straight line
        inputs.append(value)
        return layout_of(value)
    if type(value) in (tuple, list) or hasattr(value, "_fields"):
        parts = [form_of(item, inputs) for item in value]
        return None if None in parts else (type(value), *parts)
    if type(value) is dict:
        parts = [form_of(item, inputs) for item in value.values()]
        return None if None in parts else (type(value), *value, *parts)
    return (type(value), value) if isinstance(value, _PLAIN) or callable(value) else None


def rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Put other tensors in the place of those that :func:`form_of` collects."""
    if isinstance(value, Tensor):
        return next(tensors)
    if hasattr(value, "_fields"):
        return type(value)(*(rebuilt(item, tensors) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(rebuilt(item, tensors) for item in value)
    if isinstance(value, dict):
        return {name: rebuilt(item, tensors) for name, item in value.items()}
    return value
