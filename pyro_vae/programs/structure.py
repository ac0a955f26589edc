"""What a model is made of: which plate holds its data, which latents are local to a datum."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.looks import ModelRun, check_same, run_model
from pyro_vae.programs.observed import check_observed
from pyro_vae.programs.sites import Plate, Site, Structure, names_of
from pyro_vae.programs.state import Look, called_modules
from pyro_vae.programs.types import DataPlate, Program

__all__ = ["DataPlateError", "ModelLooks", "inspect"]


class DataPlateError(ValueError):
    """It is not plain which plate holds the data."""


def inspect(
    model: Program,
    *batch: Any,
    data_plate: DataPlate = None,
    strict: bool = False,
    latents_needed: bool = True,
) -> Structure:
    """Run the model once on a batch and return its structure.

    The random state is left as it was found, and modules run in eval mode.

    Args:
        model: a Pyro model.
        *batch: its arguments (see :func:`pyro_vae.programs.batch.as_batch`).
        data_plate: the name of the plate of the data, where it is not plain; False to
            treat the whole batch as one datum.
        strict: whether to refuse values outside the support of a likelihood that does not
            validate them (validate_args=False): training may take them, a bound on log p(x) not.
        latents_needed: whether a model without latents is an error; else its data plate is the
            one that holds all that is observed.

    Returns:
        A Structure.

    Raises:
        DataPlateError: where no plate holds all observed sites and a latent one, or
            several do, or its size is not the batch's.
        ValueError: for NaN in the batch (but see :class:`pyro_vae.MissingData`), and for observed
            values of another shape than their likelihood's, or outside its support.
    """
    looks = ModelLooks(model, as_batch(*batch))
    return looks.structure(data_plate, strict=strict, latents_needed=latents_needed)


class ModelLooks:
    """A model and a batch, with what runs under the prior have shown.

    A structure for another data plate, or judged more strictly, takes no further run; nor does
    stability in as many runs as were made before.

    Args:
        model: a Pyro model.
        batch: its arguments.
    """

    def __init__(self, model: Program, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self._stable_runs = 0
        self._subsampled: dict[str, bool] = {}

    @classmethod
    def of(cls, model: Program, example: Any) -> ModelLooks:
        """Return what is known of a model: an example that is a ModelLooks of it, or a new one."""
        if isinstance(example, ModelLooks) and example.model is model:
            return example
        return cls(model, as_batch(example))

    def on(self, batch: Batch) -> ModelLooks:
        """Return what is known of the model on some of the rows: all but its sites there."""
        other = ModelLooks(self.model, batch)
        other._stable_runs, other._subsampled = self._stable_runs, self._subsampled
        return other

    @functools.cached_property
    def run(self) -> ModelRun:
        """One run under the prior; the global random state stays as it was.

        Raises:
            ValueError: for NaN in the batch (but see :class:`pyro_vae.MissingData`), before
                whatever the model raises, which it may be the cause of.
        """
        try:
            with called_modules() as called:
                return run_model(self.model, self.batch)
        finally:
            missing = any(getattr(module, "takes_missing", False) for module in called.values())
            self.batch.check_finite(missing=missing)

    def structure(
        self, data_plate: DataPlate = None, *, strict: bool = False, latents_needed: bool = True
    ) -> Structure:
        """Return the structure of the model; arguments and errors as :func:`inspect`."""

        def sites_again() -> Mapping[str, Site]:
            return run_model(self.model, self.batch, seed=1).sites

        check_observed(self.run.sites, sites_again, strict=strict)
        if data_plate is False:
            kinds = {
                name: _with_kind(site, "global latent") for name, site in self.run.sites.items()
            }
            return Structure(kinds, None, self.run.nesting, 1, self.run.sequential)
        plate = _find_data_plate(
            self.run.sites, None if data_plate is True else data_plate, latents_needed
        )
        if self.batch.size is not None and not plate.drawn and plate.size != self.batch.size:
            raise DataPlateError(
                f"the data plate {plate.name!r} has {plate.size} entries but the batch has "
                f"{self.batch.size} rows; let the plate take its size from the batch, as in "
                f"pyro.plate({plate.name!r}, len(x)) or pyro.plate({plate.name!r}, num_data, "
                "subsample=x), or name another plate with data_plate="
            )
        kinds = {
            name: _with_kind(
                site, "local latent" if plate.name in names_of(site.plates) else "global latent"
            )
            for name, site in self.run.sites.items()
        }
        for site in kinds.values():
            _check_local(site, plate)
        return Structure(kinds, plate, self.run.nesting, plate.size, self.run.sequential)

    def check_stable(self, structure: Structure, runs: int) -> None:
        """Raise ValueError where sites, or their shapes, are others in one of some further runs."""
        structure.require_no_sequential()
        for seed in range(self._stable_runs + 1, runs + 1):
            with Look() as look:
                again = run_model(self.model, self.batch, seed=seed).sites
            if look.error is None:  # a draw from the prior that the model cannot take says nothing
                check_same(structure, again)
        self._stable_runs = max(runs, self._stable_runs)

    def is_subsampled(self, plate: Plate) -> bool:
        """Return whether the data plate keeps its full size when the batch is of another size."""
        if plate.name not in self._subsampled:
            self._subsampled[plate.name] = self._is_subsampled(plate)
        return self._subsampled[plate.name]

    def _is_subsampled(self, plate: Plate) -> bool:
        size = self.batch.size
        if plate.size != plate.full_size or size is None or size < 1:
            return plate.size != plate.full_size
        other = self.batch.rows(slice(0, size - 1)) if size > 1 else self.batch.repeat(2)
        with Look():
            found = ModelLooks(self.model, other).structure(plate.name).data_plate
            return found is not None and found.full_size == plate.full_size
        return False  # the model takes batches of this one size only: no minibatches

    def know_run(self, run: ModelRun, other: ModelRun | None) -> None:
        """Take a run under a guide's draws for that under the prior, and for one of stability.

        Args:
            run: on this batch.
            other: under the prior, on another batch, if there was one. Where sites or shapes
                differ, further runs say whether the model is stable.
        """
        self.run = run
        self._stable_runs = int(other is not None and run.is_like(other))

    def know_subsampled(self, plate: Plate, subsampled: bool) -> None:
        """Remember what a run on other rows has shown of :meth:`is_subsampled`."""
        self._subsampled[plate.name] = subsampled


def _check_local(site: Site, plate: Plate) -> None:
    """Raise DataPlateError for a local latent that has one value for all data."""
    shape = site.batch_shape
    single = len(shape) < -plate.dim or shape[plate.dim] == 1
    if site.kind == "local latent" and single and plate.size > 1:
        raise DataPlateError(
            f"latent site {site.name!r} has batch shape {list(shape)}, one value for the "
            f"{plate.size} data of plate {plate.name!r}; give the plate its size, "
            f"pyro.plate({plate.name!r}, len(x)), and the site that shape, or pass "
            "data_plate=False to treat the whole batch as one datum"
        )


def _find_data_plate(sites: Mapping[str, Site], name: str | None, latents_needed: bool) -> Plate:
    observed = [site for site in sites.values() if site.kind == "observed"]
    latents = [site for site in sites.values() if site.kind == "latent"]
    if not observed:
        raise DataPlateError(
            "the model observes nothing: no sample statement has obs=...; its latent sites are "
            f"{names_of(latents)}"
        )
    if not latents and latents_needed:
        raise DataPlateError(
            f"the model has no latent site, only observed ones: {names_of(observed)}"
        )
    if name is not None:
        return _named_data_plate(sites, observed, latents, name)
    shared = set.intersection(*({plate.name for plate in site.plates} for site in observed))
    if not shared:
        plates = "; ".join(
            f"{site.name!r} is in {names_of(site.plates) if site.plates else 'no plate'}"
            for site in observed
        )
        raise DataPlateError(
            f"no data plate: no vectorized plate holds every observed site ({plates}). Put the "
            "data in one plate (with pyro.plate('data', len(x)): ...), or pass data_plate=False "
            "to treat the whole batch as one datum"
        )
    candidates = {
        plate.name: plate
        for site in latents or observed
        for plate in site.plates
        if plate.name in shared
    }
    if not candidates:
        raise DataPlateError(
            f"no local latents: the latent sites {names_of(latents)} lie outside the plates "
            f"{sorted(shared)} of the observed sites {names_of(observed)}. Pass data_plate=False "
            "to treat the whole batch as one datum"
        )
    # A latent outside the data plate is global: the plate that holds every latent that
    # another candidate holds, and more, makes the fewest so.
    held = {
        name: {site.name for site in latents if name in {plate.name for plate in site.plates}}
        for name in candidates
    }
    if not latents and len(candidates) == 1:
        return next(iter(candidates.values()))
    widest = [
        name for name in held if all(held[name] > held[other] for other in held if other != name)
    ]
    if len(widest) != 1:
        raise DataPlateError(
            f"the data plate is not plain: {sorted(candidates)} each hold every observed site"
            f"{' and a latent one' if latents else ''}; name it with data_plate="
        )
    return candidates[widest[0]]


def _named_data_plate(
    sites: Mapping[str, Site], observed: list[Site], latents: list[Site], name: str
) -> Plate:
    found = {plate.name: plate for site in sites.values() for plate in site.plates}
    if name not in found:
        raise DataPlateError(
            f"data_plate={name!r}: the model has no vectorized plate of that name; it has "
            f"{sorted(found)}"
        )
    outside = [site for site in observed if name not in {plate.name for plate in site.plates}]
    if outside:
        raise DataPlateError(
            f"the observed sites {names_of(outside)} lie outside the data plate {name!r}; move "
            "them inside it"
        )
    if latents and all(name not in {plate.name for plate in site.plates} for site in latents):
        raise DataPlateError(
            f"no latent site lies inside the data plate {name!r}; the latent sites are "
            f"{names_of(latents)}. Pass data_plate=False to treat the whole batch as one datum"
        )
    return found[name]


def _with_kind(site: Site, latent_kind: str) -> Site:
    return site if site.kind == "observed" else replace(site, kind=latent_kind)
