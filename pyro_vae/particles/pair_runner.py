"""K particles of a guide and of the model given them, each in the mode that it takes.

The modes are chosen by comparing with single particles, the guide's and the model's apart, so
that a wrong broadcast is found and not averaged over.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.particles.blocks import chunk_pairs, data_blocks
from pyro_vae.particles.checks import (
    DependentDataError,
    candidates,
    choose_mode,
    coarse_sites,
    every_other,
    mix,
    warn_of_coarse_parameters,
)
from pyro_vae.particles.modes import Loop
from pyro_vae.particles.run import Run, Runner, is_any, is_latent, is_observed
from pyro_vae.programs.agreement import agree, largest_gap
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.enumeration_check import check_values
from pyro_vae.programs.masks import check_proposal_mask, depend_on_draws
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.sites import SiteShape
from pyro_vae.programs.state import Look, as_in_training, preserved_rng
from pyro_vae.programs.types import ModeName, Particles, Trace, Values

# First in the key of every random stream: what it is for.
DRAWS, CHECKS, RUNS = 0, 1, 2


class PairRunner:
    """Runs a guide, and the model given its draws, for K particles at once.

    Its methods run in :meth:`Pair.evaluating`.

    Args:
        pair: model, guide and batch.
        seed: of the draws by which modes are chosen.
        particles: the mode of both; "auto" takes the first that agrees with single particles.

    Attributes:
        guide: the Runner of the guide.
        model: the Runner of the model.

    Raises:
        ValueError: where particles together have other densities than each alone, and where a
            datum's density depends on the latents of other data.
    """

    def __init__(self, pair: Pair, seed: int, particles: Particles = "auto") -> None:
        self.pair, self._seed = pair, seed
        # The reference: single particles, run one by one. It takes any network, and so comes
        # before all else that runs the pair.
        loop = Loop(pair.nesting, pair.structure.data_dim)
        self.guide = Runner(pair.guide, pair.batch, pair.shapes, loop)
        self.masks_by_draw = False
        self.model = Runner(pair.model, pair.batch, pair.shapes, self.guide.mode, pair.summed_out)
        self._num_values = 1  # of summed-out sites, those that one density depends on
        with pair.evaluating(), torch.no_grad():
            self._choose_modes(particles)

    # --- runs

    def latents(self, values: Values) -> dict[str, Tensor]:
        """Return the values of the model's sites, and their preimages."""
        sites, shapes = self.pair.structure.sites, self.guide.shapes
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
        masks: Values = self.guide.masks_of(rows)
        if self.masks_by_draw:
            masks = self._masks_of_draws(run, rows, values)
        return run.log_prob(is_latent, masks)

    def score_guide(self, rows: slice, values: Values) -> Tensor:
        """Return log q of given values, [K, N]."""
        return self.log_guide(self.guide.run(rows, _count(values), values), rows, values)

    def log_joint(self, rows: slice, values: Values) -> Tensor:
        """Return log p(x, z) of given values, [K, N]."""
        return self.run_model(rows, values).log_prob(is_any)

    def score_model(self, rows: slice, values: Values) -> tuple[Tensor, Tensor]:
        """Return log p(x | z) and log p(z) of given values, [K, N] each."""
        run = self.run_model(rows, values)
        if all(site.kind == "observed" for site in self.pair.structure.sites.values()):
            log_likelihood = run.log_prob(is_observed)
            return log_likelihood, torch.zeros_like(log_likelihood)
        log_prior = run.log_prob(is_latent)
        never = log_prior == -math.inf
        if not self.pair.summed_out:
            # Where there is no z, what x would be given it is no number, and matters to nothing.
            return run.log_prob(is_observed).masked_fill(never, 0.0), log_prior
        # The discrete sites tie likelihood and prior: p(x | z) = p(x, z) / p(z).
        log_joint = run.log_prob(is_any).masked_fill(never, 0.0)
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
            own = run.masks()
        theirs = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        for name, mask in own.items():
            if name in latents:
                check_proposal_mask(name, mask, theirs.get(name))
        return {
            name: theirs[latent] for name, latent in self.pair.masked.items() if latent in theirs
        }

    # --- parts

    @property
    def chunk_pairs(self) -> int:
        """Pairs (particle, datum) that the model scores at once by default."""
        structure = self.pair.structure
        observed = sum(site.value.numel() for site in structure.observed)
        return chunk_pairs(structure.num_data, observed * self._num_values)

    def data_blocks(self) -> list[slice]:
        """Return the data in blocks of rows; all at once where a model takes no fewer."""
        return data_blocks(self.pair.structure.num_data, lambda: self.splittable)

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
        count = min(rows.stop, size) - rows.start
        return {
            name: value.narrow(
                value.ndim - self.model.shapes[name].event_ndim + dim, rows.start, count
            )
            for name, value in values.items()
        }

    def on(self, batch: Batch, masks: Values) -> PairRunner:
        """Return this runner on a block of the data, with the masks on the guide's sites there."""
        other = copy.copy(self)
        other.model = self.model.on(batch, {})
        other.guide = self.guide.on(batch, masks if self.guide.masks else {})
        return other

    @functools.cached_property
    def splittable(self) -> bool:
        """Whether guide and model, given some of the rows, say of them what they say of all.

        Not so where a plate has a fixed size, or a function closes over data of its own.
        """
        num_data, batch = self.pair.structure.num_data, self.pair.batch
        plate = self.pair.structure.data_plate
        if plate is None or batch.size is None or num_data < 2:
            return False
        if self.pair.part_agrees(plate):
            return True
        whole, half = slice(0, num_data), slice(num_data // 2, num_data)
        with self.pair.evaluating(), torch.no_grad():
            reseed(batch.device, self._seed, CHECKS, 1)
            run = self.guide.run(whole, 2)
            values = run.values()
            log_guide = self.log_guide(run, whole, values)
            log_joint = torch.stack(self.score_model(whole, values)).sum(0)
            some = self.take_data(values, half, num_data)
            with Look():
                found = self.score_guide(half, some)
                found_joint = torch.stack(self.score_model(half, some)).sum(0)
                same = self._agree(log_guide[:, half], found)
                return same and self._agree(log_joint[:, half], found_joint)
        return False  # it takes batches of this one size

    # --- the modes

    def sharing(self, shapes: Mapping[str, SiteShape]) -> PairRunner:
        """Return this runner with shapes of another guide's draws as well, to score them."""
        other = copy.copy(self)
        other.guide, other.model = self.guide.sharing(shapes), self.model.sharing(shapes)
        return other

    def in_mode(self, name: ModeName) -> PairRunner:
        """Return this runner with guide and model in another mode."""
        other = copy.copy(self)
        other.guide, other.model = self.guide.in_mode(name), self.model.in_mode(name)
        return other

    def _choose_modes(self, particles: Particles) -> None:
        """Choose the modes of guide and model, and find out what decides how they are scored."""
        agreed: tuple[Run, Run] | None = None
        with Look():
            agreed = self._agree_at_once(particles)
        if agreed is not None:
            self._score_in_float64(*agreed)
            return
        rows, values = self._choose_guide(particles)
        if self.pair.summed_out:
            self._check_summed_out(rows, values)
        count, latents = _count(values), self.latents(values)
        runs: list[Run] = []

        def score(model: Runner) -> Tensor:
            runs.append(model.run(rows, count, latents))
            return runs[-1].log_prob(is_any)

        reference = score(self.model)
        self.model = choose_mode(self.model, "model", particles, reference, score)
        self._check_independent(rows, latents, reference)
        self._score_in_float64(model=runs[-1])

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
        pair, structure, single = self.pair, self.pair.structure, self.pair.single
        if pair.masked or pair.summed_out or pair.guide_sites - set(single.guide_trace.nodes):
            return None
        if pair.shares_model_trace:  # which is of another guide's draws
            return None
        rows, plate = self.data_blocks()[0], structure.data_plate
        alone = [
            Run([trace], self.guide.mode, 1, structure.num_data, pair.shapes)
            for trace in (single.guide_trace, single.model_trace)
        ]
        known = self.take_data(alone[0].values(), rows, structure.num_data)
        reseed(pair.batch.device, self._seed, CHECKS)
        drawn = self.guide.run(rows, 1)
        other, size = drawn.values(), rows.stop - rows.start
        odd = every_other(size, pair.batch.device)
        copies = 2 if structure.num_data == 3 else 1  # K is not N, so that they are not mistaken
        values = {}
        for name, value in known.items():
            mixed = other[name]
            if plate is not None:
                mixed = mix(odd, mixed, value, plate.dim - pair.shapes[name].event_ndim)
            values[name] = torch.cat([*[other[name]] * copies, value, mixed])
        others = self.latents({name: value[:1] for name, value in values.items()})
        run_of_other = self.model.run(rows, 1, others)
        of_other = run_of_other.log_prob(is_any)
        of_mixed = None
        if plate is not None and pair.part is None:  # else that run has told data apart
            both = self.latents({name: value[-1:] for name, value in values.items()})
            of_mixed = self.model.run(rows, 1, both).log_prob(is_any)
        (name, *_) = candidates(self.guide, particles)
        guide, model = self.guide.in_mode(name), self.model.in_mode(name)
        count, last = copies + 2, copies + 1
        run = guide.run(rows, count, values)
        model_run = model.run(rows, count, self.latents(values))
        log_guide, log_joint = run.log_prob(is_latent), model_run.log_prob(is_any)
        of_known = alone[1].log_prob(is_any)[:, rows]
        rest = of_other if plate is None else torch.where(odd, of_known, of_other)
        if not (
            agree(drawn.log_prob(is_latent), log_guide[:1])
            and agree(alone[0].log_prob(is_latent)[:, rows], log_guide[copies:last])
            and agree(of_other, log_joint[:1])
            and agree(of_known, log_joint[copies:last])
            and agree(rest, log_joint[last:])
            and (of_mixed is None or agree(rest, of_mixed))
        ):
            return None
        self.guide, self.model = guide, model
        return drawn, run_of_other  # by the seed alone

    def _choose_guide(self, particles: Particles) -> tuple[slice, Values]:
        """Choose the mode of the guide; return some of its draws, for some data."""
        rows, count = self.data_blocks()[0], 3 if self.pair.structure.num_data == 2 else 2
        reseed(self.pair.batch.device, self._seed, CHECKS)
        run = self.guide.run(rows, count)
        values = run.values()
        if self.pair.masked:
            self._find_masks()
        log_guide = self.log_guide(run, rows, values)

        runs: list[Run] = []

        def score(guide: Runner) -> Tensor:
            runs.append(guide.run(rows, count, values))
            return self.log_guide(runs[-1], rows, values)

        self.guide = choose_mode(self.guide, "guide", particles, log_guide, score)
        self._score_in_float64(runs[-1])
        return rows, values

    def _score_in_float64(self, guide: Run | None = None, model: Run | None = None) -> None:
        """Note the sites that float32 is too coarse for, as runs in the chosen modes show them."""
        if guide is not None:
            self.guide.double = coarse_sites(guide)
        if model is not None:
            self.model.double = coarse_sites(model)
            warn_of_coarse_parameters(self.model, model)

    def _find_masks(self) -> None:
        """Find the model's masks on latents, and whether they are others for other draws."""
        whole = slice(0, self.pair.structure.num_data)
        values = self.latents(self.guide.run(whole, 1).values())

        def traces() -> list[Trace]:
            return self.model.run(whole, 1, values).traces

        self.masks_by_draw = depend_on_draws(values, traces)
        if not self.masks_by_draw:
            masks = self.model.run(whole, 1, values).masks()
            self.guide.masks = {
                name: masks[latent] for name, latent in self.pair.masked.items() if latent in masks
            }

    def _check_summed_out(self, rows: slice, values: Values) -> None:
        """Raise ValueError where the values of a site do not run together as each alone."""
        first = {name: value[:1] for name, value in self.latents(values).items()}
        run = self.model.run(rows, 1, first)
        self._num_values = run.num_values()

        def alone(discrete: Values) -> Trace:
            chosen = {
                name: run.mode.unfold([value], self.model.shapes[name].event_ndim, 1)
                for name, value in discrete.items()
            }
            return self.model.run(rows, 1, {**first, **chosen}).traces[0]

        check_values(run.traces[0], alone, self.pair.nesting)

    def _check_independent(self, rows: slice, values: Values, reference: Tensor) -> None:
        """Raise DependentDataError where a datum's density depends on the latents of others.

        Of two particles, one is made that takes every other datum's values from the second:
        each datum must have the density that it had before.
        """
        size, plate = rows.stop - rows.start, self.pair.structure.data_plate
        if plate is None or size < 2:
            return
        odd = every_other(size, self.pair.batch.device)
        mixed = {
            name: mix(odd, value[:1], value[1:2], plate.dim - self.guide.shapes[name].event_ndim)
            for name, value in values.items()
        }
        found = self.model.run(rows, 1, mixed).log_prob(is_any)
        wanted = torch.where(odd, reference[1:2], reference[:1])
        if not agree(wanted, found):
            raise DependentDataError(plate, largest_gap(wanted, found))

    def agrees_in_training(self, modules: Sequence[nn.Module]) -> bool:
        """Return whether particles together are scored as each alone, with modules as they are.

        A module that normalizes over the batch in training mode sees other rows. True also where
        modules draw random numbers, so that two runs of one particle differ.

        Args:
            modules: all that guide and model call; their buffers stay what they are.
        """
        rows, device = self.data_blocks()[0], self.pair.batch.device
        with (
            torch.no_grad(),
            as_in_training(modules, self.pair.first),
            pyro.validation_enabled(False),
            preserved_rng(device),
            poutine.block(),
        ):
            reseed(device, self._seed, CHECKS)
            single = self.in_mode("loop")
            values = single.guide.run(rows, 2).values()
            alone, again = (single._log_densities(rows, values) for _ in range(2))
            if not all(map(self._agree, alone, again)):
                return True
            return all(map(self._agree, alone, self._log_densities(rows, values)))

    def _log_densities(self, rows: slice, values: Values) -> tuple[Tensor, Tensor]:
        """Return log p(x, z) and log q(z | x) of given values, [K, N] each."""
        return self.log_joint(rows, values), self.score_guide(rows, values)

    def _agree(self, reference: Tensor, found: Tensor) -> bool:
        """Return whether two log densities are equal to the rounding of what they are made of."""
        if self.model.double or self.guide.double:
            reference, found = reference.float(), found.float()
        return agree(reference, found)


def _count(values: Values) -> int:
    """Return K of values ``[K, ...]``."""
    return next(iter(values.values())).shape[0]


def reseed(device: torch.device, seed: int, *key: int) -> None:
    """Seed the random numbers of a stream: they depend on the base seed and the key alone."""
    low, high = np.random.SeedSequence([seed, *key]).generate_state(2, np.uint32)
    number = int(high) << 32 | int(low)
    # Not torch.manual_seed: it seeds every device, and takes a millisecond to.
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    torch.default_generator.manual_seed(number)
