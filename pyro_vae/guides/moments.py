"""Means and widths that guides start from: those of the prior, of draws, of Normal proposals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_vae.guides.coordinates import Coordinates
from pyro_vae.guides.model_look import ModelLook
from pyro_vae.programs.state import preserved_rng
from pyro_vae.programs.types import Node

__all__ = ["middle_moments", "normal_moments", "prior_moments"]

_PRIOR_DRAWS = 1000
_WIDEST = 3.0  # standard deviation of a start on the reals, where they are mapped to a support


def prior_moments(look: ModelLook, coordinates: Sequence[Coordinates]) -> tuple[Tensor, Tensor]:
    """Return mean and width of the prior in unconstrained coordinates, over draws and data, [D].

    Args:
        look: at the model.
        coordinates: of each latent site that a guide proposes.

    Raises:
        ValueError: for a site whose prior is a point.
    """
    device = next(iter(look.structure.sites.values())).value.device
    with torch.no_grad(), preserved_rng(device):
        torch.manual_seed(0)  # the start of a guide is part of its definition
        moments = [_prior_moments(look, mine) for mine in coordinates]
    means, stds = zip(*moments, strict=True)
    return torch.cat(means), torch.cat(stds)


def _prior_moments(look: ModelLook, mine: Coordinates) -> tuple[Tensor, Tensor]:
    draws = look.structure.sites[mine.name].fn.sample((_PRIOR_DRAWS,))
    mean, std = _of_site(mine, draws)
    if not bool((std > 0).all()):  # given these parents, which have a prior too
        others = look.draws_of_other_parents(mine.name)
        draws = draws if others is None else others
        mean, std = _of_site(mine, draws)
        if bool((draws == draws[:1]).all()):
            raise ValueError(
                f"latent site {mine.name!r}: its prior does not vary (a point), so there is "
                "nothing to infer. Use pyro.deterministic, or condition on it"
            )
        # It varies between a few values, or between the ends of its support.
        mean = torch.where(mean.isfinite(), mean, 0.0)
        std = torch.where(std > 0, std, _WIDEST)
    # Wide on the reals may be beyond all numbers once mapped to the support.
    return mean, std if mine.is_identity else std.clamp(max=_WIDEST)


def _of_site(mine: Coordinates, draws: Tensor) -> tuple[Tensor, Tensor]:
    return middle_moments(mine.rows(mine.transform.inv(draws)).flatten(0, 1))


def middle_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column; of heavy tails, those of the middle.

    Heavy tails have no moments: median and half the distance of the 16 % and 84 % quantiles stand
    in. Values that are not finite count for neither.

    Args:
        rows: draws, [K, ...].
    """
    if rows.dtype in (torch.float16, torch.bfloat16):  # which PyTorch has no quantiles of
        mean, std = middle_moments(rows.float())
        return mean.to(rows.dtype), std.to(rows.dtype)
    some = rows[:: -(-len(rows) // 10_000)]
    # Sorted, NaN last: torch.nanquantile takes 2**24 numbers at most.
    some = torch.where(some.isfinite(), some, math.nan).sort(dim=0).values
    last = (some.isfinite().sum(0, keepdim=True) - 1).clamp_min(0)
    low, median, high = (
        some.gather(0, (level * last).round().long())[0] for level in (0.16, 0.5, 0.84)
    )
    mean, std, middle = rows.mean(0), rows.std(0), (high - low) / 2
    light = (std < 2 * middle) | (std == 0)
    return torch.where(light, mean, median), torch.where(light, std, middle)


def normal_moments(nodes: Sequence[Node]) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation of a site of independent Normals.

    Args:
        nodes: the site in several runs.

    Returns:
        Two tensors of the site's shape; None where it is no Normal, or not alike in all runs, as
        it is where it depends on another draw.
    """
    found = []
    for node in nodes:
        fn = node["fn"]
        while isinstance(fn, Independent):
            fn = fn.base_dist
        if not isinstance(fn, Normal):
            return None
        found.append((fn.loc, fn.scale))
    loc, scale = found[0]
    if any(not torch.equal(loc, a) or not torch.equal(scale, b) for a, b in found):
        return None
    return loc, scale
