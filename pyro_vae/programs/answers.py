"""What a pair says of a batch, row by row: terms of its sites, and the draws that they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.looks import ModelRun
from pyro_vae.programs.nodes import is_point, sample_nodes
from pyro_vae.programs.preimages import Preimage, preimage_of
from pyro_vae.programs.sites import Plate
from pyro_vae.programs.traces import GiveValues, site_log_prob, trace_guide
from pyro_vae.programs.types import Node, Program, Trace

# Relative to a parameter's largest gradient: that of another row differs as much as it is large.
_GRADIENT_TOLERANCE = 1e-2
# Relative to the largest of all parameters' gradients: rounding, where one is zero but for that.
_ROUNDING = 1e-5
_TERM_TOLERANCE = {torch.float64: 1e-8}  # 1e-3 for all others


@dataclass(frozen=True, slots=True)
class _Draw:
    """A draw of a run, to be given to another one.

    Attributes:
        value: detached.
        axis: of the data in it; None where it has none.
        preimage: what it was made of, where that was kept.
        preimage_axis: of the data in the preimage.
    """

    value: Tensor
    axis: int | None
    preimage: Preimage | None
    preimage_axis: int | None

    @classmethod
    def of(cls, node: Node, data_dim: int | None) -> _Draw:
        value, preimage = node["value"], preimage_of(node)
        axis = None if data_dim is None else value.ndim - node["fn"].event_dim + data_dim
        if preimage is None:
            return cls(value.detach(), axis, None, None)
        more = preimage.draw.ndim - value.ndim
        kept = Preimage(preimage.draw.detach(), preimage.transforms)
        return cls(value.detach(), axis, kept, None if axis is None else axis + more)

    def rows(self, index: Tensor) -> tuple[Tensor, Preimage | None]:
        """Return the draw, and its preimage, of these data."""
        preimage = self.preimage
        if preimage is not None:
            draw = _selected(preimage.draw, self.preimage_axis, index)
            preimage = Preimage(draw, preimage.transforms)
        return _selected(self.value, self.axis, index), preimage


@dataclass(slots=True)
class Answers:
    """What a pair says of a batch.

    Attributes:
        plate: the data plate.
        size: data in the batch.
        sizes: of the data dimension of local proposals.
        draws: by latent site of model or guide.
        terms: by role ("model", "guide") and term, [size], or [1] where it is of all data.
        run: of the model.
    """

    plate: Plate
    size: int
    sizes: set[int] = field(default_factory=set)
    draws: dict[str, _Draw] = field(default_factory=dict)
    terms: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    run: ModelRun | None = None

    @classmethod
    def of(cls, model_trace: Trace, guide_trace: Trace, plate: Plate, size: int) -> Answers:
        """Return what a run of a pair says."""
        answers = cls(plate, size, run=ModelRun.of(model_trace))
        local = {
            name
            for trace in (model_trace, guide_trace)
            for name, node in sample_nodes(trace)
            if plate.name in {frame.name for frame in node["cond_indep_stack"]}
        }
        for role, trace in (("model", model_trace), ("guide", guide_trace)):
            answers._add(role, trace, local)
        return answers

    def _add(self, role: str, trace: Trace, local: set[str]) -> None:
        terms, dim = self.terms.setdefault(role, {}), self.plate.dim
        for name, node in sample_nodes(trace):
            shape, value = node["fn"].batch_shape, node["value"]
            wide = len(shape) >= -dim
            if name in local and wide and role == "guide":
                self.sizes.add(shape[dim])
            data_dim = dim if wide and shape[dim] == self.size else None
            if not node["is_observed"]:
                self.draws[name] = _Draw.of(node, data_dim)
            terms[f"log density of {name}"] = _by_row(
                site_log_prob(name, node, scaled=False), data_dim
            )
            if is_point(node["fn"]) and value.is_floating_point():
                events = tuple(range(value.ndim - node["fn"].event_dim, value.ndim))
                point = value.sum(events) if events else value
                terms[f"value of {name}"] = _by_row(point, data_dim)

    def given(self, model: Program, guide: Program, batch: Batch, index: Tensor) -> Answers:
        """Return the answers for the same draws of these data.

        Args:
            model: a Pyro model.
            guide: a Pyro guide.
            batch: the rows of ``index``.
            index: of data that were answered for, in any order.
        """
        rows = {name: draw.rows(index) for name, draw in self.draws.items()}
        values = {name: value for name, (value, _) in rows.items()}
        preimages = {name: kept for name, (_, kept) in rows.items() if kept is not None}
        give = GiveValues(values, preimages)
        traces = [trace_guide(give(fn), batch) for fn in (model, guide)]
        return Answers.of(traces[0], traces[1], self.plate, len(index))

    def differs(
        self,
        other: Answers,
        index: Tensor,
        *,
        gradients: bool = True,
        close: Callable[[Tensor, Tensor], bool] | None = None,
    ) -> str | None:
        """Return whose answers, for these data, are not the other's: "guide", "model" or None.

        Args:
            other: of the rows of ``index``.
            index: of data, in the order of the other's.
            gradients: whether those by parameters are compared, too.
            close: whether two terms are equal; by default :func:`close_to`.
        """
        close = close_to if close is None else close
        for role in ("guide", "model"):
            mine, theirs = self.terms[role], other.terms[role]
            if mine.keys() != theirs.keys():
                return role
            rows = {name: rows_of(term, index, self.size) for name, term in mine.items()}
            if not all(close(rows[name], theirs[name]) for name in mine):
                return role
            if gradients and not _same_gradients(_weighted(rows), _weighted(theirs)):
                return role
        return None


def shuffled(size: int) -> Tensor:
    """Return the numbers of rows in another order than theirs, the same at each call."""
    order = torch.arange(size)
    permuted = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return order.flip(0) if torch.equal(order, permuted) else permuted


def _selected(value: Tensor, axis: int | None, index: Tensor) -> Tensor:
    return value if axis is None else value.index_select(axis, index.to(value.device))


def _by_row(term: Tensor, data_dim: int | None) -> Tensor:
    """Sum all dimensions of a term but the data's, [N]; all of them, [1], where it has none."""
    if data_dim is None or term.ndim < -data_dim:
        return term.sum().reshape(1)
    return term.movedim(data_dim, 0).flatten(1).sum(1) if term.ndim > 1 else term


def rows_of(term: Tensor, index: Tensor, size: int) -> Tensor:
    """Return the rows of a term, [size] or of all data."""
    return term[index.to(term.device)] if term.numel() == size else term


def close_to(one: Tensor, other: Tensor) -> bool:
    """Return whether two terms are equal to what another order of sums may change."""
    tolerance = _TERM_TOLERANCE.get(one.dtype, 1e-3)
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def _weighted(terms: Mapping[str, Tensor]) -> Tensor | None:
    """Return a sum of terms in which each row has a weight of its own."""
    total: Tensor | None = None
    for number, rows in enumerate(terms.values()):
        weights = torch.linspace(1, 2, rows.numel(), dtype=rows.dtype) + number
        weighted = (weights.cos().to(rows.device) * rows).sum()
        total = weighted if total is None else total + weighted
    return total


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
        function = stack.pop()
        if function in seen:
            continue
        seen.add(function)
        if (leaf := getattr(function, "variable", None)) is not None:
            leaves[id(leaf)] = leaf
        stack.extend(before for before, _ in function.next_functions if before is not None)
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    dense = (None if gradient is None else gradient.to_dense() for gradient in found)
    return {
        leaf: gradient
        for leaf, gradient in zip(leaves, dense, strict=True)
        if gradient is not None and gradient.numel() and bool((gradient != 0).any())
    }
