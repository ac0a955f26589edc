"""What shortens the replay of a graph without changing a result: less to do, and less memory."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from pyro_vae import torch_internals
from pyro_vae.compiler import nodes
from pyro_vae.compiler.nodes import args_of, calls, constant_of, is_real, is_written, layout
from pyro_vae.torch_internals import Operator, is_pure

_aten = torch.ops.aten
# A constant that is worked out ahead is kept as long as the graph.
_MAX_FOLDED_ELEMENTS = 2**20
# Show the numbers of their input in another shape, all of them where there are as many.
_RESHAPES = {
    *(_aten.view.default, torch_internals.UNSAFE_VIEW, torch_internals.RESHAPE_ALIAS),
    *(_aten.detach.default, _aten.alias.default, _aten.expand.default, _aten.permute.default),
    *(_aten.t.default, _aten.transpose.int, _aten.unsqueeze.default, _aten.squeeze.default),
    *(_aten.squeeze.dim, _aten.squeeze.dims, _aten.slice.Tensor, _aten.select.int),
}
# Give their first argument where the second is one.
_BY_ONE = {_aten.div.Tensor, _aten.mul.Tensor, _aten.pow.Tensor_Scalar}

# A call that gives what a node gives: the operator, and nodes and plain values.
_Call: TypeAlias = tuple[Operator, tuple[Any, ...]]
# From a node to what gives the same: another node, or a call; None where there is nothing.
_Rule: TypeAlias = Callable[[fx.Node], fx.Node | _Call | None]


def simplify(graph: fx.Graph) -> None:
    """Leave out what has no effect: a replay pays for each operation, however small.

    Results are the same to the last bit, but for the sign of a zero, and random numbers are drawn
    as before.
    """
    written = nodes.written_nodes(graph)
    _fold(graph, written)
    for rule in (_single_row, _neutral, _shorter, _single_row, _neutral):
        _apply(graph, rule, written)
    _merge_equal(graph, written)
    _own_outputs(graph)
    _drop_unused(graph)
    graph.lint()


def _apply(graph: fx.Graph, rule: _Rule, written: set[fx.Node]) -> None:
    """Put what a rule finds in the place of nodes, but where memory is written to."""
    for node in calls(graph):
        new = rule(node)
        if new is None:
            continue
        # A view shares its memory either way. A result is memory of its own; and what is read in
        # the place of it is read later, or earlier, than it was.
        is_view = isinstance(new, fx.Node) and nodes.viewed_by(node) is not None
        read = [new] if isinstance(new, fx.Node) else nodes.nodes_in((new[1], node.args))
        if not is_view and is_written([node, *read], written):
            continue
        if not isinstance(new, fx.Node):
            with graph.inserting_before(node):
                new = graph.call_function(*new)
            new.meta.update(node.meta)
        _replace(graph, node, new)


def _replace(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    """Put one node in the place of another."""
    node.replace_all_uses_with(new)
    graph.erase_node(node)


# --- constants


def _fold(graph: fx.Graph, written: set[fx.Node]) -> None:
    """Work out what depends on no input: the seeds of gradients above all."""
    for node in calls(graph):
        if not _is_constant(node) or is_written([node], written):
            continue
        target: Any = node.target
        args = args_of(node)
        if target in nodes.LIKE:  # of a tensor with any numbers in it
            like = _val(args[0])
            blank = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=like.device
            )
            args = (blank, *args[1:])
        found: Any = (args, dict(node.kwargs))
        args, kwargs = fx.node.map_arg(found, lambda n: n.meta["constant"])
        with torch.no_grad():
            value = target(*args, **kwargs)
        with graph.inserting_before(node):
            folded = graph.create_node("get_attr", f"folded_{node.name}")
        folded.meta.update(constant=value, val=value)
        _replace(graph, node, folded)


def _is_constant(node: fx.Node) -> bool:
    """Return whether a call depends on no input, and its result is not too large to keep."""
    value, target = nodes.value_of(node), node.target
    if not isinstance(target, Operator) or not is_pure(target) or value is None:
        return False
    if value.numel() > _MAX_FOLDED_ELEMENTS:
        return False
    if not node.all_input_nodes:
        return "empty" not in str(target)
    return target in nodes.LIKE or all(constant_of(n) is not None for n in node.all_input_nodes)


def _is_one(value: object) -> bool:
    """Return whether a value is the number one, or a constant filled with ones."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == 1
    constant = constant_of(value)
    return constant is not None and bool((constant == 1).all())


# --- operations without effect


def _single_row(node: fx.Node) -> _Call | None:
    """Return the view that the gradient of the only row is: the same numbers, as they lie."""
    if node.target is not _aten.select_backward.default:
        return None
    source, sizes, dim, _ = args_of(node)
    return _as_unsqueezed(node, source, dim) if sizes[dim] == 1 else None


def _as_unsqueezed(node: fx.Node, source: fx.Node, dim: int) -> _Call | None:
    """Return a view with one dimension more, where its numbers lie as those of a node do."""
    view, value = _val(source).unsqueeze(dim), _val(node)
    alike = (view.shape, view.stride()) == (value.shape, value.stride())
    return (_aten.unsqueeze.default, (source, dim)) if alike else None


def _val(node: fx.Node) -> Tensor:
    """Return the tensor that a node stood for, which is one tensor."""
    value: Tensor = node.meta["val"]
    return value


def _neutral(node: fx.Node) -> fx.Node | None:
    """Return the node whose numbers another one repeats: by views, by a product with one."""
    return _same_view(node) or _same_number(node)


def _same_view(node: fx.Node) -> fx.Node | None:
    """Return the tensor that a chain of views ends up at again; None if at no earlier one."""
    mine, source, found = layout(node), node, None
    while mine is not None and source.target in _RESHAPES:
        source = args_of(source)[0]
        value = nodes.value_of(source)
        # One that leaves numbers out may come back with the same shape, at another place.
        if value is None or value.numel() != _val(node).numel():
            break
        if layout(source) == mine:
            found = source
    return found


def _same_number(node: fx.Node) -> fx.Node | None:
    """Return what a node multiplies or divides by one, or takes to the power of one."""
    value = nodes.value_of(node)
    if value is None or value.is_complex() or node.kwargs or node.target not in _BY_ONE:
        return None  # infinities and zeros of two complex parts follow rules of their own
    pairs = [args_of(node)]
    if node.target is _aten.mul.Tensor:
        pairs.append(pairs[0][::-1])
    same = (first for first, one in pairs if _is_one(one) and layout(first) == layout(node))
    return next(same, None)


# --- one operation for several


def _shorter(node: fx.Node) -> _Call | None:
    """Return the one call that gives what a node and those before it give."""
    rules = _SHORTER.get(node.target, ()) if not node.kwargs else ()
    return next((call for rule in rules if (call := rule(node)) is not None), None)


def _sum_of_one(node: fx.Node) -> _Call | None:
    """Return the view that the sum of a single number is."""
    source = args_of(node)[0]
    if not is_real(node) or _val(source).numel() != 1 or _val(source).dtype != _val(node).dtype:
        return None
    return _aten.view.default, (source, list(_val(node).shape))


def _sum_of_two(node: fx.Node) -> _Call | None:
    """Return the addition that the sum of a stack of two numbers is."""
    stack, value = args_of(node)[0], _val(node)
    if stack.target is not _aten.stack.default or len(stack.users) > 1 or not is_real(node):
        return None
    parts = args_of(stack)[0]
    alike = all(_val(p).shape == () and _val(p).dtype == value.dtype for p in parts)
    return (_aten.add.Tensor, (*parts,)) if len(parts) == 2 and alike and not value.ndim else None


def _stack_of_one(node: fx.Node) -> _Call | None:
    """Return the view that a stack of one tensor is."""
    parts, dim = (*args_of(node), 0)[:2]
    return _as_unsqueezed(node, parts[0], dim) if len(parts) == 1 else None


def _sum_that_keeps(node: fx.Node) -> _Call | None:
    """Return the sum that drops the dimensions which one keeps, and a view drops."""
    source = args_of(node)[0]
    if source.target is not _aten.sum.dim_IntList or source.kwargs or len(source.users) > 1:
        return None
    summed, dims, *keepdim = args_of(source)
    size = _val(summed).shape
    if keepdim != [True] or not dims:
        return None
    left = [n for i, n in enumerate(size) if not {i, i - len(size)} & set(dims)]
    return (_aten.sum.dim_IntList, (summed, dims)) if list(_val(node).shape) == left else None


def _sum_of_columns(node: fx.Node) -> _Call | None:
    """Return the stack of two numbers' slices that a sum of their gradients by select() is."""
    parts = args_of(node)
    backward = _aten.select_backward.default
    if any(not isinstance(p, fx.Node) or p.target is not backward for p in parts):
        return None
    (first, sizes, dim, i), (second, other_sizes, other_dim, j) = map(args_of, parts)
    if (list(sizes), dim) != (list(other_sizes), other_dim) or sizes[dim] != 2:
        return None
    if {i % 2, j % 2} != {0, 1} or _val(first).dtype != _val(second).dtype:
        return None
    return _aten.stack.default, ([first, second] if i % 2 == 0 else [second, first], dim)


_SHORTER: dict[object, tuple[Callable[[fx.Node], _Call | None], ...]] = {
    _aten.sum.default: (_sum_of_one, _sum_of_two),
    _aten.sum.dim_IntList: (_sum_of_one, _sum_of_two),
    _aten.stack.default: (_stack_of_one,),
    _aten.view.default: (_sum_that_keeps,),
    _aten.add.Tensor: (_sum_of_columns,),
}


# --- the whole graph


def _merge_equal(graph: fx.Graph, written: set[fx.Node]) -> None:
    """Do once what is done twice on the same inputs."""
    seen: dict[Hashable, fx.Node] = {}
    for node in calls(graph):
        target: Any = node.target
        if is_pure(target) and not is_written([node, *node.all_input_nodes], written):
            arguments = nodes.key_of((node.args, tuple(sorted(node.kwargs.items()))))
            first = seen.setdefault((target, arguments), node)
            if first is not node:
                _replace(graph, node, first)


def _drop_unused(graph: fx.Graph) -> None:
    """Leave out what no result depends on, but writes and draws of random numbers."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or _has_no_effect(node)):
            graph.erase_node(node)


def _has_no_effect(node: fx.Node) -> bool:
    """Return whether a call whose result is not used can be left out."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, Operator):
        return target is operator.getitem
    # Random numbers that are not used are drawn all the same: the next ones come after them.
    is_needed = not is_pure(target) or torch_internals.returns_nothing(target)
    return target.namespace == "profiler" or not is_needed


def _own_outputs(graph: fx.Graph) -> None:
    """Copy what would be handed out twice, or is an input's: each result is its receiver's own."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    given, results = set[fx.Node](), []
    for value in output.args[0]:
        if isinstance(value, fx.Node):
            base = nodes.base_of(value)
            if base in given or base.op != "call_function":
                meta = {name: of for name, of in value.meta.items() if name != "constant"}
                with graph.inserting_before(output):
                    value = graph.call_function(_aten.clone.default, (value,))
                value.meta.update(meta)
            given.add(base)
        results.append(value)
    output.args = (tuple(results),)
