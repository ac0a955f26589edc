"""Operators for recurrent layers in a graph: oneDNN's LSTM with what its gradient needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae import torch_internals
from pyro_vae.compiler.nodes import args_of, calls
from pyro_vae.torch_internals import Operator

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
        workspace = args_of(node)[-1]
        layer = workspace.args[0]  # whose fourth result it is
        if layer.target is _aten.mkldnn_rnn_layer.default:
            layer.target = _forward()
            layer.args = (*layer.args, workspace.meta["val"].numel())
        node.target = _backward()


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("pyro_vae", "FRAGMENT")


def _define(
    name: str,
    schema: str,
    run: Callable[..., tuple[Tensor, ...]],
    shapes: Callable[..., tuple[Tensor, ...]],
) -> Operator:
    """Define an operator of our own, where the first graph needs it, and return it.

    Args:
        name: of the operator, in the namespace pyro_vae.
        schema: its arguments and results.
        run: computes the results.
        shapes: makes results of the same shapes and strides.
    """
    library = _library()
    # The compiler must leave the order in memory as it is: oneDNN goes by it.
    library.define(f"{name}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))
    library.impl(name, run, "CPU")
    library.impl(name, shapes, "Meta")
    defined: Operator = getattr(torch.ops.pyro_vae, name).default
    return defined


@functools.cache
def _forward() -> Operator:
    """Return the layer that is called with the size of its workspace, and always fills it."""
    original = _aten.mkldnn_rnn_layer.default
    arguments, results = torch_internals.schema_text(original)

    def run(*args: Any) -> tuple[Tensor, ...]:
        with torch_internals.below_autograd(), torch.enable_grad():
            results: tuple[Tensor, ...] = original(*args[:-1])
        return results

    def shapes(*args: Any) -> tuple[Tensor, ...]:
        workspace = args[0].new_empty(args[-1], dtype=torch.uint8)
        return (*original(*args[:-1])[:3], workspace)

    return _define("lstm_layer", f"({arguments}, int workspace) -> {results}", run, shapes)


@functools.cache
def _backward() -> Operator:
    original = _aten.mkldnn_rnn_layer_backward.default
    arguments, results = torch_internals.schema_text(original)
    return _define("lstm_layer_backward", f"({arguments}) -> {results}", original, original)
