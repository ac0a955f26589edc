"""Whether a guide proposes just what the model needs."""

from __future__ import annotations

from pyro_vae.programs.nodes import is_enumerable, is_point, latent_nodes, sample_nodes
from pyro_vae.programs.types import Trace


def check_guide(model_trace: Trace, guide_trace: Trace) -> None:
    """Raise ValueError if a guide does not propose just the model's latent sites.

    Discrete sites of finite support need no proposal: they are summed out. Sites that the
    guide observes, or marks auxiliary, are no proposals.
    """
    wanted = dict(latent_nodes(model_trace))
    observed = {name for name, node in sample_nodes(model_trace) if node["is_observed"]}
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
    nodes = dict(latent_nodes(guide_trace))
    points = [name for name, node in nodes.items() if is_point(node["fn"])]
    helpers = [
        name
        for name, node in nodes.items()
        if node["infer"].get("is_auxiliary") and name not in points
    ]

    def numbers(names: list[str]) -> int:
        return sum(nodes[name]["value"].numel() for name in names)

    if not helpers or numbers(helpers) <= numbers(points):
        return
    densities = {name: nodes[name]["fn"].log_prob(nodes[name]["value"]) for name in helpers}
    free = [name for name in helpers if densities[name].any()]  # one everywhere is no matter
    if numbers(free) > numbers(points):
        raise ValueError(
            f"the guide's auxiliary sites {sorted(free)} have a density of which no latent of the "
            "model is made: it counts in log q(z | x), with nothing beside it in the model: no "
            "bound. Sample them in the model as well, given the latents (without is_auxiliary); or "
            "let latents be points made of them (dist.Delta), as AutoNormal does"
        )
