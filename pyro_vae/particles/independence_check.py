"""Whether the data of a plate have densities of their own, where each particle runs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.particles.modes import per_datum
from pyro_vae.programs.agreement import agree, largest_gap
from pyro_vae.programs.nodes import latent_nodes, sample_nodes
from pyro_vae.programs.plain_errors import trace_of
from pyro_vae.programs.preimages import preimage_of
from pyro_vae.programs.pyro_internals import is_deterministic
from pyro_vae.programs.sites import Plate
from pyro_vae.programs.state import Look
from pyro_vae.programs.traces import GiveValues, site_log_prob, trace_guide

__all__ = ["DependentDataError", "check_independent", "every_other", "mix"]

_SEED = 0  # of all runs: what is drawn beside the sites is the same in each


class DependentDataError(ValueError):
    """The density of a datum depends on the latents of other data."""

    def __init__(self, plate: Plate, gap: float) -> None:
        super().__init__(
            f"the density of a datum depends on the latents of other data, by up to {gap:.3g} "
            f"nats: the data of plate {plate.name!r} have no weights of their own. Pass "
            "data_plate=False to treat the whole batch as one datum"
        )


def every_other(num_data: int, device: torch.device) -> Tensor:
    """Return which data have an odd number, [N]."""
    return torch.arange(num_data, device=device) % 2 == 1


def mix(odd: Tensor, first: Tensor, second: Tensor, axis: int) -> Tensor:
    """Return the values of ``second`` for the data with an odd number, of ``first`` for the rest.

    Args:
        odd: from :func:`every_other`, [N].
        first: values.
        second: values.
        axis: their axis of the data, negative.
    """
    return torch.where(odd.reshape(-1, *[1] * (-axis - 1)), second, first)


def check_independent(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    model_trace: Any,
    plate: Plate,
    nesting: int,
    args: Any,
    kwargs: Any,
) -> None:
    """Raise DependentDataError where a datum's density depends on the latents of other data.

    The model is scored at two draws of the guide, and at a third that takes every other datum's
    values from the second: each datum must have the density that it had before.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        model_trace: of the model under the guide.
        plate: the data plate.
        nesting: plate dimensions of guide and model.
        args: their arguments.
        kwargs: their keyword arguments.
    """
    nodes = {  # the subsamples of plates among them
        name: node
        for name, node in model_trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
    }
    first = {name: node["value"] for name, node in nodes.items()}
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
    kept = {name: preimage_of(nodes[name]) for name in nodes.keys() - local}
    preimages = {name: preimage for name, preimage in kept.items() if preimage is not None}

    def score(values: Mapping[str, Tensor]) -> Tensor:
        torch.manual_seed(_SEED)
        trace = trace_of(GiveValues({**first, **values}, preimages)(model), args, kwargs)
        terms = [
            per_datum(term, max(nesting, term.ndim), plate.dim, leading=0)
            for name, node in sample_nodes(trace)
            if not is_deterministic(node)
            for term in (site_log_prob(name, node, scaled=False),)
            if term.ndim >= -plate.dim and term.shape[plate.dim] == size
        ]
        return torch.stack(terms).sum(0)

    gap = 0.0
    with Look(), torch.no_grad(), pyro.validation_enabled(False), poutine.block():
        torch.manual_seed(_SEED + 1)
        shared = {name: value for name, value in first.items() if name not in axes}
        drawn = dict(latent_nodes(trace_guide(GiveValues(shared)(guide), args, kwargs)))
        second = {name: drawn[name]["value"] for name in local & drawn.keys()}
        device = model_trace.nodes[next(iter(local))]["value"].device
        odd = every_other(size, device)
        mixed = {
            name: mix(odd, first[name], value, axes[name] - value.ndim)
            for name, value in second.items()
        }
        wanted = torch.where(odd, score(second), score({}))
        found = score(mixed)
        if not agree(wanted, found):
            gap = largest_gap(wanted, found)
    if gap:
        raise DependentDataError(plate, gap)
