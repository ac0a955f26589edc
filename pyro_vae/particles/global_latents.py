"""Global latents held at values passed or at the guide's median: each datum has a bound then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import DeclaredGuide, RowGuide
from pyro_vae.programs.messages import trace_of
from pyro_vae.programs.nodes import is_point, latent_nodes
from pyro_vae.programs.on_demand import OnDemand
from pyro_vae.programs.pyro_internals import unconstrained
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import looking
from pyro_vae.programs.structure import DataPlateError, ModelLooks
from pyro_vae.programs.types import DataPlate, GivenValues, Program

_SOME = 256  # rows that are looked at of data that are read on demand


def fix_globals(
    model: Program,
    guides: Mapping[str, Any],
    batch: Batch,
    data_plate: DataPlate,
    given: GivenValues | None = None,
) -> tuple[Program, dict[str, Any], Given]:
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
    given, shared = dict(given or {}), dict[str, DeclaredGuide]()
    if data_plate is not False:
        # Before the median of another guide, which may have been trained since.
        fitted = [guide.given for guide in guides.values() if isinstance(guide, RowGuide)]
        given = given or {site: value for held in reversed(fitted) for site, value in held.items()}
        declared = {n: guide for n, guide in guides.items() if isinstance(guide, DeclaredGuide)}
        shared = {n: guide for n, guide in declared.items() if guide.global_guide is not None}
    if not given and not shared:
        return model, dict(guides), Given({})
    batches = _ends(batch)
    batch = batches[0]
    structure = _structure(model, batch, data_plate, given)
    wanted = [site.name for site in structure.global_latents]
    values = chosen = {name: _value(name, value, structure) for name, value in given.items()}
    if shared and set(wanted) - set(chosen):
        name, first = next(iter(shared.items()))
        values = {**_medians(first.global_guide, batches), **chosen}
        if missing := [site for site in wanted if site not in values]:
            raise ValueError(
                f"the median of guide {name!r}'s global_guide has {sorted(values)}, not the "
                f"model's global latent sites {missing}: pass their values (given={{...}})"
            )
    fixed = Given({site: values[site].detach() for site in wanted if site in values}, chosen)
    for name, guide in guides.items():
        _check_fitted(name, guide, fixed)
    local = set(shared) if len(fixed) == len(wanted) else set()
    guides = {
        name: guide.local_part(fixed) if name in local else _without(name, guide, fixed, batch)
        for name, guide in guides.items()
    }
    return _held_at(model, fixed), guides, fixed


def _held_at(program: Program, values: dict[str, Tensor], helpers: Iterable[str] = ()) -> Program:
    """Return a model or guide without these sites, held at values, and without their helpers."""
    return poutine.block(pyro.condition(program, data=values), hide=[*values, *helpers])


def _check_fitted(name: str, guide: Any, fixed: Given) -> None:
    """Raise ValueError for a LocalGuide whose rows were fitted at other values of the globals."""
    if not isinstance(guide, RowGuide) or guide.is_start:
        return
    for site, value in guide.given.items():
        here = fixed.get(site)
        if here is not None and not torch.allclose(value.to(here), here, rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"the rows of guide {name!r} were fitted given {site!r} at {_short(value)}, not at "
                f"{_short(here)}. Pass given={{{site!r}: ...}} of that value, or refine it anew: "
                "pyro_vae.refine(model, guide, *batch, given=...)"
            )


def _short(value: Tensor) -> str:
    shown = ", ".join(f"{number:.4g}" for number in value.flatten()[:3].tolist())
    return f"[{shown}, ...]" if value.numel() > 3 else f"[{shown}]"


def _structure(
    model: Program, batch: Batch, data_plate: DataPlate, given: GivenValues
) -> Structure:
    """Return the model's structure; where all its latents are given, that of what they leave."""
    looks = ModelLooks(model, batch)
    try:
        return looks.structure(data_plate)
    except DataPlateError:
        latents = {name: site for name, site in looks.run.sites.items() if site.kind == "latent"}
        if not latents or latents.keys() - given.keys():
            raise
    hidden = _held_at(model, {name: site.value for name, site in latents.items()})
    rest = ModelLooks(hidden, batch).structure(data_plate, latents_needed=False)
    sites = {**latents, **rest.sites}
    return Structure(sites, None, looks.run.nesting).with_data_plate(rest.data_plate)


def _value(name: str, value: Any, structure: Structure) -> Tensor:
    """Return a value passed, checked, in the dtype and on the device of its site."""
    site = structure.sites.get(name)
    if site is None or site.kind != "global latent":
        what = "no site of the model" if site is None else f"a site of kind {site.kind!r}"
        raise ValueError(
            f"given names {name!r}, {what}; its global latents are "
            f"{[site.name for site in structure.global_latents]}"
        )
    tensor = torch.as_tensor(value, dtype=site.value.dtype, device=site.value.device)
    wanted = (*site.batch_shape, *site.event_shape)
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"given[{name!r}] has shape {list(tensor.shape)}, but the site has {list(wanted)}"
        )
    with contextlib.suppress(NotImplementedError):  # a distribution without a declared support
        if not bool(site.fn.support.check(tensor).all()) or bool(tensor.isnan().any()):
            raise ValueError(
                f"given[{name!r}]={value!r} lies outside the site's support ({site.support_text})"
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
    with looking(guide, device=batch.device):
        first, second = (dict(latent_nodes(trace_of(guide, batch))) for _ in range(2))
    # Of Pyro's autoguides, which sample a site's unconstrained value beside it.
    helpers = {site: unconstrained(site) for site in fixed}
    auxiliary = [site for site, node in first.items() if node["infer"].get("is_auxiliary")]
    joint = [site for site in auxiliary if not site.endswith(unconstrained(""))]
    for site in [site for site in fixed if joint and site in first]:
        same = site in second and torch.equal(first[site]["value"], second[site]["value"])
        if is_point(first[site]["fn"]) and helpers[site] not in first and not same:
            raise ValueError(
                f"given names {site!r}, which guide {name!r} computes from {joint[0]!r}, together "
                "with other sites, whose density given it is unknown. Take a guide with a proposal "
                "for each site, such as pyro.infer.autoguide.AutoNormal"
            )
    if not first.keys() & {*fixed, *helpers.values()}:
        return guide
    return _held_at(guide, fixed, helpers.values())


def _ends(batch: Batch) -> list[Batch]:
    """Return a batch; of one that is read on demand its first and its last rows."""
    if not isinstance(batch, OnDemand):
        return [batch]
    return [batch.head(_SOME), batch.rows(slice(max(0, batch.count - _SOME), batch.count))]


def _medians(global_guide: Any, batches: list[Batch]) -> dict[str, Tensor]:
    """Return the median of a global guide; raise ValueError where rows have one each."""
    found, *others = (_median(global_guide, batch) for batch in batches)
    for name, value in found.items():
        for other in others:
            if value.shape != other[name].shape or not torch.allclose(value, other[name]):
                raise ValueError(
                    f"the global_guide's median of {name!r} depends on the rows of the batch, and "
                    "these data are read in parts: pass its value (given={...}), or the data in "
                    "memory, as a tensor"
                )
    return found


def _median(global_guide: Any, batch: Batch) -> dict[str, Tensor]:
    refusal = TypeError(
        "a bound for each datum needs the global latents fixed, at the global_guide's median; "
        f"{type(global_guide).__name__} has no method median(*batch). Give it one; pass values "
        "(given={...}); or pass data_plate=False to treat the whole batch as one datum"
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
