r"""Gradients through the draws of a guide alone: sticking the landing, doubly reparameterized.

.. math:: \nabla_\phi \log q_\phi(z_\phi) = \nabla_z \log q_\phi(z)\, \nabla_\phi z_\phi
          + \nabla_\phi \log q_\phi(z) \big|_{z = z_\phi}

The second term, the score, is zero on average; leaving it out is sticking the landing (Roeder, Wu
& Duvenaud 2017). Weighting what flows back to each draw is the doubly reparameterized gradient
(Tucker et al. 2019).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.particles.training_run import TrainingRun
from pyro_vae.programs.answers import leaves_of
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import DeclaredGuide
from pyro_vae.programs.moved import refuse_moved
from pyro_vae.programs.nodes import latent_nodes, point_of
from pyro_vae.programs.preimages import draw_of, with_draw
from pyro_vae.programs.state import preserved_rng, unwrapped
from pyro_vae.programs.traces import ReplaceDraws, site_log_prob, trace_guide
from pyro_vae.programs.types import Node, Program, Trace
from pyro_vae.recording import is_recording


class StoppedGradients:
    """Runs guides so that the gradient of log q may be taken by the draws alone.

    Its :meth:`trace` is the tracer of a TrainingRun, each for one step.
    """

    def __init__(self) -> None:
        # By the trace of a guide: its nodes once more, as functions of draws held fixed.
        self._copies: dict[int, Callable[[], dict[str, Node]]] = {}
        self._points: set[str] = set()  # proposals that are parameters themselves

    def trace(self, guide: Program, batch: Batch) -> Trace:
        """Run a guide; the model sees its draws as tensors of their own, to be gated."""
        device = batch.device
        state = torch.get_rng_state()
        on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        trace = trace_guide(guide, batch)
        nodes = dict(latent_nodes(trace))
        refuse_moved(nodes, "take estimator='pathwise'")
        own = unwrapped(guide)
        declared = isinstance(own, DeclaredGuide) and own.global_guide is None

        def copies() -> dict[str, Node]:
            if len(nodes) == 1 or (declared and not own.is_dependent):
                # No proposal depends on another draw: the distributions at hand will do.
                return {name: with_draw(node, _leaf(draw_of(node))) for name, node in nodes.items()}
            if is_recording():
                # The state of the random numbers is no part of a graph: the draws are given.
                with ReplaceDraws(_leaf):
                    again = trace_guide(poutine.replay(guide, trace=trace), batch)
            else:
                with ReplaceDraws(_leaf), preserved_rng(device):
                    torch.set_rng_state(state)
                    if on_gpu is not None:
                        torch.cuda.set_rng_state(on_gpu, device)
                    again = trace_guide(guide, batch)
            return {n: {**node, "mask": nodes[n]["mask"]} for n, node in latent_nodes(again)}

        for node in nodes.values():
            node.update(with_draw(node, draw_of(node).view_as(draw_of(node))))
        self._copies[id(trace)] = copies
        return trace

    def guide_terms(
        self, run: TrainingRun, *, scaled: bool, apart: bool = False
    ) -> dict[str, Tensor]:
        """Return the log density of each proposal as a function of the draws alone, [K, N].

        Each is the density to first order about the draws: the value, and the derivative by every
        draw of its trace. Enumerated proposals are left out.

        Args:
            run: of the guide, by :meth:`trace`.
            scaled: whether by the guide's scales.
            apart: whether each term has the derivatives of its own density alone, as where they
                will be weighted differently; else their sum is right, and takes one pass.
        """
        by_name, found = defaultdict[tuple[str, str], list[Tensor]](list), dict[str, Tensor]()
        for trace in run.guide.traces:
            for key, term in self._stopped(run, trace, scaled=scaled, apart=apart).items():
                by_name[key].append(term)
        for (name, draw), terms in by_name.items():
            term = run.term(draw, run.guide.nodes(draw), terms, scaled=False)
            found[name] = found[name] + term if name in found else term
        return found

    def _stopped(
        self, run: TrainingRun, guide_trace: Trace, *, scaled: bool, apart: bool
    ) -> dict[tuple[str, str], Tensor]:
        """Return terms by the proposal whose density they are of, and the draw they vary with."""
        copies = self._copies[id(guide_trace)]()
        leaves = {name: draw_of(c) for name, c in copies.items() if draw_of(c).requires_grad}
        self._check_points(copies, set(map(id, leaves.values())))
        enumerated = run.plan.enumerated  # each an expectation of its own
        densities = {
            n: scale_and_mask(site_log_prob(n, c), run.scale(c) if scaled else 1.0)
            for n, c in copies.items()
            if n not in enumerated
        }
        for name, density in densities.items():
            if len(leaves) > 1 and enumerated and density.ndim > run.plan.mode.plate_dims:
                raise ValueError(
                    f"the guide's site {name!r} depends on {list(enumerated)}, which are enumerated"
                    ", and on other draws: no gradient is of those alone. Use pathwise gradients"
                )
        if not densities:
            return {}
        sums = {name: density.sum() for name, density in densities.items()}
        if not apart:
            sums = {"": torch.stack(list(sums.values())).sum()}
        terms = {(name, name): density.detach() for name, density in densities.items()}
        nodes = guide_trace.nodes
        for (name, draw), slope in _slopes(sums, leaves).items():
            value = draw_of(nodes[draw])
            change = slope * (value - value.detach())
            event = tuple(range(change.ndim - _event_ndim(nodes[draw]), change.ndim))
            change = change.sum(event) if event else change
            key = name or draw, draw
            terms[key] = terms[key] + change if key in terms else change
        return terms

    def _check_points(self, copies: Mapping[str, Node], drawn: set[int]) -> None:
        """Sort the Deltas: those that are parameters, and those that are functions of draws.

        Raises:
            ValueError: for one that is both, or whose log density depends on parameters: what
                flows to them is no score, and cannot be left out or weighted as one.
        """
        for name, copy in copies.items():
            if (point := point_of(copy["fn"])) is None:
                continue
            sources = _sources(point.v)
            if sources - drawn:
                self._points.add(name)
            mixed = sources - drawn and sources & drawn
            if mixed or _sources(point.log_density) - drawn:
                raise ValueError(
                    f"the guide's site {name!r} is a point made of other draws and of parameters; "
                    "gradients through draws alone ('stl', 'dreg') miss a part. Use pathwise ones"
                )

    def scale_gradients(self, run: TrainingRun, factor: Tensor) -> None:
        """Multiply what flows back to the draws by a factor [K, N] of particle and datum.

        Not to points that are parameters: they have no density, hence no score.
        """
        for k, trace in enumerate(run.guide.traces):
            for name, node in latent_nodes(trace):
                draw, event_ndim = draw_of(node), _event_ndim(node)
                if draw.requires_grad and name not in self._points:
                    spread = run.plan.mode.spread(factor, k, draw.ndim - event_ndim)
                    # A hook may not change the type of a gradient: data may be of another.
                    spread = spread.reshape(spread.shape + (1,) * event_ndim).to(draw.dtype)
                    draw.register_hook(functools.partial(torch.mul, spread))


def _slopes(
    sums: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Return the derivative of each sum by each leaf that it depends on."""
    found, inputs, several = {}, list(leaves.values()), len(sums) > 1
    for name, total in sums.items():
        if total.requires_grad and leaves:
            slopes = torch.autograd.grad(total, inputs, retain_graph=several, allow_unused=True)
            pairs = zip(leaves, slopes, strict=True)
            found.update({(name, draw): s for draw, s in pairs if s is not None})
    return found


def _sources(value: object) -> set[int]:
    """Return the leaves of a tensor's autograd graph, by identity."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return set()
    return {id(value)} if value.grad_fn is None else set(leaves_of(value))


def _event_ndim(node: Node) -> int:
    """Return the event dimensions of :func:`draw_of` a node."""
    return int(node["fn"].event_dim + draw_of(node).ndim - node["value"].ndim)


def _leaf(value: Tensor) -> Tensor:
    """Return a tensor of its own with the same numbers, to differentiate by."""
    value = value.detach()
    return value.requires_grad_() if value.is_floating_point() else value
