"""Where a latent site's unconstrained coordinates lie among the parameters of a guide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributions import ComposeTransform, IndependentTransform, biject_to

from pyro_vae.sites import Plate, Site

__all__ = ["Coordinates"]


@dataclass(frozen=True)
class Coordinates:
    """Where one latent site's unconstrained coordinates lie in a guide's parameters.

    Attributes:
        name: the site.
        transform: from the reals to the site's support.
        inner: the plates inside the data plate that the site is in.
        shape: the site's batch dimensions (data dimension excluded), then the event
            dimensions of the unconstrained value.
        data_axis: the data dimension's place among the batch dimensions.
        columns: its slice of the D coordinates of a datum.
    """

    name: str
    transform: Any
    inner: tuple[Plate, ...]
    shape: tuple[int, ...]
    data_axis: int
    columns: slice

    @classmethod
    def of(cls, site: Site, data_plate: Plate, start: int) -> Coordinates:
        """Return the coordinates of a local latent site that begin at column ``start``."""
        try:
            transform = biject_to(site.support)
        except NotImplementedError as error:
            raise ValueError(
                f"latent site {site.name!r} ({site.distribution}) has the support "
                f"{site.support}, which no bijection maps to the reals; a continuous guide "
                "cannot propose it. Sum it out in the model, or write the guide by hand"
            ) from error
        event = transform.inverse_shape(site.event_shape)
        data_axis = len(site.batch_shape) + data_plate.dim
        batch = [size for axis, size in enumerate(site.batch_shape) if axis != data_axis]
        shape = (*batch, *event)
        return cls(
            name=site.name,
            transform=transform,
            inner=tuple(plate for plate in site.plates if plate.name != data_plate.name),
            shape=shape,
            data_axis=data_axis,
            columns=slice(start, start + math.prod(shape)),
        )

    def arrange(self, coordinates: Tensor, trailing: int) -> Tensor:
        """Reshape [N, D, ...] (``trailing`` dims after D) to the site's batch and event."""
        mine = coordinates[:, self.columns]
        tail = mine.shape[mine.ndim - trailing :]
        return mine.reshape(mine.shape[0], *self.shape, *tail).movedim(0, self.data_axis)

    def flatten(self, value: Tensor, trailing: int) -> Tensor:
        """Undo :meth:`arrange`: [N, d, ...] from the site's batch and event dimensions."""
        tail = value.shape[value.ndim - trailing :]
        return value.movedim(self.data_axis, 0).reshape(
            value.shape[self.data_axis], math.prod(self.shape), *tail
        )

    @property
    def is_identity(self) -> bool:
        """Whether the site lives on the reals as it is."""
        transform = self.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        return isinstance(transform, ComposeTransform) and not transform.parts
