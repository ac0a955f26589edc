"""Minibatches of a model with global latents: what a datum of them counts for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.handlers import FullSize
from pyro_vae.programs.sites import Plate, Site, Structure, names_of
from pyro_vae.programs.state import Look
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import Program

_MANY = 1000  # data: a scale for all but one of them is hardly another one


def minibatch_scale(
    model: Program,
    batch: Batch,
    structure: Structure,
    num_data: int | None,
    divides: Callable[[Plate, list[str]], bool],
    part: Structure | None,
) -> tuple[int | None, FullSize | None]:
    """Return how many data a minibatch's loss is scaled to, and what is needed to scale it.

    With latents that all data share, a minibatch of B out of N data must count N / B times:
    else there seem to be fewer data, and the posterior of what is shared is too wide. A
    model that says so itself, by the size of its plate or by poutine.scale, is left alone.

    Args:
        model: a Pyro model.
        batch: a minibatch.
        structure: of the model on that minibatch.
        num_data: N; None where it is not known.
        divides: whether the densities of some observed sites are divided by the batch's size, by
            other means than a scale.
        part: of the model on fewer data, if it was looked at.

    Returns:
        N, or None where a loss is the sum of its minibatch; and the handler that gives the data
        plate of model and guide its full size, or None where none is needed.

    Raises:
        ValueError: with latents that all data share, where the model's scale is neither, or is
            that of some sites only, or N is not known.
    """
    plate = structure.data_plate
    if plate is None:
        return 1, None
    if plate.size != plate.full_size:
        return plate.full_size, None
    if num_data == plate.size:
        # Validation data are others, of which the model may say that they are as many.
        return _size_of_fewer(model, batch, plate, num_data, part), None
    names = names_of(structure.global_latents)
    shared = f"the latent sites {names} are shared by all data"
    advice = f"write pyro.plate({plate.name!r}, num_data, subsample=x), with num_data of all data"
    if num_data is None:
        if not names:
            return None, None
        what = "of which nobody says how many there are: what a minibatch counts for is not known"
        raise ValueError(f"{shared}, {what}; {advice}")
    if names:
        observed = names_of(structure.observed)
        by_hand = observed if divides(plate, observed) else []
        _check_scaled_alike(structure, plate, num_data, by_hand)
        if by_hand:
            return num_data, None
    if _scales_itself(model, batch, structure, num_data):
        return num_data, None
    if not names:
        return None, None
    scales = _relative_scales(structure, structure.observed)
    if not any(_is(scale, 1.0) for scale in scales.values()):
        found = ", ".join(f"{name!r} by {float(s.mean()):g}" for name, s in scales.items())
        raise ValueError(
            f"{shared}, and a minibatch must count num_data / batch_size = "
            f"{num_data / plate.size:g} times; the model scales {found} instead. If that is a "
            f"weight of the likelihood, {advice}, and it is kept beside it"
        )
    others = {p.name for site in structure.sites.values() for p in site.plates} - {plate.name}
    local = names_of(structure.local_latents)
    return num_data, FullSize(plate.dim, num_data, local, others)


def _check_scaled_alike(
    structure: Structure, plate: Plate, num_data: int, by_hand: Collection[str]
) -> None:
    """Raise ValueError where a model scales some sites of a minibatch up to all data, others not.

    Another weight of a site, of a KL warm-up for one, is none of the two. ``by_hand`` are observed
    sites that are scaled up by other means than a scale.
    """
    factor = num_data / plate.size
    scales = _relative_scales(structure, (*structure.observed, *structure.local_latents))
    scaled = [name for name, scale in scales.items() if name in by_hand or _is(scale, factor)]
    alone = [name for name, scale in scales.items() if name not in scaled and _is(scale, 1.0)]
    if scaled and alone:
        raise ValueError(
            f"the latent sites {names_of(structure.global_latents)} are shared by all data, and "
            f"the model scales {scaled} by num_data / batch_size = {factor:g}, but not {alone}. "
            "Scale all that is in the data plate, in model and guide, as by "
            f"pyro.plate({plate.name!r}, num_data, subsample=x)"
        )


def _size_of_fewer(
    model: Program, batch: Batch, plate: Plate, num_data: int, part: Structure | None
) -> int | None:
    """Return how many data a model scales a part of them up to; None where it does not."""
    if batch.size is None or batch.size < 2:
        return None
    with Look():
        some = batch.rows(slice(0, batch.size // 2))
        if part is None or num_data > _MANY:
            part = ModelLooks(model, some).structure(plate.name)
        found = part.data_plate
        if found is not None and found.size != found.full_size:
            return found.full_size
        return num_data if _scales_itself(model, some, part, num_data) else None
    return None


def _scales_itself(model: Program, batch: Batch, structure: Structure, num_data: int) -> bool:
    """Return whether a model scales its likelihood up to all data, or by 1 / its batch's size."""
    plate, scales = structure.data_plate, _relative_scales(structure, structure.observed)
    if plate is None or all(_is(scale, 1.0) for scale in scales.values()):
        return False
    if all(_is(scale, num_data / plate.size) for scale in scales.values()):
        return True
    half = plate.size // 2
    if half < 1 or batch.size is None:
        return False
    with Look():
        fewer = ModelLooks(model, batch.rows(slice(0, half))).structure(plate.name)
        again = _relative_scales(fewer, fewer.observed)
        return all(_is(again[name] / scale, plate.size / half) for name, scale in scales.items())
    return False


def _relative_scales(structure: Structure, sites: Iterable[Site]) -> dict[str, torch.Tensor]:
    """Return the scales of sites, relative to that of the global latents."""
    shared = [site.own_scale.mean() for site in structure.global_latents]
    unit = torch.stack(shared).mean() if shared else torch.tensor(1.0)
    return {site.name: site.own_scale / unit for site in sites}


def _is(scale: torch.Tensor, number: float) -> bool:
    return bool(((scale - number).abs() <= 1e-4 * number).all())
