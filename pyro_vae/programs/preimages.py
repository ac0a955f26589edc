"""Draws scored by the coordinates that they were made from, never by the inverse of a transform.

A sigmoid rounds to one at 37 in float64, at 17 in float32, and the exponential to zero; an inverse
then makes up where a draw came from. So a draw keeps its preimage, and densities, the model's
prior among them, take log t and log(1 - t) from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.distributions.transforms import OrderedTransform
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.functional import logsigmoid, pad, softplus

from pyro_vae.programs.nodes import is_subsample
from pyro_vae.programs.pyro_internals import mask_inside
from pyro_vae.programs.supports import flat_transforms, inside, supported_log_prob
from pyro_vae.programs.types import Node

_KEY = "_preimage"  # in a site's infer, which a replay hands from the guide to the model

_SATURATING = (
    td.ExpTransform,
    td.SigmoidTransform,
    td.SoftplusTransform,
    td.StickBreakingTransform,
    td.CorrCholeskyTransform,
)
# Of these the log determinant is known from what goes in.
_KNOWN = (*_SATURATING, td.AffineTransform, td.TanhTransform, OrderedTransform)
# Priors of positive numbers that are as high at the smallest one as at the next.
_FLAT_AT_ZERO = (td.Exponential, td.HalfNormal)
_UNRESOLVED = 1e-3  # nats, or of a logarithm, that rounding may change


@dataclass(frozen=True, eq=False)
class Preimage:
    """What a draw on a constrained support was made of.

    Attributes:
        draw: coordinates, batch and event dimensions as the first transform takes them.
        transforms: from there to the value, each an elementary one.
    """

    draw: Tensor
    transforms: tuple[Any, ...]

    @property
    def value(self) -> Tensor:
        """The value, strictly inside of the support where it would round to its edge."""
        value = self.draw
        for transform in self.transforms:
            value = transform(value)
        low, high = _ends(self.transforms)
        if low is None and high is None:
            return value
        return value.clamp(*_within(low, high, value.dtype))

    def double(self) -> Preimage:
        """Return it in double precision."""
        return Preimage(self.draw.double(), self.transforms)

    def last(self) -> tuple[Any, Preimage]:
        """Return the last transform, and the preimage of what went into it."""
        return self.transforms[-1], Preimage(self.draw, self.transforms[:-1])

    def raw(self) -> Tensor:
        """Return the value as the transforms give it."""
        value = self.draw
        for transform in self.transforms:
            value = transform(value)
        return value


def _ends(transforms: Sequence[Any]) -> tuple[float | None, float | None]:
    """Return the ends of what transforms lead to, where these are plain numbers."""
    low: float | None = None
    high: float | None = None
    for t in transforms:
        if type(t) is td.ExpTransform or type(t) is td.SoftplusTransform:
            low, high = 0.0, None
        elif type(t) is td.SigmoidTransform:
            low, high = 0.0, 1.0
        elif type(t) is td.AffineTransform:
            if isinstance(t.loc, Tensor) or isinstance(t.scale, Tensor):
                return None, None
            ends = (None if end is None else t.loc + t.scale * end for end in (low, high))
            low, high = ends if t.scale > 0 else reversed(tuple(ends))
        else:
            low = high = None
    return low, high


def _within(
    low: float | None, high: float | None, dtype: torch.dtype
) -> tuple[float | None, float | None]:
    """Return the outermost numbers between two ends."""
    tiny = torch.finfo(dtype).tiny  # smaller ones have fewer digits

    def beside(end: float | None, way: float) -> float | None:
        if end is None:
            return None
        if end == 0:
            return math.copysign(tiny, way)
        number = torch.tensor(end, dtype=dtype)
        return torch.nextafter(number, torch.tensor(way, dtype=dtype)).item()

    return beside(low, math.inf), beside(high, -math.inf)


def preimage_key(name: str, transforms: Sequence[Any]) -> str | None:
    """Return a name for the preimages of a site's draws, which says the transforms.

    None where there are none to keep, or where a transform may be another for another datum.
    """
    if not any(type(t) in _SATURATING for t in transforms):
        return None
    parts = []
    for t in transforms:
        if type(t) is td.AffineTransform:
            if isinstance(t.loc, Tensor) or isinstance(t.scale, Tensor):
                return None
            parts.append(f"{t.loc} + {t.scale} *")
        elif type(t) in _KNOWN:
            parts.append(type(t).__name__)
        else:
            return None
    return f"{name} ({', '.join(parts)})"


def preimage_of(node: Node) -> Preimage | None:
    """Return the preimage that a site's draw keeps; None where it has none."""
    return node["infer"].get(_KEY)


def keep_preimage(infer: Mapping[str, Any], preimage: Preimage) -> dict[str, Any]:
    """Return a site's infer with the preimage of its draw."""
    return {**infer, _KEY: preimage}


def draw_of(node: Node) -> Tensor:
    """Return what a site's value is a function of: its preimage, else the value itself."""
    preimage = preimage_of(node)
    return node["value"] if preimage is None else preimage.draw


def with_draw(node: Node, draw: Tensor) -> dict[str, Any]:
    """Return a site with another draw in the place of :func:`draw_of` it."""
    preimage = preimage_of(node)
    if preimage is None:
        return {**node, "value": draw}
    moved = Preimage(draw, preimage.transforms)
    return {**node, "value": moved.value, "infer": keep_preimage(node["infer"], moved)}


class DrawByPreimage(Messenger):
    """Draws mapped latents in two steps, coordinates first, and keeps these with the site."""

    def _pyro_sample(self, msg: Node) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None or msg["args"]:
            return
        if is_subsample(msg):
            return
        leaf = msg["fn"]
        while type(leaf) in (dist.Independent, td.Independent, dist.MaskedDistribution):
            leaf = leaf.base_dist
        if not _is_mapped(leaf):
            return
        parts = flat_transforms(leaf.transforms)
        first = len(parts)
        while first and type(parts[first - 1]) in _KNOWN:
            first -= 1
        if not any(type(part) in _SATURATING for part in parts[first:]):
            return
        base = _without(leaf, parts[:first])
        drawn = Preimage(
            base.rsample() if base.has_rsample else base.sample(), tuple(parts[first:])
        )
        msg["infer"] = keep_preimage(msg["infer"], drawn)
        msg["value"] = drawn.value
        msg["done"] = True


class KeepDraws(Messenger):
    """Keeps the preimages of draws that are made inside, by site.

    Attributes:
        draws: of those that have one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Node) -> None:
        if preimage_of(msg) is not None:
            self.draws[msg["name"]] = draw_of(msg)


def _is_mapped(fn: Any) -> bool:
    """Whether a distribution is just another one mapped, with no rules of its own."""
    if not isinstance(fn, td.TransformedDistribution):
        return False
    own = ("rsample", "sample", "log_prob")
    return all(getattr(type(fn), n) is getattr(td.TransformedDistribution, n) for n in own)


def _without(fn: Any, parts: list[Any]) -> Any:
    """Return the distribution that a mapped one's last transforms are applied to."""
    if not parts:
        return fn.base_dist
    return dist.TransformedDistribution(fn.base_dist, parts, validate_args=False)


def density(fn: Any, value: Tensor, preimage: Preimage | None) -> Tensor:
    """Return the log density of a value, of the batch shape; -inf outside the support.

    NaN where the digits of the value do not say what it is, and the preimage does not help.

    Args:
        fn: a distribution.
        value: ``[..., *event]``.
        preimage: of the value, where there is one.
    """
    kind = type(fn)
    if kind in (dist.Independent, td.Independent):
        events = fn.reinterpreted_batch_ndims
        return sum_rightmost(density(fn.base_dist, value, preimage), events)
    if kind is dist.MaskedDistribution:
        log_prob = density(fn.base_dist, value, preimage)
        return scale_and_mask(log_prob, mask=mask_inside(fn))
    if kind is dist.ExpandedDistribution:
        log_prob = density(fn.base_dist, value, preimage)
        return log_prob.broadcast_to(torch.broadcast_shapes(fn.batch_shape, log_prob.shape))
    if preimage is None or not preimage.transforms:
        return supported_log_prob(fn, value)
    if _is_mapped(fn):
        parts = flat_transforms(fn.transforms)
        last, before = preimage.last()
        if parts and _same(parts[-1], last):
            x = before.raw()
            events = len(fn.event_shape) + last.domain.event_dim - last.codomain.event_dim
            inner = _without(fn, parts[:-1])
            log_prob = sum_rightmost(density(inner, x, before), events - len(inner.event_shape))
            return log_prob - sum_rightmost(_log_slope(last, x), events - last.domain.event_dim)
    for kinds, rule in _RULES:
        if isinstance(fn, kinds) and (found := rule(fn, value, preimage)) is not None:
            within = inside(fn, value)
            return found if within is None else torch.where(within, found, -math.inf)
    return _resolved(fn, value, preimage)


def _resolved(fn: Any, value: Tensor, preimage: Preimage) -> Tensor:
    """Return the log density by the value's own digits; NaN where it needs more of them.

    That is near an end where the distance to it has too few digits, and the density minds: at four
    times the distance it is another.
    """
    log_prob = supported_log_prob(fn, value)
    lost: Tensor | None = None
    log = _log_value(preimage)
    if log is not None and type(preimage.transforms[-1]) is td.StickBreakingTransform:
        lost = ((log - value.log()).abs() > _UNRESOLVED).any(-1)
    elif (log := _log_diagonal(preimage)) is not None:
        diagonal = value.diagonal(dim1=-2, dim2=-1)[..., 1:]
        lost = ((log - diagonal.log()).abs() > _UNRESOLVED).any(-1)
    if lost is not None:
        return torch.where(lost, math.nan, log_prob)
    finest, moved = torch.finfo(value.dtype), value
    for end in _ends(preimage.transforms):
        if end is not None:
            least = max(abs(end) * finest.eps, finest.tiny)
            near = (value - end).abs() < least / _UNRESOLVED
            moved = torch.where(near, end + 4 * (value - end), moved)
    if moved is value:
        return log_prob
    minds = (supported_log_prob(fn, moved) - log_prob).abs() > _UNRESOLVED
    return torch.where(minds, math.nan, log_prob)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is td.AffineTransform:
        return all(
            p is q or (not isinstance(p, Tensor) and not isinstance(q, Tensor) and p == q)
            for p, q in ((a.loc, b.loc), (a.scale, b.scale))
        )
    return type(a) in _KNOWN


def _log_slope(transform: Any, x: Tensor) -> Tensor:
    """Return log |det| of a transform's derivative, from what goes in alone."""
    if type(transform) is td.StickBreakingTransform:
        log_stick, log_rest = _log_sticks(x)
        return (log_stick + log_rest[..., :-1]).sum(-1) + logsigmoid(-_offset(x)).sum(-1)
    if type(transform) is td.CorrCholeskyTransform:
        # log(1 - tanh(x)^2) for each entry, halved once for each entry right of it in the row.
        squares = _log_one_less_square(x)
        rows = _as_rows(squares, _order(x))
        before = rows.cumsum(-1) - rows
        below = torch.ones_like(rows).tril(-1)
        return squares.sum(-1) + 0.5 * (before * below).sum((-2, -1))
    return transform.log_abs_det_jacobian(x, transform(x))


def _offset(x: Tensor) -> Tensor:
    """Return the logits of stick-breaking, by torch's convention."""
    count = x.shape[-1]
    return x - torch.arange(count, 0, -1, dtype=x.dtype, device=x.device).log()


def _log_sticks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log of the broken shares [..., D], and of what is left before each [..., D + 1]."""
    logits = _offset(x)
    left = pad(logsigmoid(-logits).cumsum(-1), (1, 0))
    return logsigmoid(logits), left


def _order(x: Tensor) -> int:
    """Return the size of a triangular matrix from the number of entries below its diagonal."""
    return round((0.25 + 2 * x.shape[-1]) ** 0.5 + 0.5)


def _as_rows(entries: Tensor, size: int) -> Tensor:
    row, column = torch.tril_indices(size, size, -1, device=entries.device)
    index = torch.zeros(size, size, dtype=torch.long, device=entries.device)
    index[row, column] = torch.arange(1, len(row) + 1, device=entries.device)
    return pad(entries, (1, 0))[..., index]


def _log_one_less_square(x: Tensor) -> Tensor:
    """Return log(1 - tanh(x)^2)."""
    return 2 * (math.log(2) - x - softplus(-2 * x))


# --- the logarithms of a value and of its distance to one


def _log_value(preimage: Preimage) -> Tensor | None:
    """Return log t; of shares, the logarithm of each."""
    last, before = preimage.last()
    x, kind = before.raw(), type(last)
    if kind is td.ExpTransform:
        return x
    if kind is td.SigmoidTransform:
        return logsigmoid(x)
    if kind is td.SoftplusTransform:
        # Softplus is the exponential where that is small.
        small = x < -15
        return torch.where(small, x, softplus(torch.where(small, 0.0, x)).log())
    if kind is td.StickBreakingTransform:
        log_stick, log_left = _log_sticks(x)
        return pad(log_stick, (0, 1)) + log_left
    return None


def _log_complement(preimage: Preimage) -> Tensor | None:
    """Return log(1 - t)."""
    last, before = preimage.last()
    return logsigmoid(-before.raw()) if type(last) is td.SigmoidTransform else None


def _log_diagonal(preimage: Preimage) -> Tensor | None:
    """Return the log diagonal of a correlation's Cholesky factor, without its first entry."""
    last, before = preimage.last()
    if type(last) is not td.CorrCholeskyTransform:
        return None
    x = before.raw()
    return 0.5 * _as_rows(_log_one_less_square(x), _order(x)).sum(-1)[..., 1:]


# --- priors by these logarithms

Rule = Callable[[Any, Tensor, Preimage], Tensor | None]


def _gamma(fn: Any, value: Tensor, preimage: Preimage) -> Tensor | None:
    log = _log_value(preimage)
    if log is None:
        return None
    shape, rate = fn.concentration, fn.rate
    return shape * rate.log() + (shape - 1) * log - rate * value - torch.lgamma(shape)


def _inverse_gamma(fn: Any, value: Tensor, preimage: Preimage) -> Tensor | None:
    log = _log_value(preimage)
    if log is None:
        return None
    shape, rate = fn.concentration, fn.rate
    return shape * rate.log() - (shape + 1) * log - rate * (-log).exp() - torch.lgamma(shape)


def _beta(fn: Any, value: Tensor, preimage: Preimage) -> Tensor | None:
    log, complement = _log_value(preimage), _log_complement(preimage)
    if log is None or complement is None:
        return None
    a, b = fn.concentration1, fn.concentration0
    norm = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    return (a - 1) * log + (b - 1) * complement - norm


def _kumaraswamy(fn: Any, value: Tensor, preimage: Preimage) -> Tensor | None:
    log, complement = _log_value(preimage), _log_complement(preimage)
    if log is None or complement is None:
        return None
    a, b = fn.concentration1, fn.concentration0
    # log(1 - t^a), which is log a + log(1 - t) where t is near one.
    near = complement < -15
    rest = (-torch.expm1(a * torch.where(near, -1.0, log))).log()
    rest = torch.where(near, a.log() + complement, rest)
    return a.log() + b.log() + (a - 1) * log + (b - 1) * rest


def _dirichlet(fn: Any, value: Tensor, preimage: Preimage) -> Tensor | None:
    log = _log_value(preimage)
    if log is None:
        return None
    alpha = fn.concentration
    norm = torch.lgamma(alpha).sum(-1) - torch.lgamma(alpha.sum(-1))
    return ((alpha - 1) * log).sum(-1) - norm


def _lkj(fn: Any, value: Tensor, preimage: Preimage) -> Tensor | None:
    log = _log_diagonal(preimage)
    if log is None:
        return None
    # The rest of the density is that of the identity, whose logarithms are zero.
    rows = torch.arange(2, fn.dim + 1, device=log.device)
    order = 2 * (fn.concentration - 1).unsqueeze(-1) + fn.dim - rows
    identity = torch.eye(fn.dim, dtype=log.dtype, device=log.device)
    return (order * log).sum(-1) + fn.log_prob(identity)


def _weibull(fn: Any, value: Tensor, preimage: Preimage) -> Tensor | None:
    log = _log_value(preimage)
    if log is None:
        return None
    shape = fn.concentration
    log = log - fn.scale.log()
    return shape.log() - fn.scale.log() + (shape - 1) * log - (shape * log).exp()


def _half_cauchy(fn: Any, value: Tensor, preimage: Preimage) -> Tensor | None:
    log = _log_value(preimage)
    if log is None:
        return None
    log_scale = fn.scale.log()
    return math.log(2 / math.pi) - log_scale - softplus(2 * (log - log_scale))


def _uniform(fn: Any, value: Tensor, preimage: Preimage) -> Tensor | None:
    # Torch's density of the upper end is zero, to which draws round.
    return -(fn.high - fn.low).log().expand(torch.broadcast_shapes(value.shape, fn.low.shape))


def _flat(fn: Any, value: Tensor, preimage: Preimage) -> Tensor | None:
    return supported_log_prob(fn, value)


def _mapped_exponential(fn: Any, value: Tensor, preimage: Preimage) -> Tensor | None:
    """What is an exponential of something else, by the logarithm of the value."""
    parts = flat_transforms(fn.transforms)
    log = _log_value(preimage)
    if log is None or not _is_mapped(fn) or type(parts[-1]) is not td.ExpTransform:
        return None
    inner = _without(fn, parts[:-1])
    events = len(fn.event_shape)
    log_prob = sum_rightmost(inner.log_prob(log), events - len(inner.event_shape))
    return log_prob - sum_rightmost(log, events)


_RULES: list[tuple[Any, Rule]] = [
    (td.Gamma, _gamma),
    (td.InverseGamma, _inverse_gamma),
    (td.Beta, _beta),
    (td.Kumaraswamy, _kumaraswamy),
    (td.Dirichlet, _dirichlet),
    (td.LKJCholesky, _lkj),
    (td.Uniform, _uniform),
    (td.Weibull, _weibull),
    (td.HalfCauchy, _half_cauchy),
    (_FLAT_AT_ZERO, _flat),
    (td.TransformedDistribution, _mapped_exponential),
]
