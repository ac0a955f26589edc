"""K particles of a guide, and the model replayed with them, in training.

Modules are as the user left them, random numbers are the global ones, gradients flow, and
scales are kept beside the terms.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import TypeAlias

from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.particles.plan import Plan, hide
from pyro_vae.particles.run import Run
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.enumeration import enumerated, scaled_by, unmasked_log_prob
from pyro_vae.programs.guide_kinds import DeclaredGuide
from pyro_vae.programs.nodes import guide_factors, latent_nodes
from pyro_vae.programs.pyro_internals import enumerate_dim
from pyro_vae.programs.state import unwrapped
from pyro_vae.programs.traces import (
    ReplaceDraws,
    outside_sites,
    site_log_prob,
    subsamples,
    trace_guide,
    trace_model,
)
from pyro_vae.programs.types import Node, Program, Trace

# How a guide is run: returns its trace, with the draws that the model is to see.
Tracer: TypeAlias = Callable[[Program, Batch], Trace]


def trace_detached(guide: Program, batch: Batch) -> Trace:
    """Run a guide, its draws without gradients; return its trace."""
    # Around the trace: what is inside of it replaces a draw after it is recorded.
    with ReplaceDraws(Tensor.detach):
        return trace_guide(guide, batch)


class TrainingRun:
    """K particles of a guide, and the model replayed with them.

    Args:
        plan: of the pair.
        model: a Pyro model.
        guide: a Pyro guide.
        batch: their arguments.
        num_particles: K.
        tracer: how the guide is run.
        one_minibatch: whether all particles share the minibatch that the model draws.

    Attributes:
        guide: the guide's Run.
        model: the model's Run.
        batch: the arguments of a run, repeated in the mode that repeats them.
    """

    def __init__(
        self,
        plan: Plan,
        model: Program,
        guide: Program,
        batch: Batch,
        num_particles: int,
        *,
        tracer: Tracer = trace_guide,
        one_minibatch: bool = False,
    ) -> None:
        self.plan, self.num_particles, mode = plan, num_particles, plan.mode
        # How many times a subsampled data plate holds each datum of the batch.
        self._repeats = mode.repeats(num_particles)
        guide = hide(guide, plan.hidden)
        if plan.shares_globals:
            guide = self._with_globals(guide, batch)
        model, guide = mode.programs(num_particles, model, guide)
        self.batch = batch = mode.batch(batch, num_particles)
        if plan.summed_out:
            model = enumerated(model, plan.summed_out, mode.first_enum_dim - len(plan.enumerated))
        if plan.enumerated:
            guide = enumerated(guide, plan.enumerated, mode.first_enum_dim)
        # Of sequential plates, the sites are others for each subsample.
        shares = one_minibatch or plan.structure.sequential
        guides, models = list[Trace](), list[Trace]()
        for run in range(mode.num_runs(num_particles)):
            if shares and run == 1:
                guide = poutine.replay(guide, trace=subsamples(guides[0]))
            guides.append(tracer(guide, batch))
            models.append(trace_model(model, guides[-1], batch))
        dims = _enumerated_dims(plan, guides[0])
        self.guide = Run(guides, mode, num_particles)
        self.model = Run(models, mode, num_particles, summed_out=plan.summed_out, enumerated=dims)

    def _with_globals(self, guide: Program, batch: Batch) -> Program:
        """Return the guide with one draw of the global latents, the same in all runs."""
        own = unwrapped(guide)
        whole = own.global_guide if isinstance(own, DeclaredGuide) else None
        shared = trace_guide(guide if whole is None else whole, batch)
        for name, node in list(latent_nodes(shared)):
            if self.is_local(name, node):
                shared.remove_node(name)
        return poutine.replay(guide, trace=shared)

    @property
    def as_planned(self) -> bool:
        """Whether the pair has the discrete latents that its plan was made for."""
        proposed = self.guide.traces[0].nodes
        left = {name for name, _ in latent_nodes(self.model.traces[0]) if name not in proposed}
        enumerates = all(name in proposed for name in self.plan.enumerated)
        return enumerates and left == set(self.plan.summed_out)

    def observed(self) -> Iterator[tuple[str, list[Node]]]:
        """Yield each observed site of the model, with its node in each trace."""
        return ((name, n) for name, n in self.model.sites() if n[0]["is_observed"])

    def latents(self) -> Iterator[tuple[str, list[Node]]]:
        """Yield each latent site of the model that is not summed out, likewise."""
        return ((n, nodes) for n, nodes in self.model.latents() if n not in self.plan.summed_out)

    def proposals(self) -> Iterator[tuple[str, list[tuple[Node, Node | None]]]]:
        """Yield each proposal with its (guide, model) nodes; None for no site of the model."""
        for name, nodes in self.guide.latents():
            theirs = (trace.nodes.get(name) for trace in self.model.traces)
            yield name, list(zip(nodes, theirs, strict=True))

    def guide_factors(self) -> Iterator[tuple[str, list[Node]]]:
        """Yield each pyro.factor statement of the guide, with its node in each trace."""
        return ((name, self.guide.nodes(name)) for name in guide_factors(self.guide.traces[0]))

    def outside(self) -> list[str]:
        """Return the sites whose values lie outside of the support of the model's distribution."""
        return outside_sites(self.model.sites())

    def is_local(self, name: str, node: Node) -> bool:
        """Return whether a site of the model or the guide is in the data plate."""
        sites, plate = self.plan.structure.sites, self.plan.structure.data_plate
        if plate is None:
            return False
        if name in sites:
            return plate.name in {p.name for p in sites[name].plates}
        # An auxiliary site of the guide, whose plate may have a name of its own.
        shape, frames = node["fn"].batch_shape, node["cond_indep_stack"]
        if plate.name in {frame.name for frame in frames if frame.vectorized}:
            return True
        others = {p.name for site in sites.values() for p in site.plates}
        if any(frame.dim == plate.dim and frame.name in others for frame in frames):
            return False
        return len(shape) >= -plate.dim and bool(shape[plate.dim] != 1)

    def log_prob(self, name: str, nodes: list[Node], *, scaled: bool) -> Tensor:
        """Return a site's log density, masked, [K, N]; [K, 1] outside the data plate."""
        terms = [site_log_prob(name, node) for node in nodes]
        return self.term(name, nodes, terms, scaled=scaled)

    def term(self, name: str, nodes: list[Node], terms: list[Tensor], *, scaled: bool) -> Tensor:
        """Return a site's term as [K, N], from masked ones of its batch shape, one for each trace.

        Over proposals that the guide enumerates it is an expectation.
        """
        if scaled:
            scales = map(self.scale, nodes)
            terms = list(map(scale_and_mask, terms, scales))
        if self.plan.enumerated:
            terms = list(map(self._expected, terms, self.guide.traces))
        dim = self.plan.mode.data_dim if self.is_local(name, nodes[0]) else None
        return self.plan.mode.by_particle(terms, self.num_particles, dim)

    def _expected(self, term: Tensor, guide_trace: Trace) -> Tensor:
        """Return the expectation of a term over the enumerated proposals of its trace.

        Proposals are normalized one given the others before: the last is summed first.
        """
        for name in reversed(self.plan.enumerated):
            node, dim = guide_trace.nodes[name], self.model.enumerated[name]
            if term.ndim >= -dim and term.shape[dim] > 1:
                # Whole, where a mask leaves the proposal's own term out.
                probability = unmasked_log_prob(node).exp()
                term = (probability * term).sum(dim, keepdim=True)
        return term.reshape(term.shape[max(0, term.ndim - self.plan.mode.plate_dims) :])

    def model_terms(
        self, *, scaled: bool, skip: Container[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the log density of the model's sample statements, masked, [K, N].

        Sites that depend on a latent that is summed out come as one, the logarithm of the
        sum, under the name of the site whose scale they have.
        """
        names = [name for name, _ in self.model.sites() if name not in skip]
        for group, terms in self.model.densities(names):
            name = group[0]
            if self.plan.summed_out:
                name, *_ = [scaled_by(t, group, self.model.enumerated) for t in self.model.traces]
            yield name, self.term(name, self.model.nodes(name), terms, scaled=scaled)

    def guide_terms(self) -> dict[str, Tensor]:
        """Return the log density of each proposal, masked, unscaled, [K, N]."""
        return {name: self.log_prob(name, n, scaled=False) for name, n in self.guide.latents()}

    def scale(self, node: Node) -> float | Tensor:
        """Return the scale of a node for a batch that is not repeated."""
        scale: float | Tensor = node["scale"]
        return scale * self._repeats if self._repeats > 1 and self.plan.subsampled else scale

    @property
    def plate_scale(self) -> float:
        """What a datum counts for in a subsampled data plate: its full size over its size."""
        plate = self.plan.structure.data_plate
        if plate is None or not (self.plan.subsampled or self.plan.draws_minibatch):
            return 1.0
        stacks = (nodes[0]["cond_indep_stack"] for _, nodes in self.observed())
        frame = next(frame for stack in stacks for frame in stack if frame.name == plate.name)
        return float(self._repeats * frame.full_size / frame.size)

    def datum_scale(self, name: str, node: Node) -> float | Tensor:
        """Return the scale of a datum at a site: a number, a 0-dimensional tensor, or [N].

        Raises:
            ValueError: for a scale that varies within a datum.
        """
        scale, dim = self.scale(node), self.plan.mode.data_dim
        if not isinstance(scale, Tensor):
            return scale
        data_axis = None if dim is None else scale.ndim + dim
        if any(size != 1 for axis, size in enumerate(scale.shape) if axis != data_axis):
            raise ValueError(
                f"site {name!r} has a scale of shape {tuple(scale.shape)}, which varies within a "
                "datum; one number for each datum is needed"
            )
        return scale.reshape(()) if scale.numel() == 1 else scale.reshape(self._repeats, -1)[0]


def _enumerated_dims(plan: Plan, guide_trace: Trace) -> dict[str, int]:
    """Return the dimension of each proposal that the guide enumerates; refuse shared ones."""
    nodes = guide_trace.nodes
    found = {name: enumerate_dim(nodes[name]) for name in plan.enumerated if name in nodes}
    dims = {name: dim for name, dim in found.items() if dim is not None}
    if len(set(dims.values())) < len(dims):
        raise ValueError(
            f"the guide enumerates {list(plan.enumerated)} in dimensions that some share "
            "(pyro.markov), which has no expectation here. Leave them out of the guide, and they "
            "are summed out; or use pyro.infer.TraceEnum_ELBO"
        )
    return dims
