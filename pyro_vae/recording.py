"""Whether tensor operations are being recorded into a graph, and which are one expression."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, fx

from pyro_vae.torch_internals import Operator, is_pure, node_of

_num_traces = [0]  # under way


def is_recording() -> bool:
    """Return whether a function is being traced now.

    What Python does with numbers in tensors would be no part of the graph. Checks that can only
    raise an error are left out then: they were made in an earlier run.
    """
    return _num_traces[0] > 0


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Have :func:`is_recording` return True inside the context."""
    _num_traces[0] += 1
    try:
        yield
    finally:
        _num_traces[0] -= 1


def same_expression(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of a trace come from the same inputs by the same operations.

    Their numbers are then equal whenever the graph runs, not only in the run that is traced.
    """
    nodes = node_of(one), node_of(other)
    return None not in nodes and _is_same(*nodes)


def _is_same(one: object, other: object) -> bool:
    """Return whether two nodes, or arguments of nodes, are one expression."""
    if one is other:
        return True
    if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
        return type(one) is type(other) and bool(one == other)
    if one.op != "call_function" or one.target is not other.target:
        return False
    pure = isinstance(one.target, Operator) and is_pure(one.target)
    parts = ([*node.args, *node.kwargs.values()] for node in (one, other))
    return pure and all(_is_same(*pair) for pair in zip(*parts, strict=False))
