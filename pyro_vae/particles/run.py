"""One run of a guide or a model for K particles: values, masks and terms of its sites.

A :class:`Run` knows the traces and the mode that they were made in; evaluation and training
read the same terms off it. :class:`Runner` makes runs for evaluation, on rows of a batch, with
values of latents given.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.particles.modes import MODES, Mode
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.enumeration import conditionals, contract, draw, enumerated
from pyro_vae.programs.guide_kinds import row_guide
from pyro_vae.programs.masks import lift_masks, mask_of
from pyro_vae.programs.messages import trace_of
from pyro_vae.programs.nodes import latent_nodes, sample_nodes
from pyro_vae.programs.preimages import DrawByPreimage, Preimage, draw_of, preimage_key, preimage_of
from pyro_vae.programs.pyro_internals import is_deterministic
from pyro_vae.programs.sites import SiteShape
from pyro_vae.programs.traces import GiveValues, site_log_prob
from pyro_vae.programs.types import ModeName, Node, Program, Trace, Values

Keep = Callable[[Node], bool]  # which sites of a trace


@dataclass(slots=True)
class Run:
    """K particles of a guide or a model.

    Attributes:
        traces: one, or in a loop one for each particle.
        mode: how they ran.
        num_particles: K.
        num_data: data that they ran on.
        shapes: of their sites in a single run.
        summed_out: discrete sites whose values lie side by side, to be summed out.
        enumerated: sites whose values lie side by side too and are not summed out (proposals
            that a guide enumerates), with their dimensions.
        double: sites whose log density is computed in float64.
    """

    traces: list[Trace]
    mode: Mode
    num_particles: int
    num_data: int = 1
    shapes: Mapping[str, SiteShape] = field(default_factory=dict)
    summed_out: tuple[str, ...] = ()
    enumerated: Mapping[str, int] = field(default_factory=dict)
    double: frozenset[str] = frozenset()

    def nodes(self, name: str) -> list[Node]:
        """Return a site's node in each trace."""
        return [trace.nodes[name] for trace in self.traces]

    def sites(self) -> Iterator[tuple[str, list[Node]]]:
        """Yield each sample statement with its nodes; deterministic sites, without a term, not."""
        for name, node in sample_nodes(self.traces[0]):
            if not is_deterministic(node):
                yield name, self.nodes(name)

    def latents(self) -> Iterator[tuple[str, list[Node]]]:
        """Yield each sample statement that is not observed with its nodes."""
        for name, _ in latent_nodes(self.traces[0]):
            yield name, self.nodes(name)

    def values(self) -> dict[str, Tensor]:
        """Return the values of sites not observed, ``[K, *plates, *event]`` each.

        The preimages of draws stand beside them.
        """
        found = {}
        for name, nodes in self.latents():
            found[name] = self._unfold(name, [node["value"] for node in nodes])
            preimage = preimage_of(nodes[0])
            key = preimage and preimage_key(name, preimage.transforms)
            if key and key in self.shapes:
                found[key] = self._unfold(key, [draw_of(node) for node in nodes])
        return found

    def _unfold(self, name: str, values: list[Tensor]) -> Tensor:
        return self.mode.unfold(values, self.shapes[name].event_ndim, self.num_particles)

    def masks(self) -> dict[str, Tensor]:
        """Return the masks on latents, ``[K, *plates]`` each, or of size 1."""
        found = {}
        for name, nodes in self.latents():
            masks = [mask_of(node) for node in nodes]
            if name not in self.summed_out and any(m is not None and m is not True for m in masks):
                device = nodes[0]["value"].device
                seen = [torch.as_tensor(True if m is None else m, device=device) for m in masks]
                found[name] = self.mode.unfold(seen, 0, self.num_particles)
        return found

    def densities(self, names: Iterable[str]) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
        """Yield the log density of sites in each trace, masked, unscaled.

        Sites that a summed-out one connects come as one group: the log of the sum over its
        values.
        """
        if not self.summed_out:
            yield from (((name,), self._log_prob(name)) for name in names)
            return
        plate_dims = self.mode.plate_dims + len(self.enumerated)
        scored = zip(self.traces, self._log_probs(names), strict=True)
        groups = [contract(trace, terms, plate_dims, self.enumerated) for trace, terms in scored]
        for group in groups[0]:
            yield group, [found[group] for found in groups]

    def _log_prob(self, name: str) -> list[Tensor]:
        double = name in self.double
        return [site_log_prob(name, n, double=double) for n in self.nodes(name)]

    def _log_probs(self, names: Iterable[str]) -> list[dict[str, Tensor]]:
        terms = {name: self._log_prob(name) for name in names}
        return [{n: term[k] for n, term in terms.items()} for k in range(len(self.traces))]

    def by_particle(self, terms: Sequence[Tensor]) -> Tensor:
        """Return a term of each trace, of a site's batch shape, as [K, N]."""
        return self.mode.by_particle(terms, self.num_particles, self.mode.data_dim)

    def term(self, name: str, mask: Tensor | None = None) -> Tensor:
        """Return one site's log density, unscaled, [K, N]; ``mask [K, *plates]`` beside its own."""
        terms = self._log_prob(name)
        if mask is not None:
            masks = self.mode.fold_mask(mask, self.num_particles, self.num_data)
            terms = [scale_and_mask(t, 1.0, seen) for t, seen in zip(terms, masks, strict=True)]
        return self.by_particle(terms)

    def log_prob(self, keep: Keep | None = None, masks: Values | None = None) -> Tensor:
        """Return the summed log density of the kept sites (all), unscaled, [K, N].

        There may be masks on some, ``[K, *plates]``, beside their own.
        """
        names = [name for name, nodes in self.sites() if keep is None or keep(nodes[0])]
        if self.summed_out:
            terms = [self.by_particle(terms) for _, terms in self.densities(names)]
        else:
            terms = [self.term(name, (masks or {}).get(name)) for name in names]
        if not terms:
            raise ValueError("no site to score")
        return functools.reduce(torch.add, terms)

    def pointwise(self, name: str) -> Tensor:
        """Return one site's log density for each particle, not summed: ``[K, *batch]``."""
        term = self.mode.unfold(self._log_prob(name), 0, self.num_particles)
        missing = self.mode.nesting - self.shapes[name].batch_ndim
        return term.reshape(term.shape[:1] + term.shape[1 + missing :])

    def num_values(self) -> int:
        """Return how many values of summed-out sites a density depends on at once, at most."""
        terms = self._log_probs(name for name, _ in self.sites())[0].values()
        return max(t.shape[: max(0, t.ndim - self.mode.plate_dims)].numel() for t in terms)

    def draw_summed_out(self) -> dict[str, Tensor]:
        """Draw the sites that are summed out from their exact posterior, given all else.

        Returns:
            Site name to values, ``[K, *plates, *event]``.
        """
        log_probs = self._log_probs(name for name, _ in self.sites())
        scored = zip(self.traces, log_probs, strict=True)
        found = [draw(conditionals(t, terms, self.mode.plate_dims)) for t, terms in scored]
        return {name: self._unfold(name, [each[name] for each in found]) for name in found[0]}


@dataclass(eq=False, slots=True)
class Runner:
    """Runs a guide or a model on rows of a batch, for several particles at once.

    Discrete sites that are summed out are enumerated in every run that does not give their
    values.

    Attributes:
        program: a Pyro model or guide.
        batch: its arguments.
        shapes: of the sites of guide and model, in a single run.
        mode: how particles run.
        summed_out: sites of a model to be summed out.
        masks: on sites of a guide, the model's, where they are the same for all draws:
            ``[1, *plates]`` of the whole batch.
        double: sites whose log density is computed in float64.
    """

    program: Program
    batch: Batch
    shapes: Mapping[str, SiteShape]
    mode: Mode
    summed_out: tuple[str, ...] = ()
    masks: Values = field(default_factory=dict)
    double: frozenset[str] = frozenset()

    def in_mode(self, name: ModeName) -> Runner:
        """Return this runner in another mode."""
        return replace(self, mode=MODES[name](self.mode.nesting, self.mode.data_dim))

    def block(self, rows: slice) -> tuple[Batch, Tensor | None]:
        """Return what a run on some data takes: a batch, and the rows of a guide's table."""
        guide, size = row_guide(self.program), self.batch.size
        index = None if guide is None else guide.current_rows
        if self.mode.data_dim is None or size is None or (rows.start == 0 and rows.stop >= size):
            return self.batch.whole(), index
        return self.batch.rows(rows), None if index is None else index[rows]

    def run(self, rows: slice, num_particles: int, values: Values | None = None) -> Run:
        """Run K particles; latents with given values, ``[K, *plates, *event]``, are not drawn."""
        mode, (some, index) = self.mode, self.block(rows)
        (program,) = mode.programs(num_particles, self.program)
        batch, traces = mode.batch(some, num_particles), []
        # Of the whole batch, the rows are those in force.
        with using_rows(self.program, None if some is self.batch else index):
            for k in range(mode.num_runs(num_particles)):
                # Preimages of a guide that this one is compared with may be of another kind.
                given = values and {
                    name: mode.fold(value, self.shapes[name], k)
                    for name, value in values.items()
                    if name in self.shapes
                }
                traces.append(self._trace(program, batch, given))
        size, double = rows.stop - rows.start, self.double
        return Run(traces, mode, num_particles, size, self.shapes, self.summed_out, double=double)

    def _trace(self, program: Program, batch: Batch, values: Values | None) -> Trace:
        given: Container[str] = values or ()
        if summed_out := [name for name in self.summed_out if name not in given]:
            program = enumerated(program, summed_out, self.mode.first_enum_dim)
        if values is not None:
            preimages = {
                shape.preimage_of: Preimage(value, shape.transforms)
                for name, value in values.items()
                if (shape := self.shapes[name]).preimage_of is not None
            }
            program = GiveValues(values, preimages)(program)
        with DrawByPreimage():
            trace = trace_of(program, batch)
        return lift_masks(trace, summed_out) if summed_out else trace

    def masks_of(self, rows: slice) -> dict[str, Tensor]:
        """Return the masks that are the same for all draws, of some data."""
        dim, size = self.mode.data_dim, rows.stop - rows.start
        return {
            n: m if dim is None or m.shape[dim] == 1 else m.narrow(dim, rows.start, size)
            for n, m in self.masks.items()
        }


def using_rows(program: Program, index: Tensor | None) -> contextlib.AbstractContextManager[object]:
    """Keep a guide with a row per datum aligned with the rows of a batch."""
    if (guide := row_guide(program)) is None or index is None:
        return contextlib.nullcontext()
    return guide.rows_as_given(index)


def is_observed(node: Node) -> bool:
    """Keep the observed sites of a trace."""
    return bool(node["is_observed"])


def is_latent(node: Node) -> bool:
    """Keep the sites of a trace that are not observed."""
    return not node["is_observed"]
