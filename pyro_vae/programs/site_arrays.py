"""Values of a model's sites as arrays with the datum in front, and names of their dimensions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_vae.programs.sites import Site, Structure


def array_of(value: Tensor, site: Site, structure: Structure) -> np.ndarray:
    """Return values of a site, broadcast to its shape, as ``[N, *inner plates, *event]``.

    Args:
        value: what broadcasts with ``[*batch, *event]``.
        site: whose values they are.
        structure: of the model; as ``[*batch, *event]`` where it is one datum.
    """
    shape = torch.broadcast_shapes(value.shape, (*site.batch_shape, *site.event_shape))
    value = value.broadcast_to(shape)
    if structure.data_dim is not None:
        value = value.movedim(value.ndim - len(site.event_shape) + structure.data_dim, 0)
    return value.detach().cpu().numpy()


def observed_values(site: Site, structure: Structure) -> np.ndarray:
    """Return the values of an observed site, NaN where one is missing."""
    missing = site.missing
    value = site.value if missing is None else site.value.masked_fill(missing, np.nan)
    return array_of(value, site, structure)


def absent(site: Site, structure: Structure) -> np.ndarray | None:
    """Return where masks say that a site has no value: padding, for example; None for nowhere.

    A missing value is not absent: it is there, though not seen.
    """
    left_out = site.left_out if site.missing is None else site.left_out & ~site.missing
    return array_of(left_out, site, structure) if bool(left_out.any()) else None


def inner_dims(site: Site, structure: Structure) -> list[str]:
    """Return names of a site's dimensions but the data's: inner plates, then ``<site>_dim_i``."""
    batch = len(site.batch_shape)
    inner = {batch + p.dim: p.name for p in site.plates if p != structure.data_plate}
    data_axis = None if structure.data_dim is None else batch + structure.data_dim
    axes = [axis for axis in range(batch) if axis != data_axis]
    names = [inner.get(axis, f"{site.name}_dim_{i}") for i, axis in enumerate(axes)]
    return names + [f"{site.name}_dim_{len(axes) + i}" for i in range(len(site.event_shape))]
