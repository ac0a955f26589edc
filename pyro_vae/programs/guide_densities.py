"""What a guide must be for each datum to have a weight, and which of its sites are points."""

from __future__ import annotations

import math

import torch
import torch.distributions as td

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.nodes import is_circular, is_point, latent_nodes, plain_distribution
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.supports import flat_transforms, support_of
from pyro_vae.programs.traces import trace_guide
from pyro_vae.programs.types import Distribution, Node, Program, Trace

_PERIOD = 2 * math.pi * (1 + 1e-6)  # ends are rounded


def check_per_datum(structure: Structure, model_trace: Trace, guide_trace: Trace) -> None:
    """Raise ValueError for a guide's site whose density is no bound, or not one per datum."""
    plate = structure.data_plate
    nodes = {name: (node, model_trace.nodes.get(name)) for name, node in latent_nodes(guide_trace)}
    for name, (_, theirs) in nodes.items():
        if theirs is not None and is_circular(theirs["fn"]):
            _check_circle(name, guide_trace)
    if plate is None:
        return
    for name, (node, theirs) in nodes.items():
        shape, events = node["fn"].batch_shape, node["fn"].event_dim
        found = shape[plate.dim] if len(shape) >= -plate.dim else None
        within = plate.name in {frame.name for frame in node["cond_indep_stack"]}
        if not within and found != structure.num_data:
            raise ValueError(
                f"the guide's site {name!r} has batch shape {list(shape)}: its density is one "
                f"number for the whole batch, not one for each of the {structure.num_data} data "
                f"of plate {plate.name!r} (dim {plate.dim}). Sample it in that plate, or pass "
                "data_plate=False to treat the whole batch as one datum"
            )
        if found not in (None, 1, structure.num_data):
            raise ValueError(
                f"the guide proposes {found} values of {name!r} along plate {plate.name!r}, and "
                f"the batch has {structure.num_data} data: it has parameters for each of the data "
                "that it was made for. Pass all of these, in their order, or use an AmortizedGuide"
            )
        if theirs is not None and theirs["fn"].event_dim != events:
            raise ValueError(
                f"latent site {name!r} has {theirs['fn'].event_dim} event dimensions in the "
                f"model and {events} in the guide; mend with .to_event(...)"
            )


def _check_circle(name: str, guide_trace: Trace) -> None:
    """Raise ValueError for a proposal that goes round the circle of an angle more than once."""
    fn = guide_trace.nodes[name]["fn"]
    if is_circular(fn):
        return
    holder = guide_trace.nodes.get(f"{name}_unconstrained")  # where AutoNormal holds the density
    if is_point(fn) and holder is not None:
        fn = holder["fn"]  # torch maps the reals to an angle by the identity
    width = _width(plain_distribution(fn))
    if width > _PERIOD:
        where = "the reals" if width == math.inf else f"an interval of {width:.3g}"
        raise ValueError(
            f"latent site {name!r} is an angle, and the guide's "
            f"{type(plain_distribution(fn)).__name__} runs over {where}, on which the model's "
            "periodic density goes on: no bound. Propose angles between -pi and pi: VonMises, or "
            "a guide of pyro_vae"
        )


def _width(fn: Distribution) -> float:
    """Return how wide the interval is that a distribution of numbers draws from; 0 for no answer.

    Of a transformed distribution torch may call the support real, where it is an interval.
    """
    transforms: list[td.Transform] = []
    while isinstance(fn, td.TransformedDistribution):
        transforms = [*flat_transforms(fn.transforms), *transforms]
        fn = plain_distribution(fn.base_dist)
    support = support_of(fn)
    if support is None or support.event_dim or any(t.domain.event_dim for t in transforms):
        return 0.0
    ends = [
        torch.as_tensor(getattr(support, name, default))
        for name, default in (("lower_bound", -math.inf), ("upper_bound", math.inf))
    ]
    for transform in transforms:
        ends = [transform(end) for end in ends]
    width = (ends[1] - ends[0]).abs().max()
    return 0.0 if bool(width.isnan()) else float(width)


def points(guide: Program, batch: Batch, guide_trace: Trace) -> list[str]:
    """Return the latents that a guide proposes a point for, whose density nothing carries.

    Where there are auxiliary sites, they carry the density (as AutoNormal's do) of what moves
    with them from run to run, and of nothing else.
    """
    nodes = dict(latent_nodes(guide_trace))
    auxiliary = {n for n, node in nodes.items() if node["infer"].get("is_auxiliary")}
    bare = [n for n, node in nodes.items() if n not in auxiliary and _bare_point(node)]
    if not bare or not auxiliary:
        return bare
    again = trace_guide(guide, batch)
    return [n for n in bare if torch.equal(nodes[n]["value"], again.nodes[n]["value"])]


def _bare_point(node: Node) -> bool:
    """Whether a guide's site is a Delta that carries no density of a distribution."""
    return is_point(node["fn"]) and bool((node["fn"].log_prob(node["value"]) == 0).all())
