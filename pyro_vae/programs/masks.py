"""Masks on latents: each latent has one, in model and guide, for the draw that it came with.

A latent that the model masks is not there, nor is its proposal. Otherwise its density would
count for nothing, and the bound grow with the guide's entropy past log p(x).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.programs.nodes import is_point, latent_nodes
from pyro_vae.programs.pyro_internals import enumerate_dim, mask_inside, unconstrained
from pyro_vae.programs.state import Look
from pyro_vae.programs.supports import both
from pyro_vae.programs.types import Distribution, Mask, Node, Trace
from pyro_vae.recording import is_recording
from pyro_vae.torch_internals import DispatchMode, storage_key, tensors_in


def mask_of(node: Node) -> Mask:
    """Return the mask of whole events on a site, that inside its distribution included."""
    return both(node["mask"], _without_mask(node["fn"])[1])


def lift_masks(trace: Trace, summed: Container[str] = ()) -> Trace:
    """Make a mask inside a latent's distribution (fn.mask(...)) its site's, as poutine.mask is.

    One that differs within an event stays where it is.

    Args:
        trace: of a model or a guide; it is changed, and returned.
        summed: latents that are summed out. One that they mask, for some of their values, is
            scored by its prior for all: it has one proposal, and a prior that integrates to one
            where the latent is not there leaves the evidence what it is.
    """
    enumerated = (enumerate_dim(node) for name, node in latent_nodes(trace) if name in summed)
    dims = {dim for dim in enumerated if dim is not None}
    for name, node in latent_nodes(trace):
        fn, mask = _without_mask(node["fn"])
        if mask is not None:
            node.update(fn=fn, mask=both(node["mask"], mask))
        if name not in summed:
            node["mask"] = _for_any_value(node["mask"], dims)
    return trace


def _for_any_value(mask: Mask, dims: set[int]) -> Mask:
    """Return where a latent is there for some of the values that lie in these dimensions."""
    if not isinstance(mask, Tensor) or not dims:
        return mask
    for dim in dims:
        if mask.ndim >= -dim:
            mask = mask.any(dim, keepdim=True)
    # Left of the plates there are particles in what follows.
    while mask.ndim >= -max(dims) and mask.shape[0] == 1:
        mask = mask[0]
    return mask


def _without_mask(fn: Distribution) -> tuple[Distribution, Mask]:
    """Return a distribution without a mask of whole events, and that mask; None for no mask."""
    if isinstance(fn, dist.MaskedDistribution):
        inner, mask = _without_mask(fn.base_dist)
        return inner, both(mask, mask_inside(fn))
    if isinstance(fn, dist.Independent):
        inner, mask = _without_mask(fn.base_dist)
        events = fn.reinterpreted_batch_ndims
        if isinstance(mask, Tensor):
            flat = mask.expand(inner.batch_shape).flatten(-events)
            if not bool((flat == flat[..., :1]).all()):
                return fn, None
            mask = flat[..., 0]
        return (fn, None) if mask is None else (inner.to_event(events), mask)
    return fn, None


def mask_proposals(model_trace: Trace, guide_trace: Trace) -> None:
    """Put the masks of a model's latent sites on their proposals too.

    Raises:
        ValueError: as :func:`masked_proposals`.
    """
    for name, latent in masked_proposals(model_trace, guide_trace).items():
        node, mask = guide_trace.nodes[name], model_trace.nodes[latent]["mask"]
        # A mask of the guide's own leaves out no more than the model's: one tensor for both.
        node["mask"] = mask if name == latent else both(node["mask"], mask)


def masked_proposals(model_trace: Trace, guide_trace: Trace) -> dict[str, str]:
    """Return the guide's sites that the model's masks are for, each with the latent masked.

    Raises:
        ValueError: for a masked latent whose density an auxiliary site holds that other
            latents may share, and for masks of the guide that the model does not have.
    """
    auxiliary = {n for n, node in latent_nodes(guide_trace) if node["infer"].get("is_auxiliary")}
    found = {}
    for name, node in latent_nodes(model_trace):
        guide_node = guide_trace.nodes.get(name)
        if guide_node is None:
            continue  # a discrete latent that is summed out has no proposal
        _check_inner_masks(name, node, guide_node)
        check_proposal_mask(name, guide_node["mask"], node["mask"])
        if node["mask"] is None or node["mask"] is True:
            continue
        found[name] = name
        if auxiliary and is_point(guide_node["fn"]):
            holder = unconstrained(name)  # where Pyro's AutoNormal holds the density
            if holder not in auxiliary:
                raise ValueError(
                    f"the model masks the latent site {name!r}, but the guide holds its density in "
                    f"{sorted(auxiliary)}, of which no part can be masked. Use a guide that "
                    "samples it itself, such as pyro_vae's, or pyro.infer.autoguide.AutoNormal"
                )
            found[holder] = name
    return found


def _check_inner_masks(name: str, model_node: Node, guide_node: Node) -> None:
    """Raise ValueError for masks inside an event, which cannot be carried over, unless equal."""
    inner = [mask_inside(node["fn"]) for node in (guide_node, model_node)]
    known = [torch.as_tensor(mask) for mask in inner if mask is not None]
    if len(known) == 1 or (known and not torch.equal(*torch.broadcast_tensors(*known))):
        one, other = ("model", "guide") if inner[0] is None else ("guide", "model")
        raise ValueError(
            f"the {one} masks parts of an event of the latent site {name!r}, and the {other} does "
            "not, or others: put the same mask on both distributions; or sample the parts in an "
            "inner plate, under poutine.mask in the model"
        )


def check_proposal_mask(name: str, mine: Mask, theirs: Mask) -> None:
    """Raise ValueError where a guide masks (mine) what the model does not (theirs), at a site."""
    if mine is None or mine is True or is_recording():
        return
    left_out = ~torch.as_tensor(mine)
    there = torch.as_tensor(True if theirs is None else theirs, device=left_out.device)
    if bool((there & left_out).any()):
        raise ValueError(
            f"the guide masks the latent site {name!r} where the model does not: its draws would "
            "be scored by the prior and not by the guide, which is no bound. Mask it in the "
            "model, and the guide follows"
        )


def depend_on_draws(draws: Mapping[str, Tensor], run: Callable[[], list[Trace]]) -> bool:
    """Return whether a model masks its latents by what is drawn, not by the data alone.

    True also where operations cannot be followed: that is right for all masks, and slower.

    Args:
        draws: the values of the latents.
        run: of no arguments, runs the model with these values; returns its traces.
    """
    with Look() as look, Descendants(draws.values()) as found:
        traces = run()
    if look.error is not None:
        return True
    nodes = (node for trace in traces for name, node in latent_nodes(trace) if name in draws)
    return found.read or any(
        found.includes(mask) for node in nodes for mask in (node["mask"], mask_inside(node["fn"]))
    )


# --- what is computed from draws


class Descendants(DispatchMode):
    """Follows what is computed from some tensors inside the context, through every operation.

    By memory, not by value: ``0 * z`` is computed from z. What an operation writes to counts
    with all views of the same memory.

    Args:
        sources: the tensors.

    Attributes:
        read: whether a number went from one of them to Python, which may decide by it.

    Example:
        >>> import torch
        >>> z = torch.zeros(2)
        >>> with Descendants([z]) as found:
        ...     positive, other = z > 0, torch.ones(2)
        >>> found.includes(positive), found.includes(other), found.read
        (True, False, False)
    """

    def __init__(self, sources: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read = False
        # By memory; the tensors are kept, for memory that is freed may be another one's next.
        self._found = {storage_key(tensor): tensor for tensor in sources}

    def includes(self, value: Any) -> bool:
        """Return whether a value is a tensor that was computed from the sources."""
        return isinstance(value, Tensor) and storage_key(value) in self._found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operation, and note what came of it."""
        result = func(*args, **(kwargs or {}))
        if any(map(self.includes, tensors_in((args, kwargs)))):
            made = tensors_in(result)
            self.read |= not made
            for tensor in made:
                self._found.setdefault(storage_key(tensor), tensor)
        return result
