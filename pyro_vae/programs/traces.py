"""A run of a guide and the replayed model; what the guide must propose; a site's log density."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_vae.programs.batch import Batch, arguments, dtype_errors
from pyro_vae.programs.enumeration import enumerated
from pyro_vae.programs.handlers import Unobserve
from pyro_vae.programs.masks import lift_masks, mask_proposals
from pyro_vae.programs.messages import trace_of
from pyro_vae.programs.moved import Noise
from pyro_vae.programs.nodes import (
    drawn_subsamples,
    is_enumerable,
    is_point,
    is_subsample,
    latent_nodes,
    left_out,
    plain_distribution,
    sample_nodes,
)
from pyro_vae.programs.precision import widened
from pyro_vae.programs.preimages import (
    DrawByPreimage,
    Preimage,
    density,
    draw_of,
    keep_preimage,
    preimage_of,
    with_draw,
)
from pyro_vae.programs.pyro_internals import enumerate_dim, mask_inside
from pyro_vae.programs.state import looking
from pyro_vae.programs.supports import SameMeasure, inside, is_fixed
from pyro_vae.programs.types import Node, Program, Trace, Values

OUTSIDE = ", outside its support"  # ends what is said of a site


def trace_pair(model: Program, guide: Program, batch: Batch) -> tuple[Trace, Trace]:
    """Run the guide, replay the model with its draws, and return both traces.

    Raises:
        ValueError: where the guide does not propose just the model's latent sites, or a density
            for a mass.
    """
    guide_trace = trace_guide(guide, batch)
    with SameMeasure(guide_trace):
        model_trace = trace_model(model, guide_trace, batch)
    pruned: Any = [prune_subsample_sites(trace) for trace in (model_trace, guide_trace)]
    return pruned[0], pruned[1]


def run_pair(model: Program, guide: Program, batch: Batch) -> tuple[Trace, Trace]:
    """Run a pair as :func:`trace_pair` does, to look at it: unseen, in eval mode."""
    with looking(model, guide, device=batch.device):
        return trace_pair(model, guide, batch)


def drawn_by(guide: Program, batch: Batch) -> set[str]:
    """Return the plates of which a guide draws a subsample."""
    with looking(guide, device=batch.device), drawn_subsamples() as drawn:
        trace_guide(guide, batch)
    return drawn


def under_guide(model: Program, guide: Program) -> Program:
    """Return the model as it runs in training: with the guide's draws in the place of its own.

    A draw from the prior may have what no draw of the guide has: another size, or a value that
    the rest of the model cannot do with.
    """

    def replayed(*args: Any, **kwargs: Any) -> Any:
        with poutine.block():
            guide_trace = trace_guide(guide, arguments(args, kwargs))
        return poutine.replay(model, trace=guide_trace)(*args, **kwargs)

    return replayed


def trace_guide(guide: Program, batch: Batch) -> Trace:
    """Run the guide; return its trace, the subsamples of plates included.

    Draws on a constrained support keep the coordinates that they were made from.
    """
    with DrawByPreimage(), dtype_errors(batch):
        trace = trace_of(guide, batch)
    return lift_masks(trace)


def trace_model(model: Program, guide_trace: Trace, batch: Batch) -> Trace:
    """Replay the model with the values of a guide's trace; return its trace.

    A latent that the model masks is not there, nor is its proposal: the model's mask is
    put on the guide's site as well.

    Raises:
        ValueError: where the guide does not propose just the model's latent sites.
    """
    replayed = poutine.replay(model, trace=guide_trace)
    with dtype_errors(batch):
        model_trace = trace_of(replayed, batch)
    check_proposals(model_trace, guide_trace)
    lift_masks(model_trace, {n for n, _ in latent_nodes(model_trace) if n not in guide_trace.nodes})
    mask_proposals(model_trace, guide_trace)
    return model_trace


class ReplaceDraws(Messenger):
    """Replaces each latent draw, as soon as it is made, by a function of it.

    Where it is a function of coordinates, these are replaced.

    Args:
        replace: from a draw to what the program goes on with.
    """

    def __init__(self, replace: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.replace = replace

    def _pyro_post_sample(self, msg: Node) -> None:
        if not msg["is_observed"] and not is_subsample(msg):
            msg.update(with_draw(msg, self.replace(draw_of(msg))))


class GiveValues(Messenger):
    """Gives sites their values, and leaves all else that is known of them as it is.

    A replay puts the sites of its trace in the place of the program's own; Pyro's messenger
    guides (AutoNormalMessenger) keep the prior there.

    Args:
        values: of latent sites, and of the subsamples of plates.
        preimages: of some of them.
    """

    def __init__(self, values: Values, preimages: Mapping[str, Preimage] | None = None) -> None:
        super().__init__()
        self.values, self.preimages = values, preimages or {}

    def _pyro_sample(self, msg: Node) -> None:
        name = msg["name"]
        if not msg["is_observed"] and name in self.values:
            msg["value"], msg["done"] = self.values[name], True
            if name in self.preimages:
                msg["infer"] = keep_preimage(msg["infer"], self.preimages[name])


def dream(
    model: Program, batch: Batch, *, summed_out: tuple[str, ...] = (), nesting: int = 0
) -> Trace:
    """Run the model with observed sites drawn as well; return its trace, unseen from outside.

    Args:
        model: a Pyro model.
        batch: its arguments.
        summed_out: latents that are summed out: a mask on another is that for all their values.
        nesting: batch dimensions of the model's sites.
    """
    with poutine.block():
        trace = lift_masks(trace_of(Unobserve()(model), batch))
        proposed = {n: node for n, node in latent_nodes(trace) if n not in summed_out}
        if summed_out and any(isinstance(node["mask"], Tensor) for node in proposed.values()):
            values = {name: node["value"] for name, node in proposed.items()}
            together = enumerated(Unobserve()(model), summed_out, -1 - nesting)
            found = trace_of(GiveValues(values)(together), batch)
            masks = dict(latent_nodes(lift_masks(found, summed_out)))
            for name, node in proposed.items():
                node["mask"] = masks[name]["mask"]
    return trace


def trace_given(
    fn: Program, values: Values, batch: Batch, preimages: Mapping[str, Preimage] | None = None
) -> Trace:
    """Run a model or guide with latents given, as by :class:`GiveValues`; return its trace."""
    return trace_guide(GiveValues(values, preimages)(fn), batch)


def dependencies(model: Program, batch: Batch, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return, for each of some latent sites, those of them whose values its prior depends on.

    Directly, or through latents that are not among them. Found by running the model with the
    value of one site changed and all others kept.

    Args:
        model: a Pyro model.
        batch: its arguments.
        names: of latent sites.
    """
    with looking(model, device=batch.device):
        trace = trace_of(model, batch)
        values = {name: node["value"] for name, node in latent_nodes(trace)}
        order, seen = list(values), {name: set[str]() for name in values}
        for number, parent in enumerate(order):
            changed = {**values, parent: _another_value(trace.nodes[parent])}
            other = trace_given(model, changed, batch)
            for name in order[number + 1 :]:
                fns = trace.nodes[name]["fn"], other.nodes[name]["fn"]
                if not torch.equal(*(fn.log_prob(values[name]) for fn in fns)):
                    seen[name] |= {parent} if parent in names else seen[parent]
    return {name: tuple(n for n in order if n in seen[name]) for name in order if name in names}


def _another_value(node: Node) -> Tensor:
    """Draw a site anew, until it is another value (a discrete one may be the same)."""
    old, draws = node["value"], (node["fn"].sample() for _ in range(20))
    return next((value for value in draws if not torch.equal(value, old)), old)


def subsamples(trace: Trace) -> Trace:
    """Return a trace of the subsamples that plates have drawn, to be replayed."""
    found = Trace()
    for name, node in trace.nodes.items():
        if is_subsample(node):
            found.add_node(name, **node)
    return found


def site_log_prob(name: str, node: Node, *, double: bool = False) -> Tensor:
    """Return a site's log density, of its batch shape, masked, and without its scale.

    Outside the support of a latent site it is -inf.

    Args:
        name: the site.
        node: of a trace.
        double: whether in float64, where its distribution can be had in float64.

    Raises:
        ValueError: for a value outside the support that is observed, naming the site.
    """
    fn = node["fn"]
    try:
        log_prob = _log_prob(_in_float64(node) if double else node)
    except KeyError as error:
        raise ValueError(
            f"site {name!r}: {fn} knows the density of its own last draw alone, for its transform "
            "has no inverse (planar and radial flows); take a flow with one"
        ) from error
    except ValueError as error:
        role = "observed" if node["is_observed"] else "latent"
        text = f"{role} site {name!r}: no log density of its value under {fn}: {error}"
        raise ValueError(text) from error
    return scale_and_mask(log_prob, mask=node["mask"])


def _is_given(node: Node) -> bool:
    """Return whether a node has a tensor for a value, and not all values that are listed for it."""
    return enumerate_dim(node) is None and isinstance(node["value"], Tensor)


def _in_float64(node: Node) -> Node:
    """Return a node with its distribution, value and preimage in float64, where there are such."""
    fn, value, preimage = widened(node["fn"]), node["value"], preimage_of(node)
    if fn is None or not _is_given(node):
        return node
    value = value.double() if value.is_floating_point() else value
    infer = node["infer"] if preimage is None else keep_preimage(node["infer"], preimage.double())
    return {**node, "fn": fn, "value": value, "infer": infer}


def _log_prob(node: Node) -> Tensor:
    """Return a node's log density, -inf outside the support where values may lie there.

    Observed values were looked at before, but where a mask leaves some out, or the support itself
    is the model's to draw. Enumerated ones are the support.
    """
    fn, value = node["fn"], node["value"]
    unmasked = node["mask"] is None and mask_inside(fn) is None
    if not _is_given(node) or (node["is_observed"] and unmasked and is_fixed(fn)):
        return fn.log_prob(value)
    return density(fn, value, preimage_of(node))


def outside_support(name: str, node: Node) -> str:
    """Return which distribution's support a site's value lies outside of; "" where it does not."""
    fn, value = node["fn"], node["value"]
    within = inside(fn, value) if _is_given(node) else None
    if within is None:
        return ""
    out = left_out(fn, node["mask"], value.device)
    within = within | (out.flatten(-fn.event_dim).all(-1) if fn.event_dim else out)
    return "" if bool(within.all()) else f"{name!r} ({type(plain_distribution(fn)).__name__})"


def outside_sites(nodes: Iterable[tuple[str, Sequence[Any]]]) -> list[str]:
    """Return the sites with values outside of the support of the model's distribution.

    Args:
        nodes: of the model, by site; several where it ran several times.
    """
    texts = dict.fromkeys(outside_support(name, node) for name, some in nodes for node in some)
    return list(filter(None, texts))


def non_finite_sites(model: Program, guide: Program, batch: Batch) -> list[str]:
    """Return the sites whose value or log density is not finite in one run, in order."""
    found = []
    with torch.no_grad(), pyro.validation_enabled(False):
        model_trace, guide_trace = trace_pair(model, guide, batch)
        for owner, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, node in sample_nodes(trace):
                density = site_log_prob(name, node)
                scaled = scale_and_mask(density, node["scale"], node["mask"])
                if not (node["value"].isfinite().all() and scaled.isfinite().all()):
                    outside = OUTSIDE if outside_support(name, node) else ""
                    found.append(f"{name!r} of the {owner}{outside}")
    return found


# --- whether a guide proposes just what the model needs


def check_proposals(model_trace: Trace, guide_trace: Trace) -> None:
    """Raise ValueError if a guide does not propose just the model's latent sites.

    Discrete sites of finite support need no proposal: they are summed out. Sites that the
    guide observes, or marks auxiliary, are no proposals.
    """
    wanted = dict(latent_nodes(model_trace))
    observed = set(model_trace.observation_nodes)
    proposed = {n for n, node in latent_nodes(guide_trace) if not node["infer"].get("is_auxiliary")}
    if missing := [n for n in wanted.keys() - proposed if not is_enumerable(wanted[n]["fn"])]:
        raise ValueError(
            f"the guide has no sample statement for the model's latent sites {sorted(missing)}; "
            f"it has {sorted(proposed)}. Only discrete sites of finite support need none: they "
            "are summed out"
        )
    if unknown := proposed - wanted.keys() - observed:
        raise ValueError(
            f"the guide samples {sorted(unknown)}, which the model does not; the model's latent "
            f"sites are {sorted(wanted)}. Rename them. A global latent is fixed at a value in "
            "model and guide alike by given={name: value}"
        )
    if clash := proposed & observed:
        raise ValueError(
            f"the guide proposes {sorted(clash)}, which the model observes; observe them in the "
            "guide too (obs=...), or leave them out"
        )
    _check_helpers(guide_trace)


def _check_helpers(guide_trace: Trace) -> None:
    """Raise ValueError for auxiliary sites of which no latent is made.

    Their density counts in log q(z | x). That is right where points are made of them, as
    Pyro's autoguides do; else the loss grows with their entropy past log p(x).
    """

    def numbers(nodes: Iterable[Node]) -> int:
        return sum(node["value"].numel() for node in nodes)

    latents = dict(latent_nodes(guide_trace))
    points = numbers(node for node in latents.values() if is_point(node["fn"]))
    helpers = {n: node for n, node in latents.items() if node["infer"].get("is_auxiliary")}
    plain = {n: node for n, node in helpers.items() if not isinstance(node["fn"], Noise)}
    free = {n: node for n, node in plain.items() if not is_point(node["fn"])}
    if numbers(free.values()) <= points:
        return
    # A density of one everywhere is no matter.
    free = {n: node for n, node in free.items() if node["fn"].log_prob(node["value"]).any()}
    if numbers(free.values()) > points:
        raise ValueError(
            f"the guide's auxiliary sites {sorted(free)} have a density of which no latent of the "
            "model is made: it counts in log q(z | x), with nothing beside it in the model: no "
            "bound. Sample them in the model as well, given the latents (without is_auxiliary); or "
            "let latents be points made of them (dist.Delta), as AutoNormal does"
        )
