"""A pair that predicts: what it draws jointly, and what it has no values of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.particles.global_latents import Given
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.messages import trace_of
from pyro_vae.programs.nodes import latent_nodes, sample_nodes
from pyro_vae.programs.on_demand import OnDemand
from pyro_vae.programs.pyro_internals import is_deterministic
from pyro_vae.programs.sites import Plate, Structure
from pyro_vae.programs.state import Look, looking
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import DataPlate, GivenValues, Program

_ROWS = 64  # of data that are read on demand, which are looked at first


@dataclass(frozen=True, slots=True)
class Prepared:
    """A pair that is ready to predict.

    Attributes:
        evaluator: of the pair.
        given: the values that global latents were fixed at.
        plate: that of the data, where all of them are drawn jointly with global latents; None else.
        unknown: sites that the model observes and the batch has no values of.
    """

    evaluator: Evaluator
    given: Given
    plate: Plate | None
    unknown: tuple[str, ...]

    @property
    def chunk_size(self) -> int:
        """Pairs (particle, datum) that are drawn at once; where all is one datum, particles."""
        evaluator = self.evaluator
        size = (evaluator.batch.size or 1) if evaluator.structure.data_dim is None else 1
        return max(1, evaluator.chunk_pairs // size)

    @property
    def observed(self) -> list[str]:
        """The sites that can be drawn anew: a pyro.factor has nothing to draw."""
        sites = self.evaluator.structure.observed
        return [site.name for site in sites if not isinstance(site.fn, dist.Unit)]

    @property
    def deterministic(self) -> list[str]:
        """The model's pyro.deterministic sites."""
        nodes = sample_nodes(self.evaluator.pair.single.model_trace)
        return [name for name, node in nodes if is_deterministic(node)]


def prepared(
    model: Program,
    guide: Program,
    batch: tuple[Any, ...],
    given: GivenValues | None,
    data_plate: DataPlate,
    seed: int | None,
) -> Prepared:
    """Return a pair that is ready to predict; arguments as of :func:`pyro_vae.predict`."""
    data = batch[0] if len(batch) == 1 and isinstance(batch[0], OnDemand) else as_batch(*batch)
    on_demand = isinstance(data, OnDemand)
    looked_at = data.rows(slice(0, _ROWS)) if on_demand else data
    unknown: dict[str, Tensor] = {}
    plate: Plate | None = None
    if (proposed := _proposed(guide, looked_at)) is not None:
        unknown = {} if on_demand else _unknown(model, data, proposed)
        model = pyro.condition(model, data=unknown) if unknown else model
        if given is None and data_plate is not False:
            plate = _joint_plate(model, looked_at, data_plate, proposed)
    whole = data_plate if plate is None else False
    evaluator, fixed = prepare(model, guide, (data,), given, whole, seed)
    return Prepared(evaluator, fixed, plate, tuple(unknown))


def _proposed(guide: Program, batch: Batch) -> set[str] | None:
    """Return what a guide samples; None where a look at it fails, as a run of it will."""
    with Look() as look, looking(guide, device=batch.device):
        return {name for name, _ in latent_nodes(trace_of(guide, batch))}
    return None if look.error is not None else set()


def _unknown(model: Program, batch: Batch, proposed: set[str]) -> dict[str, Tensor]:
    """Return values, any ones, of sites that nobody observes or proposes; others stay latent.

    A discrete one may be a latent to be summed out, unless nothing at all is observed.
    """
    if all(value is not None for value in (*batch.args, *batch.kwargs.values())):
        return {}
    structure = ModelLooks(model, batch).run
    latent = [
        s for s in structure.sites.values() if s.kind != "observed" and s.name not in proposed
    ]
    blind = not structure.observed
    return {site.name: site.value for site in latent if blind or not site.enumerable}


def _joint_plate(
    model: Program, batch: Batch, data_plate: DataPlate, proposed: set[str]
) -> Plate | None:
    """Return the plate of the data where a guide draws the model's global latents, None else."""
    run = ModelLooks(model, batch).run
    if (plate := plate_of_data(run, batch, data_plate)) is None:  # says the evaluator
        return None
    latent = [site for site in run.sites.values() if site.kind != "observed"]
    shared = {site.name for site in latent if not site.is_in(plate.name)}
    return plate if shared and shared <= proposed else None


def plate_of_data(run: Structure, batch: Batch, data_plate: DataPlate) -> Plate | None:
    """Return the plate that all that is observed is in, where that is one; also without latents."""
    own = [{plate.name: plate for plate in site.plates} for site in run.observed]
    names = set.intersection(*map(set, own)) if own else set()
    if isinstance(data_plate, str):
        names &= {data_plate}
    elif len(names) > 1:
        latent = [site for site in run.sites.values() if site.kind != "observed"]
        local = {plate.name for site in latent for plate in site.plates}
        names = names & local or {name for name in names if own[0][name].size == batch.size}
    return own[0][names.pop()] if len(names) == 1 else None
