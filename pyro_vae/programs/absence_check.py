"""Whether a latent that the model masks everywhere is absent, or has a flat prior."""

from __future__ import annotations

import math

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.programs.agreement import largest_gap
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.masks import mask_of
from pyro_vae.programs.messages import trace_of
from pyro_vae.programs.nodes import latent_nodes, sample_nodes
from pyro_vae.programs.preimages import preimage_of
from pyro_vae.programs.pyro_internals import is_deterministic
from pyro_vae.programs.state import Look, preserved_rng
from pyro_vae.programs.traces import GiveValues, site_log_prob
from pyro_vae.programs.types import Node, Program, Trace

# Of other draws than those of the guide, which may be the same function of the random state.
_SEED = 5419351


def check_absent(model: Program, model_trace: Trace, batch: Batch) -> None:
    """Raise ValueError where densities depend on a latent that the model masks everywhere.

    A masked latent counts as one that is not there, and its proposal's density is left out as
    well. That is right where nothing depends on the draw. A mask of all of a site on which
    something depends stands for an improper flat prior: the entropy of the proposal would be
    missing from the bound, and a guide that is trained by it would shrink to a point.

    Args:
        model: a Pyro model.
        model_trace: of the model under its guide, with masks lifted to sites.
        batch: the model's arguments.
    """
    latents = dict(latent_nodes(model_trace))
    drawn = {name: _drawn_anew(node) for name, node in latents.items()}
    changed = {name: value for name, value in drawn.items() if value is not None}
    if not changed:
        return
    given = {  # the subsamples of plates among them
        name: node["value"]
        for name, node in model_trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
    }
    kept = {name: found for name, node in latents.items() if (found := preimage_of(node))}
    left = {name: preimage for name, preimage in kept.items() if name not in changed}
    with Look() as look, torch.no_grad(), pyro.validation_enabled(False), poutine.block():
        before = _terms(model, GiveValues(given, kept), batch)
        after = _terms(model, GiveValues({**given, **changed}, left), batch)
    if look.error is not None:
        return
    for name, one in before.items():
        other = after.get(name, one)
        if gap := largest_gap(one, other) if one.shape == other.shape else math.inf:
            raise ValueError(
                f"the density of site {name!r} depends on draws of {sorted(changed)} that the "
                f"model masks everywhere (it changes by {gap:.3g} nats). A latent that is masked "
                "counts as one that is not there, and its proposal is left out too; a mask that "
                "stands for a flat prior has no evidence to bound. Give the site a proper prior, "
                "however wide; mask what depends on it as well; or train with "
                "pyro.infer.Trace_ELBO, which CompiledSVI takes"
            )


def _drawn_anew(node: Node) -> Tensor | None:
    """Return another draw of a latent that is masked everywhere; None for other latents."""
    mask = mask_of(node)
    if mask is None or bool(torch.as_tensor(mask).any()):
        return None
    value = node["value"]
    with Look() as look, torch.no_grad(), preserved_rng(value.device):
        torch.manual_seed(_SEED)
        other = node["fn"].sample().expand_as(value)
    return None if look.error is not None or torch.equal(other, value) else other


def _terms(model: Program, give: GiveValues, batch: Batch) -> dict[str, Tensor]:
    """Return the log density of each site, masked, of the model run with these values."""
    with preserved_rng(next(iter(give.values.values())).device):
        trace = trace_of(give(model), batch)
    return {
        name: site_log_prob(name, node, scaled=False)
        for name, node in sample_nodes(trace)
        if not is_deterministic(node)
    }
