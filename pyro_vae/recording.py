"""Whether tensor operations are being recorded into a graph, and which are one expression."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

__all__ = ["is_pure", "is_recording", "same_expression"]


# How many traces are under way: a check that only raises errors has no place in a graph.
_under_way = [0]


def is_recording() -> bool:
    """Whether a function is being traced now.

    What it does with numbers in tensors would be no part of the graph. Checks that can but
    raise an error may be left out: they have been made in a run before.
    """
    return _under_way[0] > 0


def same_expression(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a trace come from the same inputs by the same operations.

    Then their numbers are equal whenever the graph runs, which a look at them would not tell.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, has_proxy_slot

    mode = get_proxy_mode()
    if mode is None or not all(has_proxy_slot(t, mode.tracer) for t in (one, other)):
        return False
    nodes = (get_proxy_slot(t, mode.tracer).proxy.node for t in (one, other))
    return same_node(*nodes)


def same_node(one: Any, other: Any) -> bool:
    if one is other or not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
        return one is other or (type(one) is type(other) and bool(one == other))
    if one.op != "call_function" or one.target is not other.target:
        return False
    pure = isinstance(one.target, OpOverload) and is_pure(one)
    parts = ([*node.args, *node.kwargs.values()] for node in (one, other))
    return pure and all(same_node(*pair) for pair in zip(*parts, strict=False))


@contextlib.contextmanager
def recording() -> Iterator[None]:
    _under_way[0] += 1
    try:
        yield
    finally:
        _under_way[0] -= 1


# Batch normalization writes to its running statistics, though its schema does not say so.
SILENTLY_WRITTEN = {"running_mean", "running_var"}


def writes_to_arguments(target: OpOverload) -> bool:
    schema = target._schema
    return schema.is_mutable or any(a.name in SILENTLY_WRITTEN for a in schema.arguments)


def is_pure(node: Any) -> bool:
    """Whether a call neither writes to an argument nor draws random numbers."""
    target = node.target
    return not writes_to_arguments(target) and torch.Tag.nondeterministic_seeded not in target.tags
