"""Means and widths that guides start from: those of the prior, of draws, of Normal proposals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_vae.guides.coordinates import Coordinates
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import Look, preserved_rng
from pyro_vae.programs.structure import ModelLooks, run_model
from pyro_vae.programs.types import Node

_PRIOR_DRAWS = 1000
_PARENT_RUNS = 50  # of the model, where the draws of one do not vary
_WIDEST = 3.0  # standard deviation of a start on the reals, where they are mapped to a support


def prior_moments(
    looks: ModelLooks, structure: Structure, coordinates: Sequence[Coordinates]
) -> tuple[Tensor, Tensor]:
    """Return mean and width of the prior in unconstrained coordinates, over draws and data, [D].

    Raises:
        ValueError: for a site whose prior is a point.
    """
    means, stds = [], []
    with torch.no_grad(), preserved_rng(next(iter(structure.sites.values())).value.device):
        torch.manual_seed(0)  # the start of a guide is part of its definition
        for mine in coordinates:
            draws = structure.sites[mine.name].fn.sample((_PRIOR_DRAWS,))
            mean, std = _of_site(mine, draws)
            if not bool((std > 0).all()):  # given these parents, which have a prior too
                draws = _of_other_parents(looks, mine.name, draws)
                mean, std = _of_site(mine, draws)
                if bool((draws == draws[:1]).all()):
                    raise ValueError(
                        f"latent site {mine.name!r}: its prior does not vary (a point), so there "
                        "is nothing to infer. Use pyro.deterministic, or condition on it"
                    )
                # It varies between a few values, or between the ends of its support.
                mean = torch.where(mean.isfinite(), mean, 0.0)
                std = torch.where(std > 0, std, _WIDEST)
            means.append(mean)
            # Wide on the reals may be beyond all numbers once mapped to the support.
            stds.append(std if mine.is_identity else std.clamp(max=_WIDEST))
    return torch.cat(means), torch.cat(stds)


def _of_site(mine: Coordinates, draws: Tensor) -> tuple[Tensor, Tensor]:
    return middle_moments(mine.rows(mine.transform.inv(draws)).flatten(0, 1))


def _of_other_parents(looks: ModelLooks, name: str, draws: Tensor) -> Tensor:
    """Return draws of a latent from its prior, its parents drawn anew for some of them."""
    found = []
    for seed in range(1, _PARENT_RUNS + 1):
        with Look() as look:
            sites = run_model(looks.model, looks.batch, seed=seed).sites
        if look.error is None:  # a draw that the model cannot take says nothing
            found.append(sites[name].fn.sample((_PRIOR_DRAWS // _PARENT_RUNS,)))
    return torch.cat(found) if found else draws


def middle_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of draws [K, ...], over the first dimension.

    Of heavy tails, which have no moments, median and half the distance of the 16 % and 84 %
    quantiles of those that are finite.
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
    """Return mean and standard deviation of a site of independent Normals, given several runs.

    None where it is no Normal, or is not alike in all runs: it depends on another draw.
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
