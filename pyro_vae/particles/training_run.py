"""One run of a pair in training: the terms of its sites, per particle and datum, with gradients.

:mod:`pyro_vae.particles.evaluator` is for evaluation: modules in eval mode, scales stripped,
fixed random streams. Here modules are as the user left them, the random numbers are the
global ones, and scales are kept beside the terms.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.particles.modes import per_datum
from pyro_vae.particles.plan import Layout, device_of, hide
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.declared_guide import DeclaredGuide
from pyro_vae.programs.enumeration import contract, enumerated, scaled_by, unmasked_log_prob
from pyro_vae.programs.nodes import guide_factors, latent_nodes, sample_nodes
from pyro_vae.programs.preimages import draw_of, with_draw
from pyro_vae.programs.row_guide import repeated_rows
from pyro_vae.programs.state import preserved_rng, unwrapped
from pyro_vae.programs.traces import (
    ReplaceDraws,
    outside_sites,
    point_of,
    redrawn,
    site_log_prob,
    trace_guide,
    trace_model,
)
from pyro_vae.recording import is_recording

__all__ = ["Run"]


class Run:
    """K particles of a guide, and the model replayed with them.

    Args:
        layout: from :func:`plan`.
        model: a Pyro model.
        guide: a Pyro guide.
        args: their arguments.
        kwargs: their keyword arguments.
        num_particles: K.
        draws: "attached" to the guide's parameters; "gated", which is attached, with the
            draws that the model and :meth:`stopped_guide_terms` see each a tensor of its
            own, so that what flows back there can be scaled; or "detached".
        one_minibatch: whether all particles share the minibatch that the model draws.
    """

    def __init__(
        self,
        layout: Layout,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: Any,
        kwargs: Any,
        num_particles: int,
        *,
        draws: str = "attached",
        one_minibatch: bool = False,
    ) -> None:
        self.layout = layout
        self.num_particles = num_particles
        self._draws = draws
        # For a second run of the guide, on the same random numbers.
        self._again: list[tuple[Callable[[], Any], Any]] = []
        self._points: set[str] = set()  # proposals that are parameters themselves
        own = unwrapped(guide)
        declared = isinstance(own, DeclaredGuide)
        global_guide = own.global_guide if declared else None
        self._simple = declared and not own.is_dependent and global_guide is None
        guide = hide(guide, layout.hidden)
        if layout.shares_globals:
            shared = trace_guide(guide if global_guide is None else global_guide, args, kwargs)
            local = {name for name, node in latent_nodes(shared) if self.is_local(name, node)}
            for name in local:
                shared.remove_node(name)
            guide = poutine.replay(guide, trace=shared)
        self._pairs: list[tuple[Any, Any]] = []
        if layout.mode == "plate":
            plate = pyro.plate("num_particles_vectorized", num_particles, dim=-1 - layout.nesting)
            model, guide = plate(model), plate(guide)
        elif layout.mode == "repeat":
            repeated = Batch(args, kwargs).repeat(num_particles)
            guide = repeated_rows(guide, num_particles)
            args, kwargs = repeated.args, repeated.kwargs
        if layout.summed_out:
            model = enumerated(model, layout.summed_out, layout.first_summed_dim)
        if layout.enumerated:
            guide = enumerated(guide, layout.enumerated, layout.first_enum_dim)
        self.args, self.kwargs = args, kwargs
        for _ in range(num_particles if layout.mode == "loop" else 1):
            sequential = layout.structure is not None and layout.structure.sequential
            shares = one_minibatch or sequential  # whose sites are others for each subsample
            shared = self._pairs[0][1] if shares and self._pairs else None
            self._pairs.append(self._pair(model, guide, args, kwargs, shared))
        dims = [
            self._pairs[0][1].nodes[name]["infer"]["_enumerate_dim"]
            for name in layout.enumerated
            if name in self._pairs[0][1].nodes
        ]
        if len(set(dims)) < len(dims):
            raise ValueError(
                f"the guide enumerates {list(layout.enumerated)} in dimensions that some share "
                "(pyro.markov), for which there is no expectation here. Leave them out of the "
                "guide, and they are summed out; or use pyro.infer.TraceEnum_ELBO"
            )

    @property
    def as_planned(self) -> bool:
        """Whether the pair has the discrete latents that its layout was made for."""
        model_trace, guide_trace = self._pairs[0]
        left = {name for name, _ in latent_nodes(model_trace) if name not in guide_trace.nodes}
        proposed = all(name in guide_trace.nodes for name in self.layout.enumerated)
        return proposed and left == set(self.layout.summed_out)

    def _pair(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: Any,
        kwargs: Any,
        shared: Any,
    ) -> tuple[Any, Any]:
        if shared is not None:
            guide = poutine.replay(guide, trace=_subsamples(shared))
        if self._draws == "gated":
            state = _random_state(device_of(args, kwargs))

            def again() -> Any:
                if is_recording():
                    # The state of the random numbers is no part of a graph: the draws are given.
                    return redrawn(guide, guide_trace, _leaf, args, kwargs)
                with ReplaceDraws(_leaf), _random_state_of(state):
                    return trace_guide(guide, args, kwargs)

        # Around the trace: what is inside of it replaces a draw after it is recorded.
        detached = self._draws == "detached"
        with ReplaceDraws(torch.Tensor.detach) if detached else contextlib.nullcontext():
            guide_trace = trace_guide(guide, args, kwargs)
        if self._draws == "gated":
            for _, node in latent_nodes(guide_trace):
                node.update(with_draw(node, draw_of(node).view_as(draw_of(node))))
            self._again.append((again, guide_trace))
        return trace_model(model, guide_trace, args, kwargs), guide_trace

    # --- sites

    def model_nodes(self) -> Iterator[tuple[str, list[Any]]]:
        """Yield each sample statement of the model, with its node in each trace.

        Deterministic sites, which have no term, are left out.
        """
        for name, node in sample_nodes(self._pairs[0][0]):
            if node["infer"].get("_deterministic"):
                continue
            yield name, [model_trace.nodes[name] for model_trace, _ in self._pairs]

    def guide_nodes(self) -> Iterator[tuple[str, list[Any]]]:
        """Yield each proposal of the guide, with its node in each trace."""
        for name, _ in latent_nodes(self._pairs[0][1]):
            yield name, [guide_trace.nodes[name] for _, guide_trace in self._pairs]

    def guide_factor_nodes(self) -> Iterator[tuple[str, list[Any]]]:
        """Yield each pyro.factor statement of the guide, likewise."""
        for name in guide_factors(self._pairs[0][1]):
            yield name, [guide_trace.nodes[name] for _, guide_trace in self._pairs]

    def observed_nodes(self) -> Iterator[tuple[str, list[Any]]]:
        """Yield each observed site of the model, with its node in each trace."""
        return ((name, n) for name, n in self.model_nodes() if n[0]["is_observed"])

    def latent_nodes(self) -> Iterator[tuple[str, list[Any]]]:
        """Yield each latent site of the model that is not summed out, likewise."""
        out = self.layout.summed_out
        nodes = self.model_nodes()
        return ((name, n) for name, n in nodes if not n[0]["is_observed"] and name not in out)

    def outside(self) -> list[str]:
        """Return the sites whose values lie outside of the support of the model's distribution."""
        return outside_sites(self.model_nodes())

    def proposals(self) -> Iterator[tuple[str, list[tuple[Any, Any]]]]:
        """Yield each proposal with its (guide, model) nodes; None for no site of the model."""
        for name, _ in latent_nodes(self._pairs[0][1]):
            yield name, [(g.nodes[name], m.nodes.get(name)) for m, g in self._pairs]

    # --- terms

    def per_datum(self, terms: list[Tensor], *, local: bool) -> Tensor:
        """Return a site's term, of its batch shape in each trace, as [K, N].

        [K, 1] for a site that is not in the data plate.
        """
        if self.layout.enumerated:
            terms = [self._expected(t, g) for t, (_, g) in zip(terms, self._pairs, strict=True)]
        dim, nesting = self.layout.data_dim if local else None, self.layout.nesting
        if self.layout.mode == "loop":
            return torch.stack([per_datum(term, nesting, dim, leading=0) for term in terms])
        (term,) = terms
        if self.layout.mode == "repeat":
            return per_datum(term, nesting, dim, leading=0).reshape(self.num_particles, -1)
        reduced = per_datum(term, nesting, dim, leading=1)
        return reduced.expand(self.num_particles, reduced.shape[1])

    def _expected(self, term: Tensor, guide_trace: Any) -> Tensor:
        """Return the expectation of a term over the enumerated proposals of its trace.

        Proposals are normalized one given the others before: the last is summed first.
        """
        for name in reversed(self.layout.enumerated):
            node = guide_trace.nodes[name]
            dim = node["infer"]["_enumerate_dim"]
            if term.ndim >= -dim and term.shape[dim] > 1:
                # Whole, where a mask leaves the proposal's own term out.
                probability = unmasked_log_prob(node).exp()
                term = (probability * term).sum(dim, keepdim=True)
        plates = -1 - self.layout.first_enum_dim
        return term.reshape(term.shape[max(0, term.ndim - plates) :])

    def is_local(self, name: str, node: Any) -> bool:
        """Return whether a site of the model or the guide is in the data plate."""
        structure = self.layout.structure
        if structure is None or structure.data_plate is None:
            return False
        plate = structure.data_plate
        if name in structure.sites:
            return plate.name in {p.name for p in structure.sites[name].plates}
        # An auxiliary site of the guide, whose plate may have a name of its own.
        shape = node["fn"].batch_shape
        names = {frame.name for frame in node["cond_indep_stack"] if frame.vectorized}
        if plate.name in names or len(shape) < -plate.dim:
            return plate.name in names
        others = {p.name for site in structure.sites.values() for p in site.plates}
        return shape[plate.dim] > 1 and not any(
            frame.dim == plate.dim and frame.name in others for frame in node["cond_indep_stack"]
        )

    def per_dimension(self, terms: list[Tensor], event_dim: int, *, local: bool) -> Tensor:
        """Sum a site's term, of its batch and event shape in each trace, over the data.

        Returns:
            The mean over particles, for each latent dimension: batch and event dimensions
            but those of particles and data (or these with size 1).
        """
        dim = self.layout.data_dim if local else None
        total = torch.stack([self._over_data(term, event_dim, dim) for term in terms]).sum(0)
        return total / self.num_particles

    def _over_data(self, term: Tensor, event_dim: int, data_dim: int | None) -> Tensor:
        batch = term.ndim - event_dim
        summed = [] if data_dim is None else [batch + data_dim]
        if self.layout.mode == "plate":
            summed.append(batch - 1 - self.layout.nesting)
        summed = [axis for axis in summed if axis >= 0]
        return term.sum(summed, keepdim=True) if summed else term

    def scale(self, node: Any) -> Any:
        """Return the scale of a node, a number or a tensor, for a batch that is not repeated."""
        if self.layout.mode == "repeat" and self.layout.subsampled:
            return node["scale"] * self.num_particles
        return node["scale"]

    @property
    def plate_scale(self) -> float:
        """What a datum counts for in a subsampled data plate: its full size over its size."""
        if self.layout.structure is None or self.layout.structure.data_plate is None:
            return 1.0
        if not self.layout.subsampled and not self.layout.draws_minibatch:
            return 1.0
        name = self.layout.structure.data_plate.name
        times = self.num_particles if self.layout.mode == "repeat" else 1
        stacks = (nodes[0]["cond_indep_stack"] for _, nodes in self.observed_nodes())
        frame = next(frame for stack in stacks for frame in stack if frame.name == name)
        return times * frame.full_size / frame.size

    def datum_scale(self, name: str, node: Any) -> Any:
        """Return the scale of a datum at a site: a number, a 0-dimensional tensor, or [N].

        Raises:
            ValueError: for a scale that varies within a datum.
        """
        scale, dim = self.scale(node), self.layout.data_dim
        if not isinstance(scale, Tensor):
            return scale
        data_axis = None if dim is None else scale.ndim + dim
        if any(size != 1 for axis, size in enumerate(scale.shape) if axis != data_axis):
            raise ValueError(
                f"site {name!r} has a scale of shape {tuple(scale.shape)}, which varies within a "
                "datum; one number for each datum is needed"
            )
        if self.layout.mode == "repeat" and scale.numel() > 1:
            return scale.reshape(self.num_particles, -1)[0]
        return scale.reshape(-1) if scale.numel() > 1 else scale.reshape(())

    def log_prob(self, name: str, nodes: list[Any], *, scaled: bool) -> Tensor:
        """Return a site's log density, masked, [K, N]."""
        terms = [site_log_prob(name, node, scaled=False) for node in nodes]
        if scaled:
            terms = [
                scale_and_mask(term, self.scale(node))
                for term, node in zip(terms, nodes, strict=True)
            ]
        return self.per_datum(terms, local=self.is_local(name, nodes[0]))

    def model_terms(
        self, *, scaled: bool, skip: Container[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the log density of the model's sample statements, masked, [K, N].

        Sites that depend on a latent that is summed out come as one, the logarithm of the
        sum, under the name of the site whose scale they have.
        """
        nodes_of = dict(self.model_nodes())
        if not self.layout.summed_out:
            for name, nodes in nodes_of.items():
                if name not in skip:
                    yield name, self.log_prob(name, nodes, scaled=scaled)
            return
        found: dict[str, list[Tensor]] = {}
        for model_trace, guide_trace in self._pairs:
            given = {
                name: guide_trace.nodes[name]["infer"]["_enumerate_dim"]
                for name in self.layout.enumerated
            }
            log_probs = {
                name: site_log_prob(name, model_trace.nodes[name], scaled=False)
                for name in nodes_of
                if name not in skip
            }
            nesting = -1 - self.layout.first_summed_dim
            for group, term in contract(model_trace, log_probs, nesting, given).items():
                name = scaled_by(model_trace, group, given)
                scale = self.scale(model_trace.nodes[name]) if scaled else 1.0
                found.setdefault(name, []).append(scale_and_mask(term, scale))
        for name, terms in found.items():
            yield name, self.per_datum(terms, local=self.is_local(name, nodes_of[name][0]))

    def guide_terms(self) -> dict[str, Tensor]:
        """Return the log density of each proposal, masked, unscaled, [K, N]."""
        return {name: self.log_prob(name, n, scaled=False) for name, n in self.guide_nodes()}

    def stopped_guide_terms(self, *, scaled: bool, apart: bool = False) -> dict[str, Tensor]:
        """Return the log density of each proposal as a function of the draws alone, [K, N].

        Its gradient flows to the draws, and from there to the guide's parameters, but not
        to the parameters by which the density itself depends on them (sticking the
        landing). Each is the density to first order about the draws: the value, and the
        derivative by every draw of its trace. Masked; of gated draws, none else. Enumerated
        proposals are left out.

        Args:
            scaled: whether by the guide's scales.
            apart: whether each term has the derivatives of its own density alone, as where they
                will be weighted differently; else their sum is right, and takes one pass.
        """
        by_name: dict[tuple[str, str], list[Tensor]] = {}
        for again, guide_trace in self._again:
            for *names, term in self._stopped(again, guide_trace, scaled=scaled, apart=apart):
                by_name.setdefault((names[0], names[1]), []).append(term)
        nodes = dict(self.guide_nodes())
        found: dict[str, Tensor] = {}
        for (name, draw), terms in by_name.items():
            term = self.per_datum(terms, local=self.is_local(draw, nodes[draw][0]))
            found[name] = found[name] + term if name in found else term
        return found

    def _stopped(
        self, again: Callable[[], Any], guide_trace: Any, *, scaled: bool, apart: bool
    ) -> Iterator[tuple[str, str, Tensor]]:
        """Yield terms with the proposal whose density they are of, and the draw they vary with."""
        nodes = dict(latent_nodes(guide_trace))
        if self._simple or len(nodes) == 1:
            # No proposal depends on another draw: the distributions at hand will do.
            copies = {name: with_draw(node, _leaf(draw_of(node))) for name, node in nodes.items()}
        else:
            copies = {
                name: {**node, "mask": nodes[name]["mask"]} for name, node in latent_nodes(again())
            }
        leaves = {name: draw_of(c) for name, c in copies.items() if draw_of(c).requires_grad}
        self._check_points(copies, list(leaves.values()))
        densities = {
            name: scale_and_mask(
                site_log_prob(name, copy, scaled=False), self.scale(copy) if scaled else 1.0
            )
            for name, copy in copies.items()
            if name not in self.layout.enumerated  # an expectation of its own
        }
        plates = -1 - self.layout.first_enum_dim
        for name, density in densities.items():
            if self.layout.enumerated and density.ndim > plates and len(leaves) > 1:
                raise ValueError(
                    f"the guide's site {name!r} depends on {list(self.layout.enumerated)}, which "
                    "are enumerated, next to other draws: its density cannot be held at fixed "
                    "parameters. Use pathwise gradients"
                )
        if not densities:
            return
        sums = {name: density.sum() for name, density in densities.items()}
        if not apart:
            sums = {"": torch.stack(list(sums.values())).sum()}
        terms = {(name, name): density.detach() for name, density in densities.items()}
        for (name, draw), slope in _slopes(sums, leaves).items():
            value = draw_of(nodes[draw])
            change = slope * (value - value.detach())
            event = tuple(range(change.ndim - _event_dim(nodes[draw]), change.ndim))
            change = change.sum(event) if event else change
            key = name or draw, draw
            terms[key] = terms[key] + change if key in terms else change
        for (name, draw), term in terms.items():
            yield name, draw, term

    def _check_points(self, copies: Mapping[str, Any], leaves: list[Tensor]) -> None:
        """Sort the Deltas: those that are parameters, and those that are functions of draws.

        Raises:
            ValueError: for one that is both, or whose log density depends on parameters: what
                flows to them is no score, and cannot be left out or weighted as one.
        """
        for name, copy in copies.items():
            point = point_of(copy["fn"])
            if point is None:
                continue
            of_parameters = _depends_on_parameters(point.v, leaves)
            of_draws = _depends_on(point.v, leaves)
            if of_parameters:
                self._points.add(name)
            if (of_parameters and of_draws) or _depends_on_parameters(point.log_density, leaves):
                raise ValueError(
                    f"the guide's site {name!r} is a point made of other draws and of parameters; "
                    "gradients through the draws alone ('stl', 'dreg') would miss a part. Use "
                    "pathwise gradients"
                )

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply what flows back to gated draws by a factor [K, N] of particle and datum.

        Not to points that are parameters: they have no density, hence no score.
        """
        for k, (_, guide_trace) in enumerate(self._pairs):
            for name, node in latent_nodes(guide_trace):
                draw, event_dim = draw_of(node), _event_dim(node)
                if draw.requires_grad and name not in self._points:
                    spread = self._like_draw(factor, k, draw.ndim - event_dim)
                    spread = spread.reshape(*spread.shape, *[1] * event_dim)
                    draw.register_hook(functools.partial(torch.mul, spread))

    def _like_draw(self, by_datum: Tensor, particle: int, batch_ndim: int) -> Tensor:
        """Bring [K, N] to the batch dimensions of a draw in one of the traces."""
        layout = self.layout
        if layout.mode == "repeat":
            by_datum = by_datum.reshape(1, -1)
        elif layout.mode == "loop":
            by_datum = by_datum[particle : particle + 1]
        shape = [1] * layout.nesting
        if layout.data_dim is not None:
            shape[layout.data_dim] = by_datum.shape[1]
        shape = [by_datum.shape[0], *shape]
        return by_datum.reshape(shape[len(shape) - batch_ndim :])


def _slopes(
    sums: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Return the derivative of each sum by each leaf that it depends on."""
    found = {}
    for name, total in sums.items():
        if total.requires_grad and leaves:
            slopes = torch.autograd.grad(
                total, list(leaves.values()), allow_unused=True, retain_graph=len(sums) > 1
            )
            pairs = zip(leaves, slopes, strict=True)
            found.update({(name, draw): s for draw, s in pairs if s is not None})
    return found


def _depends_on(value: Any, leaves: list[Tensor]) -> bool:
    """Return whether a tensor is a function of one of the leaves."""
    return bool(_sources(value) & {id(leaf) for leaf in leaves})


def _depends_on_parameters(value: Any, leaves: list[Tensor]) -> bool:
    """Return whether a tensor is a function of anything that learns but the leaves."""
    return bool(_sources(value) - {id(leaf) for leaf in leaves})


def _sources(value: Any) -> set[int]:
    """Return the leaves of a tensor's graph, by identity."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return set()
    if value.grad_fn is None:
        return {id(value)}
    found, seen, stack = set(), set(), [value.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(function for function, _ in node.next_functions if function is not None)
    return found


def _event_dim(node: Any) -> int:
    """Return the event dimensions of :func:`draw_of` a node."""
    return node["fn"].event_dim + draw_of(node).ndim - node["value"].ndim


def _leaf(value: Tensor) -> Tensor:
    value = value.detach()
    return value.requires_grad_() if value.is_floating_point() else value


def _subsamples(trace: Any) -> Any:
    found = poutine.Trace()
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and site_is_subsample(node):
            found.add_node(name, **node.copy())
    return found


def _random_state(device: torch.device) -> tuple[torch.device, Tensor, Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return device, torch.get_rng_state(), cuda


@contextlib.contextmanager
def _random_state_of(state: tuple[torch.device, Tensor, Tensor | None]) -> Iterator[None]:
    """Go back to a random state, and leave the present one as it was."""
    device, cpu, cuda = state
    with preserved_rng(device):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield
