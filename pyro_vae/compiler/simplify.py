"""What shortens the replay of a graph without changing a result: less to do, and less memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from pyro_vae.compiler.nodes import base_of, calls, is_real, key_of, viewed_by, written_nodes
from pyro_vae.recording import is_pure

__all__ = ["in_place", "simplify"]

_aten = torch.ops.aten
# A constant that is worked out ahead is kept as long as the graph.
_FOLDED_ELEMENTS = 2**20
# Show the numbers of their input in another shape, all of them where there are as many.
_RESHAPES = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten._reshape_alias.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.slice.Tensor,
    _aten.select.int,
}
# Take nothing of their first argument but its shape and kind.
_LIKE = {
    _aten.ones_like.default,
    _aten.zeros_like.default,
    _aten.full_like.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
}
# Have a form that writes its result over the first argument.
_IN_PLACE = {
    _aten.abs.default: _aten.abs_.default,
    _aten.add.Tensor: _aten.add_.Tensor,
    _aten.clamp_min.default: _aten.clamp_min_.default,
    _aten.div.Tensor: _aten.div_.Tensor,
    _aten.exp.default: _aten.exp_.default,
    _aten.log.default: _aten.log_.default,
    _aten.mul.Scalar: _aten.mul_.Scalar,
    _aten.mul.Tensor: _aten.mul_.Tensor,
    _aten.neg.default: _aten.neg_.default,
    _aten.pow.Tensor_Scalar: _aten.pow_.Scalar,
    _aten.relu.default: _aten.relu_.default,
    _aten.sigmoid.default: _aten.sigmoid_.default,
    _aten.sqrt.default: _aten.sqrt_.default,
    _aten.sub.Tensor: _aten.sub_.Tensor,
    _aten.tanh.default: _aten.tanh_.default,
}
# Of one tensor, number by number, rounded as IEEE says: the same wherever the number stands.
_UNARY = {_aten.abs.default, _aten.mul.Scalar, _aten.neg.default, _aten.sqrt.default}
# Of two; results lie in memory as the one does that is whole.
_BINARY = {_aten.add.Tensor, _aten.div.Tensor, _aten.mul.Tensor, _aten.sub.Tensor}
_SUMS = {_aten.sum.default, _aten.sum.dim_IntList}
_COMMUTE = {_aten.add.Tensor, _aten.mul.Tensor}


def simplify(graph: fx.Graph) -> None:
    """Leave out what has no effect: a replay pays for each operation, however small.

    Results are the same to the last bit, but for the sign of a zero, and random numbers are drawn
    as before.
    """
    written = written_nodes(graph)
    _fold(graph, written)
    _drop_neutral(graph, written)
    _shorten(graph, written)
    _drop_neutral(graph, written)
    _negate_sums(graph, written)
    _expand_last(graph, written)
    _merge_equal(graph, written)
    _own_outputs(graph)
    _drop_unused(graph)
    graph.lint()


def in_place(graph: fx.Graph) -> dict[Any, tuple[OpOverload, tuple[Any, ...]]]:
    """Return the operations that may write over an argument, which nobody needs after them.

    Each with the operator and the arguments to call it with. Numbers stay in the cache, and the
    results are the same.
    """
    last: dict[Any, int] = {}  # use of a tensor's memory
    for i, node in enumerate(graph.nodes):
        last.update((base_of(used), i) for used in node.all_input_nodes)
    found = {}
    for i, node in enumerate(graph.nodes):
        if node.target not in _IN_PLACE:
            continue
        orders = [tuple(node.args)]
        if node.target in _COMMUTE and not node.kwargs and all(map(is_real, node.args)):
            orders.append(tuple(reversed(node.args)))  # in half precision a scalar may round
        for first, *others in orders:
            if (
                isinstance(first, fx.Node)
                and first.op == "call_function"
                and viewed_by(first) is None
                and last[first] == i
                and _geometry(first) == _geometry(node)
                and all(base_of(n) is not first for n in others if isinstance(n, fx.Node))
            ):
                found[node] = _IN_PLACE[node.target], (first, *others)
                break
    return found


def _fold(graph: fx.Graph, written: set[Any]) -> None:
    """Work out what depends on no input: the seeds of gradients above all."""
    for node in calls(graph):
        sources = node.all_input_nodes
        like = node.target in _LIKE
        factory = not sources and "empty" not in str(node.target)
        constant = all("constant" in s.meta for s in sources)
        if (
            not is_pure(node)
            or not (like or factory or (sources and constant))
            or base_of(node) in written
            or not isinstance(node.meta.get("val"), Tensor)
            or node.meta["val"].numel() > _FOLDED_ELEMENTS
        ):
            continue
        if like:
            arguments = (_blank(node.args[0]), *node.args[1:])
        else:
            arguments = fx.node.map_arg(node.args, lambda n: n.meta["constant"])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["constant"])
        with torch.no_grad():
            value = node.target(*arguments, **kwargs)
        with graph.inserting_before(node):
            folded = graph.create_node("get_attr", f"folded_{node.name}")
        folded.meta.update(constant=value, val=value)
        node.replace_all_uses_with(folded)
        graph.erase_node(node)


def _blank(node: Any) -> Tensor:
    """Return a tensor of a node's shape and kind, with any numbers in it."""
    val = node.meta["val"]
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)


def _drop_neutral(graph: fx.Graph, written: set[Any]) -> None:
    """Leave out views that change nothing, and multiplications by one."""
    for node in calls(graph):
        if _is_unsqueezed(node) and not _is_written([node, node.args[0]], written):
            with graph.inserting_before(node):
                same = graph.call_function(_aten.unsqueeze.default, (node.args[0], node.args[2]))
            same.meta.update(node.meta)
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            node = same
        same = _same_view(node) or _same_number(node)
        if same is None:
            continue
        # The result of an operation is memory of its own: not to be shared where it is written to.
        if viewed_by(node) is None and _is_written([node, same], written):
            continue
        node.replace_all_uses_with(same)
        graph.erase_node(node)


def _shorten(graph: fx.Graph, written: set[Any]) -> None:
    """Put one operation in the place of several that come to the same."""
    for node in calls(graph):
        if node.kwargs or _is_written([node, *node.all_input_nodes], written):
            continue
        shorter = _shorter(node)
        # What it takes, it takes later than those operations that it stands for did.
        if shorter is None or _is_written(_nodes_in(shorter[1]), written):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(*shorter)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _shorter(node: Any) -> tuple[OpOverload, tuple[Any, ...]] | None:
    """Return an operator and arguments that give what a node gives; None if none is known."""
    args, source = node.args, _first(node)
    shape: Any = getattr(node.meta.get("val"), "shape", None)
    if node.target in _SUMS and is_real(node) and is_real(source):
        if source.meta["val"].numel() == 1 and _same_dtype(source, node):
            return _aten.view.default, (source, list(shape))
        if source.target is _aten.stack.default and len(source.args[0]) == 2 and shape == ():
            left, right = source.args[0]
            alike = _same_dtype(left, node) and _same_dtype(right, node)
            if alike and left.meta["val"].shape == () and len(source.users) == 1:
                return _aten.add.Tensor, (left, right)
    if node.target is _aten.stack.default and len(source) == 1:
        dim = args[1] if len(args) > 1 else 0
        if source[0].meta["val"].unsqueeze(dim).stride() == node.meta["val"].stride():
            return _aten.unsqueeze.default, (source[0], dim)
    if node.target is _aten.view.default and source.target is _aten.sum.dim_IntList:
        summed, dims, *kept = source.args
        if kept == [True] and dims and not source.kwargs and len(source.users) == 1:
            size = summed.meta["val"].shape
            left_over = [n for i, n in enumerate(size) if not {i, i - len(size)} & set(dims)]
            if list(shape) == left_over:
                return _aten.sum.dim_IntList, (summed, dims)
    if node.target is _aten.add.Tensor and len(args) == 2:
        return _stacked(*args)
    return None


def _same_dtype(left: Any, right: Any) -> bool:
    return bool(left.meta["val"].dtype == right.meta["val"].dtype)


def _first(node: Any) -> Any:
    return node.args[0] if node.args else None


def _stacked(left: Any, right: Any) -> tuple[OpOverload, tuple[Any, ...]] | None:
    """Return the stack of two numbers' slices that a sum of their gradients by select() is."""
    for part in (left, right):
        if not isinstance(part, fx.Node) or part.target is not _aten.select_backward.default:
            return None
    (first, sizes, dim, i), (second, other_sizes, other_dim, j) = left.args, right.args
    if (list(sizes), dim) != (list(other_sizes), other_dim) or sizes[dim] != 2:
        return None
    if {i % 2, j % 2} != {0, 1} or not _same_dtype(first, second):
        return None
    return _aten.stack.default, ([first, second] if i % 2 == 0 else [second, first], dim)


def _negate_sums(graph: fx.Graph, written: set[Any]) -> None:
    """Take the negative of a sum for the sum of negatives: fewer numbers, and the same."""
    for node in calls(graph):
        if node.target is not _aten.sum.dim_IntList or node.kwargs or not is_real(node):
            continue
        negative = node.args[0]
        if negative.target is not _aten.neg.default or len(negative.users) > 1:
            continue
        if _is_written([node, negative, negative.args[0]], written):
            continue
        if _geometry(negative) != _geometry(negative.args[0]):
            continue  # with gaps in memory, a sum goes in another order
        with graph.inserting_before(node):
            total = graph.call_function(node.target, (negative.args[0], *node.args[1:]))
            value = graph.call_function(_aten.neg.default, (total,))
        total.meta.update(node.meta)
        value.meta.update(node.meta)
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def _expand_last(graph: fx.Graph, written: set[Any]) -> None:
    """Work out a number once that stands in many places: the weight of all that one datum has."""
    for node in calls(graph):
        wide = _first(node)
        if node.target not in _UNARY or wide.target is not _aten.expand.default:
            continue
        narrow: Any = wide.args[0]
        value = narrow.meta["val"]
        if (
            node.meta["val"].dtype != value.dtype
            or not value.is_contiguous()
            or _is_written([node, narrow], written)
            or not all(_goes_with_a_whole_one(user, node) for user in node.users)
        ):
            continue
        with graph.inserting_before(node):
            small = graph.call_function(node.target, (narrow, *node.args[1:]), node.kwargs)
            again = graph.call_function(wide.target, (small, *wide.args[1:]), wide.kwargs)
        small.meta["val"] = torch.empty_like(value)
        again.meta["val"] = small.meta["val"].expand(node.meta["val"].shape)
        node.replace_all_uses_with(again)
        graph.erase_node(node)


def _goes_with_a_whole_one(user: Any, node: Any) -> bool:
    """Whether an operation has another argument that tells how its result lies in memory."""
    return user.target in _BINARY and any(
        isinstance(other, fx.Node)
        and _geometry(other) == _geometry(node) == _geometry(user)
        and other.target is not _aten.expand.default
        and other is not node
        for other in user.args
    )


def _is_written(nodes: Iterable[Any], written: set[Any]) -> bool:
    """Whether some operation writes to the memory of one of these."""
    return any(base_of(node) in written for node in nodes)


def _nodes_in(args: tuple[Any, ...]) -> list[Any]:
    found: list[Any] = []
    fx.node.map_arg(args, found.append)
    return found


def _is_unsqueezed(node: Any) -> bool:
    """Whether a node is the gradient of the one row there is: the same numbers, as they lie."""
    if node.target is not _aten.select_backward.default:
        return False
    source, sizes, dim, _ = node.args
    if sizes[dim] != 1:
        return False
    view, value = source.meta["val"].unsqueeze(dim), node.meta["val"]
    return (view.shape, view.stride()) == (value.shape, value.stride())


def _geometry(node: Any) -> Any:
    value = node.meta.get("val")
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else None


def _same_view(node: Any) -> Any:
    """Return the tensor that a chain of views ends up at again; None if at no earlier one."""
    mine, source, found = _geometry(node), node, None
    while mine is not None and source.target in _RESHAPES:
        source = source.args[0]
        # One that leaves numbers out may come back with the same shape, at another place.
        if _geometry(source) is None or source.meta["val"].numel() != node.meta["val"].numel():
            break
        if _geometry(source) == mine:
            found = source
    return found


def _same_number(node: Any) -> Any:
    """Return what a node multiplies or divides by one, or takes zero from, or to the power one."""
    if _geometry(node) is None or node.meta["val"].is_complex():
        return None  # infinities and zeros of two parts follow rules of their own
    if node.target is _aten.pow.Tensor_Scalar and node.args[1] == 1:
        return node.args[0] if _geometry(node.args[0]) == _geometry(node) else None
    if node.target is _aten.sub.Tensor and not node.kwargs and _is_zero(node.args[1]):
        return node.args[0] if _geometry(node.args[0]) == _geometry(node) else None
    if node.target in (_aten.mul.Tensor, _aten.div.Tensor) and not node.kwargs:
        left, right = node.args
        if _is_one(right) and _geometry(left) == _geometry(node):
            return left
        if (
            node.target is _aten.mul.Tensor
            and _is_one(left)
            and _geometry(right) == _geometry(node)
        ):
            return right
    return None


def _is_zero(value: Any) -> bool:
    if isinstance(value, fx.Node):
        constant = value.meta.get("constant")
        return constant is not None and bool(((constant == 0) & ~constant.signbit()).all())
    return type(value) in (int, float) and value == 0 and math.copysign(1, value) == 1


def _is_one(value: Any) -> bool:
    if isinstance(value, fx.Node):
        constant = value.meta.get("constant")
        return constant is not None and bool((constant == 1).all())
    return type(value) in (int, float) and value == 1


def _merge_equal(graph: fx.Graph, written: set[Any]) -> None:
    """Do once what is done twice on the same inputs."""
    seen: dict[Any, Any] = {}
    for node in calls(graph):
        if not is_pure(node):
            continue
        if _is_written([node, *node.all_input_nodes], written):
            continue
        key = (node.target, key_of(node.args), key_of(tuple(sorted(node.kwargs.items()))))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _drop_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        unused = not node.users and node.op in ("call_function", "get_attr")
        if unused and (node.op == "get_attr" or _has_no_effect(node)):
            graph.erase_node(node)


def _has_no_effect(node: Any) -> bool:
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    if node.target.namespace == "profiler":
        return True
    # Random numbers that are not used are drawn all the same: the next ones come after them.
    return is_pure(node) and bool(node.target._schema.returns)


def _own_outputs(graph: fx.Graph) -> None:
    """Copy what would be handed out twice, or is an input's: each result is its receiver's own."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    given, results = set[Any](), []
    for value in output.args[0]:
        if isinstance(value, fx.Node):
            base = base_of(value)
            if base in given or base.op != "call_function":
                with graph.inserting_before(output):
                    copy = graph.call_function(_aten.clone.default, (value,))
                copy.meta.update(value.meta)
                copy.meta.pop("constant", None)
                value = copy
            given.add(base)
        results.append(value)
    output.args = (tuple(results),)
