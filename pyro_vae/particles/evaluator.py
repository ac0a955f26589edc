"""The only runner of guide and replayed model for scoring: draws, chunks, refusals.

The guide is drawn from in blocks whose size and seed depend on the data and the
base seed alone, and the model scores the draws in chunks of any size; so a chunk
bounds memory and never changes a result.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.compiler.arguments import form_of, rebuilt
from pyro_vae.compiler.recorder import Recorder
from pyro_vae.particles.checks import check_per_datum, points
from pyro_vae.particles.independence_check import DependentDataError
from pyro_vae.particles.log_weights import LogWeights
from pyro_vae.particles.modes import (
    MODES,
    Runner,
    choose_mode,
    is_any,
    is_latent,
    is_observed,
)
from pyro_vae.programs.absence_check import check_absent
from pyro_vae.programs.agreement import agree, largest_gap
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.counts import as_count
from pyro_vae.programs.enumeration import summed_out, with_placeholder
from pyro_vae.programs.handlers import unobserve
from pyro_vae.programs.looks import check_stable
from pyro_vae.programs.masks import check_proposal_mask, depend_on_draws, masked_proposals
from pyro_vae.programs.nodes import (
    batch_nesting,
    drawn_subsamples,
    guide_factors,
    latent_nodes,
    sample_nodes,
)
from pyro_vae.programs.plain_errors import trace_of
from pyro_vae.programs.precision import rounding_of_parameters
from pyro_vae.programs.site_shapes import SiteShape, site_shapes
from pyro_vae.programs.state import (
    FirstValues,
    Look,
    as_in_training,
    evaluation,
    preserved_rng,
    unwrapped,
)
from pyro_vae.programs.structure import inspect
from pyro_vae.programs.supports import edge_share, lost_share
from pyro_vae.programs.traces import is_point, outside_sites, trace_pair
from pyro_vae.programs.warned_once import warn_once

__all__ = ["Chunk", "DeterministicNode", "Scorer"]

logger = logging.getLogger(__name__)

# Pairs (particle, datum) drawn at once, and data in a block. They decide which
# random numbers a datum gets, so they are constants and not options.
_DRAW_PAIRS = 16384
_DRAW_DATA = 256
# Pairs, and observed numbers, scored at once by default. Larger tensors than these
# leave the processor's cache, and go back to the system after each use.
_CHUNK_PAIRS = 8192
_CHUNK_ELEMENTS = 2**22
# Draws at the edge of a support that may be averaged over: their log weights are off by some nats.
_EDGE_SHARE = 1e-3
# Nats of a datum that float32 parameters of a likelihood may cost before a warning.
_COARSE = 1e-2
# First in the key of every random stream: what it is for.
_DRAWS, _CHECKS, _RUNS = 0, 1, 2


@dataclass(frozen=True)
class Chunk:
    """Draws of some particles for some data, and their log weights.

    Attributes:
        rows: which data.
        particles: which particles.
        values: latent site (the guide's auxiliary ones too) to ``[K, *plates, *event]``.
        weights: the LogWeights, [K, N] of this chunk.
    """

    rows: slice
    particles: slice
    values: Mapping[str, Tensor]
    weights: LogWeights


@dataclass(frozen=True)
class DeterministicNode:
    """A pyro.deterministic site, as one run saw it.

    Attributes:
        value: its value.
        plates: the vectorized plates around it, as Pyro knows them.
        event_ndim: the event dimensions that the model says it has; None where it says none.
    """

    value: Tensor
    plates: tuple[Any, ...]
    event_ndim: int | None


class Scorer:
    """A model, a guide and a batch, made ready to draw and to score.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: the batch.
        data_plate: as in :func:`pyro_vae.programs.structure.inspect`.
        particles: "plate", "repeat", "loop", or "auto" to take the first of them that
            agrees with a loop.
        seed: the base seed of the draws; None takes one from the global random state.
        gradients: whether draws and densities carry gradients.
        compile: "auto", "replay", True or False, as in :class:`pyro_vae.CompiledSVI`: how what is
            drawn and scored again and again is run. With gradients it runs eagerly.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        batch: Batch,
        *,
        data_plate: str | bool | None = None,
        particles: str = "auto",
        seed: int | None = None,
        gradients: bool = False,
        compile: str | bool = "auto",
    ) -> None:
        self._recorder = Recorder("scoring", False if gradients else compile)
        if particles not in ("auto", *MODES):
            raise ValueError(f"particles={particles!r}: one of 'auto', {MODES} is needed")
        self.batch = batch
        self.seed = (
            int(torch.randint(2**62, ()).item()) if seed is None else as_count("seed", seed, 0)
        )
        self.gradients = gradients
        self._names: list[str] = []  # of what the guide draws
        self.outside: list[str] = []  # sites with draws of no density, once they were seen
        self._looked_outside = False
        self._modules = (model, guide)
        self._first = FirstValues()  # the same ones for all that is scored
        with evaluation(*self._modules, first=self._first), preserved_rng(batch.device):
            self.structure = inspect(
                model, batch, data_plate=data_plate, strict=True, latents_needed=False
            )
            if check := getattr(unwrapped(guide), "check_data", None):
                check(batch)
            self.structure.require_no_globals()
            check_stable(model, batch, self.structure)
            plate = self.structure.data_plate
            if plate is not None and plate.drawn:
                raise ValueError(
                    f"the model draws its own minibatch in plate {plate.name!r} "
                    "(subsample_size=...); a result for each datum needs to know which. Pass the "
                    "minibatch as the batch, with pyro.plate(name, num_data, subsample=x)"
                )
            with torch.no_grad(), poutine.block():
                with drawn_subsamples() as drawn:
                    model_trace, guide_trace = trace_pair(model, guide, batch.args, batch.kwargs)
                if drawn:
                    plates = (p for site in self.structure.sites.values() for p in site.plates)
                    whose = "model" if any(p.drawn for p in plates) else "guide"
                    raise ValueError(
                        f"the {whose} draws its own minibatch in plate {sorted(drawn)[0]!r} "
                        "(subsample_size=...); a result for each datum needs to know which. Pass "
                        "the minibatch as the batch, and give the plate no subsample_size"
                    )
                # On random numbers of its own: not outside of this context.
                self.point_sites = points(guide, batch, guide_trace)
                name = plate.name if plate else None
                self.summed_out = summed_out(model_trace, guide_trace, data_plate=name)
                if not list(latent_nodes(guide_trace)):
                    guide = with_placeholder(guide, plate)
                    model_trace, guide_trace = trace_pair(model, guide, batch.args, batch.kwargs)
                check_absent(model, model_trace, batch.args, batch.kwargs)
        if factors := guide_factors(guide_trace):
            raise ValueError(
                f"the guide has pyro.factor statements {factors}, which are no part of a density "
                f"q(z | x); pass pyro.poutine.block(guide, hide={factors}) if they serve training "
                "alone, else put them in the distribution that the guide samples from"
            )
        check_per_datum(self.structure, model_trace, guide_trace)
        self.nesting = batch_nesting(model_trace, guide_trace)
        self._guide_sites = frozenset(name for name, _ in latent_nodes(guide_trace))
        self._scorable = all(
            not node["infer"].get("is_auxiliary") and not is_point(node["fn"])
            for _, node in latent_nodes(guide_trace)
        )
        shapes = site_shapes(model_trace, guide_trace)
        for site in self.structure.observed:  # a plate without a size does not expand them
            shapes[site.name] = SiteShape(len(site.batch_shape), len(site.event_shape))
        data_dim = self.structure.data_dim
        # Sites of the guide, with the latent whose mask each has.
        self._masked = masked_proposals(model_trace, guide_trace)
        self._mask_by_draw = False
        self._guide = Runner(guide, batch, shapes, self.nesting, data_dim)
        self._model = Runner(model, batch, shapes, self.nesting, data_dim, summed=self.summed_out)
        with self._scoring(), torch.no_grad():
            self._choose_modes(particles)

    @property
    def num_data(self) -> int:
        """N: data in the batch, or 1 where it is treated as one datum."""
        return self.structure.num_data

    @property
    def modes(self) -> dict[str, str]:
        """How particles are run, for guide and model: "plate", "repeat" or "loop"."""
        return {"guide": self._guide.mode, "model": self._model.mode}

    @property
    def chunk_pairs(self) -> int:
        """Pairs (particle, datum) that the model scores at once by default."""
        observed = sum(site.value.numel() for site in self.structure.observed)
        elements = max(1, observed) * self._model.num_values
        return max(1, min(_CHUNK_PAIRS, _CHUNK_ELEMENTS * self.num_data // elements))

    def chunks(self, num_particles: int, chunk_size: int | None = None) -> Iterator[Chunk]:
        """Draw and score, block of data by block of data, particles inside.

        Args:
            num_particles: K, for each datum.
            chunk_size: pairs (particle, datum) scored at once; bounds memory only.
        """
        num_particles = as_count("num_particles", num_particles)
        pairs = self.chunk_pairs if chunk_size is None else as_count("chunk_size", chunk_size)
        for block, rows in enumerate(self.data_blocks()):
            size = rows.stop - rows.start
            step = _round_down(max(1, _DRAW_PAIRS // size))
            starts = list(range(0, num_particles, step))
            together = max(1, pairs // (step * size))
            for group in range(0, len(starts), together):
                blocks = starts[group : group + together]
                drawn = [
                    self.draw(
                        rows, min(step, num_particles - k), (_DRAWS, block, k // step), len(starts)
                    )
                    for k in blocks
                ]
                values, log_guide = drawn[0]
                if len(drawn) > 1:
                    values = {name: torch.cat([v[name] for v, _ in drawn]) for name in values}
                    log_guide = torch.cat([log_guide for _, log_guide in drawn])
                self._refuse_edges(rows, values)
                log_likelihood, log_prior = self.score_model(
                    rows, values, pairs, num_particles * self.num_data
                )
                weights = LogWeights(log_likelihood, log_prior, log_guide)
                self._refuse_nan(rows, weights)
                self._note_outside(rows, values, weights)
                start = blocks[0]
                yield Chunk(
                    rows=rows,
                    particles=slice(start, start + weights.num_particles),
                    values=values,
                    weights=weights,
                )

    def _refuse_edges(self, rows: slice, values: Mapping[str, Tensor]) -> None:
        """Raise ValueError for draws that round to an edge, where log densities are made up."""
        shapes = self._guide.shapes
        kept = {shapes[name].preimage_of for name in values if name in shapes}
        for name, value in values.items():
            site = self.structure.sites.get(name)
            if site is None or name in kept:
                continue
            dim = self.structure.data_dim
            axis = None if dim is None else dim - len(site.event_shape)
            share = edge_share(site.fn, value, rows, axis)
            holder = f"{name}_unconstrained"  # where Pyro's AutoNormal keeps what it drew
            if holder in values:
                share = max(share, lost_share(site.fn, value, values[holder]))
            if share > _EDGE_SHARE:
                raise ValueError(
                    f"{share:.2g} of the guide's draws of latent site {name!r} lie at the edge of "
                    f"what {value.dtype} can hold of its support ({site.support_text}), "
                    "where neither density is to be trusted. Use float64, a prior that is less "
                    "sparse, or a guide of pyro_vae, whose draws are scored before they round"
                )

    def _note_outside(self, rows: slice, values: Mapping[str, Tensor], weights: LogWeights) -> None:
        """Keep the names of sites whose values have no density under the model."""
        if self._looked_outside or not bool((weights.log_joint == -math.inf).any()):
            return
        self._looked_outside = True
        num_particles = next(iter(values.values())).shape[0]
        with self._scoring():
            traces = self._model.traces(rows, num_particles, self._latents(values))
            nodes = ((n, [t.nodes[n] for t in traces]) for n, _ in sample_nodes(traces[0]))
            self.outside = outside_sites(nodes)

    def warn_of_outside(self, what: str, infinite: Tensor) -> None:
        """Log why ELBOs are -inf.

        Args:
            what: the name of the result.
            infinite: which data have such an ELBO.
        """
        if self.outside and bool(infinite.any()):
            logger.warning(
                "%s is -inf for %d of %d data: the guide proposes values of %s where the model's "
                "density is zero. Propose on the support of its distribution alone, as the guides "
                "of pyro_vae do; iwae_bound takes proposals that are wider",
                what,
                int(infinite.sum()),
                infinite.numel(),
                ", ".join(self.outside),
            )

    def _refuse_nan(self, rows: slice, weights: LogWeights) -> None:
        """Raise ValueError for weights that are NaN or +inf; -inf is a density of zero."""
        bad = (weights.total.isnan() | (weights.total == math.inf)).any(0)
        if not bool(bad.any()):
            return
        parts = {
            "log p(x | z)": weights.log_likelihood,
            "log p(z)": weights.log_prior,
            "log q(z | x)": weights.log_guide,
        }
        told = [name for name, part in parts.items() if not bool(torch.isfinite(part).all())]
        index = torch.nonzero(bad).flatten()[:5] + rows.start
        raise ValueError(
            f"the log weights of data {index.tolist()} ({int(bad.sum())} of {bad.shape[0]} in the "
            f"block) are NaN or infinite, through {', '.join(told)}: a draw is at the edge of a "
            "support, or overflows. Try float64, or bound the scale there"
        )

    def data_blocks(self) -> list[slice]:
        """The data in blocks of rows; all at once where a model cannot be given fewer."""
        return self.blocks_of(self.num_data)

    def blocks_of(self, count: int) -> list[slice]:
        """Some of the data in blocks, equal ones, so that they share a graph."""
        if count <= _DRAW_DATA or not self.splittable:
            return [slice(0, count)]
        size = _equal_step(count, _DRAW_DATA)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    @functools.cached_property
    def splittable(self) -> bool:
        """Whether guide and model, given some of the rows, say of them what they say of all.

        Not so where a plate has a fixed size, or a function closes over data of its own.
        """
        if self.structure.data_plate is None or self.batch.size is None or self.num_data < 2:
            return False
        whole, half = slice(0, self.num_data), slice(self.num_data // 2, self.num_data)
        with torch.no_grad():
            values, log_guide = self.draw(whole, 2, (_CHECKS, 1))
            with self._scoring():
                log_joint = torch.stack(self._score(whole, values)).sum(0)
                some = self.take_data(values, half, self.num_data)
                with Look():
                    found = self.score_guide(half, some)
                    found_joint = torch.stack(self._score(half, some)).sum(0)
                    same = self._agree(log_guide[:, half], found)
                    return same and self._agree(log_joint[:, half], found_joint)
        return False  # it takes batches of this one size

    def guide_runs(self, count: int) -> list[dict[str, Any]]:
        """Return the guide's latent nodes in independent runs on the whole batch."""
        runs = []
        with self._scoring():
            for run in range(count):
                self._reseed(_RUNS, run)
                batch = self.batch
                trace = trace_of(self._guide.fn, batch.args, batch.kwargs)
                runs.append(dict(latent_nodes(trace)))
        return runs

    def draw(
        self, rows: slice, num_particles: int, key: tuple[int, ...], calls: int = 1
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draw from the guide: values, and their log density [K, N].

        The random numbers depend on the base seed and ``key`` alone.

        Args:
            rows: of which data.
            num_particles: K.
            key: tells the random numbers from others.
            calls: how many such calls are to be expected.
        """
        names: list[str] = []

        def drawn(block: Scorer, rows: slice, _: Mapping[str, Tensor]) -> list[Tensor]:
            traces = block._guide.traces(rows, num_particles)
            values = block._guide.values(traces, num_particles)
            names[:] = values
            log_guide = block._log_guide(traces, rows, values)
            return [*values.values(), log_guide]

        with self._scoring():
            self._reseed(*key)
            if self._mask_by_draw:  # eagerly, for a graph has no place for a check
                *values, log_guide = drawn(self, rows, {})
            else:
                *values, log_guide = self._recorded(
                    self._guide, drawn, rows, {}, num_particles, calls
                )
        names = names or self._names
        self._names = names
        return dict(zip(names, values, strict=True)), log_guide

    def score_guide(self, rows: slice, values: Mapping[str, Tensor]) -> Tensor:
        """Return log q(z | x) of given values under the guide, [K, N]."""
        num_particles = next(iter(values.values())).shape[0]
        with self._scoring():
            traces = self._guide.traces(rows, num_particles, values)
            return self._log_guide(traces, rows, values)

    def _log_guide(self, traces: list[Any], rows: slice, values: Mapping[str, Tensor]) -> Tensor:
        """Return log q of draws, [K, N], masked as the model masks its latents given them."""
        num_particles = next(iter(values.values())).shape[0]
        masks = self._masks_by_draw(traces, rows, values) if self._mask_by_draw else None
        return self._guide.log_prob(traces, rows, num_particles, is_latent, masks)

    def _masks_by_draw(
        self, guide_traces: list[Any], rows: slice, values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the model's masks on the guide's sites, ``[K, *plates]``, for these draws.

        Raises:
            ValueError: where the guide masks what the model does not.
        """
        latents = self._latents(values)
        num_particles = next(iter(values.values())).shape[0]
        step = max(1, self.chunk_pairs // (rows.stop - rows.start))
        pieces = []
        with torch.no_grad():
            for k in range(0, num_particles, step):
                some = {name: value[k : k + step] for name, value in latents.items()}
                count = min(step, num_particles - k)
                found = self._model.latent_masks(self._model.traces(rows, count, some), count)
                pieces.append({n: m.expand(count, *m.shape[1:]) for n, m in found.items()})
            own = self._guide.latent_masks(guide_traces, num_particles)
        theirs = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        for name, mask in own.items():
            if name in latents:
                check_proposal_mask(name, mask, theirs.get(name))
        return {name: theirs[latent] for name, latent in self._masked.items() if latent in theirs}

    def by_datum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values as ``[K, N, *inner plates, *event]``.

        For one datum as ``[K, *batch, *event]``.
        """
        single = self.single_values(values)
        dim = self.structure.data_dim
        if dim is None:
            return single
        shapes = self._guide.shapes
        return {
            name: value.movedim(value.ndim - shapes[name].event_ndim + dim, 1)
            for name, value in single.items()
        }

    def predict(
        self,
        rows: slice,
        num_particles: int,
        values: Mapping[str, Tensor] | None,
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
        model = self._model
        fn = unobserve(model.fn) if observed else model.fn
        runner = Runner(fn, self.batch, model.shapes, self.nesting, model.data_dim)
        runner.mode = model.mode
        with self._scoring():
            self._reseed(*key)
            traces = runner.traces(
                rows, num_particles, None if values is None else self._latents(values)
            )
            drawn = runner.values(traces, num_particles)
        return self.by_datum({n: v for n, v in drawn.items() if n in self.structure.sites})

    def deterministic_nodes(
        self, rows: slice, values: Mapping[str, Tensor], *, alone: bool
    ) -> dict[str, list[DeterministicNode]]:
        """Return the model's pyro.deterministic sites given latents: a node for each run.

        Args:
            rows: of which data.
            values: as :meth:`draw` returns them.
            alone: whether particles run one by one; else as the model's densities do.
        """
        runner = copy.copy(self._model)
        runner.mode = "loop" if alone else runner.mode
        num_particles = next(iter(values.values())).shape[0]
        found: dict[str, list[DeterministicNode]] = {}
        with self._scoring(), torch.no_grad():
            for trace in runner.traces(rows, num_particles, self._latents(values)):
                for name, node in sample_nodes(trace):
                    if node["infer"].get("_deterministic"):
                        plates = tuple(f for f in node["cond_indep_stack"] if f.vectorized)
                        value, events = node["value"], node["fn"].event_dim
                        said = events if events < value.ndim else None
                        found.setdefault(name, []).append(DeterministicNode(value, plates, said))
        return found

    def single_values(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values as a single run shapes them, particles first: ``[K, *batch, *event]``."""
        shapes = self._guide.shapes
        return {
            name: value.reshape(
                value.shape[:1] + value.shape[1 + self.nesting - shapes[name].batch_ndim :]
            )
            for name, value in values.items()
        }

    def from_single(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo :meth:`single_values`.

        To ``[K, *plates, *event]`` from ``[K, *batch, *event]``.
        """
        shapes = self._guide.shapes
        return {
            name: value.reshape(
                value.shape[:1] + (1,) * (self.nesting - shapes[name].batch_ndim) + value.shape[1:]
            )
            for name, value in values.items()
        }

    def share_preimages(self, other: Scorer) -> None:
        """Take up the preimages of another guide's draws, to score these by."""
        theirs = {n: s for n, s in other._guide.shapes.items() if s.preimage_of is not None}
        self._guide.shapes = self._model.shapes = {**theirs, **self._guide.shapes}

    def can_score(self, other: Scorer) -> bool:
        """Whether this guide's density of the other guide's draws is known."""
        return (
            self._scorable
            and self.nesting == other.nesting
            and self._guide_sites == other._guide_sites
        )

    def score_model(
        self,
        rows: slice,
        values: Mapping[str, Tensor],
        pairs: int | None = None,
        expected: int = 0,
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
        particle_step = _equal_step(num_particles, max(1, pairs // size))
        data_step = pairs if pairs < size and self.splittable else size
        by_particle = []
        starts = range(0, num_particles, particle_step)
        calls = max(expected, num_particles * size) // (particle_step * min(size, data_step))
        with self._scoring():
            for k in starts:
                some = {name: value[k : k + particle_step] for name, value in values.items()}
                by_data = [
                    self._recorded(
                        self._model,
                        Scorer._score,
                        slice(rows.start + n, min(rows.start + n + data_step, rows.stop)),
                        self.take_data(some, slice(n, n + data_step), size),
                        min(particle_step, num_particles - k),
                        calls,
                    )
                    for n in range(0, size, data_step)
                ]
                by_particle.append([torch.cat(terms, 1) for terms in zip(*by_data, strict=True)])
        log_likelihood, log_prior = (torch.cat(terms) for terms in zip(*by_particle, strict=True))
        return log_likelihood, log_prior

    def site_log_likelihood(self, rows: slice, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return log p(x | z) of each observed site, [K, N]; ``[K, *batch]`` for one datum."""
        num_particles = next(iter(values.values())).shape[0]
        one_datum = self.structure.data_dim is None
        with self._scoring():
            traces = self._model.traces(rows, num_particles, self._latents(values))
            return {
                site.name: self._model.pointwise_log_prob(traces, site.name)
                if one_datum
                else self._model.site_log_prob(traces, rows, site.name, num_particles)
                for site in self.structure.observed
            }

    def _recorded(
        self,
        runner: Runner,
        function: Callable[[Scorer, slice, Mapping[str, Tensor]], Sequence[Tensor]],
        rows: slice,
        values: Mapping[str, Tensor],
        num_particles: int,
        calls: int,
    ) -> Sequence[Any]:
        """Return what a function of some data and values returns, by its graph where it has one.

        Args:
            runner: of what the function runs.
            function: of a scorer, of rows of its batch, and of values.
            rows: of which data.
            values: by latent site.
            num_particles: K.
            calls: how many such calls are to be expected.
        """
        given = (*self.given(runner, rows), dict(values))
        inputs: list[Tensor] = []
        form = form_of(given, inputs)
        if form is None or (runner.mode == "loop" and num_particles > 1):
            return function(self, rows, values)

        def on_tensors(*tensors: Tensor) -> Sequence[Tensor]:
            *block, values = rebuilt(given, iter(tensors))
            with self.on(*block) as scorer:
                return function(scorer, slice(0, rows.stop - rows.start), values)

        key = (runner is self._model, num_particles, form)
        return self._recorder(key, on_tensors, inputs, calls)

    def given(self, runner: Runner | None = None, rows: slice | None = None) -> tuple[Any, ...]:
        """Return the tensors that what is scored depends on, in some structure, for :meth:`on`.

        Args:
            runner: of what is to be run; that of the guide, with what the model does to it.
            rows: of which data; by default all.
        """
        rows = slice(0, self.num_data) if rows is None else rows
        batch, masks, index = (self._guide if runner is None else runner).block(rows)
        return batch.args, dict(batch.kwargs), masks, index

    @contextlib.contextmanager
    def on(self, args: Any, kwargs: Any, masks: Any, index: Any) -> Iterator[Scorer]:
        """Yield this scorer on other tensors of the same kind, as :meth:`given` returns them."""
        block, guide = copy.copy(self), unwrapped(self._guide.fn)
        block.batch = Batch(args, kwargs)
        block._model = self._model.on(block.batch, {})
        block._guide = self._guide.on(block.batch, self._guide.masks and masks)
        with guide.rows_as_given(index) if index is not None else contextlib.nullcontext():
            yield block

    def _score(self, rows: slice, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        num_particles = next(iter(values.values())).shape[0]
        traces = self._model.traces(rows, num_particles, self._latents(values))
        if not any(site.kind != "observed" for site in self.structure.sites.values()):
            log_likelihood = self._model.log_prob(traces, rows, num_particles, is_observed)
            return log_likelihood, torch.zeros_like(log_likelihood)
        log_prior = self._model.log_prob(traces, rows, num_particles, is_latent)
        if not self.summed_out:
            log_likelihood = self._model.log_prob(traces, rows, num_particles, is_observed)
            # Where there is no z, what x would be given it is no number, and matters to nothing.
            return log_likelihood.masked_fill(log_prior == -math.inf, 0.0), log_prior
        # The discrete sites tie likelihood and prior: p(x | z) = p(x, z) / p(z).
        log_joint = self._model.log_prob(traces, rows, num_particles, is_any)
        never = log_prior == -math.inf
        return log_joint.masked_fill(never, 0.0) - log_prior.masked_fill(never, 0.0), log_prior

    def draw_summed_out(
        self, rows: slice, values: Mapping[str, Tensor], key: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Draw what is summed out from its exact posterior given x and the values.

        Returns:
            Site name to draws, shaped as the values are.
        """
        if not self.summed_out:
            return {}
        num_particles = next(iter(values.values())).shape[0]
        with self._scoring():
            self._reseed(*key)
            traces = self._model.traces(rows, num_particles, self._latents(values))
            return self._model.draw_summed(traces, num_particles)[0]

    def _latents(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values of the model's sites, and their preimages."""
        sites, shapes = self.structure.sites, self._guide.shapes
        return {
            name: value
            for name, value in values.items()
            if name in sites or (name in shapes and shapes[name].preimage_of in sites)
        }

    def take_data(self, values: Mapping[str, Tensor], rows: slice, size: int) -> dict[str, Tensor]:
        """Return the values of some data, shaped as :meth:`draw` returns them.

        Args:
            values: of ``size`` data.
            rows: which of them, the first being 0.
            size: how many.
        """
        if rows.start == 0 and rows.stop >= size:
            return dict(values)
        dim = self._model.require_data_dim()
        taken = {}
        for name, value in values.items():
            axis = value.ndim - self._model.shapes[name].event_ndim + dim
            taken[name] = value.narrow(axis, rows.start, min(rows.stop, size) - rows.start)
        return taken

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        """Eval mode, no value checks at every chunk, random state kept."""
        with (
            torch.set_grad_enabled(self.gradients),
            evaluation(*self._modules, first=self._first),
            pyro.validation_enabled(False),
            preserved_rng(self.batch.device),
            poutine.block(),
        ):
            yield

    def without_gradients(self) -> Scorer:
        """Return this scorer for draws and densities that carry no gradients."""
        other = copy.copy(self)
        other.gradients = False
        return other

    def _reseed(self, *key: int) -> None:
        low, high = np.random.SeedSequence([self.seed, *key]).generate_state(2, np.uint32)
        seed, device = int(high) << 32 | int(low), self.batch.device
        # Not torch.manual_seed: it seeds every device, and takes a millisecond to.
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        torch.default_generator.manual_seed(seed)

    def _choose_modes(self, particles: str) -> None:
        # The reference: single particles, run one by one. It takes any network, and so comes
        # before all else that runs the pair.
        self._guide.mode = self._model.mode = "loop"
        rows = self.data_blocks()[0]
        count = 3 if self.num_data == 2 else 2
        self._reseed(_CHECKS)
        traces = self._guide.traces(rows, count)
        values = self._guide.values(traces, count)
        latents = self._latents(values)
        if self._masked:
            self._find_masks()
        log_guide = self._log_guide(traces, rows, values)
        if self.summed_out:
            self._model.check_summed(rows, latents)

        def score_guide() -> Tensor:
            return self._log_guide(self._guide.traces(rows, count, values), rows, values)

        def score_model() -> Tensor:
            return self._model.log_prob(
                self._model.traces(rows, count, latents), rows, count, is_any
            )

        choose_mode(self._guide, "guide", particles, log_guide, score_guide)
        reference = score_model()
        choose_mode(self._model, "model", particles, reference, score_model)
        self._check_independent(rows, latents, reference)
        self._guide.find_double(self._guide.traces(rows, count, values), rows, count)
        model_traces = self._model.traces(rows, count, latents)
        self._model.find_double(model_traces, rows, count)
        self._warn_of_rounding(
            model_traces[0], (rows.stop - rows.start) * count // len(model_traces)
        )

    def _warn_of_rounding(self, trace: Any, pairs: int) -> None:
        """Say where parameters of a likelihood are too coarse, though it is scored in float64.

        Args:
            trace: of the model.
            pairs: (particle, datum) that it holds.
        """
        for name in self._model.double:
            node = trace.nodes[name]
            if not node["is_observed"]:
                continue
            moved = rounding_of_parameters(node["fn"], node["value"])
            # Of all together, whose parameters are rounded apart.
            per_datum = 0.0 if moved is None else float(moved) / pairs**0.5
            if per_datum > _COARSE:
                warn_once(
                    logger,
                    (unwrapped(self._model.fn),),
                    "the model gives the likelihood of %r in float32: its rounding moves the log "
                    "density of a datum by about %.2g nats, which no standard error counts. Give "
                    "data, parameters and networks in float64",
                    name,
                    per_datum,
                )

    def _agree(self, reference: Tensor, found: Tensor) -> bool:
        """Return whether two log densities are equal to the rounding of what they are made of."""
        if self._model.double or self._guide.double:
            reference, found = reference.float(), found.float()
        return agree(reference, found)

    def agrees_in_training(self, modules: Sequence[nn.Module]) -> bool:
        """Return whether particles together are scored as each alone, with modules as they are.

        A module that normalizes over the batch in training mode sees other rows. True where
        nothing is in training mode, or what is draws random numbers, so that nothing can be told.

        Args:
            modules: that guide and model call.
        """
        if not any(module.training for module in modules):
            return True
        rows = self.data_blocks()[0]
        with (
            torch.no_grad(),
            as_in_training(modules, self._first),
            pyro.validation_enabled(False),
            preserved_rng(self.batch.device),
            poutine.block(),
        ):
            self._reseed(_CHECKS)
            chosen = self._model.mode, self._guide.mode
            self._model.mode = self._guide.mode = "loop"
            values = self._guide.values(self._guide.traces(rows, 2), 2)
            alone, again = (self._log_joint(rows, values) for _ in range(2))
            self._model.mode, self._guide.mode = chosen
            if not all(map(self._agree, alone, again)):
                return True
            return all(map(self._agree, alone, self._log_joint(rows, values)))

    def _log_joint(self, rows: slice, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return log p(x, z) and log q(z | x) of given values, [K, N] each."""
        num_particles = next(iter(values.values())).shape[0]
        traces = self._model.traces(rows, num_particles, self._latents(values))
        log_joint = self._model.log_prob(traces, rows, num_particles, is_any)
        guide_traces = self._guide.traces(rows, num_particles, values)
        return log_joint, self._log_guide(guide_traces, rows, values)

    def _find_masks(self) -> None:
        """Find the model's masks on latents, and whether they are others for other draws."""
        whole = slice(0, self.num_data)
        values = self._latents(self._guide.values(self._guide.traces(whole, 1), 1))
        self._mask_by_draw = depend_on_draws(values, lambda: self._model.traces(whole, 1, values))
        if not self._mask_by_draw:
            masks = self._model.latent_masks(self._model.traces(whole, 1, values), 1)
            self._guide.masks = {
                name: masks[latent] for name, latent in self._masked.items() if latent in masks
            }

    def _check_independent(
        self, rows: slice, values: Mapping[str, Tensor], reference: Tensor
    ) -> None:
        """Raise DependentDataError where a datum's density depends on the latents of others.

        Of two particles, one is made that takes every other datum's values from the second:
        each datum must have the density that it had before.
        """
        size, plate = rows.stop - rows.start, self.structure.data_plate
        if plate is None or size < 2:
            return
        second = torch.arange(size, device=self.batch.device) % 2 == 1
        mixed = {}
        for name, value in values.items():
            shape = self._guide.shapes[name]
            right = shape.event_ndim - plate.dim - 1
            mixed[name] = torch.where(second.reshape(-1, *[1] * right), value[1:2], value[:1])
        traces = self._model.traces(rows, 1, mixed)
        found = self._model.log_prob(traces, rows, 1, is_any)
        wanted = torch.where(second, reference[1:2], reference[:1])
        if agree(wanted, found):
            return
        raise DependentDataError(plate, largest_gap(wanted, found))


def _equal_step(count: int, most: int) -> int:
    """Return the size of pieces that a count is cut into, at most ``most``.

    Equal ones where there are: another size is another graph, and costs as much as a full one.
    """
    fewest = -(-count // most)
    pieces = next((n for n in range(fewest, 2 * fewest) if count % n == 0), fewest)
    return -(-count // pieces)


def _round_down(number: int) -> int:
    """Return the largest number of the form 1, 2 or 5 times a power of ten up to a number.

    Numbers of particles are round, and pieces of round sizes leave no remainder.
    """
    power = 10 ** (len(str(number)) - 1)
    return max(n for n in (1, 2, 5) if n * power <= number) * power
