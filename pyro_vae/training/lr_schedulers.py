"""Learning rate schedulers that callbacks are, or hold: their state is part of a run's."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Objects that are not searched, and how many entries of others are.
_CLOSED = (type, types.ModuleType, torch.Tensor, torch.nn.Module, Optimizer, LRScheduler)
_LONG = 50
_EMPTY = types.CellType()


def schedulers_of(callbacks: Iterable[object], optimizer: Optimizer) -> list[LRScheduler]:
    """Return the learning rate schedulers of an optimizer that callbacks are, or hold.

    Raises:
        ValueError: where a scheduler moves the optimizer that no callback is seen to hold, so
            that its state would be lost.
    """
    found = {
        id(value): value
        for callback in callbacks
        for value in _held(callback)
        if isinstance(value, LRScheduler) and value.optimizer is optimizer
    }
    if hasattr(optimizer.step, "_wrapped_by_lr_sched") and not found:
        raise ValueError(
            "checkpoint: a learning rate scheduler has the optimizer and is in no callback, so its "
            "state would be lost; pass callbacks=[scheduler], which takes a step after each epoch"
        )
    return list(found.values())


def _held(value: object, depth: int = 3) -> Iterator[object]:
    """Yield an object, and those that it holds, directly or through others."""
    yield value
    if depth > 0 and not isinstance(value, _CLOSED):
        for item in _parts(value):
            yield from _held(item, depth - 1)


def _parts(value: Any) -> Sequence[object]:
    """Return the objects in a value: in its closure, in globals that it names, its attributes."""
    if isinstance(value, Mapping):
        return list(value.values())[:_LONG]
    if isinstance(value, (list, tuple)):
        return value[:_LONG]
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        return [*cells, *named, *(value.__defaults__ or ())]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    return list(getattr(value, "__dict__", {}).values())[:_LONG]
