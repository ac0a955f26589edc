"""What is compared and refused before runs count: modes, values at once, rounding, edges, NaN."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Mapping
from typing import Literal, TypeAlias

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.particles.estimators import LogWeights
from pyro_vae.particles.modes import MODES, Loop
from pyro_vae.particles.run import Run, Runner
from pyro_vae.programs.answers import agree, largest_gap
from pyro_vae.programs.enumeration import enumerated
from pyro_vae.programs.enumeration_check import check_values
from pyro_vae.programs.masks import lift_masks
from pyro_vae.programs.messages import text_of, trace_of, warn_once
from pyro_vae.programs.nodes import is_enumerable, latent_nodes, sample_nodes
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.precision import rounding_of_parameters
from pyro_vae.programs.preimages import Preimage, preimage_of
from pyro_vae.programs.pyro_internals import unconstrained
from pyro_vae.programs.sites import Plate, SiteShape, Structure
from pyro_vae.programs.state import Look, unwrapped
from pyro_vae.programs.supports import edge_share, lost_share
from pyro_vae.programs.traces import GiveValues, site_log_prob, trace_guide, trace_model
from pyro_vae.programs.types import ModeName, Node, Particles, Program, Trace, Values

logger = logging.getLogger(__name__)
Names: TypeAlias = tuple[str, ...]

_MINIBATCHES = 8  # looked at, of a model that draws them itself
_SEED = 0  # of all runs: what is drawn beside the sites is the same in each
_ROUNDING = 1e-3  # nats of a datum, beyond which a site is scored in float64
# Nats of a datum that float32 parameters of a likelihood may cost before a warning.
_COARSE = 1e-2
_COARSE_LOSS = 0.05  # nats of a datum that a reported loss may be off by, before a warning
# Draws at the edge of a support that may be averaged over: their log weights are off by some nats.
EDGE_SHARE = 1e-3


class UnnamedDrawsError(ValueError):
    """A model or guide draws random numbers outside of sample statements."""


def choose_mode(
    runner: Runner,
    role: Literal["guide", "model"],
    particles: Particles,
    rows: slice,
    values: Values,
    reference: Tensor,
    score: Callable[[Run], Tensor],
) -> tuple[Runner, Run]:
    """Return the runner in the first mode that agrees with single particles, and its run.

    Args:
        runner: of a guide or a model.
        role: which of them, for messages.
        particles: the mode that is asked for; "auto" tries all.
        rows: of which data.
        values: of the particles.
        reference: log densities of these, run one by one, [K, N].
        score: returns the log densities of a run.

    Raises:
        UnnamedDrawsError: where the same latents have another density in each run.
        ValueError: where no mode agrees.
    """
    reasons, count = list[str](), len(reference)
    for name in candidates(runner, particles):
        chosen = runner.in_mode(name)
        with Look() as look:
            ran = chosen.run(rows, count, values)
            found = score(ran)
        if look.error is not None:
            # A shape that the network cannot take, said in its own way; the loop, which is the
            # reference and has already run, is always left to fall back on.
            reasons.append(f"{name}: {type(look.error).__name__}: {text_of(look.error)}")
        elif agree(reference, found):
            if name == "loop" and reasons:
                slow = "the %s runs particle by particle, which is slow: %s"
                warn_once(logger, (unwrapped(runner.program),), slow, role, "; ".join(reasons))
            return chosen, ran
        else:
            gap = largest_gap(reference, found)
            reasons.append(f"{name}: log densities differ from single particles by {gap:.3g} nats")
    if not agree(reference, score(runner.in_mode("loop").run(rows, count, values))):
        raise UnnamedDrawsError(
            f"the {role} draws random numbers outside of sample statements: its log density of the "
            "same latents is another in each run, but a weight needs one. Draw by pyro.sample, as "
            f"a latent; or, for dropout in training mode, call .eval() on the {role}'s modules; or "
            "train with a mean over particles (pv.ELBO), which is well defined"
        )
    raise ValueError(
        f"the {role}'s log density of several particles is not that of each alone "
        f"({'; '.join(reasons)}): it broadcasts wrongly over the particle dimension, the leftmost"
    )


def candidates(runner: Runner, particles: Particles) -> list[ModeName]:
    """Return the modes to try, in order."""
    if particles == "repeat":
        runner.in_mode("repeat")  # refuses a model that is one datum
    names = list(MODES) if particles == "auto" else [particles]
    if runner.mode.data_dim is None or runner.batch.size is None:
        names = [name for name in names if name != "repeat"] or ["loop"]
    return names


def warn_of_coarse_loss(model_trace: Trace, owners: tuple[Program, Program]) -> None:
    """Warn where float32 gives another loss; training goes on, because gradients mind less."""
    told = (
        "the loss is off by about %.2g nats for a datum: terms of the observed site %r are too "
        "large for the digits of float32. Gradients are little hurt by it, and bounds (pv.elbo, "
        "pv.iwae_bound) score such sites in float64; for a loss to trust, use float64 throughout"
    )
    observed = ((name, n) for name, n in sample_nodes(model_trace) if n["is_observed"])
    for name, node in observed:
        gap = 0.0
        # A distribution that cannot be had in float64 is passed over.
        with Look(), torch.no_grad(), pyro.validation_enabled(False):
            narrow, wide = (site_log_prob(name, node, double=double) for double in (False, True))
            gap = float((narrow.sum() - wide.sum()).abs()) / max((1, *narrow.shape[:1]))
        if gap > _COARSE_LOSS:
            warn_once(logger, owners, told, gap, name)


class DependentDataError(ValueError):
    """The density of a datum depends on the latents of other data."""

    @classmethod
    def check(cls, plate: Plate, wanted: Tensor, found: Tensor) -> None:
        """Raise it where densities of data, some of them with other values, are not as wanted."""
        if not agree(wanted, found):
            gap = largest_gap(wanted, found)
            raise cls(
                f"the density of a datum depends on the latents of other data, by up to {gap:.3g} "
                f"nats: data of plate {plate.name!r} have no weights of their own. Pass "
                "data_plate=False to treat the whole batch as one datum"
            )


def every_other(num_data: int, device: torch.device) -> Tensor:
    """Return which data have an odd number, [N]."""
    return torch.arange(num_data, device=device) % 2 == 1


def mix(odd: Tensor, first: Tensor, second: Tensor, axis: int) -> Tensor:
    """Return the values of ``second`` for odd data, of ``first`` for the rest; axis < 0."""
    return torch.where(odd.reshape(-1, *[1] * (-axis - 1)), second, first)


def check_independent(pair: Pair, model_trace: Trace, plate: Plate, nesting: int) -> None:
    """Raise DependentDataError where a datum's density depends on the latents of other data.

    The model is scored at two draws of the guide, and at a third that takes every other datum's
    values from the second: each datum must have the density that it had before.
    """
    first, preimages = _held(model_trace)
    axes = {
        name: node["value"].ndim - node["fn"].event_dim + plate.dim
        for name, node in latent_nodes(model_trace)
        if plate.name in {frame.name for frame in node["cond_indep_stack"]}
    }
    sizes = {first[name].shape[axis] for name, axis in axes.items() if axis >= 0}
    size = max(sizes, default=1)
    if size < 2:
        return
    local = {name for name, axis in axes.items() if axis >= 0 and first[name].shape[axis] == size}
    preimages = {name: preimage for name, preimage in preimages.items() if name not in local}

    def has_data(node: Node) -> bool:
        shape = node["fn"].batch_shape
        return len(shape) >= -plate.dim and shape[plate.dim] == size

    def score(values: Values) -> Tensor:
        torch.manual_seed(_SEED)
        trace = trace_of(GiveValues({**first, **values}, preimages)(pair.model), pair.batch)
        return Run([trace], Loop(nesting, plate.dim), 1).log_prob(has_data)[0]

    with Look() as look, torch.no_grad(), pyro.validation_enabled(False), poutine.block():
        torch.manual_seed(_SEED + 1)
        shared = {name: value for name, value in first.items() if name not in axes}
        drawn = dict(latent_nodes(trace_guide(GiveValues(shared)(pair.guide), pair.batch)))
        second = {name: drawn[name]["value"] for name in local & drawn.keys()}
        odd = every_other(size, first[next(iter(local))].device)
        mixed = {n: mix(odd, first[n], v, axes[n] - v.ndim) for n, v in second.items()}
        wanted = torch.where(odd, score(second), score({}))
        DependentDataError.check(plate, wanted, score(mixed))
    if isinstance(look.error, DependentDataError):
        raise look.error


def _held(
    trace: Trace, without: Container[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Preimage]]:
    """Return the values of latents, and of plates' subsamples, and the preimages that they keep."""
    nodes = {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and name not in without
    }
    kept = {name: p for name, node in nodes.items() if (p := preimage_of(node)) is not None}
    return {name: node["value"] for name, node in nodes.items()}, kept


def asking_enumeration(guide_trace: Trace) -> Names:
    """Return the proposals that ask to be enumerated; refuse several draws of a proposal."""
    asked = []
    for name, node in latent_nodes(guide_trace):
        count, how = node["infer"].get("num_samples"), node["infer"].get("enumerate")
        listed = (count is not None or how == "parallel") and is_enumerable(node["fn"])
        if listed and how == "parallel":
            asked.append(name)
        elif count is not None and not listed:
            raise ValueError(
                f"the guide's site {name!r} asks for {count} draws of its own ('num_samples'), for "
                f"pyro.infer.TraceEnum_ELBO alone. Give the loss num_particles={count} instead"
            )
    return tuple(asked)


def check_hidden(pair: Pair, hidden: Names, nesting: int) -> None:
    """Raise ValueError where a proposal depends on one that is to be summed out instead."""
    run = enumerated(pair.guide, hidden, -1 - nesting)
    with pair.looking():
        trace = trace_guide(run, pair.batch)
    for name, node in latent_nodes(trace):
        if name not in hidden and len(node["fn"].batch_shape) > nesting:
            raise ValueError(
                f"the guide's site {name!r} depends on {list(hidden)}, which ask to be enumerated: "
                "an importance weight sums them out in the model, and has no draw of them. Without "
                "infer={'enumerate': ...} in the guide they are drawn"
            )


def check_summed_out(
    pair: Pair, trace: Trace, names: Names, nesting: int, *, redrawn: bool
) -> None:
    """Raise ValueError where the values of summed-out latents do not run together as each alone.

    They are looked at in a trace of the model; where it draws its minibatch, other data in each
    run (``redrawn``), in some more.
    """
    traces = [trace]
    if redrawn:
        with pair.looking():
            for _ in range(_MINIBATCHES):
                drawn = trace_guide(pair.guide, pair.batch)
                traces.append(trace_model(pair.model, drawn, pair.batch))
    for each in traces:
        _check_values(pair, pair.model, each, names, nesting)


def check_enumerated(pair: Pair, names: Names, nesting: int) -> None:
    """Raise ValueError where there is no expectation over a guide's values, entry by entry.

    The values are weighted as those that are summed out are, and must run together as those do.
    """
    model_trace, guide_trace = pair.single.model_trace, pair.single.guide_trace
    expand = tuple(n for n in names if guide_trace.nodes[n]["infer"].get("expand"))
    for program, trace in ((pair.model, model_trace), (pair.guide, guide_trace)):
        try:
            _check_values(pair, program, trace, names, nesting, expand)
        except ValueError as error:
            raise ValueError(
                f"the guide enumerates {list(names)}, over which there is no expectation entry by "
                "entry. Leave infer={'enumerate': ...} out, and they are drawn, for "
                f"pv.ELBO(estimator='score'). What was found: {error}"
            ) from error


def _check_values(
    pair: Pair, program: Program, trace: Trace, names: Names, nesting: int, expand: Names = ()
) -> None:
    """Raise ValueError where the values of some sites do not run together as each alone."""
    others, preimages = _held(trace, names)
    ndim = {name: trace.nodes[name]["value"].ndim for name in names}

    def alone(values: Values) -> Trace:
        own = {n: v.reshape(v.shape[v.ndim - ndim[n] :]) for n, v in values.items()}
        return trace_of(GiveValues({**others, **own}, preimages)(program), pair.batch)

    with pair.evaluating():
        at_once = enumerated(program, names, -1 - nesting, expand)
        together = trace_of(GiveValues(others, preimages)(at_once), pair.batch)
        check_values(lift_masks(together, names), alone, nesting)


def coarse_sites(run: Run) -> frozenset[str]:
    """Return the sites whose log density of a datum float32 gives wrong by over 0.001 nats."""
    found = set()
    for name, nodes in run.sites():
        with Look():  # a distribution may be made for one dtype
            if _rounding(run, name, nodes) > _ROUNDING:
                found.add(name)
    return frozenset(found)


def _rounding(run: Run, name: str, nodes: list[Node]) -> float:
    """Return how far a site's log density of a datum is from that in float64, at most."""
    narrow, wide = ([site_log_prob(name, n, double=d) for n in nodes] for d in (False, True))
    if narrow[0].dtype == wide[0].dtype:
        return 0.0
    if run.summed_out:  # with dimensions of its own: on average
        pairs = zip(narrow, wide, strict=True)
        total = torch.stack([(a - b).abs().nan_to_num().sum() for a, b in pairs]).sum()
        return float(total) / (run.num_particles * run.num_data)
    gap = run.by_particle(narrow) - run.by_particle(wide)
    return float(gap.abs().nan_to_num().max())


def warn_of_coarse_parameters(model: Runner, run: Run) -> None:
    """Warn where a likelihood's parameters are too coarse, though it is scored in float64."""
    told = (
        "the model gives the likelihood of %r in float32: its rounding moves the log density of a "
        "datum by about %.2g nats, which no standard error counts. Use float64 throughout"
    )
    pairs, nodes = run.num_data * run.num_particles // len(run.traces), run.traces[0].nodes
    for name in (name for name in model.double if nodes[name]["is_observed"]):
        moved = rounding_of_parameters(nodes[name]["fn"], nodes[name]["value"])
        # Of all together, whose parameters are rounded apart.
        per_datum = 0.0 if moved is None else float(moved) / pairs**0.5
        if per_datum > _COARSE:
            warn_once(logger, (unwrapped(model.program),), told, name, per_datum)


def refuse_edges(
    structure: Structure, shapes: Mapping[str, SiteShape], rows: slice, values: Values
) -> None:
    """Raise ValueError for draws that round to an edge, where log densities are made up.

    Draws that keep their preimages, as ``shapes`` say, are scored by these.
    """
    kept = {shapes[name].preimage_of for name in values if name in shapes}
    for name, value in values.items():
        site = structure.sites.get(name)
        if site is None or name in kept:
            continue
        dim = structure.data_dim
        axis = None if dim is None else dim - len(site.event_shape)
        share = edge_share(site.fn, value, rows, axis)
        holder = unconstrained(name)  # where Pyro's AutoNormal keeps what it drew
        if holder in values:
            share = max(share, lost_share(site.fn, value, values[holder]))
        if share > EDGE_SHARE:
            raise ValueError(
                f"{share:.2g} of the guide's draws of latent site {name!r} lie at the edge of what "
                f"{value.dtype} can hold of its support ({site.support_text}), where no density is "
                "to be trusted. Use float64, a prior that is less sparse, or a guide of pyro_vae, "
                "whose draws are scored before they round"
            )


def refuse_nan(rows: slice, weights: LogWeights) -> None:
    """Raise ValueError for weights that are NaN or +inf; -inf is a density of zero."""
    bad = (weights.total.isnan() | (weights.total == math.inf)).any(0)
    if not bool(bad.any()):
        return
    parts = (weights.log_likelihood, weights.log_prior, weights.log_guide)
    named = zip(("log p(x | z)", "log p(z)", "log q(z | x)"), parts, strict=True)
    through = [name for name, part in named if not bool(torch.isfinite(part).all())]
    index = torch.nonzero(bad).flatten()[:5] + rows.start
    raise ValueError(
        f"the log weights of data {index.tolist()} ({int(bad.sum())} of {bad.shape[0]} in the "
        f"block) are NaN or infinite, through {', '.join(through)}: a draw is at the edge of a "
        "support, or overflows. Try float64, or bound the scale there"
    )
