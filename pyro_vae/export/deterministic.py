"""Values of a model's pyro.deterministic sites, for draws of its latents."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.particles.evaluator import DeterministicNode, Evaluator
from pyro_vae.programs.agreement import agree

__all__ = ["DeterministicSite", "DeterministicValues"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeterministicSite:
    """What a single run says of a site.

    Attributes:
        name: its name.
        ndim: dimensions of its value.
        data_axis: that of the data, from the left; None where it has none.
        dims: names of the others: plates, then ``<name>_dim_i``.
    """

    name: str
    ndim: int
    data_axis: int | None
    dims: tuple[str, ...]


class DeterministicValues:
    """Computes the sites' values for particles, run by plate, by repeat or in a loop.

    Pyro knows no batch dimensions of such a site, and the model's densities do not tell whether
    its value is right for particles together. So it is compared with particles run alone; a value
    that differs, or has another shape, is run in a loop.

    Args:
        scorer: of the model.
        rows: a block of data.
        values: latent site to ``[K, *plates, *event]``, for that block.
    """

    def __init__(self, scorer: Evaluator, rows: slice, values: Mapping[str, Tensor]) -> None:
        self._scorer = scorer
        few = {name: value[:2] for name, value in values.items()}
        alone = scorer.deterministic_nodes(rows, few, alone=True)
        self._found = self._look(rows, few, alone)
        self.sites: dict[str, DeterministicSite] = {s.name: s for s in self._found}
        self._alone = not self._agrees(rows, few)

    def __call__(self, rows: slice, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sites' values for a block, ``[K, N, ...]``; without N where it has none."""
        if not self.sites:
            return {}
        folded = self._folded(rows, values, self._alone)
        if folded is None:
            raise RuntimeError("deterministic sites have other shapes than in the first run")
        return {
            name: value
            if self.sites[name].data_axis is None
            # After the particles comes the datum.
            else value.movedim(1 + (self.sites[name].data_axis or 0), 1)
            for name, value in folded.items()
        }

    def _look(
        self, rows: slice, few: Mapping[str, Tensor], alone: Mapping[str, list[DeterministicNode]]
    ) -> list[DeterministicSite]:
        """Return the sites; those whose value is of all the data at once are left out."""
        scorer, size = self._scorer, rows.stop - rows.start
        fewer: Mapping[str, list[DeterministicNode]] = {}
        if scorer.splittable and size > 1:
            half = slice(rows.start, rows.start + (size + 1) // 2)
            some = scorer.take_data(few, slice(0, (size + 1) // 2), size)
            fewer = scorer.deterministic_nodes(half, some, alone=True)
        found = []
        for name, nodes in alone.items():
            node, less = nodes[0], fewer.get(name)
            axis = _data_axis(node, None if less is None else less[0], size, scorer)
            depends = (
                axis is None
                and less is not None
                and not agree(node.value, less[0].value)
                and len(scorer.data_blocks()) > 1
            )
            if depends:
                logger.warning(
                    "the deterministic site %r is made of all the data at once, which are drawn "
                    "in blocks: it is left out",
                    name,
                )
                continue
            plate = scorer.structure.data_plate
            dims = _dims(name, node, axis, None if plate is None else plate.name)
            found.append(DeterministicSite(name, node.value.ndim, axis, dims))
        return found

    def _agrees(self, rows: slice, few: Mapping[str, Tensor]) -> bool:
        """Whether values for particles together are those of particles alone."""
        together, alone = (self._folded(rows, few, each) for each in (False, True))
        if together is None or alone is None:
            return False
        return all(agree(together[name], alone[name]) for name in self.sites)

    def _folded(
        self, rows: slice, values: Mapping[str, Tensor], alone: bool
    ) -> dict[str, Tensor] | None:
        """Return values as ``[K, *single run]``; None where a shape is not to be understood."""
        num_particles = next(iter(values.values())).shape[0]
        found = self._scorer.deterministic_nodes(rows, values, alone=alone)
        folded = {}
        for name, site in self.sites.items():
            each = [node.value for node in found.get(name, [])]
            value = _by_particle(each, site, num_particles, self._scorer.modes["model"], alone)
            if value is None:
                return None
            folded[name] = value
        return folded


def _by_particle(
    each: list[Tensor], site: DeterministicSite, num_particles: int, mode: str, alone: bool
) -> Tensor | None:
    if alone or mode == "loop":
        return torch.stack(each) if len(each) == num_particles else None
    (value,) = each
    if mode == "repeat":
        if site.data_axis is None:
            return None
        split = value.unflatten(site.data_axis, (num_particles, -1))
        return split.movedim(site.data_axis, 0)
    extra = value.ndim - site.ndim
    if extra == 0:  # of no latent: the same for all particles
        return value.expand(num_particles, *value.shape)
    if value.shape[0] != num_particles or any(size != 1 for size in value.shape[1:extra]):
        return None
    return value.reshape(num_particles, *value.shape[extra:])


def _data_axis(
    node: DeterministicNode, less: DeterministicNode | None, size: int, scorer: Evaluator
) -> int | None:
    """Return the axis whose length is the number of data."""
    plate, shape = scorer.structure.data_plate, node.value.shape
    if plate is None:
        return None
    if node.event_ndim is not None and plate.name in {p.name for p in node.plates}:
        return len(shape) - node.event_ndim + plate.dim
    if less is not None and less.value.ndim == len(shape):
        axes = [i for i, (a, b) in enumerate(zip(shape, less.value.shape, strict=True)) if a != b]
    else:
        axes = [i for i, length in enumerate(shape) if length == size]
    return axes[0] if axes else None


def _dims(
    name: str, node: DeterministicNode, data_axis: int | None, data_plate: str | None
) -> tuple[str, ...]:
    """Return the names of the axes but the data's: of plates, where sizes fit."""
    shape = node.value.shape
    plates: dict[int, str] = {}
    guesses = range(len(shape) + 1) if node.event_ndim is None else (node.event_ndim,)
    for events in guesses:
        found = {len(shape) - events + plate.dim: plate for plate in node.plates}
        if all(
            axis >= 0
            and shape[axis] == plate.size
            and (plate.name != data_plate or axis == data_axis)
            for axis, plate in found.items()
        ):
            plates = {axis: plate.name for axis, plate in found.items()}
            break
    axes = [axis for axis in range(len(shape)) if axis != data_axis]
    return tuple(plates.get(axis, f"{name}_dim_{i}") for i, axis in enumerate(axes))
