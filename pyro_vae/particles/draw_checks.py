"""What is refused of draws and their log weights: edges of a support, numbers that are NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from pyro_vae.particles.log_weights import LogWeights
from pyro_vae.programs.site_shapes import SiteShape
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.supports import edge_share, lost_share
from pyro_vae.programs.types import Values

__all__ = ["refuse_edges", "refuse_nan"]

# Draws at the edge of a support that may be averaged over: their log weights are off by some nats.
_EDGE_SHARE = 1e-3


def refuse_edges(
    structure: Structure, shapes: Mapping[str, SiteShape], rows: slice, values: Values
) -> None:
    """Raise ValueError for draws that round to an edge, where log densities are made up.

    Args:
        structure: of the model.
        shapes: of its sites; draws that keep their preimages are scored by these.
        rows: of which data the draws are.
        values: the draws, ``[K, *plates, *event]``.
    """
    kept = {shapes[name].preimage_of for name in values if name in shapes}
    for name, value in values.items():
        site = structure.sites.get(name)
        if site is None or name in kept:
            continue
        dim = structure.data_dim
        axis = None if dim is None else dim - len(site.event_shape)
        share = edge_share(site.fn, value, rows, axis)
        holder = f"{name}_unconstrained"  # where Pyro's AutoNormal keeps what it drew
        if holder in values:
            share = max(share, lost_share(site.fn, value, values[holder]))
        if share > _EDGE_SHARE:
            raise ValueError(
                f"{share:.2g} of the guide's draws of latent site {name!r} lie at the edge of "
                f"what {value.dtype} can hold of its support ({site.support_text}), "
                "where neither density is to be trusted. Use float64, a prior that is less "
                "sparse, or a guide of pyro_vae, whose draws are scored before they round"
            )


def refuse_nan(rows: slice, weights: LogWeights) -> None:
    """Raise ValueError for weights that are NaN or +inf; -inf is a density of zero."""
    bad = (weights.total.isnan() | (weights.total == math.inf)).any(0)
    if not bool(bad.any()):
        return
    parts = {
        "log p(x | z)": weights.log_likelihood,
        "log p(z)": weights.log_prior,
        "log q(z | x)": weights.log_guide,
    }
    through = [name for name, part in parts.items() if not bool(torch.isfinite(part).all())]
    index = torch.nonzero(bad).flatten()[:5] + rows.start
    raise ValueError(
        f"the log weights of data {index.tolist()} ({int(bad.sum())} of {bad.shape[0]} in the "
        f"block) are NaN or infinite, through {', '.join(through)}: a draw is at the edge of a "
        "support, or overflows. Try float64, or bound the scale there"
    )
