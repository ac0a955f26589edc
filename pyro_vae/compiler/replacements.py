"""Operations put in the place of others: oneDNN's LSTM layers, and what compiled code needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from pyro_vae import torch_internals
from pyro_vae.compiler.nodes import args_of, calls, is_real
from pyro_vae.torch_internals import Operator

_aten = torch.ops.aten


# --- oneDNN's LSTM with what its gradient needs


def keep_workspaces(graph: fx.Graph) -> None:
    """Have oneDNN's LSTM layers return what their gradients need, whenever the graph runs.

    PyTorch's operator asks whether gradients are recorded at the time, and returns no workspace
    where they are not. In a graph they never are: those that it computes are operations of it.
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
    name: str, schema: str, run: Callable[..., object], shapes: Callable[..., object]
) -> Operator:
    """Return a new operator of our own, pyro_vae::name; ``shapes`` makes its results, but empty."""
    # The compiler must leave the order in memory as it is: oneDNN goes by it.
    _library().define(f"{name}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))
    _library().impl(name, run, "CPU")
    _library().impl(name, shapes, "Meta")
    return cast("Operator", getattr(torch.ops.pyro_vae, name).default)


@functools.cache
def _forward() -> Operator:
    """Return the layer that is called with the size of its workspace, and always fills it."""
    original = _aten.mkldnn_rnn_layer.default
    arguments, results = torch_internals.schema_text(original)

    def run(*args: Any) -> Any:
        with torch_internals.below_autograd(), torch.enable_grad():
            return original(*args[:-1])

    def shapes(*args: Any) -> Any:
        return (*original(*args[:-1])[:3], args[0].new_empty(args[-1], dtype=torch.uint8))

    return _define("lstm_layer", f"({arguments}, int workspace) -> {results}", run, shapes)


@functools.cache
def _backward() -> Operator:
    original = _aten.mkldnn_rnn_layer_backward.default
    arguments, results = torch_internals.schema_text(original)
    return _define("lstm_layer_backward", f"({arguments}) -> {results}", original, original)


# --- for compiled code: a formula that it does faster, and the same random numbers


def for_compiler(graph: fx.Graph) -> fx.GraphModule:
    """Return a copy of a graph as a module, as the compiler takes it.

    With a formula that compiled code does faster, and draws that it does as they are: results are
    the same to rounding.
    """
    root, own = torch.nn.Module(), fx.Graph()
    own.output(own.graph_copy(graph, {}))
    for node in own.nodes:
        if node.op == "get_attr":
            setattr(root, node.target, node.meta["constant"])
    module = fx.GraphModule(root, own)
    for node in calls(module.graph):
        with module.graph.inserting_before(node):
            value = _bernoulli_draw(node) or _sum_by_products(node)
        if value is not None:
            node.replace_all_uses_with(value)
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def _bernoulli_draw(node: fx.Node) -> fx.Node | None:
    """Return the same draw by the operator in place, which the compiler leaves as it is.

    Of torch.bernoulli it makes a comparison with uniform numbers, which are others than those that
    PyTorch's kernel draws: on a CUDA device, and on the CPU in float64.
    """
    if node.target is not _aten.bernoulli.default or node.kwargs:
        return None
    probabilities = args_of(node)[0]
    contiguous: dict[str, Any] = {"memory_format": torch.contiguous_format}
    empty = node.graph.call_function(_aten.empty_like.default, (probabilities,), contiguous)
    return node.graph.call_function(_aten.bernoulli_.Tensor, (empty, probabilities))


def _sum_by_products(node: fx.Node) -> fx.Node | None:
    r"""Take few logarithms in a sum of log densities of Bernoulli variables with given logits l.

    The sum of log(1 + exp(-|l|)) over a group is the logarithm of a product, and a logarithm
    costs more than all the rest:

    .. math:: \log p(x | l) = x l - \max(l, 0) - \log(1 + e^{-|l|})
    """
    loss, is_negative = _bernoulli_loss(node)
    if loss is None:
        return None
    shape = args_of(loss)[0].meta["val"].shape
    groups = _num_factors(shape[-1]) if args_of(node)[1] in ([-1], [len(shape) - 1]) else 0
    if not groups:
        return None
    # By operators, and not by methods, so that PyTorch keeps what is compiled on disk.
    call, (logits, x) = node.graph.call_function, args_of(loss)[:2]
    parts = [*shape[:-1], groups, shape[-1] // groups]
    decay = call(
        _aten.exp.default, (call(_aten.neg.default, (call(_aten.abs.default, (logits,)),)),)
    )
    factors = call(_aten.reshape.default, (call(_aten.add.Scalar, (decay, 1.0)), parts))
    logs = call(_aten.log.default, (call(_aten.prod.dim_int, (factors, -2)),))
    # In the products' order, so that both are one loop over the numbers.
    positive = call(_aten.clamp_min.default, (logits, 0.0))
    rest = call(_aten.sub.Tensor, (call(_aten.mul.Tensor, (logits, x)), positive))
    rest = call(_aten.sum.dim_IntList, (call(_aten.reshape.default, (rest, parts)), [-2]))
    value = call(_aten.sum.dim_IntList, (call(_aten.sub.Tensor, (rest, logs)), [-1]))
    return value if is_negative else call(_aten.neg.default, (value,))


def _bernoulli_loss(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """Return the binary cross entropy that a node sums, number by number, and whether negated."""
    if node.target is not _aten.sum.dim_IntList or len(node.args) != 2 or node.kwargs:
        return None, False
    source = args_of(node)[0]
    is_negative = source.target is _aten.neg.default
    loss = args_of(source)[0] if is_negative else source
    if loss.target is not _aten.binary_cross_entropy_with_logits.default or loss.kwargs:
        return None, False
    logits, _, *weights = args_of(loss)
    if weights not in ([None, None, 0],) or not is_real(logits):
        return None, False  # in half precision, products would overflow
    return loss, is_negative


def _num_factors(size: int) -> int:
    """Return how many factors to multiply before a logarithm; 0 where there is nothing to gain.

    Products of 64 numbers of at most two are far from overflow, and slices of a multiple of
    eight fill vectors.
    """
    able = [g for g in range(2, 65) if size % g == 0 and size // g >= 16]
    return max(able, key=lambda g: (size // g % 8 == 0, g), default=0)
