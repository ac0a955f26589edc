"""What a guide must be for each datum to have a weight, and which of its sites are points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributions import constraints

from pyro_vae.batches import Batch
from pyro_vae.sites import Structure, is_circular, latent_nodes, plain_distribution
from pyro_vae.traces import is_point, trace_guide

__all__ = ["check_per_datum", "points"]


def check_per_datum(structure: Structure, model_trace: Any, guide_trace: Any) -> None:
    """Raise ValueError for a guide's site whose density is no bound, or not one per datum."""
    plate = structure.data_plate
    for name, node in latent_nodes(guide_trace):
        model_node = model_trace.nodes.get(name)
        if model_node is not None and is_circular(model_node["fn"]):
            _check_circle(name, node["fn"])
    if plate is None:
        return
    for name, node in latent_nodes(guide_trace):
        shape = node["fn"].batch_shape
        within = plate.name in {frame.name for frame in node["cond_indep_stack"]}
        if not within and (len(shape) < -plate.dim or shape[plate.dim] != structure.num_data):
            raise ValueError(
                f"the guide's site {name!r} has batch shape {list(shape)}: its density is one "
                f"number for the whole batch, not one for each of the {structure.num_data} data "
                f"of plate {plate.name!r} (dim {plate.dim}). Sample it in that plate, or pass "
                "data_plate=False to treat the whole batch as one datum"
            )
        found = shape[plate.dim] if len(shape) >= -plate.dim else 1
        if found not in (1, structure.num_data):
            raise ValueError(
                f"the guide proposes {found} values of {name!r} along plate {plate.name!r}, and "
                f"the batch has {structure.num_data} data: it has parameters for each of the data "
                "that it was made for. Pass all of these, in their order, or use an AmortizedGuide"
            )
        model_node = model_trace.nodes.get(name)
        if model_node is not None and model_node["fn"].event_dim != node["fn"].event_dim:
            raise ValueError(
                f"latent site {name!r} has {model_node['fn'].event_dim} event dimensions in the "
                f"model and {node['fn'].event_dim} in the guide; mend with .to_event(...)"
            )


def _check_circle(name: str, fn: Any) -> None:
    plain = plain_distribution(fn)
    # Of a transformed distribution torch may call the support real, where it is an interval.
    known = not isinstance(plain, torch.distributions.TransformedDistribution)
    on_the_reals = known and plain.support in (constraints.real, constraints.real_vector)
    if on_the_reals and not is_circular(fn):
        raise ValueError(
            f"latent site {name!r} is an angle, and the guide's {type(plain).__name__} runs over "
            "the reals, on which the model's periodic density has no end: no bound. Propose "
            "angles between -pi and pi: VonMises, or a guide of pyro_vae"
        )


def points(guide: Callable[..., Any], batch: Batch, guide_trace: Any) -> list[str]:
    """Return the latents that a guide proposes a point for, whose density nothing carries.

    Where there are auxiliary sites, they carry the density (as AutoNormal's do) of what moves
    with them from run to run, and of nothing else.
    """
    nodes = dict(latent_nodes(guide_trace))
    bare = [
        n
        for n, node in nodes.items()
        if not node["infer"].get("is_auxiliary") and _bare_point(node)
    ]
    if not bare or not any(node["infer"].get("is_auxiliary") for node in nodes.values()):
        return bare
    again = trace_guide(guide, batch.args, batch.kwargs)
    return [n for n in bare if torch.equal(nodes[n]["value"], again.nodes[n]["value"])]


def _bare_point(node: Any) -> bool:
    """Whether a guide's site is a Delta that carries no density of a distribution."""
    return is_point(node["fn"]) and bool((node["fn"].log_prob(node["value"]) == 0).all())
