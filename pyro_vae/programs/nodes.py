"""Sample statements of a trace: which there are, and what their distributions are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.programs.pyro_internals import is_deterministic, mask_inside
from pyro_vae.programs.types import Distribution, Mask, Node, Trace

_WRAPPERS = ("Independent", "MaskedDistribution", "ExpandedDistribution")  # torch's and Pyro's


def is_subsample(node: Node) -> bool:
    """Return whether a statement is a plate's draw of a subsample."""
    return site_is_subsample(cast("Any", node))


def sample_nodes(trace: Trace) -> Iterator[tuple[str, Node]]:
    """Yield the (name, node) of a trace's sample statements, plates' subsamples left out."""
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not is_subsample(node):
            yield name, node


def latent_nodes(trace: Trace) -> Iterator[tuple[str, Node]]:
    """Yield the (name, node) of a trace's sample statements that are not observed."""
    return ((name, node) for name, node in sample_nodes(trace) if not node["is_observed"])


def batch_nesting(*traces: Trace) -> int:
    """Return how many batch dimensions sites take up: those of vectorized plates, and others.

    The dimensions left of all of them are free for particles and the values of discrete sites.
    """
    depths = [0]
    for _, node in (found for trace in traces for found in sample_nodes(trace)):
        depths += [-frame.dim for frame in node["cond_indep_stack"] if frame.vectorized]
        if not is_deterministic(node):
            depths.append(len(node["fn"].batch_shape))
    return max(depths)


def guide_factors(guide_trace: Trace) -> list[str]:
    """Return the names of a guide's pyro.factor statements."""
    observed = [(name, node) for name, node in sample_nodes(guide_trace) if node["is_observed"]]
    return [name for name, node in observed if isinstance(node["fn"], dist.Unit)]


@contextlib.contextmanager
def drawn_subsamples() -> Iterator[set[str]]:
    """Collect the names of plates that draw a subsample inside the context.

    Plates whose subsample is given, by subsample=... or by a replayed trace, are left out.
    """
    drawn: set[str] = set()

    class Watch(Messenger):
        def _pyro_sample(self, msg: Node) -> None:
            drawn_here = is_subsample(msg) and msg["value"] is None
            if drawn_here and msg["fn"].subsample_size not in (None, -1, msg["fn"].size):
                drawn.add(msg["name"])

    with Watch():
        yield drawn


def plain_distribution(fn: Any) -> Any:
    """Return a distribution without Independent, Masked and Expanded around it."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in _WRAPPERS:
        fn = fn.base_dist
    return fn


def plain_support(fn: Any) -> Any:
    """Return the support of one number or event of a distribution; None where none is declared."""
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return None
    while hasattr(support, "base_constraint"):  # independent, or of a mixture
        support = support.base_constraint
    return support


def is_point(fn: object) -> bool:
    """Return whether a distribution is a Delta, which may hide a density."""
    return point_of(fn) is not None


def point_of(fn: object) -> dist.Delta | None:
    """Return the Delta that a distribution is, or wraps; None for another."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn if isinstance(fn, dist.Delta) else None


def is_circular(fn: Distribution) -> bool:
    """Return whether a density is periodic; torch says of its support that it is the reals."""
    kinds = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
    return isinstance(plain_distribution(fn), kinds)


def is_enumerable(fn: Distribution) -> bool:
    """Return whether a distribution is discrete and its finitely many values can be listed."""
    listed = getattr(fn, "has_enumerate_support", False)
    if not listed or isinstance(plain_distribution(fn), dist.Empirical):
        return False  # an Empirical lists its samples, of which several may be one value
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError:  # total counts of a Binomial that differ, event dimensions
        return False
    return True


def is_masked(fn: Distribution) -> bool:
    """Return whether there is a mask inside of a distribution (fn.mask(...))."""
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            return True
        fn = fn.base_dist
    return False


def left_out(fn: Distribution, mask: Mask, device: torch.device) -> Tensor:
    """Return which values of a sample statement masks leave out, ``[*batch, *event]``.

    Args:
        fn: its distribution, with the masks inside.
        mask: that on the statement (poutine.mask).
        device: of the result.
    """
    out = torch.zeros((*fn.batch_shape, *fn.event_shape), dtype=torch.bool, device=device)
    masks = [(mask, fn.event_dim)]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((mask_inside(fn), fn.event_dim))
        fn = fn.base_dist
    for seen, events in masks:
        if seen is not None:
            there = torch.as_tensor(seen, device=device)
            out = out | ~there.reshape((*there.shape, *[1] * events))
    return out
