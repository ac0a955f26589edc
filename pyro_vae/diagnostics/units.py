"""The units of a datum's latents: the numbers of each site, inner plates included, with a name."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from pyro_vae.particles.evaluator import Evaluator


def units_of(
    evaluator: Evaluator, name: str, value: Tensor, count: int, size: int
) -> tuple[Tensor, list[str]]:
    """Return the numbers of a site of n data, [K, n, d], and their names: ``z[0]``, or ``z``.

    Args:
        evaluator: of the pair.
        name: the site.
        value: ``[K, *plates, *event]``, or of size 1 where it is the same for all.
        count: K.
        size: n.
    """
    found = evaluator.by_datum({name: value})[name]
    if evaluator.structure.data_dim is None:
        found = found.unsqueeze(1)
    shape = found.shape[2:]
    index = (f"[{', '.join(map(str, place))}]" if place else "" for place in np.ndindex(*shape))
    numbers = found.expand(count, size, *shape).reshape(count, size, math.prod(shape))
    return numbers, [f"{name}{place}" for place in index]


def check_over_data(evaluator: Evaluator, what: str, fewest: int) -> None:
    """Raise ValueError where latents cannot be compared over the data.

    Args:
        evaluator: of the pair.
        what: asks for it.
        fewest: data that it needs.
    """
    if evaluator.structure.data_dim is None:
        raise ValueError(
            f"{what} is about how latents vary over the data, and data_plate=False says that all "
            "is one datum; rate_distortion takes it"
        )
    if evaluator.num_data < fewest:
        raise ValueError(
            f"{what} needs at least {fewest} data, for it is about how latents vary over them; "
            f"found {evaluator.num_data}"
        )
    if not evaluator.pair.guide_sites & set(evaluator.structure.sites):
        raise ValueError(
            f"{what}: the guide proposes no latent of the model; those that are summed out have no "
            "draws of the guide"
        )
    if masked := evaluator.pair.masked:
        raise ValueError(
            f"{what}: a mask of the model leaves draws of {sorted(masked)} out for some data, "
            "which have no posterior there; rate_distortion leaves them out"
        )
