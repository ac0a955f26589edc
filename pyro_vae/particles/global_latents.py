"""Global latents held at values passed or at the guide's median: each datum has a bound then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import DeclaredGuide, RowGuide
from pyro_vae.programs.messages import trace_of
from pyro_vae.programs.nodes import is_point, latent_nodes
from pyro_vae.programs.sites import Site, Structure
from pyro_vae.programs.state import looking
from pyro_vae.programs.structure import DataPlateError, inspect, run_model


def fix_globals(
    model: Callable[..., Any],
    guides: Mapping[str, Any],
    batch: Batch,
    data_plate: str | bool | None,
    given: Mapping[str, Any] | None = None,
) -> tuple[Callable[..., Any], dict[str, Any], Given]:
    """Return a model and guides without global latents, and the values they were fixed at.

    Values are those passed, else those that a LocalGuide was fitted at, else the median of the
    first guide's ``global_guide``. Without any, model and guides are returned as they are.

    Args:
        model: a Pyro model.
        guides: name to guide (or to anything else, which is handed on).
        batch: their arguments.
        data_plate: as in :func:`pyro_vae.log_weights`.
        given: values of global latent sites, by name.

    Raises:
        TypeError: where the global guide does not say its median; for a ``given`` that is no
            mapping.
        ValueError: where its median leaves out one of the model's global latents; for a given
            site that is no global latent, a value of another shape or outside the support, a
            guide that has no density of its other sites given these, and a LocalGuide that was
            fitted at other values.
    """
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"given={given!r}: a mapping from the names of global latent sites to values is needed"
        )
    if not given and data_plate is not False:
        # Before the median of another guide, which may have been trained since.
        given = {}
        for guide in guides.values():
            given = {**_fitted_at(guide), **given}
    shared = {
        name: guide
        for name, guide in guides.items()
        if isinstance(guide, DeclaredGuide) and guide.global_guide is not None
    }
    if not given and (not shared or data_plate is False):
        return model, dict(guides), Given({})
    structure = _structure(model, batch, data_plate, given or {})
    wanted = [site.name for site in structure.global_latents]
    chosen = _values(given or {}, structure)
    values: dict[str, Tensor] = dict(chosen)
    if shared and data_plate is not False and set(wanted) - set(chosen):
        name, first = next(iter(shared.items()))
        values = {**_median(first.global_guide, batch), **chosen}
        if missing := [site for site in wanted if site not in values]:
            raise ValueError(
                f"the median of guide {name!r}'s global_guide has {sorted(values)}, not the "
                f"model's global latent sites {missing}, which a bound for each datum needs "
                "fixed; pass their values (given={...})"
            )
    fixed = Given({site: values[site].detach() for site in wanted if site in values}, chosen)
    for name, guide in guides.items():
        _check_fitted(name, guide, fixed)
    all_fixed = data_plate is not False and len(fixed) == len(wanted)
    return (
        poutine.block(pyro.condition(model, data=fixed), hide=list(fixed)),
        {
            name: guide.local_part()
            if name in shared and all_fixed
            else _without(name, guide, fixed, batch)
            for name, guide in guides.items()
        },
        fixed,
    )


def _fitted_at(guide: Any) -> Mapping[str, Tensor]:
    return guide.given if isinstance(guide, RowGuide) else {}


def _check_fitted(name: str, guide: Any, fixed: Given) -> None:
    """Raise ValueError for a LocalGuide whose rows were fitted at other values of the globals."""
    if isinstance(guide, RowGuide) and guide.is_start:
        return
    for site, value in _fitted_at(guide).items():
        here = fixed.get(site)
        if here is None or torch.allclose(value.to(here), here, rtol=1e-4, atol=1e-6):
            continue
        raise ValueError(
            f"the rows of guide {name!r} were fitted given {site!r} at {_short(value)}, not at "
            f"{_short(here)}. Pass given={{{site!r}: ...}} of that value, or refine the guide "
            "anew: pyro_vae.refine(model, guide, *batch, given=...)"
        )


def _short(value: Tensor) -> str:
    shown = ", ".join(f"{number:.4g}" for number in value.flatten()[:3].tolist())
    return f"[{shown}, ...]" if value.numel() > 3 else f"[{shown}]"


def fix_globals_of_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    data_plate: str | bool | None,
    given: Mapping[str, Any] | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any], Given]:
    """Return :func:`fix_globals` of a single guide."""
    model, guides, fixed = fix_globals(model, {"guide": guide}, batch, data_plate, given)
    return model, guides["guide"], fixed


def _structure(
    model: Callable[..., Any], batch: Batch, data_plate: str | bool | None, given: Mapping[str, Any]
) -> Structure:
    """Return the model's structure; where all its latents are given, that of what they leave."""
    try:
        return inspect(model, batch, data_plate=data_plate)
    except DataPlateError:
        run = run_model(model, batch)
        latents = {name: site for name, site in run.sites.items() if site.kind == "latent"}
        if not latents or latents.keys() - given.keys():
            raise
    fixed = {name: site.value for name, site in latents.items()}
    hidden = poutine.block(pyro.condition(model, data=fixed), hide=list(fixed))
    rest = inspect(hidden, batch, data_plate=data_plate, latents_needed=False)
    plate = rest.data_plate
    kinds = {
        name: "global latent" if plate not in site.plates else "local latent"
        for name, site in latents.items()
    }
    shared = {name: replace(site, kind=kinds[name]) for name, site in latents.items()}
    return Structure({**shared, **rest.sites}, plate, run.nesting)


def _values(given: Mapping[str, Any], structure: Structure) -> dict[str, Tensor]:
    """Return the values passed, checked, in the dtype and on the device of their sites."""
    found = {}
    for name, value in given.items():
        site = structure.sites.get(name)
        if site is None or site.kind != "global latent":
            what = "no site of the model" if site is None else f"a site of kind {site.kind!r}"
            raise ValueError(
                f"given names {name!r}, {what}; its global latents are "
                f"{[site.name for site in structure.global_latents]}"
            )
        found[name] = _value(value, site)
    return found


def _value(value: Any, site: Site) -> Tensor:
    tensor = torch.as_tensor(value, dtype=site.value.dtype, device=site.value.device)
    wanted = (*site.batch_shape, *site.event_shape)
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"given[{site.name!r}] has shape {list(tensor.shape)}, but the site has {list(wanted)}"
        )
    try:
        inside = bool(site.support.check(tensor).all()) and not bool(tensor.isnan().any())
    except NotImplementedError:  # a distribution without a declared support
        inside = True
    if not inside:
        raise ValueError(
            f"given[{site.name!r}]={value!r} lies outside the site's support ({site.support_text})"
        )
    return tensor


def _without(name: str, guide: Any, fixed: Given, batch: Batch) -> Any:
    """Return a guide of the other sites, given these; anything else is handed on."""
    if not callable(guide) or isinstance(guide, type):
        return guide
    if (
        isinstance(guide, DeclaredGuide)
        and guide.global_guide is None
        and not fixed.keys() & set(guide.site_names)
    ):
        return guide  # as it is: what it is, is asked for
    first, second = _latents(guide, batch, 2)
    # Of Pyro's autoguides, which sample a site's unconstrained value beside it.
    helpers = {site: f"{site}_unconstrained" for site in fixed}
    joint = [
        helper
        for helper, node in first.items()
        if node["infer"].get("is_auxiliary") and not helper.endswith("_unconstrained")
    ]
    for site in fixed:
        if not joint or site not in first or not is_point(first[site]["fn"]):
            continue
        if helpers[site] not in first and not _same_value(first, second, site):
            raise ValueError(
                f"given names {site!r}, which guide {name!r} computes from {joint[0]!r}, together "
                "with other sites: of those it has no density given this one. Take a guide with a "
                "proposal for each site, such as pyro.infer.autoguide.AutoNormal"
            )
    if not first.keys() & {*fixed, *helpers.values()}:
        return guide
    return poutine.block(pyro.condition(guide, data=fixed), hide=[*fixed, *helpers.values()])


def _same_value(first: Mapping[str, Any], second: Mapping[str, Any], site: str) -> bool:
    return site in second and torch.equal(first[site]["value"], second[site]["value"])


def _latents(guide: Callable[..., Any], batch: Batch, runs: int) -> list[dict[str, Any]]:
    """Return a guide's latent nodes by name, in each of some runs."""
    found = []
    with looking(guide, device=batch.device):
        for _ in range(runs):
            trace = trace_of(guide, batch)
            found.append(dict(latent_nodes(trace)))
    return found


def _median(global_guide: Any, batch: Batch) -> dict[str, Tensor]:
    refusal = TypeError(
        f"a bound for each datum needs the global latents fixed, at the global_guide's median; "
        f"{type(global_guide).__name__} has no method median(*batch). Give it one, as most of "
        "Pyro's autoguides have; pass values (given={...}); or pass data_plate=False to treat the "
        "whole batch as one datum"
    )
    if not hasattr(global_guide, "median"):
        raise refusal
    with looking(global_guide, device=batch.device):
        try:
            return dict(global_guide.median(*batch.args, **batch.kwargs))
        except NotImplementedError as error:
            raise refusal from error


class Given(dict[str, Tensor]):
    """Global latent sites, and the values that they were fixed at.

    Args:
        values: by site.
        chosen: the sites whose values were passed; those of the others are the guide's median.
    """

    def __init__(self, values: Mapping[str, Tensor], chosen: Iterable[str] = ()) -> None:
        super().__init__(values)
        self.chosen = frozenset(chosen)


def given_text(given: Mapping[str, Any]) -> str:
    """Return what a result says of global latents that were fixed; "" where none were."""
    chosen = [name for name in given if isinstance(given, Given) and name in given.chosen]
    medians = [name for name in given if name not in chosen]
    parts = [(medians, "at the guide's median"), (chosen, "at the values passed")]
    return "; ".join(f"{', '.join(names)} {how}" for names, how in parts if names)
