"""K particles of a guide and of the model given them, each in the mode that it takes.

The modes are chosen by comparing with single particles, the guide's and the model's apart, so
that a wrong broadcast is found and not averaged over.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.particles import checks
from pyro_vae.particles.modes import Loop
from pyro_vae.particles.run import Run, Runner, is_latent, is_observed
from pyro_vae.programs.answers import agree
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.enumeration_check import check_values
from pyro_vae.programs.masks import check_proposal_mask, depend_on_draws
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.purposes import Purpose, bits_of
from pyro_vae.programs.state import Look, as_in_training, preserved_rng
from pyro_vae.programs.types import ModeName, Particles, Trace, Values

# Pairs (particle, datum) drawn at once, and data in a block. They decide which
# random numbers a datum gets, so they are constants and not options.
_DRAW_PAIRS = 16384
_DRAW_DATA = 256
# Pairs, and observed numbers, scored at once by default. Larger tensors than these
# leave the processor's cache, and go back to the system after each use.
_CHUNK_PAIRS = 8192
_CHUNK_ELEMENTS = 2**22


class PairRunner:
    """Runs a guide, and the model given its draws, for K particles at once.

    Its methods run in :meth:`Pair.evaluating`.

    Args:
        pair: model, guide and batch.
        seed: of the draws, those by which modes are chosen among them.
        particles: the mode of both; "auto" takes the first that agrees with single particles.

    Attributes:
        guide: the Runner of the guide.
        model: the Runner of the model.
        structure: of the model.

    Raises:
        ValueError: where particles together have other densities than each alone, and where a
            datum's density depends on the latents of other data.
    """

    def __init__(self, pair: Pair, seed: int, particles: Particles = "auto") -> None:
        self.pair, self.seed, self.structure = pair, seed, pair.structure
        # The reference: single particles, run one by one. It takes any network, and so comes
        # before all else that runs the pair.
        loop = Loop(pair.nesting, pair.structure.data_dim)
        self.guide = Runner(pair.guide, pair.batch, pair.shapes, loop)
        self.model = Runner(pair.model, pair.batch, pair.shapes, loop, pair.summed_out)
        self.masks_by_draw = False
        self._num_values = 1  # of summed-out sites, those that one density depends on
        with pair.evaluating(), torch.no_grad():
            self._choose_modes(particles)

    def latents(self, values: Values) -> dict[str, Tensor]:
        """Return the values of the model's sites, and their preimages."""
        sites, shapes = self.structure.sites, self.guide.shapes
        return {
            name: value
            for name, value in values.items()
            if name in sites or (name in shapes and shapes[name].preimage_of in sites)
        }

    def run_model(self, rows: slice, values: Values) -> Run:
        """Run the model given draws of the guide."""
        return self.model.run(rows, _count(values), self.latents(values))

    def log_guide(self, run: Run, rows: slice, values: Values) -> Tensor:
        """Return log q of draws, [K, N], masked as the model masks its latents given them."""
        by_draw = self.masks_by_draw
        masks = self._masks_of_draws(run, rows, values) if by_draw else self.guide.masks_of(rows)
        return run.log_prob(is_latent, masks)

    def guide_given(self, rows: slice, values: Values) -> Tensor:
        """Return log q of given values, [K, N]."""
        return self.log_guide(self.guide.run(rows, _count(values), values), rows, values)

    def model_given(self, rows: slice, values: Values) -> tuple[Tensor, Tensor]:
        """Return log p(x | z) and log p(z) of given values, [K, N] each."""
        run = self.run_model(rows, values)
        if all(site.kind == "observed" for site in self.structure.sites.values()):
            log_likelihood = run.log_prob(is_observed)
            return log_likelihood, torch.zeros_like(log_likelihood)
        log_prior = run.log_prob(is_latent)
        never = log_prior == -math.inf
        if not self.pair.summed_out:
            # Where there is no z, what x would be given it is no number, and matters to nothing.
            return run.log_prob(is_observed).masked_fill(never, 0.0), log_prior
        # The discrete sites tie likelihood and prior: p(x | z) = p(x, z) / p(z).
        log_joint = run.log_prob().masked_fill(never, 0.0)
        return log_joint - log_prior.masked_fill(never, 0.0), log_prior

    def _masks_of_draws(self, run: Run, rows: slice, values: Values) -> dict[str, Tensor]:
        """Return the model's masks on the guide's sites, ``[K, *plates]``, for these draws.

        Raises:
            ValueError: where the guide masks what the model does not.
        """
        latents, num_particles = self.latents(values), _count(values)
        step = max(1, self.chunk_pairs // (rows.stop - rows.start))
        pieces = []
        with torch.no_grad():
            for k in range(0, num_particles, step):
                some = {name: value[k : k + step] for name, value in latents.items()}
                count = min(step, num_particles - k)
                found = self.model.run(rows, count, some).masks()
                pieces.append({n: m.expand(count, *m.shape[1:]) for n, m in found.items()})
        theirs = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        for name, mask in run.masks().items():
            if name in latents:
                check_proposal_mask(name, mask, theirs.get(name))
        return self._on_proposals(theirs)

    def _on_proposals(self, masks: Values) -> dict[str, Tensor]:
        """Return masks on the model's latents by the sites of the guide that propose these."""
        return {name: masks[site] for name, site in self.pair.masked.items() if site in masks}

    @property
    def chunk_pairs(self) -> int:
        """Pairs (particle, datum) that the model scores at once by default."""
        known = self.pair.structure  # of the rows that were looked at
        observed = sum(site.value.numel() for site in known.observed) * self._num_values
        return max(1, min(_CHUNK_PAIRS, _CHUNK_ELEMENTS * known.num_data // max(1, observed)))

    @property
    def batch(self) -> Batch:
        """The arguments of model and guide."""
        return self.guide.batch

    @property
    def modes(self) -> dict[str, ModeName]:
        """How particles run, for guide and model: "plate", "repeat" or "loop"."""
        return {"guide": self.guide.mode.name, "model": self.model.mode.name}

    @property
    def num_data(self) -> int:
        """N: data in the batch, or 1 where it is treated as one datum."""
        return self.structure.num_data

    def data_blocks(self) -> list[slice]:
        """Return the data in blocks of rows; all at once where a model takes no fewer."""
        return self.blocks_of(self.num_data)

    def blocks_of(self, count: int) -> list[slice]:
        """Return some of the data in blocks, equal ones, so that they share a graph."""
        if count <= _DRAW_DATA or not self.splittable:
            return [slice(0, count)]
        size = first_block(count)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def take_data(self, values: Values, rows: slice, size: int) -> dict[str, Tensor]:
        """Return the values of some data, ``[K, *plates, *event]``.

        Args:
            values: of ``size`` data.
            rows: which of them, the first being 0.
            size: how many.
        """
        dim = self.model.mode.data_dim
        if dim is None or (rows.start == 0 and rows.stop >= size):
            return dict(values)
        axes = {n: v.ndim - self.model.shapes[n].event_ndim + dim for n, v in values.items()}
        count = min(rows.stop, size) - rows.start
        return {n: value.narrow(axes[n], rows.start, count) for n, value in values.items()}

    @functools.cached_property
    def splittable(self) -> bool:
        """Whether guide and model, given some of the rows, say of them what they say of all.

        Not so where a plate has a fixed size, or a function closes over data of its own.
        """
        num_data, plate = self.num_data, self.structure.data_plate
        if plate is None or self.batch.size is None or num_data < 2:
            return False
        if self.pair.part_agrees(plate):
            return True
        whole, half = slice(0, num_data), slice(num_data // 2, num_data)
        with self.pair.evaluating(), torch.no_grad():
            self._reseed(Purpose.CHECKS, 1)
            run = self.guide.run(whole, 2)
            values = run.values()
            log_guide = self.log_guide(run, whole, values)
            log_joint = torch.stack(self.model_given(whole, values)).sum(0)
            some = self.take_data(values, half, num_data)
            with Look():
                found = self.guide_given(half, some)
                found_joint = torch.stack(self.model_given(half, some)).sum(0)
                same = self._agree(log_guide[:, half], found)
                return same and self._agree(log_joint[:, half], found_joint)
        return False  # it takes batches of this one size

    def by_datum(self, values: Values) -> dict[str, Tensor]:
        """Return ``[K, N, *inner plates, *event]`` values; of one datum ``[K, *batch, *event]``."""
        single, dim = self.single_values(values), self.structure.data_dim
        if dim is None:
            return single
        axes = {n: v.ndim - self.guide.shapes[n].event_ndim + dim for n, v in single.items()}
        return {name: value.movedim(axes[name], 1) for name, value in single.items()}

    def single_by_datum(self, values: Values) -> dict[str, Tensor]:
        """Undo :meth:`by_datum` up to :meth:`single_values`: ``[K, *batch, *event]``."""
        dim = self.structure.data_dim
        if dim is None:
            return dict(values)
        axes = {n: v.ndim - self.guide.shapes[n].event_ndim + dim for n, v in values.items()}
        return {name: value.movedim(1, axes[name]) for name, value in values.items()}

    def single_values(self, values: Values) -> dict[str, Tensor]:
        """Return values as a single run shapes them, particles first: ``[K, *batch, *event]``."""
        return {
            name: value.reshape(value.shape[:1] + value.shape[1 + self._missing_dims(name) :])
            for name, value in values.items()
        }

    def from_single(self, values: Values) -> dict[str, Tensor]:
        """Undo :meth:`single_values`: return values as ``[K, *plates, *event]``."""
        return {
            name: value.reshape(value.shape[:1] + (1,) * self._missing_dims(name) + value.shape[1:])
            for name, value in values.items()
        }

    def _missing_dims(self, name: str) -> int:
        """Return how many plate dimensions of all values a site has not."""
        return self.pair.nesting - self.guide.shapes[name].batch_ndim

    def share_preimages(self, other: PairRunner) -> None:
        """Take up the preimages of another guide's draws, to score these by."""
        theirs = {n: s for n, s in other.guide.shapes.items() if s.preimage_of is not None}
        shapes = {**theirs, **self.guide.shapes}
        self.guide, self.model = (replace(r, shapes=shapes) for r in (self.guide, self.model))

    def can_score(self, other: PairRunner) -> bool:
        """Whether this guide's density of the other guide's draws is known."""
        same = self.pair.guide_sites == other.pair.guide_sites
        return same and self.pair.scorable and self.pair.nesting == other.pair.nesting

    def in_mode(self, name: ModeName) -> Self:
        """Return this runner with guide and model in another mode."""
        other = copy.copy(self)
        other.guide, other.model = self.guide.in_mode(name), self.model.in_mode(name)
        return other

    def _choose_modes(self, particles: Particles) -> None:
        """Choose the modes of guide and model; note the sites that float32 is too coarse for."""
        runs: tuple[Run, Run] | None = None
        with Look():
            runs = self._agree_at_once(particles)
        guide_run, run = runs or self._choose_apart(particles)
        self.guide.double = checks.coarse_sites(guide_run)
        self.model.double = checks.coarse_sites(run)
        checks.warn_of_coarse_parameters(self.model, run)

    def _agree_at_once(self, particles: Particles) -> tuple[Run, Run] | None:
        """Take the first mode if particles together say all that single ones would.

        Together run the particle of the pair's single run, one or two others, and one that has
        every other datum's values from either. Each must have the density that it has alone, and
        each datum of the last that of the particle that its values are from. (Comparing particles
        of one run with each other would not do: what they share, as a maximum over all numbers of
        a latent, changes all of them alike.)

        Returns:
            Runs of guide and model on a draw by the seed alone; None where other checks decide.
        """
        pair, single, size = self.pair, self.pair.single, self.num_data
        if pair.masked or pair.summed_out or pair.guide_sites - set(single.guide_trace.nodes):
            return None
        if pair.shared_trace is not None:  # which is of another guide's draws
            return None
        rows, plate = self.data_blocks()[0], self.structure.data_plate
        alone, model_alone = (
            Run([trace], self.guide.mode, 1, size, pair.shapes)
            for trace in (single.guide_trace, single.model_trace)
        )
        known = self.take_data(alone.values(), rows, size)
        self._reseed(Purpose.CHECKS)
        drawn = self.guide.run(rows, 1)
        values = drawn.values()
        other = {name: values[name] for name in known}
        odd = checks.every_other(rows.stop - rows.start, self.batch.device)
        mixed = other if plate is None else self._mixed(odd, other, known)
        run_of_other = self.run_model(rows, other)
        of_known, of_other = model_alone.log_prob()[:, rows], run_of_other.log_prob()
        rest = of_other if plate is None else torch.where(odd, of_known, of_other)
        # Where a part was run, that run has told data apart.
        apart = plate is not None and pair.part is None
        of_mixed = self.run_model(rows, mixed).log_prob() if apart else rest
        copies = 2 if size == 3 else 1  # K is not N, so that they are not mistaken
        values = {n: torch.cat([*[other[n]] * copies, known[n], mixed[n]]) for n in known}
        (name, *_) = checks.candidates(self.guide, particles)
        together = self.in_mode(name)
        run = together.guide.run(rows, copies + 2, values)
        log_guide, seen = run.log_prob(is_latent), [0, copies, copies + 1]
        log_joint = together.run_model(rows, values).log_prob()
        of_guide = torch.cat([drawn.log_prob(is_latent), alone.log_prob(is_latent)[:, rows]])
        of_model = torch.cat([of_other, of_known, rest])
        if not (agree(of_guide, log_guide[seen[:2]]) and agree(of_model, log_joint[seen])):
            return None
        if not agree(rest, of_mixed):
            return None
        self.guide, self.model = together.guide, together.model
        return drawn, run_of_other

    def _mixed(self, odd: Tensor, first: Values, second: Values) -> dict[str, Tensor]:
        """Return the values of ``second`` for odd data, of ``first`` for the rest."""
        dim, shapes = self.structure.data_dim or 0, self.guide.shapes
        return {
            name: checks.mix(odd, value, second[name], dim - shapes[name].event_ndim)
            for name, value in first.items()
        }

    def _choose_apart(self, particles: Particles) -> tuple[Run, Run]:
        """Choose the mode of the guide, then of the model; return a run of each."""
        rows, count = self.data_blocks()[0], 3 if self.num_data == 2 else 2
        self._reseed(Purpose.CHECKS)
        run = self.guide.run(rows, count)
        values = run.values()
        if self.pair.masked:
            self._find_masks()
        score = functools.partial(self.log_guide, rows=rows, values=values)
        self.guide, guide_run = checks.choose_mode(
            self.guide, "guide", particles, rows, values, score(run), score
        )
        latents = self.latents(values)
        if self.pair.summed_out:
            self._check_summed_out(rows, latents)
        reference = self.model.run(rows, count, latents).log_prob()
        self.model, run = checks.choose_mode(
            self.model, "model", particles, rows, latents, reference, Run.log_prob
        )
        self._check_independent(rows, latents, reference)
        return guide_run, run

    def _find_masks(self) -> None:
        """Find the model's masks on latents, and whether they are others for other draws."""
        whole = slice(0, self.num_data)
        values = self.latents(self.guide.run(whole, 1).values())
        run = functools.partial(self.model.run, whole, 1, values)
        self.masks_by_draw = depend_on_draws(values, lambda: run().traces)
        if not self.masks_by_draw:
            self.guide.masks = self._on_proposals(run().masks())

    def _check_summed_out(self, rows: slice, latents: Values) -> None:
        """Raise ValueError where the values of a site do not run together as each alone."""
        first = {name: value[:1] for name, value in latents.items()}
        run = self.model.run(rows, 1, first)
        self._num_values = run.num_values()

        def alone(discrete: Values) -> Trace:
            events = {name: self.model.shapes[name].event_ndim for name in discrete}
            chosen = {n: run.mode.unfold([value], events[n], 1) for n, value in discrete.items()}
            return self.model.run(rows, 1, {**first, **chosen}).traces[0]

        check_values(run.traces[0], alone, self.pair.nesting)

    def _check_independent(self, rows: slice, values: Values, reference: Tensor) -> None:
        """Raise DependentDataError where a datum's density depends on the latents of others.

        Of two particles, one is made that takes every other datum's values from the second:
        each datum must have the density that it had before.
        """
        size, plate = rows.stop - rows.start, self.structure.data_plate
        if plate is None or size < 2:
            return
        odd = checks.every_other(size, self.batch.device)
        first, second = ({n: v[k : k + 1] for n, v in values.items()} for k in range(2))
        found = self.model.run(rows, 1, self._mixed(odd, first, second)).log_prob()
        wanted = torch.where(odd, reference[1:2], reference[:1])
        checks.DependentDataError.check(plate, wanted, found)

    def agrees_in_training(self, modules: Sequence[nn.Module]) -> bool:
        """Return whether particles together are scored as each alone, with modules as they are.

        A module that normalizes over the batch in training mode sees other rows. True also where
        modules draw random numbers, so that two runs of one particle differ.

        Args:
            modules: all that guide and model call; their buffers stay what they are.
        """
        rows, single = self.data_blocks()[0], self.in_mode("loop")

        def score(runner: PairRunner) -> tuple[Tensor, Tensor]:
            return runner.run_model(rows, values).log_prob(), runner.guide_given(rows, values)

        with (
            torch.no_grad(),
            as_in_training(modules, self.pair.first),
            pyro.validation_enabled(False),
            preserved_rng(self.batch.device),
            poutine.block(),
        ):
            self._reseed(Purpose.CHECKS)
            values = single.guide.run(rows, 2).values()
            alone, again = score(single), score(single)
            differs = not all(map(self._agree, alone, again))
            return differs or all(map(self._agree, alone, score(self)))

    def _agree(self, reference: Tensor, found: Tensor) -> bool:
        """Return whether two log densities are equal to the rounding of what they are made of."""
        if self.model.double or self.guide.double:
            reference, found = reference.float(), found.float()
        return agree(reference, found)

    def _reseed(self, *key: int) -> None:
        """Seed the random numbers of a stream: they depend on the base seed and the key alone."""
        number = bits_of(self.seed, *key)
        # Not torch.manual_seed: it seeds every device, and takes a millisecond to.
        if self.batch.device.type == "cuda":
            torch.cuda.manual_seed(number)
        torch.default_generator.manual_seed(number)


def _count(values: Values) -> int:
    """Return K of values ``[K, ...]``."""
    return next(iter(values.values())).shape[0]


def draw_step(num_data: int) -> int:
    """Return how many particles of a block of data are drawn at once."""
    return round_down(max(1, _DRAW_PAIRS // num_data))


def first_block(count: int) -> int:
    """Return how many of the data the first block of them holds, where a model takes some."""
    return equal_step(count, _DRAW_DATA)


def equal_step(count: int, most: int) -> int:
    """Return the size of pieces that a count is cut into, at most ``most``.

    Equal ones where there are: another size is another graph, and costs as much as a full one.
    """
    fewest = -(-count // most)
    pieces = next((n for n in range(fewest, 2 * fewest) if count % n == 0), fewest)
    return -(-count // pieces)


def round_down(number: int) -> int:
    """Return the largest number of the form 1, 2 or 5 times a power of ten up to a number.

    Numbers of particles are round, and pieces of round sizes leave no remainder.
    """
    power = 10 ** (len(str(number)) - 1)
    return max(n for n in (1, 2, 5) if n * power <= number) * power
