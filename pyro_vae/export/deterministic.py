"""Values of a model's pyro.deterministic sites, for draws of its latents."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import starmap

import torch
from torch import Tensor

from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.answers import agree
from pyro_vae.programs.sites import Plate
from pyro_vae.programs.types import ModeName, Node, Values

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeterministicSite:
    """The shape of a site's value in a run of a single particle.

    Attributes:
        data_axis: that of the data, from the left; None where it has none.
        dims: names of the others: plates, then ``<name>_dim_i``.
    """

    name: str
    data_axis: int | None
    dims: tuple[str, ...]


class DeterministicValues:
    """Computes the sites' values for particles, run by plate, by repeat or in a loop.

    Pyro knows no batch dimensions of such a site, and the model's densities do not tell whether
    its value is right for particles together. So it is compared with particles run alone, on a
    block of data; a value that differs, or has another shape, is run in a loop.
    """

    def __init__(self, evaluator: Evaluator, rows: slice, values: Values) -> None:
        self._evaluator = evaluator
        few = {name: value[:2] for name, value in values.items()}
        self.sites = self._look(rows, few)
        together, alone = (self.sites and self._folded(rows, few, each) for each in (False, True))
        self._alone = not (
            together and alone and all(agree(together[name], alone[name]) for name in self.sites)
        )

    def __call__(self, rows: slice, values: Values) -> dict[str, Tensor]:
        """Return the sites' values for a block, ``[K, N, ...]``; without N where it has none."""
        if not self.sites:
            return {}
        if (folded := self._folded(rows, values, self._alone)) is None:
            raise RuntimeError("deterministic sites have other shapes than in the first run")
        for name, site in self.sites.items():
            if site.data_axis is not None:  # after the particles comes the datum
                folded[name] = folded[name].movedim(1 + site.data_axis, 1)
        return folded

    def _look(self, rows: slice, few: Values) -> dict[str, DeterministicSite]:
        """Return the sites; those whose value is of all the data at once are left out."""
        evaluator, size = self._evaluator, rows.stop - rows.start
        alone = evaluator.deterministic_nodes(rows, few, alone=True)
        fewer: Mapping[str, list[Node]] = {}
        if alone and evaluator.splittable and size > 1:
            half = slice(rows.start, rows.start + (size + 1) // 2)
            some = evaluator.take_data(few, slice(0, (size + 1) // 2), size)
            fewer = evaluator.deterministic_nodes(half, some, alone=True)
        found = {}
        for name, (node, *_) in alone.items():
            less = fewer[name][0] if name in fewer else None
            axis = _data_axis(node, less, size, evaluator.structure.data_plate)
            of_all = axis is None and less is not None and not agree(node["value"], less["value"])
            if of_all and len(evaluator.data_blocks()) > 1:
                logger.warning(
                    "the deterministic site %r is made of all the data at once, which are drawn "
                    "in blocks: it is left out",
                    name,
                )
                continue
            dims = _dims(name, node, axis, evaluator.structure.data_plate)
            found[name] = DeterministicSite(name, axis, dims)
        return found

    def _folded(self, rows: slice, values: Values, alone: bool) -> dict[str, Tensor] | None:
        """Return values as ``[K, *single run]``; None where a shape is not to be understood."""
        num_particles = next(iter(values.values())).shape[0]
        found = self._evaluator.deterministic_nodes(rows, values, alone=alone)
        mode = "loop" if alone else self._evaluator.modes["model"]
        folded = {}
        for name, site in self.sites.items():
            each = [node["value"] for node in found.get(name, [])]
            if (value := _by_particle(each, site, num_particles, mode)) is None:
                return None
            folded[name] = value
        return folded


def _by_particle(
    each: list[Tensor], site: DeterministicSite, num_particles: int, mode: ModeName
) -> Tensor | None:
    """Return a site's value as ``[K, *single run]``; None where a shape is not to be understood."""
    if mode == "loop":
        return torch.stack(each) if len(each) == num_particles else None
    (value,), axis = each, site.data_axis
    if mode == "repeat":
        return None if axis is None else value.unflatten(axis, (num_particles, -1)).movedim(axis, 0)
    extra = value.ndim - len(site.dims) - (axis is not None)
    if extra == 0:  # of no latent: the same for all particles
        return value.expand(num_particles, *value.shape)
    if value.shape[0] != num_particles or any(size != 1 for size in value.shape[1:extra]):
        return None
    return value.reshape(num_particles, *value.shape[extra:])


def _event_ndim(node: Node) -> int | None:
    """Return the event dimensions that the model says a site has; None where it says none."""
    events: int = node["fn"].event_dim
    return events if events < node["value"].ndim else None


def _data_axis(node: Node, less: Node | None, size: int, plate: Plate | None) -> int | None:
    """Return the axis whose length is the number of data, by another run on fewer if any."""
    shape = node["value"].shape
    if plate is None:
        return None
    events = _event_ndim(node)
    plates = (frame for frame in node["cond_indep_stack"] if frame.vectorized)
    if events is not None and plate.name in {frame.name for frame in plates}:
        return len(shape) - events + plate.dim
    if less is not None and less["value"].ndim == len(shape):
        return next((i for i, length in enumerate(shape) if length != less["value"].shape[i]), None)
    return next((i for i, length in enumerate(shape) if length == size), None)


def _dims(
    name: str, node: Node, data_axis: int | None, data_plate: Plate | None
) -> tuple[str, ...]:
    """Return the names of the axes but the data's: of plates, where sizes fit."""
    shape = node["value"].shape
    known = _event_ndim(node)
    frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]

    def fits(axis: int, plate: Plate) -> bool:
        misplaced = data_plate and plate.name == data_plate.name and axis != data_axis
        return axis >= 0 and shape[axis] == plate.size and not misplaced

    guesses = range(len(shape) + 1) if known is None else (known,)
    by_axis = ({len(shape) - events + plate.dim: plate for plate in frames} for events in guesses)
    plates = next((found for found in by_axis if all(starmap(fits, found.items()))), {})
    axes = [axis for axis in range(len(shape)) if axis != data_axis]
    return tuple(plates[a].name if a in plates else f"{name}_dim_{i}" for i, a in enumerate(axes))
