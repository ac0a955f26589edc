"""Draws of the posterior that chains may start at: what data were simulated with, or long chains'.

Data and latents drawn together from a model, (z, x) ~ p(z) p(x | z), are as well drawn as x ~ p(x)
and z ~ p(z | x): the latents are an exact draw of the posterior of their data (Geweke 2004).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.guides.coordinates import Coordinates
from pyro_vae.particles.checks import EDGE_SHARE
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.dreams import check_held, sources_of, with_dreamt
from pyro_vae.programs.nodes import latent_nodes
from pyro_vae.programs.observed import check_drawable
from pyro_vae.programs.purposes import Purpose, seed_of
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import looking, seeded
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.supports import edge_share
from pyro_vae.programs.traces import dream, site_log_prob, trace_given
from pyro_vae.programs.types import DataPlate, Program, Trace, Values
from pyro_vae.sampling.density import TemperedDensity
from pyro_vae.sampling.prepare import Ready
from pyro_vae.sampling.samples import PosteriorSamples

# How far log p(x, z) of draws may lie from what the chains that made them said: rounding.
_NATS, _SHARE = 0.1, 1e-3


@dataclass(frozen=True, slots=True)
class Simulated:
    """Data that a model has drawn, with the latents that it drew them from.

    Attributes:
        batch: the arguments of model and guide.
        latents: site to value, as a run of the model shapes it: ``[*batch, *event]``.
    """

    batch: Batch
    latents: dict[str, Tensor]


@dataclass(frozen=True)
class Simulator:
    """Draws latents and data from a model without global latents.

    Attributes:
        model: a Pyro model.
        batch: its arguments, an example with as many rows as data are drawn.
        structure: of the model on these.
        dreamt: from {observed site: value} to the arguments, where these are not just the values.
        who: asks, for messages.
        remedy: what else to do, for messages: a sentence.
    """

    model: Program
    batch: Batch
    structure: Structure
    dreamt: Callable[[Values], Any] | None
    who: str
    remedy: str

    @classmethod
    def of(
        cls,
        model: Program,
        example: Batch,
        num_data: int,
        *,
        dreamt: Callable[[Values], Any] | None,
        data_plate: DataPlate,
        who: str,
        remedy: str,
    ) -> Simulator:
        """Return the simulator of a number of data.

        Args:
            model: a Pyro model.
            example: its arguments. What is not an observed value (covariates, lengths, masks)
                stays; rows are taken again from the first where they are fewer than the data.
            num_data: how many; 1 where the whole example is one datum.
            dreamt: as the attribute.
            data_plate: as in :func:`pyro_vae.log_weights`.
            who: as the attribute.
            remedy: as the attribute.

        Raises:
            ValueError: where the model cannot be drawn from.
        """
        batch = of_size(example, num_data, whole=data_plate is False)
        structure = ModelLooks(model, batch).structure(data_plate)
        check_generative(structure, batch, remedy)
        return cls(model, batch, structure, dreamt, who, remedy)

    def draw(self, seed: int) -> Simulated:
        """Draw latents and data.

        Args:
            seed: of the draws.

        Raises:
            ValueError: where it is not plain which argument holds the observed values, and where a
                density depends on these in another way.
        """
        model, batch, structure = self.model, self.batch, self.structure
        with (
            looking(model, device=batch.device),
            seeded(batch.device, seed_of(seed, Purpose.SIMULATED)),
        ):
            trace = dream(model, batch)
        latents = {name: node["value"] for name, node in latent_nodes(trace)}
        drawn = {s.name: latents.pop(s.name) for s in structure.observed if s.name in latents}
        # What masks leave out is no datum: a site that a reparameterization has made a point, too.
        held = (s for s in structure.observed if s.name in drawn and not bool(s.left_out.all()))
        observed = {site.name: site.value for site in held}
        found = self._put(observed, drawn)
        with looking(model, device=batch.device):
            again = trace_given(model, latents, found)
        _check_same_densities(trace, again, [*latents, *observed], self.remedy)
        _check_edges(structure, latents)
        return Simulated(found, latents)

    def _put(self, observed: Values, drawn: Values) -> Batch:
        """Return the arguments that hold what was drawn in the place of what was observed."""
        if self.dreamt is None:
            sources = sources_of(observed, self.batch, who=self.who, remedy="")
            check_held(sources, self.batch, drawn)
            return with_dreamt(self.batch, sources, drawn)
        found = as_batch(self.dreamt(drawn))
        if found.size != self.batch.size:
            raise ValueError(
                f"dream= returned arguments with {found.size} rows for {self.batch.size} simulated "
                "data; it gets {observed site: values} and returns what the model takes, a row for "
                "each datum"
            )
        return found


def of_size(example: Batch, num_data: int, *, whole: bool) -> Batch:
    """Return an example with as many rows; ValueError where it has none."""
    if whole:
        if num_data != 1:
            raise ValueError(
                f"num_data={num_data}: with data_plate=False the whole batch is one datum, and "
                "num_data=1 draws it"
            )
        return example
    if example.size is None:
        raise ValueError(
            f"{num_data} data are to be simulated, and the model takes no tensor with a row per "
            "datum, so how many data it draws is its own; let it take its data as an argument"
        )
    return example.rows(torch.arange(num_data) % example.size)


def check_generative(structure: Structure, batch: Batch, remedy: str) -> None:
    """Raise ValueError for a model of which running it does not draw the data."""
    if factors := [s.name for s in structure.observed if isinstance(s.fn, dist.Unit)]:
        raise ValueError(
            f"{factors} of the model are pyro.factor statements: a density that no draw has, so "
            f"data cannot be simulated from it. {remedy}"
        )
    if structure.data_plate is not None and structure.data_plate.drawn:
        raise ValueError(
            f"the model draws its own minibatch (plate {structure.data_plate.name!r}, "
            "subsample_size=...), so simulated data have no rows; pass pyro.plate(name, num_data, "
            "subsample=x)"
        )
    check_drawable(structure, batch.device)


def _check_same_densities(trace: Trace, again: Trace, names: list[str], remedy: str) -> None:
    """Raise ValueError where a site has another density on the data that were drawn."""
    for name in names:
        node = again.nodes.get(name)
        one = site_log_prob(name, trace.nodes[name])
        other = None if node is None else site_log_prob(name, node)
        if other is None or other.shape != one.shape or not _close(one, other):
            raise ValueError(
                f"site {name!r} has another density on the data that the model has drawn than it "
                "had while they were drawn: the model looks at its observed values in another way "
                "than by obs=..., so running it does not simulate them, or dream= does not put "
                f"them where the model finds them. Use the value that pyro.sample returns. {remedy}"
            )


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=_SHARE, atol=1e-3, equal_nan=True)


def _check_edges(structure: Structure, latents: Values) -> None:
    """Raise ValueError for draws that were cut off at the edge of a support: they are not exact."""
    for name, value in latents.items():
        site = structure.sites[name]
        if (share := edge_share(site.fn, value)) > EDGE_SHARE:
            raise ValueError(
                f"{share:.2g} of the model's draws of latent site {name!r} lie at the edge of what "
                f"{value.dtype} can hold of its support ({site.support_text}), where they are cut "
                "off: no exact draws. Use float64, or a prior that is less sparse"
            )


def starts_of_latents(prepared: Ready, latents: Values, num_chains: int) -> Tensor:
    """Return the coordinates of the latents of all data, once for each chain, [C, N, D]."""
    known = {name: value.unsqueeze(0) for name, value in latents.items()}
    known = {name: v.expand(num_chains, *v.shape[1:]) for name, v in known.items()}
    return _complete(prepared, known)


def starts_of_samples(prepared: Ready, samples: PosteriorSamples, num_chains: int) -> Tensor:
    """Return coordinates of draws of chains, far apart from each other, [C, N, D].

    Raises:
        ValueError: for draws of other sites, of another number of data, too few, and where
            log p(x, z) of the draws is another one here: they are of another model or other data.
    """
    names = [each.name for each in prepared.guide.coordinates]
    if missing := [name for name in names if name not in samples.draws]:
        raise ValueError(
            f"posterior= has no draws of latent sites {missing}, only of {sorted(samples.draws)}; "
            "pass what pyro_vae.sample_posterior gave for this model"
        )
    total, num_data = samples.log_joint[..., 0].numel(), samples.log_joint.shape[-1]
    if num_data != prepared.evaluator.num_data or total < num_chains:
        raise ValueError(
            f"posterior= has {total} draws of {num_data} data, but {num_chains} chains of "
            f"{prepared.evaluator.num_data} data are to start at them"
        )
    index = torch.linspace(0, total - 1, num_chains).round().long()
    draws = {name: samples.draws[name].flatten(0, 1) for name in names}
    chosen = {name: value[index.to(value.device)] for name, value in draws.items()}
    z = _complete(prepared, prepared.evaluator.single_by_datum(chosen))
    _check_heights(prepared, z, samples.log_joint.flatten(0, 1)[index.to(z.device)])
    return z


def _check_heights(prepared: Ready, z: Tensor, known: Tensor) -> None:
    """Raise ValueError where log p(x, z) of coordinates [C, N, D] is not what chains said."""
    if prepared.evaluator.pair.masked:
        return  # coordinates that are not there count for something, and are drawn anew
    power = z.new_ones(1, dtype=torch.float64)
    found = torch.cat(
        [
            TemperedDensity(block, prepared.table[rows], "guide", 1)(z[:, rows]).height(power)
            for rows, block in prepared.each()
        ],
        1,
    )
    apart = (found - known).abs() > _NATS + _SHARE * known.abs()
    if bool((apart & z.isfinite().all(-1)).any()):
        bad = torch.nonzero(apart.any(0)).flatten()
        raise ValueError(
            f"posterior= holds draws of another model or of other data: log p(x, z) of them is not "
            f"what it was for the chains, for {len(bad)} of {z.shape[1]} data "
            f"({bad[:5].tolist()}). Pass the same model, parameters and batch"
        )


def _complete(prepared: Ready, values: Values) -> Tensor:
    """Return coordinates [K, N, D] of values ``[K, *batch, *event]``, all of them drawn.

    What a mask of the model leaves out has no draw of the posterior; annealed chains give it the
    base's density given the coordinates before it, and so it is drawn.
    """
    evaluator = prepared.evaluator
    z = prepared.coordinates_of_single(values).to(prepared.table)
    if not evaluator.pair.masked:
        return z
    rows, family, size = slice(0, evaluator.num_data), prepared.blocks.family, z.shape[-1]
    known = {each.name: values[each.name] for each in prepared.guide.coordinates}
    with evaluator.evaluating():
        run = evaluator.run_model(rows, evaluator.from_single(known))
        masks = evaluator.single_values(run.masks())
    present = torch.cat([_present(each, masks, values) for each in prepared.guide.coordinates], -1)
    z = torch.where(present, z, 0.0)
    with torch.no_grad(), seeded(z.device, seed_of(evaluator.seed, Purpose.SIMULATED_ABSENT)):
        for column in torch.nonzero(~present.flatten(0, 1).all(0)).flatten().tolist():
            mine = slice(column, column + 1)
            base = family.conditional(prepared.table, size, z[..., :column], mine)
            drawn = base.sample(z.shape[: z.ndim - len(base.batch_shape + base.event_shape)])
            z[..., mine] = torch.where(present[..., mine], z[..., mine], drawn)
    return z


def _present(coordinates: Coordinates, masks: Values, values: Values) -> Tensor:
    """Return which coordinates of a site no mask leaves out, [K, N, d]."""
    like = coordinates.unconstrained(values)
    mask = masks.get(coordinates.name)
    if mask is None:
        return coordinates.rows(torch.ones_like(like, dtype=torch.bool))
    wide = mask.reshape(*mask.shape, *[1] * len(coordinates.event))
    return coordinates.rows(wide.expand_as(like))
