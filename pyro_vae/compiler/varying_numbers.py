"""Plain numbers among the arguments of a step, made tensors where they vary from call to call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["VaryingNumbers"]

_FEW = 3  # values of a number that have graphs of their own
_FORMS = 64  # of arguments that are remembered


@dataclass
class _Form:
    """What is known of arguments that differ in their numbers alone."""

    first: tuple[Any, ...]
    varied: set[int] = field(default_factory=set)  # positions of numbers that were others
    values: int = 1  # that were met
    refused: bool = False


class VaryingNumbers:
    """Finds the numbers that vary, and puts tensors in their place.

    A number among the arguments is a constant of a graph, and another one asks for another graph.
    A KL weight that changes with each epoch would ask for as many as there are epochs; as a
    tensor it is an input of one.
    """

    def __init__(self) -> None:
        self._forms: dict[Any, _Form] = {}

    def meet(self, value: Any) -> Any:
        """Take note of arguments that have no graph yet; return their key, None without numbers."""
        found: list[Any] = []
        key = _masked(value, found)
        if not found:
            return None
        form = self._forms.get(key)
        if form is None:
            while len(self._forms) >= _FORMS:
                del self._forms[next(iter(self._forms))]
            self._forms[key] = _Form(tuple(found))
            return key
        new = {i for i, (a, b) in enumerate(zip(found, form.first, strict=True)) if a != b}
        if new:
            form.values += 1
            form.varied |= new
        return key

    def refuse(self, key: Any) -> None:
        """Leave numbers what they are: the functions at hand want no tensors."""
        self._forms[key].refused = True

    def as_tensors(self, key: Any, value: Any, inputs: list[Tensor]) -> tuple[Any, tuple[Any, ...]]:
        """Return arguments with tensors in the place of numbers that vary, and these numbers.

        Args:
            key: as :meth:`meet` returned it.
            value: the arguments.
            inputs: their tensors, by which the numbers' dtype and device are chosen.
        """
        form = self._forms.get(key)
        if form is None or form.refused or form.values <= _FEW:
            return value, ()
        floats = [tensor for tensor in inputs if tensor.is_floating_point()]
        dtype = torch.get_default_dtype()
        if any(tensor.dtype == torch.float64 for tensor in floats):
            dtype = torch.float64
        device = inputs[0].device if inputs else None
        numbers: list[Any] = []
        _masked(value, numbers)
        tensors = [
            torch.tensor(n, dtype=None if isinstance(n, int) else dtype, device=device)
            if i in form.varied
            else n
            for i, n in enumerate(numbers)
        ]
        varying = tuple(n for i, n in enumerate(numbers) if i in form.varied)
        return _filled(value, iter(tensors)), varying


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _masked(value: Any, found: list[Any]) -> Any:
    """Return arguments without their numbers, hashable, and collect these."""
    if _is_number(value):
        found.append(value)
        return type(value)
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return (type(value), *(_masked(item, found) for item in value))
    if isinstance(value, dict):
        return (type(value), *value, *(_masked(item, found) for item in value.values()))
    return value


def _filled(value: Any, numbers: Iterator[Any]) -> Any:
    """Put others in the place of the numbers that :func:`_masked` collects."""
    if _is_number(value):
        return next(numbers)
    if hasattr(value, "_fields"):
        return type(value)(*(_filled(item, numbers) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(item, numbers) for item in value)
    if isinstance(value, dict):
        return {name: _filled(item, numbers) for name, item in value.items()}
    return value
