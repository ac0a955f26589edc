"""What a traced graph may hold, and what can be left out of it without changing a result."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

__all__ = [
    "ChangingShapesError",
    "check",
    "for_compiler",
    "in_place",
    "lift",
    "simplify",
    "text_of",
    "written_inputs",
]

_aten = torch.ops.aten
# A constant that is worked out ahead is kept as long as the graph.
_FOLDED_ELEMENTS = 2**20
# Share memory with their input, though their schemas do not say so.
_SILENT_VIEWS = {_aten._unsafe_view.default, _aten.lift_fresh.default}
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
# Batch normalization writes to its running statistics, though its schema does not say so.
_SILENTLY_WRITTEN = {"running_mean", "running_var"}
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


class ChangingShapesError(RuntimeError):
    """An operation's result has a shape that depends on the numbers in its input."""


def check(graph: fx.Graph) -> None:
    """Raise ChangingShapesError for shapes that depend on numbers: a graph has but one shape."""
    for node in _calls(graph):
        if node.target is _aten.index.Tensor:
            masks = [i for i in node.args[1] if i is not None and _is_mask(i)]
            if not masks:
                continue
        elif torch.Tag.dynamic_output_shape not in node.target.tags:
            continue
        raise ChangingShapesError(
            f"the shape of what {node.target} returns depends on the numbers in its input"
        )


def _is_mask(node: Any) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


def lift(traced: fx.GraphModule) -> tuple[fx.Graph, list[Tensor]]:
    """Make inputs of the tensors that a traced function found outside of its arguments.

    Returns:
        The graph, whose first inputs they are, and these tensors. Those that the function made
        itself (torch.tensor(3.0)) are constants of the graph.
    """
    made = {
        node.args[0]
        for node in traced.graph.nodes
        if node.target in (_aten.lift_fresh_copy.default, _aten.lift_fresh.default)
    }
    graph, live = fx.Graph(), list[Tensor]()
    lifted: dict[int, Any] = {}
    new: dict[Any, Any] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node not in made:
            tensor = getattr(traced, node.target)
            if id(tensor) not in lifted:
                lifted[id(tensor)] = graph.placeholder(f"live{len(live)}")
                lifted[id(tensor)].meta["val"] = tensor.detach()
                live.append(tensor)
            new[node] = lifted[id(tensor)]
    for node in traced.graph.nodes:
        if node in new:
            continue
        new[node] = graph.node_copy(node, lambda old: new[old])
        if node.op == "get_attr":
            new[node].meta["constant"] = getattr(traced, node.target)
            new[node].meta["val"] = new[node].meta["constant"]
    return graph, live


def simplify(graph: fx.Graph) -> None:
    """Leave out what has no effect: a replay pays for each operation, however small.

    Results are the same to the last bit, but for the sign of a zero, and random numbers are drawn
    as before.
    """
    written = _written(graph)
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


def for_compiler(graph: fx.Graph) -> fx.GraphModule:
    """Return a copy of a graph as a module, with formulas that compiled code does faster.

    Results are the same to rounding.
    """
    root, own, new = torch.nn.Module(), fx.Graph(), dict[Any, Any]()
    own.output(own.graph_copy(graph, new))
    for node in own.nodes:
        if node.op == "get_attr":
            setattr(root, node.target, node.meta["constant"])
    module = fx.GraphModule(root, own)
    for node in _calls(module.graph):
        _sum_by_products(module.graph, node)
    module.graph.lint()
    module.recompile()
    return module


def written_inputs(graph: fx.Graph) -> list[int]:
    """Return the inputs, by their number, whose memory the graph writes to."""
    written = _written(graph)
    inputs = (node for node in graph.nodes if node.op == "placeholder")
    return [i for i, node in enumerate(inputs) if node in written]


def in_place(graph: fx.Graph) -> dict[Any, tuple[OpOverload, tuple[Any, ...]]]:
    """Return the operations that may write over an argument, which nobody needs after them.

    Each with the operator and the arguments to call it with. Numbers stay in the cache, and the
    results are the same.
    """
    last: dict[Any, int] = {}  # use of a tensor's memory
    for i, node in enumerate(graph.nodes):
        last.update((_base(used), i) for used in node.all_input_nodes)
    found = {}
    for i, node in enumerate(graph.nodes):
        if node.target not in _IN_PLACE:
            continue
        orders = [tuple(node.args)]
        if node.target in _COMMUTE and not node.kwargs and all(map(_is_real, node.args)):
            orders.append(tuple(reversed(node.args)))  # in half precision a scalar may round
        for first, *others in orders:
            if (
                isinstance(first, fx.Node)
                and first.op == "call_function"
                and _viewed(first) is None
                and last[first] == i
                and _geometry(first) == _geometry(node)
                and all(_base(n) is not first for n in others if isinstance(n, fx.Node))
            ):
                found[node] = _IN_PLACE[node.target], (first, *others)
                break
    return found


def text_of(graph: fx.Graph) -> tuple[Any, ...]:
    """Return all that a graph says, constants included: equal for graphs that do the same."""
    index = {node: i for i, node in enumerate(graph.nodes)}

    def told(node: Any) -> Any:
        if (constant := node.meta.get("constant")) is not None:
            # A clone has strides of its own: those of an expanded tensor are zero.
            flat = constant.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
            numbers = flat.view(torch.uint8).numpy().tobytes()
            return constant.shape, constant.stride(), constant.dtype, constant.device, numbers
        if node.op == "placeholder":
            return node.op
        named = fx.node.map_arg((node.args, node.kwargs), lambda n: ("node", index[n]))
        return node.target, _key((named[0], tuple(sorted(named[1].items()))))

    return tuple(told(node) for node in graph.nodes)


def _sum_by_products(graph: fx.Graph, node: Any) -> None:
    r"""Take few logarithms in a sum of log densities of Bernoulli variables with given logits l.

    The sum of log(1 + exp(-|l|)) over a group is the logarithm of a product, and a logarithm
    costs more than all the rest:

    .. math:: \log p(x | l) = x l - \max(l, 0) - \log(1 + e^{-|l|})
    """
    if node.target is not _aten.sum.dim_IntList or len(node.args) != 2 or node.kwargs:
        return
    source: Any = node.args[0]
    dims = node.args[1]
    negative = isinstance(source, fx.Node) and source.target is _aten.neg.default
    loss: Any = source.args[0] if negative else source
    if (
        not isinstance(loss, fx.Node)
        or loss.target is not _aten.binary_cross_entropy_with_logits.default
        or any(used is not None for used in loss.args[2:4])
        or loss.args[4:] != (0,)
        or loss.kwargs
    ):
        return
    logits: Any = loss.args[0]
    x = loss.args[1]
    if not _is_real(logits):
        return  # products would overflow
    shape = logits.meta["val"].shape
    groups = _groups(shape[-1]) if dims in ([-1], [len(shape) - 1]) else 0
    if not groups:
        return

    def call(target: Any, *args: Any) -> Any:
        return graph.call_function(target, args)

    with graph.inserting_before(node):
        parts = [*shape[:-1], groups, shape[-1] // groups]
        factor = call(_aten.exp.default, call(_aten.neg.default, call(_aten.abs.default, logits)))
        factor = call(_aten.reshape.default, call(_aten.add.Tensor, factor, 1.0), parts)
        logs = call(_aten.log.default, call(_aten.prod.dim_int, factor, len(shape) - 1))
        rest = call(_aten.mul.Tensor, x, logits)
        rest = call(_aten.sub.Tensor, rest, call(_aten.clamp_min.default, logits, 0.0))
        # In the products' order, so that both are one loop over the numbers.
        rest = call(_aten.sum.dim_IntList, call(_aten.reshape.default, rest, parts), [-2])
        value = call(_aten.sum.dim_IntList, call(_aten.sub.Tensor, rest, logs), [-1])
        if not negative:
            value = call(_aten.neg.default, value)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _groups(size: int) -> int:
    """Return how many factors to multiply before a logarithm; 0 where there is nothing to gain.

    Products of 64 numbers of at most two are far from overflow, and slices of a multiple of
    eight fill vectors.
    """
    able = [g for g in range(2, 65) if size % g == 0 and size // g >= 16]
    return max(able, key=lambda g: (size // g % 8 == 0, g), default=0)


def _calls(graph: fx.Graph) -> Iterator[Any]:
    return (
        node
        for node in list(graph.nodes)
        if node.op == "call_function" and isinstance(node.target, OpOverload)
    )


def _base(node: Any) -> Any:
    """Return the node whose memory a view is a view of; a node that is no view, itself."""
    while (source := _viewed(node)) is not None:
        node = source
    return node


def _viewed(node: Any) -> Any:
    """Return what a node is a view of; None for one with memory of its own."""
    if node.target is operator.getitem:
        return node.args[0]
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    returns = node.target._schema.returns
    shares = node.target in _SILENT_VIEWS or any(r.alias_info is not None for r in returns)
    first = node.args[0] if node.args else None
    return first if shares and isinstance(first, fx.Node) else None


def _written(graph: fx.Graph) -> set[Any]:
    """Return the nodes whose memory some operation writes to."""
    found = set[Any]()
    for node in _calls(graph):
        schema = node.target._schema
        if not _writes(node.target):
            continue
        named = {
            argument.name: value
            for argument, value in zip(schema.arguments, node.args, strict=False)
        }
        named.update(node.kwargs)
        for argument in schema.arguments:
            told = argument.alias_info is not None and argument.alias_info.is_write
            if not told and argument.name not in _SILENTLY_WRITTEN:
                continue
            value = named.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            found.update(_base(v) for v in values if isinstance(v, fx.Node))
    return found


def _writes(target: OpOverload) -> bool:
    schema = target._schema
    return schema.is_mutable or any(a.name in _SILENTLY_WRITTEN for a in schema.arguments)


def _is_pure(node: Any) -> bool:
    target = node.target
    return not _writes(target) and torch.Tag.nondeterministic_seeded not in target.tags


def _fold(graph: fx.Graph, written: set[Any]) -> None:
    """Work out what depends on no input: the seeds of gradients above all."""
    for node in _calls(graph):
        sources = node.all_input_nodes
        like = node.target in _LIKE
        factory = not sources and "empty" not in str(node.target)
        constant = all("constant" in s.meta for s in sources)
        if (
            not _is_pure(node)
            or not (like or factory or (sources and constant))
            or _base(node) in written
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
    for node in _calls(graph):
        if node.target is _aten.select_backward.default and _is_single(node):
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
        if _viewed(node) is None and (_base(node) in written or _base(same) in written):
            continue
        node.replace_all_uses_with(same)
        graph.erase_node(node)


def _shorten(graph: fx.Graph, written: set[Any]) -> None:
    """Put one operation in the place of several that come to the same."""
    for node in _calls(graph):
        if node.kwargs or any(_base(n) in written for n in (node, *node.all_input_nodes)):
            continue
        shorter = _shorter(node)
        if shorter is None:
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
    if node.target in _SUMS and _is_real(node) and _is_real(source):
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


def _is_real(node: Any) -> bool:
    """Whether a tensor's numbers are float32 or float64, of which the rules are known."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)


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
    for node in _calls(graph):
        if node.target is not _aten.sum.dim_IntList or node.kwargs or not _is_real(node):
            continue
        negative = node.args[0]
        if negative.target is not _aten.neg.default or len(negative.users) > 1:
            continue
        if any(_base(n) in written for n in (node, negative, negative.args[0])):
            continue
        with graph.inserting_before(node):
            total = graph.call_function(node.target, (negative.args[0], *node.args[1:]))
            value = graph.call_function(_aten.neg.default, (total,))
        total.meta.update(node.meta)
        value.meta.update(node.meta)
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def _expand_last(graph: fx.Graph, written: set[Any]) -> None:
    """Work out a number once that stands in many places: the weight of all that one datum has."""
    for node in _calls(graph):
        wide = _first(node)
        if node.target not in _UNARY or wide.target is not _aten.expand.default:
            continue
        narrow: Any = wide.args[0]
        value = narrow.meta["val"]
        if (
            node.meta["val"].dtype != value.dtype
            or not value.is_contiguous()
            or any(_base(n) in written for n in (node, narrow))
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


def _is_single(node: Any) -> bool:
    _, sizes, dim, _ = node.args
    return bool(sizes[dim] == 1)


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
    for node in _calls(graph):
        if not _is_pure(node):
            continue
        if _base(node) in written or any(_base(s) in written for s in node.all_input_nodes):
            continue
        key = (node.target, _key(node.args), _key(tuple(sorted(node.kwargs.items()))))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_key, value))
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # 0.0 == -0.0
    return type(value), value


def _drop_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        unused = not node.users and node.op in ("call_function", "get_attr")
        if unused and (node.op == "get_attr" or _has_no_effect(node)):
            graph.erase_node(node)


def _has_no_effect(node: Any) -> bool:
    if not isinstance(node.target, OpOverload) or node.target.namespace == "profiler":
        return True
    # Random numbers that are not used are drawn all the same: the next ones come after them.
    return _is_pure(node) and bool(node.target._schema.returns)


def _own_outputs(graph: fx.Graph) -> None:
    """Copy what would be handed out twice, or is an input's: each result is its receiver's own."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    given, results = set[Any](), []
    for value in output.args[0]:
        if isinstance(value, fx.Node):
            base = _base(value)
            if base in given or base.op != "call_function":
                with graph.inserting_before(output):
                    copy = graph.call_function(_aten.clone.default, (value,))
                copy.meta.update(value.meta)
                copy.meta.pop("constant", None)
                value = copy
            given.add(base)
        results.append(value)
    output.args = (tuple(results),)
