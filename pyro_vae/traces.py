"""One run of a guide and the replayed model, and the log density of a site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_vae.batches import Batch
from pyro_vae.sites import check_guide, latent_nodes, sample_nodes

__all__ = ["latent_masks", "non_finite_sites", "site_log_prob", "trace_pair"]


def trace_pair(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """Run the guide, replay the model with its draws, and return both traces.

    A latent that the model masks is not there, nor is its proposal: the model's mask is
    put on the guide's site as well. Otherwise its density would count for nothing, and
    the bound grow with the guide's entropy past log p(x).

    Raises:
        ValueError: where the guide does not propose just the model's latent sites.
    """
    guide_trace = poutine.trace(guide, graph_type="flat").get_trace(*args, **kwargs)
    model_trace = poutine.trace(
        poutine.replay(model, trace=guide_trace), graph_type="flat"
    ).get_trace(*args, **kwargs)
    check_guide(model_trace, guide_trace)
    for name, mask in latent_masks(model_trace).items():
        node = guide_trace.nodes[name]
        node["mask"] = mask if node["mask"] is None else node["mask"] & mask
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def latent_masks(model_trace: Any) -> dict[str, Tensor | bool]:
    """Return the masks that a model puts on its latent sites."""
    return {
        name: node["mask"]
        for name, node in latent_nodes(model_trace)
        if node["mask"] is not None and node["mask"] is not True
    }


def site_log_prob(name: str, node: Any, *, scaled: bool) -> Tensor:
    """Return a site's log density, of its batch shape, masked, and scaled if asked.

    Raises:
        ValueError: for a value outside the support, naming the site.
    """
    fn = node["fn"]
    try:
        log_prob = fn.log_prob(node["value"])
    except ValueError as error:
        role = "observed" if node["is_observed"] else "latent"
        raise ValueError(
            f"{role} site {name!r}: no log density of its value under {fn}: {error}"
        ) from error
    return scale_and_mask(log_prob, node["scale"] if scaled else 1.0, node["mask"])


def non_finite_sites(
    model: Callable[..., Any], guide: Callable[..., Any], batch: Batch
) -> list[str]:
    """Return the sites whose value or log density is not finite in one run, in order."""
    found = []
    with torch.no_grad(), pyro.validation_enabled(False):
        model_trace, guide_trace = trace_pair(model, guide, batch.args, batch.kwargs)
        for owner, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, node in sample_nodes(trace):
                value, log_prob = node["value"], site_log_prob(name, node, scaled=True)
                if not bool(torch.isfinite(value).all() & torch.isfinite(log_prob).all()):
                    found.append(f"{name!r} of the {owner}")
    return found
