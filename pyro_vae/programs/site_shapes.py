"""Batch and event dimensions of sites, and of the coordinates that their draws are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyro_vae.programs.nodes import sample_nodes
from pyro_vae.programs.preimages import preimage_key, preimage_of


@dataclass(frozen=True, slots=True)
class SiteShape:
    """Batch and event dimensions of a site in a single run, without particles.

    Attributes:
        batch_ndim: batch dimensions.
        event_ndim: event dimensions.
        preimage_of: of the coordinates that a site's draws are made from, that site.
        transforms: from these to the site's values.
    """

    batch_ndim: int
    event_ndim: int
    preimage_of: str | None = None
    transforms: tuple[Any, ...] = ()


def site_shapes(*traces: Any) -> dict[str, SiteShape]:
    """Return the shapes of all sites of some traces, and of the preimages of their draws."""
    found = {}
    for trace in traces:
        for name, node in sample_nodes(trace):
            own = SiteShape(len(node["fn"].batch_shape), node["fn"].event_dim)
            found[name] = own
            preimage = preimage_of(node)
            key = preimage and preimage_key(name, preimage.transforms)
            if key and preimage:
                events = own.event_ndim + preimage.draw.ndim - node["value"].ndim
                found[key] = SiteShape(own.batch_ndim, events, name, preimage.transforms)
    return found
