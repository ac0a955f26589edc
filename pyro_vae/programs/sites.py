"""Sites and plates of a model, as one run saw them, and what they are to the data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.programs import nodes
from pyro_vae.programs.preimages import preimage_key, preimage_of
from pyro_vae.programs.pyro_internals import is_deterministic
from pyro_vae.programs.types import Distribution, Mask, Node, Trace


@dataclass(frozen=True)
class Plate:
    """A vectorized plate as one run of the model saw it.

    Attributes:
        name: the plate's name.
        dim: its batch dimension, negative.
        size: entries in this run (the size of the minibatch where it is subsampled).
        full_size: entries in all.
        drawn: whether the model draws the subsample itself (subsample_size=...).
    """

    name: str
    dim: int
    size: int
    full_size: int
    drawn: bool = False


@dataclass(frozen=True)
class Site:
    """A sample statement of the model, as one run saw it.

    Attributes:
        name: the site's name.
        kind: "local latent", "global latent", "latent" (data plate unknown) or "observed".
        fn: its distribution in that run.
        batch_shape: plates and other batch dimensions.
        plates: the vectorized plates around it.
        value: its value in that run: drawn from the prior, or observed.
        mask: the mask on it (poutine.mask, obs_mask); None where there is none.
        missing: which of its values are missing; None where the model takes no missing data.
        scale: what its log density is multiplied with, by subsampled plates and poutine.scale.
    """

    name: str
    kind: str
    fn: Distribution
    batch_shape: torch.Size
    plates: tuple[Plate, ...]
    value: Tensor
    mask: Mask
    missing: Tensor | None = None
    scale: Any = 1.0

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one event."""
        return self.fn.event_shape

    @property
    def own_scale(self) -> Tensor:
        """Its scale without that of subsampled plates."""
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        for plate in self.plates:
            scale = scale * plate.size / plate.full_size
        return scale

    @property
    def support_text(self) -> str:
        """The support in words, with its bounds."""
        support = nodes.plain_support(self.fn)
        if support is None:
            return "not declared"
        values = (np.unique(bound) for bound in self.bounds if bound is not None)
        bounds = ", ".join(f"{v.item():g}" if v.size == 1 else "varies" for v in values)
        return type(support).__name__.removeprefix("_") + (f"({bounds})" if bounds else "")

    @property
    def bounds(self) -> list[Any]:
        """Lower and upper bound of the support, as plain numbers; None where there is none."""
        ends = ("lower_bound", "upper_bound")
        bounds = (getattr(nodes.plain_support(self.fn), end, None) for end in ends)
        return [bound.tolist() if isinstance(bound, Tensor) else bound for bound in bounds]

    @property
    def distribution(self) -> str:
        """The name of its distribution, without Independent and Masked around it."""
        return type(nodes.plain_distribution(self.fn)).__name__

    @property
    def left_out(self) -> Tensor:
        """Which of its values masks leave out, missing ones among them; of its whole shape."""
        return nodes.left_out(self.fn, self.mask, self.value.device)

    @property
    def is_masked(self) -> bool:
        """Whether a mask may leave values of it out, in these data or in others."""
        return self.mask is not None or nodes.is_masked(self.fn)

    @property
    def validated(self) -> bool:
        """Whether its distribution looks at values before it gives their density.

        What its maker said counts, see :func:`default_validation_told_apart`.
        """
        return vars(nodes.plain_distribution(self.fn)).get("_validate_args", True) is not False

    @property
    def enumerable(self) -> bool:
        """Whether it is discrete, of finite support, and so can be summed out."""
        return nodes.is_enumerable(self.fn)

    def is_in(self, plate: str) -> bool:
        """Return whether a plate of this name is around it."""
        return plate in names_of(self.plates)


@dataclass(frozen=True)
class Structure:
    """What a model is made of.

    Attributes:
        sites: name to Site, in the order of the model.
        data_plate: the plate of the data; None where the model is treated as one datum.
        nesting: number of batch dimensions that plates, and sites in none, take up.
        sequential: plates that are iterated over (``for i in pyro.plate(...)``) and draw a
            subsample: their sites are others in each run.
    """

    sites: Mapping[str, Site]
    data_plate: Plate | None
    nesting: int
    sequential: tuple[str, ...] = ()
    local_latents: tuple[Site, ...] = field(init=False)
    global_latents: tuple[Site, ...] = field(init=False)
    observed: tuple[Site, ...] = field(init=False)

    def __post_init__(self) -> None:
        for kind in ("local latent", "global latent", "observed"):
            found = tuple(site for site in self.sites.values() if site.kind == kind)
            attribute = kind if kind == "observed" else kind.replace(" ", "_") + "s"
            object.__setattr__(self, attribute, found)

    @classmethod
    def of(cls, trace: Trace, drawn: Collection[str] = ()) -> Structure:
        """Return what a trace of a model shows, before its latents are local or global.

        Args:
            trace: of the model.
            drawn: plates of which the run drew a subsample.
        """
        sizes = _sizes_of_unsized(trace)
        found = ((n, node) for n, node in nodes.sample_nodes(trace) if not is_deterministic(node))
        sites = {name: _site(name, node, sizes, drawn) for name, node in found}
        vectorized = {plate.name for site in sites.values() for plate in site.plates}
        return cls(sites, None, nodes.batch_nesting(trace), tuple(sorted(set(drawn) - vectorized)))

    def with_data_plate(self, plate: Plate | None) -> Structure:
        """Return this structure with its latents told apart: local in a data plate, or global."""
        sites = dict(self.sites)
        for name, site in sites.items():
            if site.kind != "observed":
                local = plate is not None and site.is_in(plate.name)
                sites[name] = replace(site, kind="local latent" if local else "global latent")
        return replace(self, sites=sites, data_plate=plate)

    def of_size(self, num_data: int) -> Structure:
        """Return this structure with another number of data; values of sites stay those of a run.

        The size in full of a plate that is no larger than its batch is that number too.
        """
        plate = self.data_plate
        if plate is None:
            return self

        def resized(each: Plate) -> Plate:
            if each.name != plate.name:
                return each
            full = num_data if each.full_size == each.size else each.full_size
            return replace(each, size=num_data, full_size=full)

        sites = {
            name: replace(site, plates=tuple(map(resized, site.plates)))
            for name, site in self.sites.items()
        }
        return replace(self, sites=sites, data_plate=resized(plate))

    def is_like(self, other: Structure) -> bool:
        """Return whether another run, on any number of data, has the same sites and events."""
        mine, theirs = (
            {n: (s.kind, s.event_shape, len(s.batch_shape)) for n, s in run.sites.items()}
            for run in (self, other)
        )
        return mine == theirs

    @property
    def num_data(self) -> int:
        """Data in this batch; 1 where the model is treated as one datum."""
        return 1 if self.data_plate is None else self.data_plate.size

    @property
    def data_dim(self) -> int | None:
        """The data plate's batch dimension, negative; None for one datum."""
        return None if self.data_plate is None else self.data_plate.dim

    def drawing(self, names: Collection[str]) -> Structure:
        """Return this structure with plates of which a subsample is drawn: by the guide, say."""

        def drawing(plate: Plate) -> Plate:
            return replace(plate, drawn=plate.drawn or plate.name in names)

        sites = {
            name: replace(site, plates=tuple(map(drawing, site.plates)))
            for name, site in self.sites.items()
        }
        return replace(self, sites=sites, data_plate=self.data_plate and drawing(self.data_plate))

    def require_no_sequential(self) -> None:
        """Raise ValueError for a model that draws a subsample of a plate that is iterated over."""
        if self.sequential:
            raise ValueError(
                f"the model draws a subsample of the sequential plate {self.sequential[0]!r} "
                "(subsample_size=...), and so has other sites in each run, which have no density "
                "in common; iterate over all of it, or train with pyro_vae.ELBO"
            )

    def require_no_globals(self) -> None:
        """Raise ValueError if a latent site lies outside the data plate."""
        if self.data_plate is not None and self.global_latents:
            names = names_of(self.global_latents)
            raise ValueError(
                f"the latent sites {names} lie outside the data plate {self.data_plate.name!r}: "
                "they are global, and a bound for each datum needs them fixed. ELBO and "
                "IWAE(estimator='pathwise') train them; for a bound, pass their values "
                f"(given={{{names[0]!r}: value}}), or give an AmortizedGuide a global_guide that "
                "knows its median; or pass data_plate=False to treat the whole batch as one datum"
            )


def names_of(things: Iterable[Site | Plate]) -> list[str]:
    """Return the names of some sites or plates, for a message."""
    return [thing.name for thing in things]


# --- from a trace


def _site(name: str, node: Node, sizes: Mapping[str, int], drawn: Collection[str]) -> Site:
    def plate_of(frame: Any) -> Plate:
        size, full_size = (sizes.get(frame.name, n) for n in (frame.size, frame.full_size))
        return Plate(frame.name, frame.dim, size, full_size, frame.name in drawn)

    plates = tuple(plate_of(frame) for frame in node["cond_indep_stack"] if frame.vectorized)
    fn, missing = node["fn"], node["infer"].get("_missing")
    own = dict(zip(range(-len(fn.batch_shape), 0), fn.batch_shape, strict=True))
    if node["is_observed"]:  # in a plate without a size its data may be more than the parameters
        for plate in plates:
            if plate.name in sizes and own.get(plate.dim, 1) == 1:
                own[plate.dim] = plate.size
    kind = "observed" if node["is_observed"] else "latent"
    batch = torch.Size(own.get(dim, 1) for dim in range(min(own, default=0), 0))
    return Site(name, kind, fn, batch, plates, node["value"], node["mask"], missing, node["scale"])


def _sizes_of_unsized(trace: Trace) -> dict[str, int]:
    """Return the sizes of plates without one (pyro.plate("data")): those of what is in them."""
    sizes: dict[str, int] = {}
    for _, node in nodes.sample_nodes(trace):
        value, fn = node["value"], node["fn"]
        shapes = [fn.batch_shape]
        if isinstance(value, Tensor):
            shapes.append(value.shape[: value.ndim - fn.event_dim])
        for frame in node["cond_indep_stack"]:
            if frame.vectorized and frame.size == -1:
                found = [shape[frame.dim] for shape in shapes if len(shape) >= -frame.dim]
                sizes[frame.name] = max(*found, sizes.get(frame.name, 1), 1)
    return sizes


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


def site_shapes(*traces: Trace) -> dict[str, SiteShape]:
    """Return the shapes of all sites of some traces, and of the preimages of their draws."""
    found = {}
    for trace in traces:
        for name, node in nodes.sample_nodes(trace):
            batch, events = len(node["fn"].batch_shape), node["fn"].event_dim
            found[name] = SiteShape(batch, events)
            if preimage := preimage_of(node):
                events += preimage.draw.ndim - node["value"].ndim
                if key := preimage_key(name, preimage.transforms):
                    found[key] = SiteShape(batch, events, name, preimage.transforms)
    return found


# --- values as arrays, the datum in front


def array_of(value: Tensor, site: Site, structure: Structure) -> np.ndarray:
    """Return values of a site, broadcast to its shape, as ``[N, *inner plates, *event]``.

    Those of a global latent, and of all sites where all is one datum, as ``[*batch, *event]``.

    Args:
        value: what broadcasts with ``[*batch, *event]``.
        site: whose values they are.
        structure: of the model.
    """
    shape = torch.broadcast_shapes(value.shape, (*site.batch_shape, *site.event_shape))
    value = value.broadcast_to(shape)
    if (dim := _data_dim(site, structure)) is not None:
        value = value.movedim(value.ndim - len(site.event_shape) + dim, 0)
    return value.detach().cpu().numpy()


def _data_dim(site: Site, structure: Structure) -> int | None:
    """Return the dimension of the data in a site's batch; None of one that all data share."""
    plate = structure.data_plate
    shared = plate is not None and not site.is_in(plate.name)
    return None if shared else structure.data_dim


def observed_values(site: Site, structure: Structure) -> np.ndarray:
    """Return the values of an observed site, NaN where one is missing."""
    missing = site.missing
    value = site.value if missing is None else site.value.masked_fill(missing, np.nan)
    return array_of(value, site, structure)


def absent(site: Site, structure: Structure, *, of_part: bool = False) -> np.ndarray | None:
    """Return where masks say that a site has no value: padding, for example; None for nowhere.

    A missing value is not absent: it is there, though not seen.

    Args:
        site: of the model.
        structure: of the model.
        of_part: whether there are other data, of which a mask may leave some out.
    """
    left_out = site.left_out if site.missing is None else site.left_out & ~site.missing
    somewhere = bool(left_out.any()) or (of_part and site.is_masked)
    return array_of(left_out, site, structure) if somewhere else None


def inner_dims(site: Site, structure: Structure) -> list[str]:
    """Return names of a site's dimensions but the data's: inner plates, then ``<site>_dim_i``."""
    batch = len(site.batch_shape)
    inner = {batch + p.dim: p.name for p in site.plates if p != structure.data_plate}
    dim = _data_dim(site, structure)
    data_axis = None if dim is None else batch + dim
    axes = [axis for axis in range(batch) if axis != data_axis]
    names = [inner.get(axis, f"{site.name}_dim_{i}") for i, axis in enumerate(axes)]
    return names + [f"{site.name}_dim_{len(axes) + i}" for i in range(len(site.event_shape))]
