"""Where a latent site's unconstrained coordinates lie among those of a datum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.distributions import (
    ComposeTransform,
    IndependentTransform,
    Transform,
    biject_to,
    constraints,
)

from pyro_vae.programs.nodes import is_circular
from pyro_vae.programs.preimages import Preimage, preimage_key
from pyro_vae.programs.sites import Plate, Site, Structure
from pyro_vae.programs.supports import flat_transforms, support_of


@dataclass(frozen=True)
class Coordinates:
    """Where one latent site's unconstrained coordinates lie among the D of a datum.

    A site's tensor has batch dimensions, then those of the event. Its coordinates are rows
    ``[..., N, d]``. Between the two stand *spread* rows: batch dimensions aligned with
    the plates, of size 1 where they lie inside the datum, then d.

    Attributes:
        name: the site.
        transform: from the reals to the site's support.
        support: that support in words.
        inner: the plates inside the data plate that the site is in.
        batch: the sizes of its batch dimensions, 1 at the data's.
        event: the event dimensions of the unconstrained value.
        data_dim: the data's batch dimension, negative; None where all is one datum.
        columns: its slice of the D coordinates of a datum.
    """

    name: str
    transform: Transform = field(compare=False)  # torch's have no equality; the support says it
    support: str
    inner: tuple[Plate, ...]
    batch: tuple[int, ...]
    event: tuple[int, ...]
    data_dim: int | None
    columns: slice

    @classmethod
    def of(cls, site: Site, data_plate: Plate | None, start: int) -> Coordinates:
        """Return the coordinates of a latent site that begin at column ``start``."""
        if support_of(site.fn) is None:
            raise ValueError(
                f"latent site {site.name!r}: {site.distribution} declares no support, so nothing "
                "says what maps the reals to its values. Give the class one (support = "
                "constraints.real_vector, for example), or write the guide by hand"
            )
        try:
            transform = biject_to(_support(site))
        except NotImplementedError as error:
            raise ValueError(
                f"latent site {site.name!r} ({site.distribution}) has the support "
                f"{site.support}, which no bijection maps to the reals; a continuous guide "
                "cannot propose it. Sum it out in the model, or write the guide by hand"
            ) from error
        event = tuple(transform.inverse_shape(site.event_shape))
        data_dim = None if data_plate is None else data_plate.dim
        first = -len(site.batch_shape)
        batch = tuple(
            1 if first + axis == data_dim else size for axis, size in enumerate(site.batch_shape)
        )
        return cls(
            name=site.name,
            transform=transform,
            support=site.support_text,
            inner=tuple(plate for plate in site.plates if plate != data_plate),
            batch=batch,
            event=event,
            data_dim=data_dim,
            columns=slice(start, start + math.prod(batch) * math.prod(event)),
        )

    @property
    def preimage_key(self) -> str | None:
        """The name that preimages of the site's draws go by; None where none are kept."""
        return preimage_key(self.name, flat_transforms([self.transform]))

    @property
    def cached_transform(self) -> Transform:
        """The transform, anew, remembering its last argument where it can."""
        return self.transform if self.preimage_key is None else self.transform.with_cache(1)

    def unconstrained(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return what draws are made of; NaN or infinite where they lie outside of the support.

        Args:
            values: of sites, and their preimages where a guide keeps them.
        """
        key = self.preimage_key
        if key is not None and key in values:
            return values[key]
        return self.transform.inv(values[self.name])

    def value(self, z: Tensor) -> Tensor:
        """Return the value of unconstrained coordinates, inside the support."""
        return Preimage(z, tuple(flat_transforms([self.transform]))).value

    @property
    def is_plain(self) -> bool:
        """Whether a datum has one event of the site, not several in batch dimensions."""
        return math.prod(self.batch) == 1

    def spread(self, rows: Tensor) -> Tensor:
        """Align rows [..., N, d] with the plates: ``[..., 1, N, 1, d]``."""
        dims = len(self.batch)
        if self.data_dim is None:
            rows = rows.squeeze(-2)
            return rows.reshape(*rows.shape[:-1], *[1] * dims, rows.shape[-1])
        *lead, num_data, width = rows.shape
        right = -self.data_dim - 1
        return rows.reshape(*lead, *[1] * (dims - 1 - right), num_data, *[1] * right, width)

    def arrange(self, spread: Tensor) -> Tensor:
        """Bring spread rows to the site's shape, ``[..., *batch, *event]``."""
        dims = spread.ndim - 1
        inside = self._inside(dims)
        lead = [axis for axis in range(dims) if axis not in inside]
        value = spread.reshape(
            (
                *(spread.shape[axis] for axis in lead),
                *(self.batch[axis - dims] for axis in inside),
                *self.event,
            )
        )
        return value.movedim(tuple(range(len(lead), dims)), tuple(inside))

    def flatten(self, value: Tensor) -> Tensor:
        """Undo :meth:`arrange`: spread rows of an unconstrained value of the site."""
        dims = value.ndim - len(self.event)
        inside = self._inside(dims)
        moved = value.movedim(tuple(inside), tuple(range(dims - len(inside), dims)))
        rows = moved.reshape(*moved.shape[: dims - len(inside)], -1)
        for axis in inside:
            rows = rows.unsqueeze(axis)
        return rows

    def rows(self, value: Tensor) -> Tensor:
        """Return the rows [K, N, d] of an unconstrained value ``[K, *batch, *event]``."""
        spread = self.flatten(value)
        return spread.reshape(spread.shape[0], -1, spread.shape[-1])

    @property
    def inside(self) -> tuple[bool, ...]:
        """Which of its batch dimensions lie inside a datum."""
        dims = len(self.batch)
        return tuple(axis - dims != self.data_dim for axis in range(dims))

    def _inside(self, dims: int) -> list[int]:
        """The site's batch axes inside a datum, where it has ``dims`` batch dimensions in all."""
        first = dims - len(self.batch)
        return [first + axis for axis, inside in enumerate(self.inside) if inside]

    @property
    def is_identity(self) -> bool:
        """Whether the site lives on the reals as it is."""
        transform = self.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        return isinstance(transform, ComposeTransform) and not transform.parts


def coordinates_of(structure: Structure, proposer: str) -> tuple[Coordinates, ...]:
    """Return the coordinates of all sites that a guide of a datum's latents proposes, in order.

    These are the continuous latents of the data plate; of the model where all is one datum.
    Discrete ones of finite support are left to be summed out.

    Args:
        structure: the model's.
        proposer: the guide's class, for a message.

    Raises:
        ValueError: where no latent is continuous, and for a site that has no coordinates.
    """
    plate = structure.data_plate
    latents = structure.global_latents if plate is None else structure.local_latents
    found: list[Coordinates] = []
    for site in latents:
        if not site.enumerable:
            _check_inner_plates(site, plate)
            found.append(Coordinates.of(site, plate, found[-1].columns.stop if found else 0))
    if not found:
        discrete = ", ".join(f"latent site {site.name!r} ({site.distribution})" for site in latents)
        raise ValueError(
            f"no latent site is continuous, only {discrete}: {proposer} proposes continuous sites, "
            "and leaves discrete ones of finite support to be summed out. Use "
            "pyro_vae.ExactGuide(model, example=batch)"
        )
    return tuple(found)


def _check_inner_plates(site: Site, data_plate: Plate | None) -> None:
    for plate in site.plates:
        if plate != data_plate and plate.size != plate.full_size:
            raise ValueError(
                f"latent site {site.name!r} is in plate {plate.name!r}, of which a run sees "
                f"{plate.size} of {plate.full_size} entries: a guide with parameters for each "
                "entry cannot know which. Subsample the data plate alone, or write the guide by "
                "hand"
            )


def _support(site: Site) -> constraints.Constraint:
    """Return the support of a site, the same for every datum.

    Raises:
        ValueError: where it differs within the batch.
    """
    if is_circular(site.fn):
        if site.distribution != "VonMises":
            raise ValueError(
                f"latent site {site.name!r} ({site.distribution}) lives on a torus, which no "
                "bijection maps to the reals; write the guide by hand"
            )
        circle = constraints.interval(-math.pi, math.pi)
        events = len(site.event_shape)
        return constraints.independent(circle, events) if events else circle
    support, events = site.support, 0
    while hasattr(support, "base_constraint"):  # independent, or of a mixture
        events += getattr(support, "reinterpreted_batch_ndims", 0)
        support = support.base_constraint
    bounds = {}
    for name in ("lower_bound", "upper_bound"):
        bound = getattr(support, name, None)
        if bound is None:
            continue
        bounds[name] = _common_bound(site, bound, events) if isinstance(bound, Tensor) else bound
    if bounds and not support.is_discrete:
        support = type(support)(**bounds)
    return constraints.independent(support, events) if events else support


def _common_bound(site: Site, bound: Tensor, events: int) -> Tensor | float:
    """Return the bound of all data; a plain number where it is one, which is known to be alike."""
    if bound.ndim > events:
        # Uniform(0, 1) in a plate has a bound for each datum, all alike.
        rows = bound.reshape(-1, *bound.shape[bound.ndim - events :])
        if not bool((rows == rows[0]).all()):
            raise ValueError(
                f"latent site {site.name!r} ({site.distribution}): its support differs from "
                "datum to datum, or with another latent. Give it a fixed support, and scale "
                "the value: low + (high - low) * u with u in the unit interval"
            )
        bound = rows[0]
    return bound.item() if bound.numel() == 1 else bound
