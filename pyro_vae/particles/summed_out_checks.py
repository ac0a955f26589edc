"""Summed-out latents and enumerated proposals in training: whether all their values can run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_vae.programs.enumeration import enumerated
from pyro_vae.programs.enumeration_check import check_values
from pyro_vae.programs.masks import lift_masks
from pyro_vae.programs.messages import trace_of
from pyro_vae.programs.nodes import is_enumerable, latent_nodes
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.preimages import preimage_of
from pyro_vae.programs.traces import GiveValues, trace_guide, trace_model
from pyro_vae.programs.types import Program, Trace, Values

_MINIBATCHES = 8  # looked at, of a model that draws them itself


def asking_enumeration(guide_trace: Trace) -> tuple[str, ...]:
    """Return the proposals that ask to be enumerated."""
    return tuple(
        name
        for name, node in latent_nodes(guide_trace)
        if node["infer"].get("enumerate") == "parallel" and is_enumerable(node["fn"])
    )


def check_local_samples(guide_trace: Trace) -> None:
    """Raise ValueError for proposals that ask for several draws of their own."""
    for name, node in latent_nodes(guide_trace):
        count = node["infer"].get("num_samples")
        if count is not None and not is_enumerable(node["fn"]):
            raise ValueError(
                f"the guide's site {name!r} asks for {count} draws of its own "
                "(infer={'num_samples': ...}), which are for pyro.infer.TraceEnum_ELBO alone. "
                f"Leave it out, and give the loss num_particles={count}"
            )


def check_hidden(pair: Pair, hidden: tuple[str, ...], nesting: int) -> None:
    """Raise ValueError where a proposal depends on one that is to be summed out instead."""
    run = enumerated(pair.guide, hidden, -1 - nesting)
    with pair.looking():
        trace = trace_guide(run, pair.batch)
    for name, node in latent_nodes(trace):
        if name not in hidden and len(node["fn"].batch_shape) > nesting:
            raise ValueError(
                f"the guide's site {name!r} depends on {list(hidden)}, which ask to be "
                "enumerated; an importance weight sums them out in the model, and has no "
                "draw of them. Leave infer={'enumerate': ...} out in the guide, and they are drawn"
            )


def check_summed_out(
    pair: Pair, trace: Trace, names: tuple[str, ...], nesting: int, *, draws_minibatch: bool
) -> None:
    """Raise ValueError where the values of summed-out latents do not run together as each alone.

    Args:
        pair: model, guide and batch.
        trace: of the model under the guide.
        names: the latents.
        nesting: plate dimensions of guide and model.
        draws_minibatch: whether the model draws its minibatch, other data in each run.
    """
    traces = [trace]
    if draws_minibatch:
        with pair.looking():
            traces += [
                trace_model(pair.model, trace_guide(pair.guide, pair.batch), pair.batch)
                for _ in range(_MINIBATCHES)
            ]
    for each in traces:
        _check_values(pair, pair.model, each, names, nesting)


def check_enumerated(pair: Pair, names: tuple[str, ...], nesting: int) -> None:
    """Raise ValueError where there is no expectation over a guide's values, entry by entry.

    The values are weighted as those that are summed out are, and must run together as those do.
    """
    single = pair.single
    infer = {name: single.guide_trace.nodes[name]["infer"] for name in names}
    expand = tuple(name for name in names if infer[name].get("expand"))
    for program, trace in ((pair.model, single.model_trace), (pair.guide, single.guide_trace)):
        try:
            _check_values(pair, program, trace, names, nesting, expand)
        except ValueError as error:
            raise ValueError(
                f"the guide enumerates {list(names)}, over which there is no expectation entry by "
                "entry. Leave infer={'enumerate': ...} out in the guide and they are drawn, with "
                f"pv.ELBO(estimator='score'). What was found: {error}"
            ) from error


def _check_values(
    pair: Pair,
    program: Program,
    trace: Trace,
    names: tuple[str, ...],
    nesting: int,
    expand: tuple[str, ...] = (),
) -> None:
    """Raise ValueError where the values of some sites do not run together as each alone."""
    others = {  # the model's own minibatch among them
        name: node["value"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and name not in names
    }
    kept = {name: preimage_of(trace.nodes[name]) for name in others}
    preimages = {name: preimage for name, preimage in kept.items() if preimage is not None}
    ndim = {name: trace.nodes[name]["value"].ndim for name in names}

    def run(fn: Program, values: Values) -> Any:
        give = GiveValues({**others, **values}, preimages)
        return trace_of(give(fn), pair.batch)

    def alone(values: Mapping[str, Tensor]) -> Any:
        single = {n: v.reshape(v.shape[v.ndim - ndim[n] :]) for n, v in values.items()}
        return run(program, single)

    with pair.evaluating():
        together = run(enumerated(program, names, -1 - nesting, expand), {})
        check_values(lift_masks(together, names), alone, nesting)
