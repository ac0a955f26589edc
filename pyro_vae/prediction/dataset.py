"""Predictions of blocks of data as one xarray.Dataset, with names and labels of dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from pyro_vae.export.deterministic import DeterministicSite
from pyro_vae.prediction.pairs import Prepared
from pyro_vae.programs.sites import inner_dims

_DATUM, _DRAW = "datum", "draw"
WEIGHTS = ("pareto_k", "ess")  # what is said of importance weights
# Ends of the names of what is said of a site; its draws have none.
ENDS = ("", "_mean", "_mean_se", "_sd", "_probability", "_probability_se")


def named(
    ready: Prepared,
    blocks: Sequence[Mapping[str, np.ndarray]],
    deterministic: Mapping[str, DeterministicSite],
    names: Sequence[str],
    coords: Mapping[str, ArrayLike] | None,
    dims: Mapping[str, Sequence[str]] | None,
) -> xr.Dataset:
    """Return the predictions of all data.

    Args:
        ready: the pair.
        blocks: of data: variable to values ``[n, ...]``, draws ``[n, draw, ...]``.
        deterministic: shapes of deterministic sites.
        names: of the sites.
        coords: dimension name to labels.
        dims: site name to names of its dimensions after (draw, datum).
    """
    whole = ready.evaluator.structure.data_dim is None
    joined = {
        name: blocks[0][name][0] if whole else np.concatenate([block[name] for block in blocks])
        for name in blocks[0]
    }
    own = {site: _dims(ready, site, deterministic) for site in names}
    return as_dataset(joined, own, [] if whole else [_DATUM], coords, dims, WEIGHTS)


def as_dataset(
    variables: Mapping[str, np.ndarray],
    own: Mapping[str, Sequence[str]],
    lead: Sequence[str],
    coords: Mapping[str, ArrayLike] | None,
    dims: Mapping[str, Sequence[str]] | None,
    reserved: Iterable[str] = (),
) -> xr.Dataset:
    """Return what is said of sites, draw and datum the first dimensions.

    Args:
        variables: ``<site><end>`` to values ``[*lead, ...]``, draws of it ``[*lead, draw, ...]``.
        own: site to the names of its own dimensions.
        lead: names of dimensions in front.
        coords: dimension name to labels.
        dims: site name to names of its dimensions after (draw, datum).
        reserved: names of other variables that the result gets.

    Raises:
        ValueError: for names of what is not there, and where two things would have one name.
    """
    if unknown := set(dims or {}) - set(own):
        raise ValueError(f"dims names {sorted(unknown)}, which are not predicted: {list(own)}")
    found: dict[str, tuple[list[str], np.ndarray]] = {}
    for site, end in itertools.product(own, ENDS):
        if (value := variables.get(f"{site}{end}")) is None:
            continue
        axes = [*lead, *([] if end else [_DRAW]), *own[site]]
        axes += [f"{site}_class"] * (value.ndim - len(axes))  # probabilities, and draws of these
        order = [d for d in (_DRAW, _DATUM) if d in axes]
        order += [d for d in axes if d not in order]
        value = np.transpose(value, [axes.index(d) for d in order])
        found[f"{site}{end}"] = _renamed(order, site, dims), value
    _check_names(own, found, set(reserved))
    dataset = xr.Dataset(found)
    sizes = dataset.sizes
    labels: dict[str, Any] = {d: np.arange(sizes[d]) for d in (_DRAW, _DATUM) if d in sizes}
    if strange := set(coords or {}) - set(sizes):
        raise ValueError(f"coords names {sorted(strange)}; the dimensions are {list(sizes)}")
    for name, values in (coords or {}).items():
        labels[name] = np.asarray(values)
        if len(labels[name]) != sizes[name]:
            raise ValueError(f"coords[{name!r}] has {len(labels[name])} labels, for {sizes[name]}")
    return dataset.assign_coords(labels)


def _dims(ready: Prepared, site: str, deterministic: Mapping[str, DeterministicSite]) -> list[str]:
    """Return the names of a site's own dimensions, the plate of data drawn jointly by "datum"."""
    structure, plate = ready.evaluator.structure, ready.plate
    if site in structure.sites:
        one = structure.sites[site]
        if plate is None or not one.is_in(plate.name):
            return inner_dims(one, structure)
        found = inner_dims(one, structure.with_data_plate(plate))
        found.insert(len(one.batch_shape) + plate.dim, _DATUM)
        return found
    if site in deterministic:
        found = list(deterministic[site].dims)
    else:
        raise ValueError(
            f"the deterministic site {site!r} is made of all the data at once, which are predicted "
            "in blocks: pass fewer data, or data_plate=False"
        )
    return [_DATUM if plate is not None and name == plate.name else name for name in found]


def _check_names(
    sites: Iterable[str], found: Mapping[str, tuple[list[str], np.ndarray]], reserved: set[str]
) -> None:
    """Raise ValueError where two variables, or a variable and a dimension, have one name."""
    made = [name for site in sites for end in ENDS if (name := f"{site}{end}") in found]
    axes = {name for order, _ in found.values() for name in order}
    twice = {name for name in made if made.count(name) > 1 or name in axes | reserved}
    twice |= axes & reserved
    twice |= {n for order, _ in found.values() for n in order if order.count(n) > 1}
    if twice:
        raise ValueError(
            f"{sorted(twice)} would name two things in the result, whose variables are {made} and "
            f"dimensions {sorted(axes)}: name the dimensions by dims=, or fewer sites by sites="
        )


def _renamed(order: list[str], site: str, dims: Mapping[str, Sequence[str]] | None) -> list[str]:
    """Return names of dimensions with those that were passed for a site in their place."""
    if site not in (dims or {}):
        return order
    lead = [d for d in order if d in (_DRAW, _DATUM)]
    classes = [d for d in order if d == f"{site}_class"]
    own = list((dims or {})[site])
    if len(lead) + len(own) + len(classes) != len(order):
        raise ValueError(
            f"dims[{site!r}]={own}: {len(order) - len(lead) - len(classes)} names are needed, for "
            "its dimensions after draw and datum"
        )
    return [*lead, *own, *classes]
