"""How K particles of a guide or a model run: in a plate, with the batch repeated, or in a loop.

Values of K particles have one shape in all modes, ``[K, *plates, *event]``, masks
``[K, *plates]`` and terms [K, N]. A mode brings them to the shape of a single run, and back.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyro
import torch
from torch import Tensor

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import repeated_rows
from pyro_vae.programs.sites import SiteShape
from pyro_vae.programs.types import ModeName, Program

_PARTICLE_PLATE = "num_particles_vectorized"  # Pyro's own name for it


@dataclass(frozen=True, slots=True)
class Mode(abc.ABC):
    """How K particles run; see the subclasses.

    Attributes:
        nesting: plate dimensions of guide and model, without the particles'.
        data_dim: the data plate's batch dimension, negative; None where all is one datum.
    """

    nesting: int
    data_dim: int | None
    name: ClassVar[ModeName]
    leading: ClassVar[int] = 0  # batch dimensions of particles in a run

    def num_runs(self, num_particles: int) -> int:
        """Return how many runs the particles take."""
        return 1

    def repeats(self, num_particles: int) -> int:
        """Return how many times a run holds each row of the batch."""
        return 1

    def programs(self, num_particles: int, *programs: Program) -> Sequence[Program]:
        """Return model and guide as one run takes them."""
        return programs

    def batch(self, batch: Batch, num_particles: int) -> Batch:
        """Return the batch of a run: all its data once, then all again if they are repeated."""
        times = self.repeats(num_particles)
        return batch.repeat(times) if times > 1 else batch

    @property
    def plate_dims(self) -> int:
        """The batch dimensions of a run that plates take up, the particles' among them."""
        return self.nesting + self.leading

    @property
    def first_enum_dim(self) -> int:
        """The first dimension left of all plates, negative."""
        return -1 - self.plate_dims

    @abc.abstractmethod
    def fold(self, value: Tensor, shape: SiteShape, run: int) -> Tensor:
        """Return a site's value ``[K, *plates, *event]`` in the shape of one of the runs."""

    def unfold(self, values: Sequence[Tensor], event_ndim: int, num_particles: int) -> Tensor:
        """Return a site's values in each run as ``[K, *plates, *event]``; K is 1 if all agree."""
        ndim = self.plate_dims + event_ndim
        padded = [value.reshape((1,) * (ndim - value.ndim) + value.shape) for value in values]
        return self._joined(padded, event_ndim, num_particles)

    @abc.abstractmethod
    def _joined(self, values: Sequence[Tensor], event_ndim: int, num_particles: int) -> Tensor:
        """Return values of all plate dimensions as :meth:`unfold` does."""

    def fold_mask(self, mask: Tensor, num_particles: int, num_data: int) -> list[Tensor]:
        """Return a mask ``[K, *plates]`` (or of size 1 there) in the shape of each run."""
        shape = [num_particles, *mask.shape[1:]]
        if self.data_dim is not None:
            shape[self.data_dim] = num_data
        of_plates, mask = SiteShape(self.nesting, 0), mask.expand(shape)
        return [self.fold(mask, of_plates, k) for k in range(self.num_runs(num_particles))]

    def by_particle(
        self, terms: Sequence[Tensor], num_particles: int, data_dim: int | None
    ) -> Tensor:
        """Return a site's term in each run, of its batch shape, summed for each datum: [K, N].

        Args:
            terms: one for each run.
            num_particles: K.
            data_dim: that of the mode; None for a site outside the data plate, and N is 1.
        """
        reduced = [per_datum(term, self.nesting, data_dim, self.leading) for term in terms]
        return self._stacked(reduced, num_particles)

    @abc.abstractmethod
    def _stacked(self, reduced: Sequence[Tensor], num_particles: int) -> Tensor:
        """Return sums for each datum of a run as :meth:`by_particle` does."""

    def spread(self, by_datum: Tensor, run: int, batch_ndim: int) -> Tensor:
        """Return numbers [K, N] in the batch shape of a site in one of the runs."""
        shape = [len(by_datum), *[1] * self.nesting]
        if self.data_dim is not None:
            shape[self.data_dim] = by_datum.shape[1]
        return self.fold(by_datum.reshape(shape), SiteShape(batch_ndim, 0), run)


class Plate(Mode):
    """All particles in one run, in a plate left of the model's own plates."""

    __slots__ = ()
    name, leading = "plate", 1

    def programs(self, num_particles: int, *programs: Program) -> Sequence[Program]:
        """Return model and guide in the plate of particles."""
        plate = pyro.plate(_PARTICLE_PLATE, num_particles, dim=-1 - self.nesting)
        return [plate(program) for program in programs]

    def fold(self, value: Tensor, shape: SiteShape, run: int) -> Tensor:
        """Return the value as it is."""
        return value

    def _joined(self, values: Sequence[Tensor], event_ndim: int, num_particles: int) -> Tensor:
        return values[0]

    def _stacked(self, reduced: Sequence[Tensor], num_particles: int) -> Tensor:
        return reduced[0].expand(num_particles, -1)


@dataclass(frozen=True)
class Repeat(Mode):
    """All particles in one run on the batch repeated along the data plate."""

    __slots__ = ()
    name = "repeat"

    def __post_init__(self) -> None:
        if self.data_dim is None:
            raise ValueError("particles='repeat' needs a data plate to repeat along")

    def repeats(self, num_particles: int) -> int:
        """Return K."""
        return num_particles

    def programs(self, num_particles: int, *programs: Program) -> Sequence[Program]:
        """Return model and guide with the rows of a guide's table repeated."""
        return [repeated_rows(program, num_particles) for program in programs]

    def fold(self, value: Tensor, shape: SiteShape, run: int) -> Tensor:
        """Return the particles' values one after the other along the data plate."""
        axis = self._axis(value, shape.event_ndim) - 1
        return _of_own_dims(value.movedim(0, axis).flatten(axis, axis + 1), shape, self.nesting)

    def _axis(self, value: Tensor, event_ndim: int) -> int:
        """Return the axis of the data in a value, from the left."""
        return value.ndim - event_ndim + (self.data_dim or 0)

    def _joined(self, values: Sequence[Tensor], event_ndim: int, num_particles: int) -> Tensor:
        axis = self._axis(values[0], event_ndim)
        if values[0].shape[axis] == 1:
            return values[0][None]
        return values[0].unflatten(axis, (num_particles, -1)).movedim(axis, 0)

    def _stacked(self, reduced: Sequence[Tensor], num_particles: int) -> Tensor:
        return reduced[0].reshape(num_particles, -1)


class Loop(Mode):
    """One particle after the other, a run for each: what any network takes, and the slowest."""

    __slots__ = ()
    name = "loop"

    def num_runs(self, num_particles: int) -> int:
        """Return K."""
        return num_particles

    def fold(self, value: Tensor, shape: SiteShape, run: int) -> Tensor:
        """Return the value of one particle."""
        return _of_own_dims(value[run], shape, self.nesting)

    def _joined(self, values: Sequence[Tensor], event_ndim: int, num_particles: int) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*values))

    def _stacked(self, reduced: Sequence[Tensor], num_particles: int) -> Tensor:
        return torch.stack(list(reduced))


# In the order in which they are tried.
MODES: dict[ModeName, type[Mode]] = {mode.name: mode for mode in (Plate, Repeat, Loop)}


def _of_own_dims(value: Tensor, shape: SiteShape, nesting: int) -> Tensor:
    """Return a value ``[*plates, *event]`` without the plate dimensions that its site has not."""
    return value.reshape(value.shape[nesting - shape.batch_ndim :])


def per_datum(term: Tensor, nesting: int, data_dim: int | None, leading: int) -> Tensor:
    """Sum a term over all dimensions but the data's, and ``leading`` ones of particles.

    Args:
        term: of a site's batch shape.
        nesting: plate dimensions, the particles' excluded.
        data_dim: the data's, negative; None for one datum.
        leading: 0 or 1, dimensions of particles left of the plates.

    Returns:
        [N], or [K, N]; N is 1 for a site outside the data plate, or for one datum.
    """
    if (missing := nesting + leading - term.ndim) > 0:
        term = term.reshape((1,) * missing + term.shape)
    data_axis = None if data_dim is None else term.ndim + data_dim
    axes = [axis for axis in range(leading, term.ndim) if axis != data_axis]
    term = term.sum(axes) if axes else term
    return term if data_axis is not None else term.unsqueeze(-1)
