"""Sites whose log density float32 is too coarse for."""

from __future__ import annotations

import logging

import pyro
import torch

from pyro_vae.particles.run import Run, Runner
from pyro_vae.programs.nodes import sample_nodes
from pyro_vae.programs.precision import rounding_of_parameters
from pyro_vae.programs.state import Look, unwrapped
from pyro_vae.programs.traces import site_log_prob
from pyro_vae.programs.types import Node, Program, Trace
from pyro_vae.programs.warned_once import warn_once

__all__ = ["coarse_sites", "warn_of_coarse_loss", "warn_of_coarse_parameters"]

logger = logging.getLogger(__name__)

_ROUNDING = 1e-3  # nats of a datum, beyond which a site is scored in float64
_COARSE_LOSS = 0.05  # nats of a datum that a reported loss may be off by, before a warning
# Nats of a datum that float32 parameters of a likelihood may cost before a warning.
_COARSE = 1e-2


def coarse_sites(run: Run) -> frozenset[str]:
    """Return the sites whose log density of a datum float32 gives wrong by over 0.001 nats."""
    found = set()
    for name, nodes in run.sites():
        with Look():  # a distribution may be made for one dtype
            if _rounding(run, name, nodes) > _ROUNDING:
                found.add(name)
    return frozenset(found)


def _rounding(run: Run, name: str, nodes: list[Node]) -> float:
    """Return how far a site's log density of a datum is from that in float64, at most."""
    narrow, wide = (
        [site_log_prob(name, node, scaled=False, double=double) for node in nodes]
        for double in (False, True)
    )
    if narrow[0].dtype == wide[0].dtype:
        return 0.0
    if run.summed_out:  # with dimensions of its own: on average
        pairs = zip(narrow, wide, strict=True)
        total = torch.stack([(a - b).abs().nan_to_num().sum() for a, b in pairs]).sum()
        return float(total) / (run.num_particles * run.num_data)
    gap = run.by_particle(narrow) - run.by_particle(wide)
    return float(gap.abs().nan_to_num().max())


def warn_of_coarse_parameters(model: Runner, run: Run) -> None:
    """Warn where a likelihood's parameters are too coarse, though it is scored in float64.

    Args:
        model: that ran.
        run: of it.
    """
    pairs = run.num_data * run.num_particles // len(run.traces)
    for name in model.double:
        node = run.traces[0].nodes[name]
        if not node["is_observed"]:
            continue
        moved = rounding_of_parameters(node["fn"], node["value"])
        # Of all together, whose parameters are rounded apart.
        per_datum = 0.0 if moved is None else float(moved) / pairs**0.5
        if per_datum > _COARSE:
            warn_once(
                logger,
                (unwrapped(model.program),),
                "the model gives the likelihood of %r in float32: its rounding moves the log "
                "density of a datum by about %.2g nats, which no standard error counts. Give "
                "data, parameters and networks in float64",
                name,
                per_datum,
            )


def warn_of_coarse_loss(model_trace: Trace, owners: tuple[Program, Program]) -> None:
    """Warn where float32 gives another loss; training goes on, because gradients mind less."""
    for name, node in sample_nodes(model_trace):
        if not node["is_observed"]:
            continue
        gap = 0.0
        # Where a distribution cannot be had in float64, nothing can be told.
        with Look(), torch.no_grad(), pyro.validation_enabled(False):
            narrow, wide = (
                site_log_prob(name, node, scaled=False, double=double) for double in (False, True)
            )
            gap = float((narrow.sum() - wide.sum()).abs()) / max((1, *narrow.shape[:1]))
        if gap > _COARSE_LOSS:
            warn_once(
                logger,
                owners,
                "the loss is off by about %.2g nats for a datum: terms of the observed site %r are "
                "so large that float32 keeps too few of their digits. Its gradients are little "
                "hurt by it, and bounds (pv.elbo, pv.iwae_bound) score such sites in float64; for "
                "a loss to trust, give data, parameters and networks in float64",
                gap,
                name,
            )
