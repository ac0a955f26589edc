"""What a pair says of a batch, row by row: terms of its sites, and the draws that they are of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.nodes import is_point, sample_nodes
from pyro_vae.programs.preimages import Preimage, preimage_of
from pyro_vae.programs.sites import Plate, Structure
from pyro_vae.programs.traces import site_log_prob, trace_given
from pyro_vae.programs.types import Node, Program, Trace

# Relative to a parameter's largest gradient: that of another row differs as much as it is large.
_GRADIENT_TOLERANCE = 1e-2
# Relative to the largest of all parameters' gradients: rounding, where one is zero but for that.
_ROUNDING = 1e-5
SLACK = 10.0  # in a comparison of terms of rows in another order: their sums are rounded otherwise


@dataclass(frozen=True, slots=True)
class Answers:
    """What a pair says of a batch.

    Attributes:
        plate: the data plate.
        size: data in the batch.
        sizes: of the data dimension of local proposals.
        draws: by latent site of model or guide, its statement and the axis of the data in value and
            preimage, negative; None where they have none.
        terms: by role ("model", "guide") and term, [size], or [1] where it is of all data.
        run: of the model.
    """

    plate: Plate
    size: int
    sizes: set[int]
    draws: dict[str, tuple[Node, int | None]]
    terms: dict[str, dict[str, Tensor]]
    run: Structure

    @classmethod
    def of(cls, model_trace: Trace, guide_trace: Trace, plate: Plate, size: int) -> Answers:
        """Return what a run of a pair says."""
        self = cls(plate, size, set(), {}, {}, Structure.of(model_trace))
        traces, dim = {"model": model_trace, "guide": guide_trace}, plate.dim
        local = {
            name
            for trace in traces.values()
            for name, node in sample_nodes(trace)
            if plate.name in {frame.name for frame in node["cond_indep_stack"]}
        }
        for role, trace in traces.items():
            terms = self.terms[role] = {}
            for name, node in sample_nodes(trace):
                fn, value = node["fn"], node["value"]
                of_data = fn.batch_shape[dim] if len(fn.batch_shape) >= -dim else None
                if name in local and of_data is not None and role == "guide":
                    self.sizes.add(of_data)
                data_dim = dim if of_data == size else None
                if not node["is_observed"]:
                    self.draws[name] = node, None if data_dim is None else dim - fn.event_dim
                density = site_log_prob(name, node)
                terms[f"log density of {name}"] = _by_row(density, data_dim)
                if is_point(fn) and value.is_floating_point():
                    point = value.reshape(*value.shape[: value.ndim - fn.event_dim], -1).sum(-1)
                    terms[f"value of {name}"] = _by_row(point, data_dim)
        return self

    def given(self, model: Program, guide: Program, batch: Batch, index: Tensor) -> Answers:
        """Return the answers for the same draws of these data.

        Args:
            model: a Pyro model.
            guide: a Pyro guide.
            batch: the rows of ``index``.
            index: of data that were answered for, in any order.
        """

        def rows(value: Tensor, axis: int | None) -> Tensor:
            value = value.detach()
            return value if axis is None else value.index_select(axis, index.to(value.device))

        values, preimages = {}, {}
        for name, (node, axis) in self.draws.items():
            values[name] = rows(node["value"], axis)
            if kept := preimage_of(node):
                preimages[name] = Preimage(rows(kept.draw, axis), kept.transforms)
        given = (trace_given(fn, values, batch, preimages) for fn in (model, guide))
        model_trace, guide_trace = given
        return Answers.of(model_trace, guide_trace, self.plate, len(index))

    def differs(
        self, other: Answers, index: Tensor, *, gradients: bool = True, slack: float = SLACK
    ) -> str | None:
        """Return whose answers, for these data, are not the other's: "guide", "model" or None.

        Args:
            other: of the rows of ``index``.
            index: of data, in the order of the other's.
            gradients: whether those by parameters are compared, too.
            slack: in the comparison of terms, as in :func:`agree`.
        """
        for role in ("guide", "model"):
            mine, theirs = self.terms[role], other.terms[role]
            rows = {name: rows_of(term, index, self.size) for name, term in mine.items()}
            if rows.keys() != theirs.keys() or not all(
                agree(rows[name], theirs[name], slack=slack) for name in rows
            ):
                return role
            if gradients and not _same_gradients(_weighted(rows), _weighted(theirs)):
                return role
        return None


def shuffled(size: int) -> Tensor:
    """Return the numbers of rows in another order than theirs, the same at each call."""
    order = torch.arange(size)
    permuted = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return order.flip(0) if torch.equal(order, permuted) else permuted


def _by_row(term: Tensor, data_dim: int | None) -> Tensor:
    """Sum all dimensions of a term but the data's, [N]; all of them, [1], where it has none."""
    if data_dim is None or term.ndim < -data_dim:
        return term.sum().reshape(1)
    return term.movedim(data_dim, 0).flatten(1).sum(1) if term.ndim > 1 else term


def rows_of(term: Tensor, index: Tensor, size: int) -> Tensor:
    """Return the rows of a term, [size] or of all data."""
    return term[index.to(term.device)] if term.numel() == size else term


def _weighted(terms: dict[str, Tensor]) -> Tensor:
    """Return a sum of terms in which each row has a weight of its own."""
    total = torch.zeros(())
    for number, rows in enumerate(terms.values()):
        weights = torch.linspace(1, 2, rows.numel(), dtype=rows.dtype) + number
        total = total + (weights.cos().to(rows.device) * rows).sum()
    return total


def _same_gradients(one: Tensor, other: Tensor) -> bool:
    """Return whether two sums have the same gradients by all that they depend on."""
    mine, theirs = _gradients(one), _gradients(other)
    sizes = {leaf: float(g.abs().max()) for leaf, g in (mine | theirs).items()}
    rounding, zero = _ROUNDING * max(sizes.values(), default=0.0), torch.zeros(())
    for leaf, size in sizes.items():
        gap = float((mine.get(leaf, zero) - theirs.get(leaf, zero)).abs().max())
        if gap > _GRADIENT_TOLERANCE * size + rounding:
            return False
    return True


def leaves_of(tensor: Tensor) -> dict[int, Tensor]:
    """Return the leaves of a tensor's autograd graph, by identity."""
    leaves: dict[int, Tensor] = {}
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if (leaf := getattr(function, "variable", None)) is not None:
            leaves[id(leaf)] = leaf
        stack.extend(before for before, _ in function.next_functions)
    return leaves


def _gradients(total: Tensor) -> dict[int, Tensor]:
    """Return the gradient of a sum by each leaf of its graph, those that are zero left out."""
    leaves = leaves_of(total)
    if not leaves:
        return {}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    dense = {leaf: g.to_dense() for leaf, g in zip(leaves, found, strict=True) if g is not None}
    return {leaf: gradient for leaf, gradient in dense.items() if gradient.any()}


# --- equal to rounding


def agree(reference: Tensor, found: Tensor, *, slack: float = 1.0) -> bool:
    """Return whether two tensors have one shape and are equal to rounding; integers exactly.

    Args:
        reference: whose dtype says what rounding is.
        found: to be compared.
        slack: by how much more than rounding they may differ.
    """
    if not reference.is_floating_point():
        return torch.equal(reference, found)
    return found.shape == reference.shape and bool(_close(reference, found, slack).all())


def largest_gap(reference: Tensor, found: Tensor) -> float:
    """Return the largest difference beyond rounding between two tensors that broadcast, or 0."""
    reference, found = torch.broadcast_tensors(reference, found)
    apart = ~_close(reference, found, 1.0)
    return float((reference - found)[apart].abs().max()) if bool(apart.any()) else 0.0


def _close(reference: Tensor, found: Tensor, slack: float) -> Tensor:
    """Return which numbers are equal to the rounding of the reference's dtype; NaN equals NaN."""
    tolerance = slack * (1e-9 if reference.dtype == torch.float64 else 1e-4)
    return torch.isclose(reference, found, rtol=tolerance, atol=tolerance, equal_nan=True)
