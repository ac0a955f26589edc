"""Log weights of a pair in bounded memory: blocks of data, chunks of particles, seeded streams.

The guide is drawn from in blocks whose size and seed depend on the data and the
base seed alone, and the model scores the draws in chunks of any size; so a chunk
bounds memory and never changes a result.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_vae.compiler.arguments import form_of, rebuilt
from pyro_vae.compiler.recorder import Recorder
from pyro_vae.particles.blocks import BlockRunner, Chunk, worth_parts
from pyro_vae.particles.checks import refuse_edges, refuse_nan
from pyro_vae.particles.estimators import LogWeights
from pyro_vae.particles.global_latents import Given, fix_globals
from pyro_vae.particles.modes import MODES
from pyro_vae.particles.noise import NoiseAhead, OtherNoiseError
from pyro_vae.particles.pair_runner import PairRunner, draw_step, equal_step
from pyro_vae.particles.run import Run, Runner, using_rows
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.guide_kinds import on_rows
from pyro_vae.programs.handlers import Unobserve
from pyro_vae.programs.messages import as_count, as_seed, trace_of
from pyro_vae.programs.nodes import latent_nodes, sample_nodes
from pyro_vae.programs.on_demand import OnDemand
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.processes import processes
from pyro_vae.programs.purposes import Purpose, bits_of
from pyro_vae.programs.pyro_internals import is_deterministic
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.traces import outside_sites
from pyro_vae.programs.types import (
    Compile,
    DataPlate,
    GivenValues,
    Node,
    Particles,
    Program,
    Values,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Evaluator(BlockRunner):
    """A model, a guide and a batch, made ready to draw and to score.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: the batch; of one that is read on demand, the first block of rows is looked at now,
            and each other one when it is its turn.
        data_plate: as in :meth:`ModelLooks.structure`.
        particles: "plate", "repeat", "loop", or "auto" to take the first of them that
            agrees with a loop.
        seed: the base seed of the draws; None takes one from the global random state.
        gradients: whether draws and densities carry gradients.
        compile: "auto", "replay", True or False, as in :class:`pyro_vae.CompiledSVI`: how what is
            drawn and scored again and again is run. With gradients it runs eagerly.
        like: an evaluator of the same model with another guide, on these data or more of them:
            what it knows of the model is not found out again.
        looks: what runs of the model on this batch have shown, where ``like`` has another one.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        batch: Batch,
        *,
        data_plate: DataPlate = None,
        particles: Particles = "auto",
        seed: int | None = None,
        gradients: bool = False,
        compile: Compile = "auto",
        like: Evaluator | None = None,
        looks: ModelLooks | None = None,
    ) -> None:
        self._recorder = Recorder("scoring", False if gradients else compile)
        if particles not in ("auto", *MODES):
            raise ValueError(f"particles={particles!r}: one of 'auto', {tuple(MODES)} is needed")
        drawn = as_seed(seed)
        if seed is None:
            drawn = processes().by_first(lambda: drawn)
        self.gradients = gradients
        self._names: list[str] = []  # of what the guide draws
        self._ahead = NoiseAhead()
        self.outside: list[str] | None = None  # sites with draws of no density; None till then

        def pair_of(rows: Batch) -> Pair:
            pair = Pair(model, guide, rows) if like is None else like.pair.with_guide(guide, looks)
            return pair.evaluable(data_plate)

        # Modes are chosen anew for each guide: particles of one that is sure of itself are equal.
        super().__init__(pair_of, guide, batch, drawn, particles)

    @contextlib.contextmanager
    def of_part(self, rows: slice) -> Iterator[Evaluator]:
        """Yield an evaluator of some of the data alone, in memory, with the guide on these rows."""
        plate, batch = self.structure.data_plate, self.batch.rows(rows)
        model, guide = self.pair.model, self.pair.user_guide
        with on_rows(guide, torch.arange(rows.start, rows.stop)):
            yield Evaluator(
                model, guide, batch, data_plate=plate.name if plate else False, seed=self.seed
            )

    def evaluating(self) -> AbstractContextManager[None]:
        """Eval mode, no value checks at every chunk, random state kept."""
        return self.pair.evaluating(gradients=self.gradients)

    def blocks(
        self, num_particles: int, chunk_size: int | None = None
    ) -> Iterator[Iterator[Chunk]]:
        """Draw and score: yield the chunks of each block of data in turn.

        Args:
            num_particles: K, for each datum.
            chunk_size: pairs (particle, datum) scored at once; bounds memory only.
        """
        num_particles = as_count("num_particles", num_particles)
        pairs = self.chunk_pairs if chunk_size is None else as_count("chunk_size", chunk_size)
        for block, rows in enumerate(self.data_blocks()):
            self.structure_of(rows)
            size = rows.stop - rows.start
            starts = range(0, num_particles, draw_step(size))
            together = max(1, pairs // (starts.step * size))
            groups = [starts[k : k + together] for k in range(0, len(starts), together)]
            chunk = functools.partial(self._chunk, block, rows, num_particles, pairs)
            yield map(chunk, groups)

    def over_blocks(
        self,
        function: Callable[[Iterator[Chunk]], _T],
        num_particles: int,
        chunk_size: int | None = None,
    ) -> Iterator[_T]:
        """Yield what a function returns of the chunks of each block of :meth:`blocks`.

        Processes under torchrun take the blocks by turns. As each block has random numbers of its
        own, they are what one process would return.
        """

        def with_outside(chunks: Iterator[Chunk]) -> tuple[_T, list[str] | None]:
            return function(chunks), self.outside

        blocks = self.blocks(num_particles, chunk_size)
        for result, outside in processes().by_turns(with_outside, blocks):
            self.outside = self.outside or outside
            yield result

    def chunks(self, num_particles: int, chunk_size: int | None = None) -> Iterator[Chunk]:
        """Yield the chunks of all :meth:`blocks`."""
        return itertools.chain.from_iterable(self.blocks(num_particles, chunk_size))

    def _chunk(
        self, block: int, rows: slice, num_particles: int, pairs: int, starts: range
    ) -> Chunk:
        """Return the chunk of the draws that begin with these particles."""
        step, total = starts.step, len(range(0, num_particles, starts.step))
        last = num_particles // step  # the next one, if any, has fewer particles
        drawn = [
            self.draw(
                rows,
                min(step, num_particles - k),
                (Purpose.DRAWS, block, k // step),
                total,
                [(Purpose.DRAWS, block, i) for i in range(k // step, last)],
            )
            for k in starts
        ]
        if len(drawn) == 1:
            values, log_guide = drawn[0]
        else:
            values = {name: torch.cat([v[name] for v, _ in drawn]) for name in drawn[0][0]}
            log_guide = torch.cat([term for _, term in drawn])
        del drawn  # which values are a copy of
        refuse_edges(self.structure, self.guide.shapes, rows, values)
        expected = num_particles * self.num_data
        weights = LogWeights(*self.score_model(rows, values, pairs, expected), log_guide)
        refuse_nan(rows, weights)
        if self.outside is None and bool((weights.log_joint == -math.inf).any()):
            with self.evaluating():
                self.outside = outside_sites(self.run_model(rows, values).sites())
        particles = slice(starts.start, starts.start + weights.num_particles)
        return Chunk(rows, particles, values, weights)

    def warn_of_outside(self, what: str, infinite: Tensor) -> None:
        """Log why ELBOs are -inf, of a result of this name and for these data."""
        if self.outside and bool(infinite.any()) and processes().is_first:
            logger.warning(
                f"{what} is -inf for {int(infinite.sum())} of {infinite.numel()} data: the guide "
                f"proposes values of {', '.join(self.outside)} where the model's density is zero. "
                "Propose on the support of its distribution alone, as the guides of pyro_vae do; "
                "iwae_bound takes proposals that are wider"
            )

    def draw(
        self,
        rows: slice,
        num_particles: int,
        key: tuple[int, ...],
        calls: int = 1,
        coming: Sequence[tuple[int, ...]] = (),
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draw from the guide: values, and their log density [K, N].

        The random numbers depend on the base seed and ``key`` alone.

        Args:
            rows: of which data.
            num_particles: K.
            key: tells the random numbers from others.
            calls: how many such calls are to be expected.
            coming: the keys of this call and of later ones of its kind, if there are any: their
                random numbers are made on several threads, and are the same.
        """
        names: list[str] = []
        kind = (rows.stop - rows.start, num_particles)

        def drawn(runner: PairRunner, rows: slice, noise: Values) -> list[Tensor]:
            with self._ahead.around(kind, noise):
                run = runner.guide.run(rows, num_particles)
            values = run.values()
            names[:] = values
            return [*values.values(), runner.log_guide(run, rows, values)]

        with self.evaluating():
            self._reseed(*key)
            if self.masks_by_draw:  # eagerly, for a graph has no place for a check
                *values, log_guide = drawn(self, rows, {})
            else:
                noise = self._ahead.take(kind, (bits_of(self.seed, *k) for k in coming))
                call = functools.partial(self._recorded, self.guide, drawn, rows)
                try:
                    *values, log_guide = call(noise, num_particles, calls)
                except OtherNoiseError:
                    self._ahead.refuse(kind)
                    self._reseed(*key)
                    *values, log_guide = call({}, num_particles, calls)
        self._names = names or self._names  # a graph does not give them
        # What a guide gives as it is, such as the parameter of a point, requires gradients still.
        constants = (value.detach() for value in values)
        return dict(zip(self._names, constants, strict=True)), log_guide

    def draw_from(self, rows: slice, given: Values) -> tuple[dict[str, Tensor], Tensor]:
        """Return draws of the guide given the values of some of its sites, as :meth:`draw` does.

        Args:
            rows: of which data.
            given: values as a single run shapes them, ``[K, *batch, *event]``.
        """
        with self.evaluating():
            given = self.from_single(given)
            run = self.guide.run(rows, next(iter(given.values())).shape[0], given)
            values = run.values()
            return values, self.log_guide(run, rows, values)

    def score_guide(self, rows: slice, values: Values) -> Tensor:
        """Return log q(z | x) of given values under the guide, [K, N]."""
        with self.evaluating():
            return self.guide_given(rows, values)

    def score_model(
        self, rows: slice, values: Values, pairs: int | None = None, expected: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return log p(x | z) and log p(z) of given values, [K, N] each.

        Args:
            rows: of which data.
            values: as :meth:`draw` returns them.
            pairs: (particle, datum) scored at once.
            expected: pairs to be scored in all, if more than these.
        """
        size = rows.stop - rows.start
        pairs = self.chunk_pairs if pairs is None else pairs
        num_particles = next(iter(values.values())).shape[0]
        step = equal_step(num_particles, max(1, pairs // size))
        data_step = pairs if pairs < size and self.splittable else size
        calls = max(expected, num_particles * size) // (step * min(size, data_step))

        def scored(k: int, n: int) -> Sequence[Tensor]:
            some = {name: value[k : k + step] for name, value in values.items()}
            part = slice(rows.start + n, min(rows.start + n + data_step, rows.stop))
            given = self.take_data(some, slice(n, n + data_step), size)
            count = min(step, num_particles - k)
            return self._recorded(self.model, PairRunner.model_given, part, given, count, calls)

        by_particle = []
        with self.evaluating():
            for k in range(0, num_particles, step):
                by_data = [scored(k, n) for n in range(0, size, data_step)]
                by_particle.append([torch.cat(terms, 1) for terms in zip(*by_data, strict=True)])
        log_likelihood, log_prior = (torch.cat(terms) for terms in zip(*by_particle, strict=True))
        return log_likelihood, log_prior

    def given(self, runner: Runner | None = None, rows: slice | None = None) -> tuple[Any, ...]:
        """Return the tensors that a runner's densities of rows depend on, for :meth:`on`.

        By default those of the guide, with what the model does to it, and all rows.
        """
        rows = slice(0, self.num_data) if rows is None else rows
        runner = runner or self.guide
        batch, index = runner.block(rows)
        return batch.args, dict(batch.kwargs), runner.masks_of(rows), index

    @contextlib.contextmanager
    def on(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], masks: Values, index: Tensor | None
    ) -> Iterator[Evaluator]:
        """Yield this evaluator on other tensors of the same kind, as :meth:`given` returns them."""
        block, batch = copy.copy(self), Batch(args, kwargs)
        block.model = replace(self.model, batch=batch, masks={})
        block.guide = replace(self.guide, batch=batch, masks=masks if self.guide.masks else {})
        with using_rows(self.guide.program, index):
            yield block

    def _recorded(
        self,
        runner: Runner,
        function: Callable[[PairRunner, slice, Values], Sequence[Tensor]],
        rows: slice,
        values: Values,
        num_particles: int,
        calls: int,
    ) -> Sequence[Tensor]:
        """Return what a function that uses ``runner`` returns, by its graph where it has one."""
        given = (*self.given(runner, rows), dict(values))
        inputs: list[Tensor] = []
        form = form_of(given, inputs)
        if form is None or runner.mode.num_runs(num_particles) > 1:
            return function(self, rows, values)

        def on_tensors(*tensors: Tensor) -> Sequence[Tensor]:
            *block, values = rebuilt(given, iter(tensors))
            with self.on(*block) as evaluator:
                return function(evaluator, slice(0, rows.stop - rows.start), values)

        key = (runner is self.model, num_particles, form)
        return self._recorder(key, on_tensors, inputs, calls)

    def guide_runs(self, count: int) -> list[dict[str, Node]]:
        """Return the guide's latent nodes in independent runs on the rows that were looked at."""
        runs = []
        with self.evaluating(), self.pair.its_rows():
            for run in range(count):
                self._reseed(Purpose.RUNS, run)
                runs.append(dict(latent_nodes(trace_of(self.guide.program, self.pair.batch))))
        return runs

    def predict(
        self,
        rows: slice,
        num_particles: int,
        values: Values | None,
        key: tuple[int, ...],
        *,
        observed: bool = True,
    ) -> dict[str, Tensor]:
        """Draw every site of the model that ``values`` does not give, observed ones too.

        Args:
            rows: of which data.
            num_particles: K.
            values: as :meth:`draw` returns them.
            key: tells the random numbers from others.
            observed: whether to draw observed sites; else they keep their values.

        Returns:
            Site name to draws, as :meth:`by_datum` shapes them.
        """
        drawn = self.predictive_run(rows, num_particles, values, key, observed=observed).values()
        return self.by_datum({n: v for n, v in drawn.items() if n in self.structure.sites})

    def predictive_run(
        self,
        rows: slice,
        num_particles: int,
        values: Values | None,
        key: tuple[int, ...],
        *,
        observed: bool = True,
    ) -> Run:
        """Return the run of the model that :meth:`predict` takes its draws from."""
        runner = self.unobserved() if observed else self
        model = replace(runner.model, summed_out=())
        with self.evaluating():
            self._reseed(*key)
            return model.run(rows, num_particles, values and self.latents(values))

    def unobserved(self) -> Evaluator:
        """Return this evaluator, whose model observes nothing: sites are drawn, or given."""
        other = copy.copy(self)
        other.model = replace(self.model, program=Unobserve()(self.model.program), summed_out=())
        return other

    def draw_prior(self, rows: slice, num_particles: int, key: tuple[int, ...]) -> Values:
        """Return draws of what :meth:`score_model` calls log p(z), as :meth:`draw` does.

        Observed sites keep their values, which later latents may depend on.
        """
        return self.prior_run(rows, num_particles, key).values()

    def prior_run(self, rows: slice, num_particles: int, key: tuple[int, ...]) -> Run:
        """Return the run of the model that :meth:`draw_prior` takes its draws from."""
        with self.evaluating():
            self._reseed(*key)
            return replace(self.model, summed_out=()).run(rows, num_particles)

    def deterministic_nodes(
        self, rows: slice, values: Values, *, alone: bool
    ) -> dict[str, list[Node]]:
        """Return the model's pyro.deterministic sites given latents: a node for each run.

        Particles run one by one (``alone``), or else as the model's densities do.
        """
        runner = self.in_mode("loop") if alone else self
        found: dict[str, list[Node]] = {}
        with self.evaluating(), torch.no_grad():
            for trace in runner.run_model(rows, values).traces:
                for name, node in sample_nodes(trace):
                    if is_deterministic(node):
                        found.setdefault(name, []).append(node)
        return found

    def site_log_prob(self, rows: slice, values: Values) -> dict[str, Tensor]:
        """Return the log density of each site of the model, [K, N]; ``[K, *batch]`` for one datum.

        Values are those of all latents, discrete ones that are summed out among them.
        """
        with self.evaluating():
            run = self.run_model(rows, values)
            of_site = run.pointwise if self.structure.data_dim is None else run.term
            return {name: of_site(name) for name in self.structure.sites}

    def draw_summed_out(
        self, rows: slice, values: Values, key: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Draw what is summed out from its exact posterior given x and the values."""
        if not self.pair.summed_out:
            return {}
        with self.evaluating():
            self._reseed(*key)
            return self.run_model(rows, values).draw_summed_out()

    def without_graphs(self) -> Evaluator:
        """Return this evaluator without what it recorded, to be kept for long and used seldom."""
        other = copy.copy(self)
        other._recorder = Recorder("scoring", False)
        return other

    def without_gradients(self) -> Evaluator:
        """Return this evaluator for draws and densities that carry no gradients."""
        other = copy.copy(self)
        other.gradients = False
        return other


def prepare(
    model: Program,
    guide: Program,
    batch: tuple[Any, ...],
    given: GivenValues | None,
    data_plate: DataPlate,
    seed: int | None,
    particles: Particles = "auto",
    compile: Compile = "auto",
) -> tuple[Evaluator, Given]:
    """Return an evaluator of a pair on a batch, and the values that global latents are fixed at.

    The arguments are those of :func:`pyro_vae.log_weights`. Of a batch on demand some rows are read
    at a time, but where all is one datum, or one block.
    """
    data = batch[0] if len(batch) == 1 and isinstance(batch[0], OnDemand) else as_batch(*batch)
    data = worth_parts(data, data_plate)
    model, guides, fixed = fix_globals(model, {"guide": guide}, data, data_plate, given)
    held = guides["guide"]
    evaluator = Evaluator(
        model, held, data, data_plate=data_plate, particles=particles, seed=seed, compile=compile
    )
    return evaluator, fixed
