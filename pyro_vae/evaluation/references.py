"""Which guides a comparison refines, and which refined guide each guide is measured against."""

from __future__ import annotations

from collections.abc import Container, Mapping

from pyro_vae.families.base import Family
from pyro_vae.families.gaussian import Normal
from pyro_vae.guides.base import FamilyGuide, of_family
from pyro_vae.guides.local import LocalGuide
from pyro_vae.guides.moments import normal_moments
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.structure import inspect
from pyro_vae.programs.types import DataPlate, Program
from pyro_vae.refinement.refine import refine

__all__ = ["with_references"]


def with_references(
    model: Program,
    guides: Mapping[str, Program | Family],
    batch: Batch,
    reference: str | None,
    *,
    data_plate: DataPlate,
    seed: int,
    max_steps: int,
    tolerance: float,
    progress: bool,
) -> tuple[dict[str, Program], dict[str, str]]:
    """Return all guides of a comparison, and the name of each guide's reference.

    Families become guides refined on the batch. A guide whose family has none gets one.

    Args:
        model: a Pyro model.
        guides: name to guide, or to a family to refine.
        batch: their arguments.
        reference: the name of all guides' reference; None for the refined guide of each one's own
            family.
        data_plate: as in :func:`pyro_vae.compare`, like the others.
        seed: of the draws.
        max_steps: of refine.
        tolerance: of refine.
        progress: of refine.

    Raises:
        TypeError: for what is neither a guide nor a family.
        ValueError: where the name of a guide to add is taken.
    """
    for name, guide in guides.items():
        if not isinstance(guide, Family) and (not callable(guide) or isinstance(guide, type)):
            raise TypeError(f"guides[{name!r}]: a guide or a family is needed, found {guide!r}")
    start = next((guide for guide in guides.values() if not isinstance(guide, Family)), None)

    def refined(family: Family) -> LocalGuide:
        begin = _prior_table(model, batch, family, data_plate) if start is None else start
        return refine(
            model,
            begin,
            batch,
            family=family,
            data_plate=data_plate,
            seed=seed,
            max_steps=max_steps,
            tolerance=tolerance,
            progress=progress,
        )

    found: dict[str, Program] = {}
    by_family: dict[Family, str] = {}
    for name, guide in guides.items():
        found[name] = refined(guide) if isinstance(guide, Family) else guide
        if isinstance(guide, Family):
            by_family.setdefault(guide, name)
    if reference is not None:
        return found, dict.fromkeys(guides, reference)
    references: dict[str, str] = {}
    for name, guide in guides.items():
        if isinstance(guide, Family):
            references[name] = name
            continue
        family = _family_of(model, guide, batch, data_plate, seed)
        if family is None:
            continue
        if family not in by_family:
            added = _name_of(family, guides, references)
            found[added] = refined(family)
            by_family[family] = references[added] = added
        references[name] = by_family[family]
    return found, references


def _prior_table(model: Program, batch: Batch, family: Family, data_plate: DataPlate) -> LocalGuide:
    """Return a table to refine from where no guide is at hand."""
    num_data = inspect(model, batch, data_plate=data_plate).num_data
    return LocalGuide(model, num_data=num_data, example=batch, family=family, data_plate=data_plate)


def _name_of(family: Family, guides: Container[str], references: Mapping[str, str]) -> str:
    """Return the name of a refined guide that the comparison adds; raise where it is taken."""
    name = f"{type(family).__name__} per datum"
    if name in references.values():  # of other options, such as another rank
        name = f"{family} per datum"
    if name in guides:
        raise ValueError(
            f"guides[{name!r}]: that is the name of the refined guide which the comparison adds; "
            "choose another, or give the family a name of its own"
        )
    return name


def _family_of(
    model: Program, guide: Program, batch: Batch, data_plate: DataPlate, seed: int
) -> Family | None:
    """Return a guide's family: its own, or Normal for independent Normals written by hand."""
    if isinstance(guide, FamilyGuide):
        return guide.family if of_family(guide) else None
    first, second = Evaluator(model, guide, batch, data_plate=data_plate, seed=seed).guide_runs(2)
    normal = all(normal_moments([first[name], second[name]]) is not None for name in first)
    return Normal() if normal else None
