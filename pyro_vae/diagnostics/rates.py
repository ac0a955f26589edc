"""The rate of a guide, site by site and number by number, in closed form where there is one.

Of each particle and datum; the mean over particles is KL(q(z | x), p(z)). Earlier draws, on which
the proposal and the prior of a later site may depend, are the particle's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.diagnostics.units import units_of
from pyro_vae.losses.kl import analytic_kl, factors, kl_per_dimension
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.run import Run, is_latent
from pyro_vae.programs.answers import agree
from pyro_vae.programs.masks import lift_masks
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.pyro_internals import unconstrained
from pyro_vae.programs.state import Look
from pyro_vae.programs.traces import site_log_prob
from pyro_vae.programs.types import Node, Values

_KL = Callable[[Node, Node | None], tuple[Tensor | None, str]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Particles of some data, few enough for one run of guide and model.

    Attributes:
        rows: which data.
        values: latent site to its draws, as :meth:`Evaluator.draw` returns them.
        log_weights: log w, [K, n].
        log_likelihood: log p(x | z), [K, n].
        guide: the guide's run, given the values.
        model: the model's run, likewise.
    """

    rows: slice
    values: Values
    log_weights: Tensor
    log_likelihood: Tensor
    guide: Run
    model: Run


@dataclass(frozen=True, slots=True)
class SiteRate:
    """log q - log p of a latent site, or its expectation given earlier draws, in nats.

    Attributes:
        total: [K, n].
        units: [K, n, d], of each of its numbers; [K, n, 1] where it does not factorize.
        there: [K, n, d], one where the unit is there, zero where a mask leaves it out.
        labels: of the units.
        closed: whether it has a closed form given earlier draws.
    """

    total: Tensor
    units: Tensor
    there: Tensor
    labels: list[str]
    closed: bool


def in_common_mode(evaluator: Evaluator) -> Evaluator:
    """Return an evaluator whose guide and model run their particles in one mode.

    Then the nodes of a site in both have one shape. Where the modes differ, that of the repeated
    batch is taken if both have the densities in it that they have in their own; a loop else.
    """
    modes = set(evaluator.modes.values())
    if len(modes) == 1:
        return evaluator
    rows = evaluator.data_blocks()[0]
    values, log_guide = evaluator.draw(rows, 2, (Purpose.RATES_MODE,))
    log_joint = torch.stack(evaluator.score_model(rows, values)).sum(0)
    repeated = evaluator.in_mode("loop" if "loop" in modes else "repeat")
    with Look(), evaluator.evaluating():
        found = torch.stack(repeated.model_given(rows, values)).sum(0)
        if agree(log_guide, repeated.guide_given(rows, values)) and agree(log_joint, found):
            return repeated
    return evaluator.in_mode("loop")


def pieces_of(evaluator: Evaluator, chunk: Chunk, chunk_size: int | None = None) -> Iterator[Piece]:
    """Yield the particles of a chunk, as many at once as the model scores at once.

    Args:
        evaluator: one :func:`in_common_mode`; the chunk may be of another.
        chunk: particles of a block of data.
        chunk_size: pairs (particle, datum) in a piece, but never less than a particle of all data.
    """
    total = chunk.weights.num_particles
    step = max(1, (chunk_size or evaluator.chunk_pairs) // chunk.weights.num_data)
    for k in range(0, total, step):
        some = slice(k, min(k + step, total))
        values = {name: value[some] for name, value in chunk.values.items()}
        terms = chunk.weights.total[some], chunk.weights.log_likelihood[some]
        with evaluator.evaluating():
            guide = evaluator.guide.run(chunk.rows, some.stop - k, values)
            model = evaluator.run_model(chunk.rows, values)
            for trace in (*guide.traces, *model.traces):
                lift_masks(trace)  # a closed form is of distributions without
        yield Piece(chunk.rows, values, terms[0], terms[1], guide, model)


def rates_of(evaluator: Evaluator, piece: Piece) -> dict[str, SiteRate]:
    """Return the rates of a piece by site, of all as one where they have no rates of their own.

    Their sum is log q - log p(z) in expectation.
    """
    with evaluator.evaluating():
        helpers = _sites_apart(evaluator, piece)
        found = {name: _of_site(evaluator, piece, name, helpers[name]) for name in helpers}
        return found or _as_one(evaluator, piece)


# --- one site after the other


def _sites_apart(evaluator: Evaluator, piece: Piece) -> dict[str, str]:
    """Return the latents that have a rate each, with the auxiliary site that belongs to it, or "".

    Empty where they have none: a guide that samples another site first, of which the latents are
    functions, or a model that sums latents out.
    """
    guide, model = ([name for name, _ in run.latents()] for run in (piece.guide, piece.model))
    helpers = {name: unconstrained(name) for name in model if unconstrained(name) in guide}
    others = set(guide) - set(model) - set(helpers.values())
    if others or evaluator.pair.summed_out:
        return {}
    return {name: helpers.get(name, "") for name in model}


def _as_one(evaluator: Evaluator, piece: Piece) -> dict[str, SiteRate]:
    guide, model = piece.guide, piece.model
    name = ", ".join(name for name, _ in model.latents() if name not in model.summed_out)
    if not name:  # all that there is is summed out
        return {}
    rate = evaluator.log_guide(guide, piece.rows, piece.values) - model.log_prob(is_latent)
    units = rate.unsqueeze(-1)
    return {name: SiteRate(rate, units, torch.ones_like(units), [name], closed=False)}


def _of_site(evaluator: Evaluator, piece: Piece, name: str, helper: str) -> SiteRate:
    guide, model = piece.guide, piece.model
    pairs = list(zip(guide.nodes(name), model.nodes(name), strict=True))
    mask, event_ndim = model.masks().get(name), guide.shapes[name].event_ndim
    kls = None if helper else _closed(analytic_kl, pairs)
    if kls is not None:
        masked = [_masked(kl, p["mask"]) for kl, (_, p) in zip(kls, pairs, strict=True)]
        total = guide.by_particle(masked)
    else:
        total = guide.term(name, mask) - model.term(name)
        total = total + guide.term(helper, mask) if helper else total
    units = None if helper else _closed(kl_per_dimension, pairs) or _sampled(name, pairs)
    seen = torch.ones((), dtype=torch.bool, device=total.device)
    if mask is not None:
        seen = mask.reshape(*mask.shape, *[1] * event_ndim)

    def numbers(value: Tensor) -> tuple[Tensor, list[str]]:
        return units_of(evaluator, name, value, guide.num_particles, guide.num_data)

    if units is not None:
        unfolded = guide.mode.unfold(units, event_ndim, guide.num_particles)
        rates, labels = numbers(torch.where(seen, unfolded, 0.0))
        there, _ = numbers(torch.ones_like(unfolded) * seen)
    else:
        rates, labels = total.unsqueeze(-1), [name]
        there = torch.ones_like(rates)
        if mask is not None:  # as long as one of its entries is
            there = there * numbers(seen)[0].any(-1, keepdim=True)
    return SiteRate(total, rates, there, labels, kls is not None)


def _closed(kl: _KL, pairs: list[tuple[Node, Node]]) -> list[Tensor] | None:
    """Return a closed form for each trace, masks and scales aside; None where there is none."""
    found = []
    for q, p in pairs:
        # A bound has no scales, and the masks are the model's, on both.
        one, _ = kl({**q, "scale": 1.0, "mask": None}, {**p, "scale": 1.0, "mask": None})
        if one is None:
            return None
        found.append(one)
    return found


def _sampled(name: str, pairs: list[tuple[Node, Node]]) -> list[Tensor] | None:
    """Return log q - log p of each number of a draw; None where a side does not factorize."""
    found = []
    for nodes in pairs:
        scalars = [factors(node["fn"]) for node in nodes]
        if any(fn is None for fn in scalars):
            return None
        terms = [
            site_log_prob(name, {**node, "fn": fn, "mask": None})
            for node, fn in zip(nodes, scalars, strict=True)
        ]
        if torch.broadcast_shapes(terms[0].shape, terms[1].shape) != terms[0].shape:
            return None  # a proposal that counts for several latents
        found.append(terms[0] - terms[1])
    return found


def _masked(term: Tensor, mask: Tensor | bool | None) -> Tensor:
    if mask is None or mask is True:
        return term
    return torch.where(torch.as_tensor(mask, device=term.device), term, 0.0)
