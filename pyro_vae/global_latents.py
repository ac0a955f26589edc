"""Global latents held at the guide's median, so that each datum has a bound of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.batches import Batch
from pyro_vae.guides import AmortizedGuide
from pyro_vae.running import evaluation, preserved_rng
from pyro_vae.sites import inspect

__all__ = ["fix_globals", "fix_globals_of_pair"]


def fix_globals(
    model: Callable[..., Any],
    guides: Mapping[str, Any],
    batch: Batch,
    data_plate: str | bool | None,
) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Tensor]]:
    """Return a model and guides without global latents, and the values they were fixed at.

    The values are the median of the first guide's ``global_guide``. A model without global
    latents, and guides without that part, are returned as they are.

    Args:
        model: a Pyro model.
        guides: name to guide (or to anything else, which is handed on).
        batch: their arguments.
        data_plate: as in :func:`pyro_vae.log_weights`.

    Raises:
        TypeError: where the global guide does not say its median.
        ValueError: where its median leaves out one of the model's global latents.
    """
    of_globals = {
        name: guide
        for name, guide in guides.items()
        if isinstance(guide, AmortizedGuide) and guide.global_guide is not None
    }
    if not of_globals or data_plate is False:
        return model, dict(guides), {}
    structure = inspect(model, batch, data_plate=data_plate)
    wanted = [site.name for site in structure.global_latents]
    name, first = next(iter(of_globals.items()))
    values = _median(first.global_guide, batch)
    if missing := [site for site in wanted if site not in values]:
        raise ValueError(
            f"the median of guide {name!r}'s global_guide has {sorted(values)}, not the model's "
            f"global latent sites {missing}, which a bound for each datum needs fixed"
        )
    fixed = {site: values[site].detach() for site in wanted}
    conditioned = poutine.block(pyro.condition(model, data=fixed), hide=wanted)
    rest = {name: guide.local_part() for name, guide in of_globals.items()}
    return conditioned, {**guides, **rest}, fixed


def fix_globals_of_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    data_plate: str | bool | None,
) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Tensor]]:
    """Return :func:`fix_globals` of a single guide."""
    model, guides, fixed = fix_globals(model, {"guide": guide}, batch, data_plate)
    return model, guides["guide"], fixed


def _median(global_guide: Any, batch: Batch) -> dict[str, Tensor]:
    refusal = TypeError(
        f"a bound for each datum needs the global latents fixed, at the global_guide's median; "
        f"{type(global_guide).__name__} has no method median(*batch). Give it one, as most of "
        "Pyro's autoguides have; or pass data_plate=False to treat the whole batch as one datum"
    )
    if not hasattr(global_guide, "median"):
        raise refusal
    with torch.no_grad(), preserved_rng(batch.device), evaluation(global_guide), poutine.block():
        try:
            return dict(global_guide.median(*batch.args, **batch.kwargs))
        except NotImplementedError as error:
            raise refusal from error
