"""Whether a pair speaks for rows by their place in the batch, or for whatever rows it is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.particles.modes import per_datum
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.nodes import batch_nesting, is_point, sample_nodes
from pyro_vae.programs.sites import Plate
from pyro_vae.programs.state import Look, evaluation, preserved_rng
from pyro_vae.programs.traces import site_log_prob, trace_given, trace_pair

__all__ = ["NotSetUpError", "bound_to_order", "divides_by_size", "set_up_before"]

# Relative to a parameter's largest gradient: that of another row differs as much as it is large.
_GRADIENT_TOLERANCE = 1e-2
# Relative to the largest of all parameters' gradients: rounding, where one is zero but for that.
_ROUNDING = 1e-5
_TERM_TOLERANCE = {torch.float64: 1e-8}  # 1e-3 for all others

# From the rows of the data that a batch holds to the context in which the guide knows them.
Rows = Callable[[Tensor], contextlib.AbstractContextManager[Any]]


class NotSetUpError(Exception):
    """An autoguide of Pyro's has seen no batch yet, from which it makes its parameters."""


@contextlib.contextmanager
def set_up_before() -> Iterator[None]:
    """Raise NotSetUpError where one of Pyro's autoguides would be set up inside the context."""

    def refuse(module: nn.Module, inputs: Any) -> None:
        if getattr(module, "prototype_trace", module) is None:
            raise NotSetUpError(type(module).__name__)

    hook = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def bound_to_order(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    plate: Plate | None,
    rows: Rows = lambda index: contextlib.nullcontext(),
) -> str | None:
    """Return which of a pair has parameters or values of its own for each row, by its place.

    The pair is run on permuted rows, with its draws permuted alike. An amortized guide's
    terms are then permuted, and their gradients by its parameters the same; those of a
    table with a row per datum come to lie on other rows, whatever values the table holds.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: rows of the data, the first ones.
        plate: the data plate.
        rows: tells the guide which rows a batch holds, where it asks.

    Returns:
        "guide" or "model"; None where neither has, or it cannot be told.

    Raises:
        Exception: what the pair raises on this batch.
    """
    size = batch.size
    if size is None or size < 2 or plate is None:
        return None
    order = torch.arange(size)
    permuted = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    if torch.equal(order, permuted):
        permuted = order.flip(0)
    with (
        torch.enable_grad(),
        preserved_rng(batch.device),
        evaluation(model, guide),
        poutine.block(),
    ):
        torch.manual_seed(0)
        with rows(order), torch.no_grad():
            traces = trace_pair(model, guide, batch.args, batch.kwargs)
            found = _Answers.of(traces, plate, size)
        if found.sizes - {1, size}:
            return "guide"  # it answers for another number of data than it was given
        with rows(order):
            here, again = (found.given(model, guide, batch, order) for _ in range(2))
        if here.differs(again, order):
            return None  # random numbers beside the sites' own
        with rows(permuted):
            elsewhere = found.given(model, guide, batch.rows(permuted), permuted)
        return here.differs(elsewhere, permuted)


def divides_by_size(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    plate: Plate,
    names: Collection[str],
    rows: Rows = lambda index: contextlib.nullcontext(),
) -> bool:
    """Return whether a model divides the log densities of its data by the size of their batch.

    Half of the rows are run alone, with the draws that they have among all: the terms of
    each site must then be larger by size / half, row by row.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: some rows of the data, the first ones.
        plate: the data plate.
        names: of observed sites in it.
        rows: as in :func:`bound_to_order`.
    """
    size = batch.size or 1
    order, half = torch.arange(size), torch.arange(size // 2)
    with (
        Look(),
        torch.no_grad(),
        preserved_rng(batch.device),
        evaluation(model, guide),
        poutine.block(),
    ):
        with rows(order):
            traces = trace_pair(model, guide, batch.args, batch.kwargs)
            found = _Answers.of(traces, plate, size)
            whole = found.given(model, guide, batch, order).terms["model"]
        with rows(half):
            alone = found.given(model, guide, batch.rows(half), half).terms["model"]
        keys = [f"log density of {name}" for name in names]
        return all(
            _close(alone[key], _taken_first(whole[key], len(half)) * size / len(half))
            for key in keys
        )
    return False


@dataclass
class _Answers:
    """What a pair says of a batch: terms of its sites, row by row, and the draws they are of."""

    plate: Plate
    size: int
    sizes: set[int] = field(default_factory=set)  # of the data dimension of proposals
    values: dict[str, tuple[Tensor, int | None]] = field(default_factory=dict)
    terms: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, traces: tuple[Any, Any], plate: Plate, size: int) -> _Answers:
        answers = cls(plate, size)
        nesting = max(map(batch_nesting, traces))
        local = {
            name
            for trace in traces
            for name, node in sample_nodes(trace)
            if plate.name in {frame.name for frame in node["cond_indep_stack"]}
        }
        for role, trace in zip(("model", "guide"), traces, strict=True):
            terms = answers.terms.setdefault(role, {})
            for name, node in sample_nodes(trace):
                shape, value = node["fn"].batch_shape, node["value"]
                wide = len(shape) >= -plate.dim
                if name in local and wide and role == "guide":
                    answers.sizes.add(shape[plate.dim])
                per_row = wide and shape[plate.dim] == size
                if not node["is_observed"]:
                    axis = value.ndim - node["fn"].event_dim + plate.dim if per_row else None
                    answers.values[name] = value.detach(), axis
                dim = plate.dim if per_row else None
                found = [("log density", site_log_prob(name, node, scaled=False))]
                if is_point(node["fn"]) and value.is_floating_point():
                    events = tuple(range(value.ndim - node["fn"].event_dim, value.ndim))
                    found.append(("value", value.sum(events) if events else value))
                for what, term in found:
                    deepest = max(nesting, term.ndim)
                    terms[f"{what} of {name}"] = per_datum(term, deepest, dim, leading=0)
        return answers

    def given(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        batch: Batch,
        order: Tensor,
    ) -> _Answers:
        """Return the answers for the same draws, in this order."""
        values: Mapping[str, Tensor] = {
            name: value if axis is None else value.index_select(axis, order.to(value.device))
            for name, (value, axis) in self.values.items()
        }
        traces = tuple(trace_given(fn, values, batch.args, batch.kwargs) for fn in (model, guide))
        return _Answers.of((traces[0], traces[1]), self.plate, len(order))

    def differs(self, other: _Answers, order: Tensor) -> str | None:
        """Return whose answers, in this order, are not the other's; None where all are."""
        for role in ("guide", "model"):
            mine, theirs = self.terms[role], other.terms[role]
            if mine.keys() != theirs.keys():
                return role
            sums = []
            for answers, index in ((mine, order), (theirs, None)):
                total: Tensor | None = None
                for number, name in enumerate(mine):
                    rows = answers[name] if index is None else _taken(answers[name], index)
                    weights = torch.linspace(1, 2, rows.numel(), dtype=rows.dtype) + number
                    weighted = (weights.cos().to(rows.device) * rows).sum()
                    total = weighted if total is None else total + weighted
                sums.append(total)
            close = all(_close(_taken(mine[name], order), theirs[name]) for name in mine)
            if not close or not _same_gradients(*sums):
                return role
        return None


def _taken(term: Tensor, index: Tensor) -> Tensor:
    return term[index.to(term.device)] if term.numel() == index.numel() else term


def _taken_first(term: Tensor, count: int) -> Tensor:
    return term[:count] if term.numel() > 1 else term


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = _TERM_TOLERANCE.get(one.dtype, 1e-3)
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def _same_gradients(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two sums have the same gradients by all that they depend on."""
    mine, theirs = (_gradients(total) for total in (one, other))
    sizes = {leaf: float(g.abs().max()) for found in (mine, theirs) for leaf, g in found.items()}
    rounding = _ROUNDING * max(sizes.values(), default=0.0)
    for leaf, size in sizes.items():
        both = leaf in mine and leaf in theirs
        gap = float((mine[leaf] - theirs[leaf]).abs().max()) if both else size
        if gap > _GRADIENT_TOLERANCE * size + rounding:
            return False
    return True


def _gradients(total: Tensor | None) -> dict[int, Tensor]:
    """Return the gradient of a sum by each leaf of its graph, those that are zero left out."""
    if total is None or total.grad_fn is None:
        return {}
    leaves: dict[int, Tensor] = {}
    seen, stack = set(), [total.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        stack.extend(function for function, _ in node.next_functions if function is not None)
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    dense = (None if gradient is None else gradient.to_dense() for gradient in found)
    return {
        leaf: gradient
        for leaf, gradient in zip(leaves, dense, strict=True)
        if gradient is not None and gradient.numel() and bool((gradient != 0).any())
    }
