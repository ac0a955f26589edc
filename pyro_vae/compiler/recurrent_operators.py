"""Operators for recurrent layers in a graph: oneDNN's LSTM with what its gradient needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.compiler.nodes import calls

__all__ = ["keep_workspaces"]

_aten = torch.ops.aten


def keep_workspaces(graph: fx.Graph) -> None:
    """Have oneDNN's LSTM layers return what their gradients need, whenever the graph runs.

    PyTorch's operator asks whether gradients are recorded at the time, and returns no workspace
    where they are not. In a graph they never are: those that it computes are operations of it.

    Args:
        graph: changed in place.
    """
    for node in calls(graph):
        if node.target is not _aten.mkldnn_rnn_layer_backward.default:
            continue
        workspace = node.args[-1]
        layer = workspace.args[0]  # whose fourth result it is
        if layer.target is _aten.mkldnn_rnn_layer.default:
            layer.target = _forward()
            layer.args = (*layer.args, workspace.meta["val"].numel())
        node.target = _backward()


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("pyro_vae", "FRAGMENT")


def _define(name: str, schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """Return an operator of our own, which PyTorch learns of where the first graph needs it."""
    library = _library()
    # The compiler must leave the order in memory as it is: oneDNN goes by it.
    library.define(f"{name}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))
    library.impl(name, run, "CPU")
    library.impl(name, shapes, "Meta")
    return getattr(torch.ops.pyro_vae, name).default


@functools.cache
def _forward() -> Any:
    original = _aten.mkldnn_rnn_layer.default
    arguments, results = str(original._schema).partition("(")[2].split(") -> ")

    def run(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
            results: tuple[Tensor, ...] = original(*args[:-1])
        return results

    def shapes(*args: Any) -> tuple[Tensor, ...]:
        workspace = args[0].new_empty(args[-1], dtype=torch.uint8)
        return (*original(*args[:-1])[:3], workspace)

    return _define("lstm_layer", f"({arguments}, int workspace) -> {results}", run, shapes)


@functools.cache
def _backward() -> Any:
    original = _aten.mkldnn_rnn_layer_backward.default
    schema = "(" + str(original._schema).partition("(")[2]
    return _define("lstm_layer_backward", schema, original, original)
