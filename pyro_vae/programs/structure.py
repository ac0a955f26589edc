"""What a model is made of: which plate holds its data, which latents are local to a datum."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch.distributions import Distribution

from pyro_vae.programs.batch import Batch, dtype_errors
from pyro_vae.programs.messages import trace_of
from pyro_vae.programs.nodes import drawn_subsamples, plain_distribution
from pyro_vae.programs.observed import check_observed, check_repeated
from pyro_vae.programs.on_demand import example_of
from pyro_vae.programs.sites import Plate, Site, Structure, names_of
from pyro_vae.programs.state import Look, called_modules, looking
from pyro_vae.programs.types import DataPlate, Node, Program

_ONE_DATUM = "data_plate=False to treat the whole batch as one datum"


class DataPlateError(ValueError):
    """It is not plain which plate holds the data."""


class ModelLooks:
    """A model and a batch, with what runs under the prior have shown.

    A structure for another data plate, or judged more strictly, takes no further run; nor does
    stability in as many runs as were made before.

    Args:
        model: a Pyro model.
        batch: its arguments.

    Attributes:
        subsampled: by name of a plate, what :meth:`is_subsampled` returns of it.
    """

    def __init__(self, model: Program, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self._stable_runs = 0
        self.subsampled: dict[str, bool] = {}

    @classmethod
    def of(cls, model: Program, example: Any) -> ModelLooks:
        """Return what is known of a model: an example that is a ModelLooks of it, or a new one."""
        if isinstance(example, ModelLooks) and example.model is model:
            return example
        return cls(model, example_of(example))

    def on(self, batch: Batch) -> ModelLooks:
        """Return what is known of the model on some of the rows: all but its sites there."""
        other = ModelLooks(self.model, batch)
        other._stable_runs, other.subsampled = self._stable_runs, self.subsampled
        return other

    @functools.cached_property
    def run(self) -> Structure:
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
        """Return the structure of the model; takes a run of it, where none was made before.

        Args:
            data_plate: the name of the plate of the data, where it is not plain; False to
                treat the whole batch as one datum.
            strict: whether to refuse values outside the support of a likelihood that does not
                validate them (validate_args=False): training may take them, a bound on log p(x)
                not.
            latents_needed: whether a model without latents is an error; else its data plate is
                the one that holds all that is observed.

        Raises:
            DataPlateError: where no plate holds all observed sites and a latent one, or
                several do, or its size is not the batch's.
            ValueError: as :attr:`run`, and for observed values of another shape than their
                likelihood's, or outside its support.
        """
        again = functools.partial(run_model, self.model, self.batch, seed=1)
        check_observed(self.run, again, strict=strict, numbers=self.batch.numbers)
        if data_plate is False:
            return self.run.with_data_plate(None)
        name = None if data_plate is True else data_plate
        plate = _find_data_plate(self.run, name, latents_needed)
        if self.batch.size is not None and not plate.drawn and plate.size != self.batch.size:
            raise DataPlateError(
                f"the data plate {plate.name!r} has {plate.size} entries but the batch has "
                f"{self.batch.size} rows; take its size from the batch, pyro.plate(name, len(x)) "
                "or pyro.plate(name, num_data, subsample=x), or name another with data_plate="
            )
        structure = self.run.with_data_plate(plate)
        for site in structure.local_latents:
            shape = site.batch_shape
            if plate.size > 1 and (len(shape) < -plate.dim or shape[plate.dim] == 1):
                raise DataPlateError(
                    f"latent site {site.name!r} has batch shape {list(shape)}, one value for the "
                    f"{plate.size} data of plate {plate.name!r}; give the site, and the plate, "
                    f"that size, pyro.plate({plate.name!r}, len(x)), or pass {_ONE_DATUM}"
                )
        return structure

    def check_stable(self, structure: Structure, runs: int) -> None:
        """Raise ValueError where sites, or their shapes, are others in one of some further runs."""
        structure.require_no_sequential()
        for seed in range(self._stable_runs + 1, runs + 1):
            with Look() as look:
                again = run_model(self.model, self.batch, seed=seed)
            if look.error is None:  # a draw from the prior that the model cannot take says nothing
                _check_same(structure, again)
        self._stable_runs = max(runs, self._stable_runs)

    def is_subsampled(self, plate: Plate) -> bool:
        """Return whether the data plate keeps its full size when the batch is of another size."""
        if plate.name not in self.subsampled:
            self.subsampled[plate.name] = plate.size != plate.full_size
            if self.batch.size and plate.size == plate.full_size:
                few = self.batch.size - 1
                other = self.batch.rows(slice(0, few)) if few else self.batch.repeat(2)
                with Look():  # a model of batches of this one size takes no minibatches
                    found = ModelLooks(self.model, other).structure(plate.name)
                    self.note_subsampled(plate, found)
        return self.subsampled[plate.name]

    def note_subsampled(self, plate: Plate, other: Structure) -> None:
        """Remember of the data plate what a structure on other rows says."""
        found = other.data_plate
        self.subsampled[plate.name] = found is not None and found.full_size == plate.full_size

    def know_run(self, run: Structure, other: Structure | None) -> None:
        """Take a run under a guide's draws for that under the prior, and for one of stability.

        Args:
            run: on this batch.
            other: under the prior, on another batch, if there was one. Where sites or shapes
                differ, further runs say whether the model is stable.
        """
        self.run = run
        self._stable_runs = int(other is not None and run.is_like(other))


# --- runs


def run_model(model: Program, batch: Batch, seed: int | None = None) -> Structure:
    """Run a model once under its prior, in eval mode; its latents are not yet local or global.

    Args:
        model: a Pyro model.
        batch: its arguments.
        seed: of its draws; None takes the global random state, and leaves it as it was.
    """
    with (
        looking(model, device=batch.device),
        drawn_subsamples() as drawn,
        default_validation_told_apart(),
        _NameUndrawable(),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            with dtype_errors(batch):
                trace = trace_of(model, batch)
        except Exception as error:
            error.add_note(f"while running the model on {batch}")
            raise
    check_repeated(trace)
    return Structure.of(trace, drawn)


class _NameUndrawable(Messenger):
    """Says which latent it is whose distribution has no draws: a model is looked at by running."""

    _drawn: Node | None = None  # the statement that is being drawn

    def _pyro_sample(self, msg: Node) -> None:
        self._drawn = msg

    def _pyro_post_sample(self, msg: Node) -> None:
        self._drawn = None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, NotImplementedError) and self._drawn is not None:
            raise ValueError(
                f"latent site {self._drawn['name']!r}: its prior "
                f"{type(plain_distribution(self._drawn['fn'])).__name__} cannot be drawn from, and "
                "a model is looked at by drawing from its priors. Give the class a method sample; "
                "any value of its support will do where its draws are not asked for"
            ) from error


@contextlib.contextmanager
def default_validation_told_apart() -> Iterator[None]:
    """Have distributions that validate nothing by default hold 0, where others got False.

    Libraries (zuko, for one) switch validation off for a whole process. Plates copy a distribution,
    and its copy holds the default as if it were its own.
    """
    default = Distribution._validate_args
    Distribution._validate_args = default or 0  # type: ignore[assignment]
    try:
        yield
    finally:
        Distribution._validate_args = default


def _check_same(structure: Structure, again: Structure) -> None:
    """Raise ValueError if sites of another run, or their shapes, are not those of a structure."""

    def shape(site: Site | None) -> str:
        return str([*site.batch_shape, *site.event_shape]) if site else "no such site"

    for name in structure.sites.keys() | again.sites.keys():
        found = [shape(run.sites.get(name)) for run in (structure, again)]
        if found[0] != found[1]:
            raise ValueError(
                f"site {name!r} is not the same in two runs of the model on one batch "
                f"({' and '.join(found)}): latents of changing number or dimension have no density "
                "in common. Give it a fixed shape, and mask what is not there (poutine.mask)"
            )


# --- the data plate


def _find_data_plate(run: Structure, name: str | None, latents_needed: bool) -> Plate:
    observed = run.observed
    latents = [site for site in run.sites.values() if site.kind == "latent"]
    if not observed:
        names = names_of(latents)
        raise DataPlateError(
            f"the model observes nothing: no sample statement has obs=...; latent sites: {names}"
        )
    if not latents and latents_needed:
        names = names_of(observed)
        raise DataPlateError(f"the model has no latent site, only observed ones: {names}")
    if name is not None:
        return _named_data_plate(run, latents, name)
    shared = set.intersection(*(set(names_of(site.plates)) for site in observed))
    if not shared:
        plates = "; ".join(f"{s.name!r} is in {names_of(s.plates) or 'no plate'}" for s in observed)
        raise DataPlateError(
            f"no data plate: no vectorized plate holds every observed site ({plates}). Put the "
            f"data in one plate (with pyro.plate('data', len(x)): ...), or pass {_ONE_DATUM}"
        )
    of = latents or observed
    candidates = {plate.name: plate for site in of for plate in site.plates if plate.name in shared}
    if not candidates:
        raise DataPlateError(
            f"no local latents: the latent sites {names_of(latents)} lie outside the plates "
            f"{sorted(shared)} of the observed sites {names_of(observed)}. Pass {_ONE_DATUM}"
        )
    # A latent outside the data plate is global: the plate that holds every latent that
    # another candidate holds, and more, makes the fewest so.
    held = {each: {site.name for site in latents if site.is_in(each)} for each in candidates}
    for each, plate in candidates.items():
        if all(held[each] > held[other] for other in held if other != each):
            return plate
    raise DataPlateError(
        f"the data plate is not plain: {sorted(candidates)} each hold every observed site"
        f"{' and a latent one' if latents else ''}; name it with data_plate="
    )


def _named_data_plate(run: Structure, latents: list[Site], name: str) -> Plate:
    found = {plate.name: plate for site in run.sites.values() for plate in site.plates}
    if name not in found:
        raise DataPlateError(
            f"data_plate={name!r}: the model has no vectorized plate of that name; it has "
            f"{sorted(found)}"
        )
    if outside := [site.name for site in run.observed if not site.is_in(name)]:
        raise DataPlateError(
            f"the observed sites {outside} lie outside the data plate {name!r}; move them inside it"
        )
    if latents and not any(site.is_in(name) for site in latents):
        raise DataPlateError(
            f"no latent site lies inside the data plate {name!r}; the latent sites are "
            f"{names_of(latents)}. Pass {_ONE_DATUM}"
        )
    return found[name]
