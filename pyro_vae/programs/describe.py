"""A table of a model's sites, to print or to see in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro_vae.programs.on_demand import example_of
from pyro_vae.programs.structure import DataPlateError, ModelLooks
from pyro_vae.programs.types import DataPlate, Program

__all__ = ["Description", "describe"]


@dataclass(frozen=True)
class Description:
    """A table of a model's sites; prints, and renders in a notebook.

    Attributes:
        rows: one mapping per site: site, kind, distribution, support, batch_shape,
            event_shape, plates; and left_out, where a mask leaves out values, how many.
        data_plate: the name of the data plate, or None.
        note: what could not be told, or which discrete latents need no guide, or an empty
            string.
    """

    rows: tuple[Mapping[str, str], ...]
    data_plate: str | None
    note: str

    def __repr__(self) -> str:
        lines = [list(self._columns), *(list(row.values()) for row in self.rows)]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        table = ("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines)
        return "\n".join([*table, self._footer()])

    def _repr_html_(self) -> str:
        lines = [("th", self._columns), *(("td", row.values()) for row in self.rows)]
        table = "".join(
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
            for tag, cells in lines
        )
        return f"<table>{table}</table><p>{html.escape(self._footer())}</p>"

    @property
    def _columns(self) -> Iterable[str]:
        return self.rows[0] if self.rows else ()

    def _footer(self) -> str:
        plate = "none" if self.data_plate is None else repr(self.data_plate)
        return f"data plate: {plate}" + (f" ({self.note})" if self.note else "")


def describe(model: Program, *batch: Any, data_plate: DataPlate = None) -> Description:
    """Return a table of a model's sites.

    Args:
        model: a Pyro model.
        *batch: its arguments; a minibatch is enough. Of data in a file the first rows are read.
        data_plate: as in :meth:`ModelLooks.structure`.

    Returns:
        A Description. Where the data plate cannot be told the table says why, and
        latent sites are shown as "latent".

    Raises:
        ValueError: for NaN in the batch, for observed values outside their support, and for
            sites that are others, or of another shape, in another run.
    """
    note = ""
    looks = ModelLooks(model, example_of(*batch))
    try:
        structure = looks.structure(data_plate)
        looks.check_stable(structure, 5)
        local = structure.local_latents if structure.data_plate else structure.global_latents
        if discrete := [site.name for site in local if site.enumerable]:
            note = f"discrete {discrete}: summed out where no guide proposes them"
    except DataPlateError as error:
        structure, note = looks.run, str(error)
    sites, plate = structure.sites.values(), structure.data_plate
    rows = tuple(
        {
            "site": site.name,
            "kind": site.kind,
            "distribution": site.distribution,
            "support": site.support_text,
            "batch_shape": str(tuple(site.batch_shape)),
            "event_shape": str(tuple(site.event_shape)),
            "plates": ", ".join(
                f"{p.name}[{p.size}{'' if p.size == p.full_size else f' of {p.full_size}'}]"
                for p in site.plates
            ),
        }
        for site in sites
    )
    masks = [site.left_out for site in sites]
    if any(mask.any() for mask in masks):
        for row, mask in zip(rows, masks, strict=True):
            row["left_out"] = f"{int(mask.sum())} of {mask.numel()}" if mask.any() else ""
    return Description(rows, None if plate is None else plate.name, note)
