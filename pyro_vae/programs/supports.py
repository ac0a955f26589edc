"""What lies in the support of a distribution: outside, the density is zero, not a formula's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint

from pyro_vae.programs.nodes import is_circular, latent_nodes, plain_distribution, plain_support
from pyro_vae.programs.types import Distribution, Mask, Node, Trace

# Sums of float32 shares, or their norms, are off by more than the 1e-6 that torch allows.
_SUM_TOLERANCE = 1e-3
# Of matrices, whether they lie in it is a matter of rounding: what is drawn there lies there.
_MATRICES = (
    "positive_definite positive_semidefinite symmetric square sphere lower_triangular "
    "lower_cholesky corr_cholesky corr_matrix"
)
_OF_ROUNDING = tuple(type(getattr(dist.constraints, name)) for name in _MATRICES.split())
# Of fewer dimensions than the numbers that they are made of.
_SURFACES = (type(constraints.simplex), type(dist.constraints.sphere))
# On these nothing is to be looked at. (An independent one is unwrapped before.)
_ANYWHERE = (type(constraints.real), *_OF_ROUNDING)


def support_of(fn: Distribution) -> Any:
    """Return the support of one number or event of a distribution; None where none is declared."""
    support = plain_support(fn)
    return None if constraints.is_dependent(support) else support


def is_discrete(fn: Distribution) -> bool | None:
    """Return whether a distribution has masses, not densities; None where it does not say."""
    while isinstance(fn, td.TransformedDistribution) or plain_distribution(fn) is not fn:
        fn = fn.base_dist
    if isinstance(fn, dist.Delta | dist.Empirical | dist.Unit):
        return None
    support = support_of(fn)
    return None if support is None else bool(support.is_discrete)


def is_fixed(fn: Distribution) -> bool:
    """Return whether a support is one and the same whatever the distribution's parameters are."""
    support = support_of(fn)
    return support is None or not any(isinstance(b, Tensor) for b in vars(support).values())


def inside(fn: Distribution, value: Tensor) -> Tensor | None:
    """Return which values lie in a distribution's support; None where all do, or it is not known.

    NaN counts as inside, where its density is NaN too.

    Of the shape of the value, ``[..., *event]``, without the event.
    """
    if (found := _inside(fn, value)) is None:
        return None
    return found | _over_events(value.isnan(), len(fn.event_shape), torch.any)


def _inside(fn: Distribution, value: Tensor) -> Tensor | None:
    if is_circular(fn):
        return None  # a period is as good as another
    plain, events = plain_distribution(fn), len(fn.event_shape)
    if not _is_mapped(plain):
        return _satisfied(support_of(fn), value, events)
    # Torch calls the support of loc + scale * Beta(a, b) the reals: look at what goes in, too.
    parts, base = flat_transforms(plain.transforms), plain.base_dist
    ends = isinstance(support_of(base), _ANYWHERE)
    found = None
    while parts and not (ends and all(isinstance(t.codomain, _ANYWHERE) for t in parts)):
        last = parts.pop()
        found = both(found, _satisfied(last.codomain, value, events))
        value = last.inv(value)
        events += last.domain.event_dim - last.codomain.event_dim
    inner = None if ends else _inside(base, value)
    inner = None if inner is None else _over_events(inner, events - len(base.event_shape))
    return both(found, inner)


def _satisfied(support: Constraint | None, value: Tensor, events: int) -> Tensor | None:
    """Return which events (dimensions at the right) a constraint holds for; None for all."""
    while inner := getattr(support, "base_constraint", None):
        support = inner
    if support is None or isinstance(support, _ANYWHERE):
        return None
    if isinstance(support, type(constraints.simplex)):
        found = (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() < _SUM_TOLERANCE)
    else:
        found = support.check(value)
    return _over_events(found, events - support.event_dim)


def both(first: Mask, second: Mask) -> Any:
    """Return where two conditions hold, of which None holds everywhere."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _is_mapped(fn: Distribution) -> bool:
    """Return whether a distribution is another one mapped, and says no more of its support."""
    return (
        isinstance(fn, td.TransformedDistribution)
        and type(fn).support is td.TransformedDistribution.support
        and all(t.bijective for t in fn.transforms)
    )


def flat_transforms(transforms: Iterable[td.Transform]) -> list[td.Transform]:
    """Return transforms without Compose and Independent around them, and without identities."""
    parts: list[td.Transform] = []
    for transform in transforms:
        if isinstance(transform, td.ComposeTransform):
            parts.extend(flat_transforms(transform.parts))
        elif isinstance(transform, td.IndependentTransform):
            parts.extend(flat_transforms([transform.base_transform]))
        elif plain_affine(transform) != (0, 1):
            parts.append(transform)
    return parts


def plain_affine(transform: td.Transform) -> tuple[float, float] | None:
    """Return location and scale of an affine transform by plain numbers; None for any other."""
    if type(transform) is not td.AffineTransform:
        return None
    loc, scale = transform.loc, transform.scale
    return None if isinstance(loc, Tensor) or isinstance(scale, Tensor) else (loc, scale)


def _over_events(
    found: Tensor, events: int, by: Callable[[Tensor, int], Tensor] = torch.all
) -> Tensor:
    return by(found.flatten(-events), -1) if events > 0 else found


def supported_log_prob(fn: Distribution, value: Tensor) -> Tensor:
    """Return the log density of values, -inf outside the support, whatever the formula says.

    Nothing flows back from there: the formula does not see these values.
    """
    found = inside(fn, value)
    if found is None:
        return fn.log_prob(value)
    events, other = found.reshape((*found.shape, *[1] * len(fn.event_shape))), value
    with contextlib.suppress(NotImplementedError):
        other = value_of(fn).to(value)
    log_prob = fn.log_prob(torch.where(events, value, other))
    return torch.where(found, log_prob, -math.inf)


def value_of(fn: Distribution) -> Tensor:
    """Return a value of the support that broadcasts with those of the distribution.

    Raises:
        NotImplementedError: where no value of the support is known.
    """
    leaf = plain_distribution(fn)
    support = support_of(leaf)
    if support is None:
        return torch.zeros(())
    if isinstance(support, type(constraints.real)) and _is_mapped(leaf):
        value = value_of(leaf.base_dist) + torch.zeros(leaf.base_dist.event_shape)
        for transform in leaf.transforms:
            value = transform(value)
        return value.detach()
    if not support.is_discrete:
        transform = biject_to(support)
        shape = leaf.event_shape if support.event_dim else ()
        return transform(torch.zeros(transform.inverse_shape(shape))).detach()
    if support.event_dim:  # counts, or one hot: all in the first category
        total = torch.as_tensor(getattr(support, "upper_bound", 1)).unsqueeze(-1)
        return nn.functional.pad(total, (0, leaf.event_shape[-1] - 1))
    return torch.as_tensor(getattr(support, "lower_bound", 0)).detach()


def edge_share(
    fn: Distribution, value: Tensor, rows: slice = slice(None), axis: int | None = None
) -> float:
    """Return the share of draws that are within rounding of an edge of a support.

    Draws of a Beta, a Gamma or a Dirichlet are cut off there.

    Args:
        fn: a distribution on that support.
        value: draws.
        rows: which data they are of.
        axis: of the data in values, negative; None where there is none.
    """
    support = support_of(fn)
    if support is None or support.is_discrete or is_circular(fn) or not value.is_floating_point():
        return 0.0
    finest = torch.finfo(value.dtype)
    ends = [getattr(support, n) for n in ("lower_bound", "upper_bound") if hasattr(support, n)]
    if isinstance(support, type(constraints.simplex)):
        ends, value = [0.0], value.min(-1).values
    worst = 0.0
    for end in map(torch.as_tensor, ends):
        if axis is not None and end.ndim >= -axis and end.shape[axis] > 1:
            end = end.movedim(axis, 0)[rows].movedim(0, axis)
        least = (end.abs() * 4 * finest.eps).clamp(min=10 * finest.tiny).to(value)
        worst = max(worst, float(((value - end).abs() < least).double().mean()))
    return worst


def lost_share(fn: Distribution, value: Tensor, coordinates: Tensor) -> float:
    """Return the share of draws from which the coordinates that they were made of cannot be told.

    The distribution is on a support that torch maps the reals to.
    """
    back = biject_to(fn.support).inv(value)
    lost = (back - coordinates).abs() > 1e-3 * (1 + coordinates.abs())
    return float((lost | back.isnan()).double().mean())


class SameMeasure(Messenger):
    """Refuses a density that is proposed for a mass, or a mass for a density, in a model's run.

    Their ratio is no weight. A point, which a Delta is, counts as either. And where the model
    cannot go on with a value outside a support, the error says where it comes from.

    Args:
        guide_trace: of the guide that the model is replayed with.
    """

    def __init__(self, guide_trace: Trace) -> None:
        super().__init__()
        self._proposals = dict(latent_nodes(guide_trace))
        self._outside: list[str] = []

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, ValueError) and self._outside:
            raise ValueError(
                f"the guide proposes values of {', '.join(self._outside)} outside the support of "
                f"the model's distribution, with which the model cannot go on: {error}"
            ) from error

    def _pyro_post_sample(self, msg: Node) -> None:
        if msg["is_observed"] or msg["name"] not in self._proposals:
            return
        within = inside(msg["fn"], msg["value"])
        if within is not None and not bool(within.all()):
            self._outside.append(
                f"{msg['name']!r} ({type(plain_distribution(msg['fn'])).__name__})"
            )

    def check(self, node: Node) -> None:
        """Raise ValueError where a site of the model and its proposal have no ratio."""
        name = node["name"]
        if node["is_observed"] or name not in self._proposals:
            return
        mine, theirs = node["fn"], self._proposals[name]["fn"]
        kinds = [type(plain_distribution(fn)).__name__ for fn in (mine, theirs)]
        if _is_apart(mine, theirs):
            raise ValueError(
                f"latent site {name!r} lies on a surface in the model ({kinds[0]}), and its parts "
                f"are drawn apart in the guide ({kinds[1]}), where the ratio of the densities is "
                "no weight. Propose a distribution on the same support"
            )
        masses, proposed = is_discrete(mine), is_discrete(theirs)
        if masses is None or proposed is None or masses == proposed:
            return
        one, other, wanted = "a density", "masses", "distribution with a density"
        if masses:
            one, other = other, one
            wanted = (
                "discrete distribution; or leave the site out of the guide, and it is summed out "
                "where its values are few; or give model and guide the same relaxation"
            )
        raise ValueError(
            f"latent site {name!r} has {one} in the model ({kinds[0]}) and {other} in the guide "
            f"({kinds[1]}), whose ratio is no weight: no bound comes of it. Propose a {wanted}"
        )

    _pyro_sample = check


def _is_apart(mine: Distribution, theirs: Distribution) -> bool:
    """Return whether a density over all of space is proposed for one on a surface."""
    surface, space = support_of(mine), support_of(theirs)
    if not isinstance(surface, _SURFACES) or space is None or space.is_discrete:
        return False
    return not space.event_dim and not isinstance(plain_distribution(theirs), dist.Delta)
