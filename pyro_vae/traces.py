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
from pyro_vae.sites import check_guide, sample_nodes

__all__ = ["non_finite_sites", "site_log_prob", "trace_pair"]


def trace_pair(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """Run the guide, replay the model with its draws, and return both traces.

    Raises:
        ValueError: where the guide does not propose just the model's latent sites.
    """
    guide_trace = poutine.trace(guide, graph_type="flat").get_trace(*args, **kwargs)
    model_trace = poutine.trace(
        poutine.replay(model, trace=guide_trace), graph_type="flat"
    ).get_trace(*args, **kwargs)
    check_guide(model_trace, guide_trace)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


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
