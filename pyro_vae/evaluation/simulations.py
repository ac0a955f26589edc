"""Latents and data drawn from a model, and the ranks of the latents among a guide's draws."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_vae.diagnostics.pareto_k import SmoothedWeights
from pyro_vae.diagnostics.units import units_of
from pyro_vae.diagnostics.verdict import Weights
from pyro_vae.guides.local import LocalGuide
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.checks import refuse_nan
from pyro_vae.particles.estimators import LogWeights
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.particles.global_latents import Given, fix_globals
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.guide_kinds import row_guide
from pyro_vae.programs.messages import as_count, as_seed
from pyro_vae.programs.purposes import Purpose, seed_of
from pyro_vae.programs.state import seeded
from pyro_vae.programs.types import DataPlate, GivenValues, Particles, Program, Values
from pyro_vae.sampling.exact_draws import Simulator

# A user's own: from a number of simulations to latents, by site, and the batch of their data.
Simulate: TypeAlias = Callable[[int], tuple[Mapping[str, Any], Any]]
# From a chunk of draws of n data, their numbers [K, n, U], which of these are there [n, U] and the
# simulations that they are of, to the quantities whose ranks are asked for, [K, n, Q].
Quantities: TypeAlias = Callable[[Chunk, Tensor, Tensor, slice], Tensor]

FEWEST = 20  # simulations, and draws that a rank is among: fewer say nothing
# Log densities that are apart by so many roundings of their dtype are the same.
_ROUNDINGS = 64
_REMEDY = "Or pass simulate=, a function that draws latents and data in its own way"


@dataclass(frozen=True, slots=True)
class Settings:
    """How latents and data are simulated, and how a guide's posterior is drawn from.

    Attributes:
        who: asks, for messages.
        num_simulations: S.
        num_draws: L, of the guide for each simulation.
        simulate: as of :func:`pyro_vae.sbc`, and so are the others.
        dream: likewise.
        resample: likewise.
        num_particles: likewise.
        error_rate: likewise.
        given: likewise.
        data_plate: likewise.
        particles: likewise.
        chunk_size: likewise.
        seed: of all random numbers.
    """

    who: str
    num_simulations: int
    num_draws: int
    simulate: Simulate | None
    dream: Callable[[Values], Any] | None
    resample: Literal["psis"] | None
    num_particles: int | None
    error_rate: float
    given: GivenValues | None
    data_plate: DataPlate
    particles: Particles
    chunk_size: int | None
    seed: int | None

    def checked(self, batch: tuple[Any, ...]) -> Settings:
        """Return these with whole numbers and a seed; ValueError for what does not go together."""
        if self.resample not in (None, "psis"):
            raise ValueError(f"resample={self.resample!r}: None or 'psis' is needed")
        if not 0 < self.error_rate < 1:
            raise ValueError(f"error_rate={self.error_rate!r}: a number between 0 and 1 is needed")
        if self.resample is None and self.num_particles is not None:
            raise ValueError("num_particles= is how many draws resample='psis' chooses from")
        if self.simulate is not None and self.dream is not None:
            raise ValueError(
                "dream= puts what the model draws into a batch, and simulate= returns both; give "
                "one of the two"
            )
        if not batch and self.simulate is None:
            raise ValueError(
                f"{self.who} needs an example of the model's arguments, {self.who}(model, guide, "
                "x, ...), whose observed values are drawn anew; or simulate=, a function from a "
                "number to (latents by site, batch)"
            )
        draws = as_count("num_draws", self.num_draws, FEWEST - 1)
        many = 10 * draws if self.num_particles is None else self.num_particles
        return dataclasses.replace(
            self,
            num_simulations=as_count("num_simulations", self.num_simulations, FEWEST),
            num_draws=draws,
            num_particles=as_count("num_particles", many, draws),
            seed=as_seed(self.seed),
        )

    @property
    def num_drawn(self) -> int:
        """Draws of the guide for each simulation, before any are chosen."""
        return self.num_draws if self.resample is None else self.num_particles or self.num_draws


@dataclass(frozen=True, slots=True)
class Trials:
    """Some simulations: what they were drawn from, and draws of the guide for their data.

    Attributes:
        evaluator: of their data.
        rows: their data among the evaluator's.
        index: their numbers among all simulations.
        truth: the latents that their data were drawn from, as a chunk of one particle.
        chunks: draws of the guide, one chunk after the other.
    """

    evaluator: Evaluator
    rows: slice
    index: slice
    truth: Chunk
    chunks: Iterator[Chunk]


class Simulations:
    """Latents and data of a model, and a guide for these data.

    With a data plate each datum is a simulation, and all are one batch. Where the whole batch is
    one datum (data_plate=False) each simulation is a batch of its own.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: an example of their arguments; empty where ``simulate`` draws them.
        settings: :meth:`Settings.checked`.
        density: whether the guide's density of the latents is asked for.

    Attributes:
        given: global latents, and the values that they were fixed at.
        evaluator: of all data, or of the first data set.
        names: the latent sites that the guide proposes.
        latents: what all data were drawn from, ``[S, *inner plates, *event]`` by site; where each
            simulation is a batch, ``[S, *batch, *event]``.
        batches: the data: one batch, or one of each simulation.
        labels: of the numbers of a simulation's latents, U, such as "z[0]".
        site_of: the site of each.

    Raises:
        ValueError: for what :func:`pyro_vae.sbc` refuses.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        batch: tuple[Any, ...],
        settings: Settings,
        *,
        density: bool = False,
    ) -> None:
        self.settings, self.density = settings, density
        self._programs = model, guide
        self._whole = settings.data_plate is False
        self._seed: int = settings.seed or 0
        self._given = settings.given
        self._held, fixed, self._example = model, None, Batch((), {})
        if settings.simulate is None:
            if row_guide(guide) is not None:
                raise ValueError(
                    f"{settings.who}: the guide has a row of parameters for each datum, and none "
                    "for data that are simulated now; take a guide that is given the data, as an "
                    "AmortizedGuide, or pass simulate=, which returns the data of its rows"
                )
            self._example = as_batch(*batch)
            self._held, fixed = without_globals(
                model, guide, self._example, self._given, settings.data_plate
            )
            self._given = dict(fixed) or None
        drawn = self._drawn(self._seed)
        self.batches = [batch for batch, _ in drawn]
        self.evaluator, found = self._prepared(self.batches[0], self._seed)
        self.given: Given = fixed or found
        self._check_guide()
        sites = self.evaluator.structure.sites
        self.names = [n for n in sites if n in self.evaluator.pair.guide_sites]
        self.latents = self._latents([latents for _, latents in drawn])
        mine = {n: v[0] if self._whole else v for n, v in self.latents.items()}
        size = self.evaluator.num_data
        _, self.labels, self.site_of = self._units(_folded(self.evaluator, mine), size)

    def others(self) -> tuple[list[Batch], dict[str, Tensor]]:
        """Return batches and latents as the attributes, of as many other simulations."""
        drawn = self._drawn(seed_of(self._seed, Purpose.CALIBRATED_OTHERS))
        return [batch for batch, _ in drawn], self._latents([latents for _, latents in drawn])

    def _drawn(self, seed: int) -> list[tuple[Batch, Values]]:
        """Return batches, and latents as sites are shaped; of a user's own the datum in front."""
        some = self.settings
        count = 1 if self._whole else some.num_simulations
        seeds = [
            seed_of(seed, Purpose.CALIBRATED_EACH, k) for k in range(some.num_simulations // count)
        ]
        if some.simulate is not None:
            return [_of_user(some.simulate, count, each, whole=self._whole) for each in seeds]
        simulator = Simulator.of(
            self._held,
            self._example,
            count,
            dreamt=some.dream,
            data_plate=some.data_plate,
            who=some.who,
            remedy=_REMEDY,
        )
        found = map(simulator.draw, seeds)
        return [(each.batch, each.latents) for each in found]

    def _prepared(self, batch: Batch, seed: int) -> tuple[Evaluator, Given]:
        (model, guide), some = self._programs, self.settings
        return prepare(model, guide, (batch,), self._given, some.data_plate, seed, some.particles)

    def _check_guide(self) -> None:
        """Raise ValueError for a guide whose draws have no rank among them."""
        evaluator, who = self.evaluator, self.settings.who
        if not evaluator.pair.guide_sites & set(evaluator.structure.sites):
            raise ValueError(
                f"{who}: the guide proposes no latent of the model; those that are summed out have "
                "no draws of the guide"
            )
        if evaluator.masks_by_draw:
            raise ValueError(
                f"{who}: the model masks latents by what it draws ({sorted(evaluator.pair.masked)})"
                ", so a draw of the guide may lack what the simulated latents have. Mask by the "
                "data alone, or leave the mask out"
            )
        self._check_by_datum()
        if self.density and not evaluator.pair.scorable:
            raise ValueError(
                f"{who}: the density that this guide has at simulated latents is not known (it "
                "proposes points, or makes latents of auxiliary draws); pass regions='tarp'"
            )

    def _check_by_datum(self) -> None:
        """Raise ValueError for a guide that says something else of a datum among other data."""
        evaluator, who = self.evaluator, self.settings.who
        plate = evaluator.structure.data_plate
        if plate is None or evaluator.splittable or row_guide(self._programs[1]) is not None:
            return
        if not evaluator.pair.guide_is_by_datum(plate):
            raise ValueError(
                f"{who}: what the guide says of a datum depends on its place in the batch (a "
                "parameter of each datum, as in Pyro's AutoNormal) or on the other data in it (a "
                "mean over the batch), and here each datum is a simulation of its own. Take a "
                "guide that is a function of its own datum, such as an AmortizedGuide; or "
                "data_plate=False, with which each simulation is a whole batch"
            )

    def _latents(self, drawn: list[Values]) -> dict[str, Tensor]:
        """Return the latents of all simulations, in front the simulation; checked."""
        own = self.settings.simulate is not None
        sites, structure = self.evaluator.structure.sites, self.evaluator.structure
        found = {}
        for name in self.names:
            site = sites[name]
            shape = torch.Size((*site.batch_shape, *site.event_shape))
            if own and structure.data_dim is not None:
                axis = len(site.batch_shape) + structure.data_dim
                shape = torch.Size((shape[axis], *shape[:axis], *shape[axis + 1 :]))
            parts = []
            for values in drawn:
                if name not in values:
                    raise ValueError(
                        f"simulate= returned no values of the latent site {name!r}, only of "
                        f"{sorted(values)}; the guide proposes {self.names}"
                    )
                value = values[name].to(site.value)
                if value.shape != shape:
                    raise ValueError(
                        f"simulate= returned values of the latent site {name!r} of shape "
                        f"{list(value.shape)}; {list(shape)} is needed"
                    )
                if bool(value.isnan().any()):
                    raise ValueError(f"simulate= returned NaN for the latent site {name!r}")
                parts.append(value)
            if structure.data_dim is None:
                found[name] = torch.stack(parts)
            elif own:
                found[name] = parts[0]
            else:
                axis = len(site.batch_shape) + structure.data_dim
                found[name] = parts[0].movedim(axis, 0)
        return found

    def blocks(self, num_draws: int) -> Iterator[Trials]:
        """Yield all simulations, with draws of the guide.

        Args:
            num_draws: of each.
        """
        chunk_size = self.settings.chunk_size
        if not self._whole:
            evaluator = self.evaluator
            pairs = zip(
                evaluator.data_blocks(), evaluator.blocks(num_draws, chunk_size), strict=True
            )
            for rows, chunks in pairs:
                truth = self._truth(evaluator, rows, {n: v[rows] for n, v in self.latents.items()})
                yield Trials(evaluator, rows, rows, truth, chunks)
            return
        for number, batch in enumerate(self.batches):
            evaluator, only = self._of_whole(number, batch), slice(0, 1)
            mine = {name: value[number] for name, value in self.latents.items()}
            truth = self._truth(evaluator, only, mine)
            (chunks,) = evaluator.blocks(num_draws, chunk_size)
            yield Trials(evaluator, only, slice(number, number + 1), truth, chunks)

    def _of_whole(self, number: int, batch: Batch) -> Evaluator:
        """Return the evaluator of one data set, whose random numbers are its own."""
        seed, first = seed_of(self._seed, Purpose.CALIBRATED_WHOLE, number), self.evaluator
        if first.pair.masked:  # the masks of another data set may be others
            return self._prepared(batch, seed)[0]
        index = first.given()[3]
        with first.on(batch.args, dict(batch.kwargs), {}, index) as evaluator:
            evaluator.seed = seed
            return evaluator

    def _truth(self, evaluator: Evaluator, rows: slice, latents: Values) -> Chunk:
        """Return the simulated latents as a chunk of one particle."""
        values = _folded(evaluator, latents)
        log_likelihood, log_prior = evaluator.score_model(rows, values)
        log_guide = torch.zeros_like(log_prior)
        if self.density:
            log_guide = evaluator.score_guide(rows, values)
        weights = LogWeights(log_likelihood, log_prior, log_guide)
        refuse_nan(rows, weights)
        if bool((weights.log_joint == -torch.inf).any()):
            raise ValueError(
                f"{int((weights.log_joint == -torch.inf).sum())} of the simulations have no density"
                " under the model: simulate= draws latents or data that the model does not"
            )
        return Chunk(rows, slice(0, 1), values, weights)

    # --- ranks

    def ranks(self, quantities: Quantities, num_exact: int = 0) -> Ranked:
        """Return the rank of each quantity among those of the guide's draws.

        Equal ones are put in a random order.

        Args:
            quantities: of chunks of draws.
            num_exact: how many of them, the first ones, are numbers as they were drawn; what is
                computed from draws is equal where it is so but for rounding.
        """
        some, found, present = self.settings, list[Tensor](), list[Tensor]()
        rng, weights = np.random.default_rng([self._seed, Purpose.CALIBRATED_TIES]), list[Weights]()
        for block in self.blocks(some.num_drawn):
            there = self._there(block)
            of = functools.partial(self._quantities, quantities, block, there)
            truth, each = of(block.truth), ((chunk, of(chunk)) for chunk in block.chunks)
            drawn: Iterable[Tensor] = (values for _, values in each)
            if some.resample is not None:
                values, own = _resampled(list(each), some.num_draws, self._seed, block.index)
                drawn = [values]
                weights.append(own)
            eps = torch.finfo(block.truth.weights.log_prior.dtype).eps
            slack = _ROUNDINGS * eps * (1 + truth[0].abs())
            slack[:, :num_exact] = 0.0
            found.append(_ranks(truth, drawn, slack, rng))
            present.append(there.cpu())
        doubt = Weights.joined(weights).doubt if weights else ""
        return Ranked(torch.cat(found).numpy(), torch.cat(present).numpy(), doubt)

    def _quantities(
        self, quantities: Quantities, block: Trials, there: Tensor, chunk: Chunk
    ) -> Tensor:
        numbers, _, _ = self._units(chunk.values, there.shape[0], block.evaluator)
        return quantities(chunk, torch.where(there, numbers, 0.0), there, block.index)

    def _units(
        self, values: Values, size: int, evaluator: Evaluator | None = None
    ) -> tuple[Tensor, list[str], list[str]]:
        """Return the numbers of latents of n data, [K, n, U], their names, the site of each."""
        evaluator, count = evaluator or self.evaluator, values[self.names[0]].shape[0]
        found = {n: units_of(evaluator, n, values[n], count, size) for n in self.names}
        numbers = torch.cat([each.double() for each, _ in found.values()], -1)
        labels = [label for _, own in found.values() for label in own]
        return numbers, labels, [name for name, (_, own) in found.items() for _ in own]

    def _there(self, block: Trials) -> Tensor:
        """Return which numbers no mask of the model leaves out, [n, U]."""
        evaluator, values = block.evaluator, block.truth.values
        masks, wide = evaluator.guide.masks_of(block.rows), dict[str, Tensor]()
        for name in self.names:
            wide[name] = torch.ones_like(values[name], dtype=torch.bool)
            if name in masks:
                events = evaluator.guide.shapes[name].event_ndim
                wide[name] &= masks[name].reshape(*masks[name].shape, *[1] * events)
        return self._units(wide, block.rows.stop - block.rows.start, evaluator)[0][0] > 0


@dataclass(frozen=True, slots=True)
class Ranked:
    """Ranks of simulations.

    Attributes:
        ranks: of each quantity, from 0 to L, [S, Q].
        there: which numbers of the latents no mask leaves out, [S, U].
        doubt: what there is to doubt of draws that were resampled, in words.
    """

    ranks: np.ndarray
    there: np.ndarray
    doubt: str


def _folded(evaluator: Evaluator, latents: Values) -> dict[str, Tensor]:
    """Return latents with the datum in front as a particle of an evaluator."""
    one = {name: value.unsqueeze(0) for name, value in latents.items()}
    return evaluator.from_single(evaluator.single_by_datum(one))


def without_globals(
    model: Program, guide: Program, batch: Batch, given: GivenValues | None, data_plate: DataPlate
) -> tuple[Program, Given]:
    """Return the model with its global latents fixed, and the values of these."""
    if isinstance(guide, LocalGuide):
        given = {**guide.given, **(given or {})}
    held, _, fixed = fix_globals(model, {"guide": guide}, batch, data_plate, given)
    return held, fixed


def _of_user(simulate: Simulate, count: int, seed: int, *, whole: bool) -> tuple[Batch, Values]:
    """Return what a user's function draws: the batch, and the latents by site."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad(), seeded(device, seed):
        returned = simulate(count)
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(
            f"simulate= returned {type(returned).__name__}; a pair is needed: the latents, a "
            "mapping from site to values, and the batch of their data"
        )
    latents, batch = returned
    if not isinstance(latents, Mapping):
        raise TypeError(
            f"simulate= returned latents of type {type(latents).__name__}; a mapping from the "
            "model's latent sites to values is needed"
        )
    arguments = as_batch(batch)
    if not whole and arguments.size != count:
        raise ValueError(
            f"simulate({count}) returned a batch of {arguments.size} rows; one for each simulation "
            "is needed"
        )
    return arguments, {name: torch.as_tensor(value) for name, value in latents.items()}


def _resampled(
    each: list[tuple[Chunk, Tensor]], num_draws: int, seed: int, index: slice
) -> tuple[Tensor, Weights]:
    """Return quantities of draws chosen by smoothed weights, [L, n, Q], and what these are like."""
    log_weights = torch.cat([chunk.weights.total for chunk, _ in each]).double().cpu().numpy()
    values = torch.cat([values for _, values in each])
    smoothed = SmoothedWeights.of(log_weights.T)
    chosen = torch.from_numpy(
        smoothed.draw(num_draws, [seed, Purpose.CALIBRATED_CHOICE, index.start])
    )
    data = torch.arange(values.shape[1])
    return values[chosen.to(values.device), data.to(values.device)], smoothed.raw


def _ranks(
    truth: Tensor, drawn: Iterable[Tensor], slack: Tensor, rng: np.random.Generator
) -> Tensor:
    """Return ranks [n, Q] of quantities [1, n, Q] among those of draws, [k, n, Q] each.

    What is no further apart than the slack, [n, Q], is equal.
    """
    below = torch.zeros(truth.shape[1:], dtype=torch.long, device=truth.device)
    equal = torch.zeros_like(below)
    for values in drawn:
        if bool(values.isnan().any()):
            raise ValueError("draws of the guide are NaN")
        below += (values < truth - slack).sum(0)
        equal += ((values - truth).abs() <= slack).sum(0)
    places = torch.from_numpy(rng.random(tuple(below.shape)))
    return below.cpu() + (places * (equal.cpu() + 1)).floor().long()
