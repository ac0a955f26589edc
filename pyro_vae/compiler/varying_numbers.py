"""Plain numbers among the arguments of a step, made tensors where they vary from call to call."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compiler.arguments import rebuilt

_MAX_CONSTANTS = 3  # values of a number that have graphs of their own
_MAX_FORMS = 64  # of arguments that are remembered

_Numbers = tuple[int | float, ...]


@dataclass(slots=True)
class _Form:
    """Cached state for arguments that differ in their numbers alone.

    Attributes:
        first: the numbers when they were met first.
        varied: positions of numbers that were others later.
        num_values: how often new numbers were met.
        refused: whether numbers stay what they are.
    """

    first: _Numbers
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

    def meet(self, value: object) -> Hashable:
        """Take note of arguments that have no graph yet; return their key, None without numbers."""
        found: list[int | float] = []
        key = _masked(value, found)
        if not found:
            return None
        form = self._forms.get(key)
        if form is None:
            while len(self._forms) >= _MAX_FORMS:
                del self._forms[next(iter(self._forms))]
            self._forms[key] = _Form(tuple(found))
            return key
        new = {i for i, (a, b) in enumerate(zip(found, form.first, strict=True)) if a != b}
        if new:
            form.num_values += 1
            form.varied |= new
        return key

    def refuse(self, key: Hashable) -> None:
        """Leave the numbers of these arguments what they are: a function takes no tensors there."""
        self._forms[key].refused = True

    def as_tensors(self, key: Hashable, value: Any, inputs: list[Tensor]) -> tuple[Any, _Numbers]:
        """Return arguments with tensors in the place of numbers that vary, and these numbers.

        Args:
            key: as :meth:`meet` returned it.
            value: the arguments.
            inputs: their tensors, by which the numbers' dtype and device are chosen.
        """
        form = self._forms.get(key)
        if form is None or form.refused or form.num_values <= _MAX_CONSTANTS:
            return value, ()
        is_double = any(tensor.dtype == torch.float64 for tensor in inputs)
        dtype = torch.float64 if is_double else torch.get_default_dtype()
        device = inputs[0].device if inputs else None
        numbers: list[int | float] = []
        _masked(value, numbers)
        new: list[int | float | Tensor] = list(numbers)
        for i in form.varied:
            kind = None if isinstance(numbers[i], int) else dtype
            new[i] = torch.tensor(numbers[i], dtype=kind, device=device)
        varying = tuple(n for i, n in enumerate(numbers) if i in form.varied)
        return rebuilt(value, iter(new), _is_number), varying


def _is_number(value: object) -> bool:
    """Return whether a value is a plain number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _masked(value: Any, found: list[int | float]) -> Hashable:
    """Return arguments without their numbers, hashable, and collect these."""
    if _is_number(value):
        found.append(value)
        return str(type(value))
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return (type(value), *(_masked(item, found) for item in value))
    if isinstance(value, dict):
        return (dict, *value, *(_masked(item, found) for item in value.values()))
    key: Hashable = value
    return key
