"""Draws scored by the coordinates that they were made from, never by the inverse of a transform.

A sigmoid rounds to one at 37 in float64, at 17 in float32, and the exponential to zero; an inverse
then makes up where a draw came from. So a draw keeps its preimage, and densities, the model's
prior among them, take log t and log(1 - t) from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.distributions.transforms import OrderedTransform
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.utils import vec_to_tril_matrix
from torch.nn.functional import logsigmoid, pad, softplus

from pyro_vae.programs.nodes import is_subsample
from pyro_vae.programs.pyro_internals import mask_inside
from pyro_vae.programs.supports import flat_transforms, inside, plain_affine, supported_log_prob
from pyro_vae.programs.types import Distribution, Node

_KEY = "_preimage"  # in a site's infer, which a replay hands from the guide to the model

_Logs = dict[type, Callable[[Tensor], Tensor]]
# The ends of what a transform leads to from anywhere.
_ENDS: dict[type, tuple[float, float | None]] = {
    **dict.fromkeys((td.ExpTransform, td.SoftplusTransform), (0.0, None)),
    td.SigmoidTransform: (0.0, 1.0),
}
_INDEPENDENT = (dist.Independent, td.Independent)
_UNRESOLVED = 1e-3  # nats, or of a logarithm, that rounding may change


@dataclass(frozen=True, eq=False)
class Preimage:
    """What a draw on a constrained support was made of.

    Attributes:
        draw: coordinates, batch and event dimensions as the first transform takes them.
        transforms: from there to the value, each an elementary one.
    """

    draw: Tensor
    transforms: tuple[td.Transform, ...]

    @property
    def value(self) -> Tensor:
        """The value, strictly inside of the support where it would round to its edge."""
        value, (low, high) = self.raw(), _ends(self.transforms)
        if low is None and high is None:
            return value
        return value.clamp(_beside(low, math.inf, value), _beside(high, -math.inf, value))

    def raw(self) -> Tensor:
        """Return the value as the transforms give it."""
        value = self.draw
        for transform in self.transforms:
            value = transform(value)
        return value

    def double(self) -> Preimage:
        """Return it in double precision."""
        return Preimage(self.draw.double(), self.transforms)

    @property
    def before(self) -> Preimage:
        """The preimage of what went into the last transform."""
        return Preimage(self.draw, self.transforms[:-1])

    def log(self, rules: _Logs) -> Tensor | None:
        """Return a logarithm of the value; None where no rule is for the last transform."""
        rule = rules.get(type(self.transforms[-1]))
        return None if rule is None else rule(self.before.raw())


def _ends(transforms: Sequence[td.Transform]) -> tuple[float | None, float | None]:
    """Return the ends of what transforms lead to, where these are plain numbers."""
    low: float | None = None
    high: float | None = None
    for t in transforms:
        if numbers := plain_affine(t):
            loc, scale = numbers
            low, high = (None if end is None else loc + scale * end for end in (low, high))
            low, high = (low, high) if scale > 0 else (high, low)
        elif type(t) is td.AffineTransform:
            return None, None
        else:
            low, high = _ENDS.get(type(t), (None, None))
    return low, high


def _beside(end: float | None, way: float, value: Tensor) -> float | None:
    """Return the number of a value's dtype next to an end, in the direction of ``way``."""
    if end is None:
        return None
    if end == 0:  # smaller ones have fewer digits
        return math.copysign(torch.finfo(value.dtype).tiny, way)
    number = torch.tensor(end, dtype=value.dtype)
    return torch.nextafter(number, torch.tensor(way, dtype=value.dtype)).item()


def preimage_key(name: str, transforms: Sequence[td.Transform]) -> str | None:
    """Return a name for the preimages of a site's draws, which says the transforms.

    None where there are none to keep, or where a transform may be another for another datum.
    """
    if not any(type(t) in _SATURATING for t in transforms):
        return None
    parts = []
    for t in transforms:
        if numbers := plain_affine(t):
            parts.append(f"{numbers[0]} + {numbers[1]} *")
        elif type(t) is td.AffineTransform or type(t) not in _KNOWN:
            return None
        else:
            parts.append(type(t).__name__)
    return f"{name} ({', '.join(parts)})"


def preimage_of(node: Node) -> Preimage | None:
    """Return the preimage that a site's draw keeps; None where it has none."""
    return node["infer"].get(_KEY)


def keep_preimage(infer: Node, preimage: Preimage) -> Node:
    """Return a site's infer with the preimage of its draw."""
    return {**infer, _KEY: preimage}


def draw_of(node: Node) -> Tensor:
    """Return what a site's value is a function of: its preimage, else the value itself."""
    preimage = preimage_of(node)
    return node["value"] if preimage is None else preimage.draw


def with_draw(node: Node, draw: Tensor) -> Node:
    """Return a site with another draw in the place of :func:`draw_of` it."""
    preimage = preimage_of(node)
    if preimage is None:
        return {**node, "value": draw}
    moved = Preimage(draw, preimage.transforms)
    return {**node, "value": moved.value, "infer": keep_preimage(node["infer"], moved)}


class DrawByPreimage(Messenger):
    """Draws mapped latents in two steps, coordinates first, and keeps these with the site."""

    def _pyro_sample(self, msg: Node) -> None:
        given = msg["done"] or msg["is_observed"] or msg["value"] is not None or msg["args"]
        if given or is_subsample(msg):
            return
        leaf = msg["fn"]
        while type(leaf) in (*_INDEPENDENT, dist.MaskedDistribution):
            leaf = leaf.base_dist
        parts = flat_transforms(leaf.transforms) if _is_mapped(leaf) else []
        first = len(parts)
        while first and type(parts[first - 1]) in _KNOWN:
            first -= 1
        if any(type(part) in _SATURATING for part in parts[first:]):
            base = _without(leaf, parts[:first])
            draw = base.rsample() if base.has_rsample else base.sample()
            drawn = Preimage(draw, tuple(parts[first:]))
            msg.update(infer=keep_preimage(msg["infer"], drawn), value=drawn.value, done=True)


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


def _is_mapped(fn: Distribution) -> bool:
    """Whether a distribution is just another one mapped, with no rules of its own."""
    if not isinstance(fn, td.TransformedDistribution):
        return False
    own = ("rsample", "sample", "log_prob")
    return all(getattr(type(fn), n) is getattr(td.TransformedDistribution, n) for n in own)


def _without(fn: Distribution, parts: list[td.Transform]) -> Distribution:
    """Return the distribution that a mapped one's last transforms are applied to."""
    base = fn.base_dist
    return dist.TransformedDistribution(base, parts, validate_args=False) if parts else base


def density(fn: Distribution, value: Tensor, preimage: Preimage | None) -> Tensor:
    """Return the log density of a value, of the batch shape; -inf outside the support.

    NaN where the digits of the value do not say what it is, and the preimage does not help.

    Args:
        fn: a distribution.
        value: ``[..., *event]``.
        preimage: of the value, where there is one.
    """
    kind = type(fn)
    if kind in (*_INDEPENDENT, dist.MaskedDistribution, dist.ExpandedDistribution):
        log_prob = density(fn.base_dist, value, preimage)
        if kind in _INDEPENDENT:
            return sum_rightmost(log_prob, fn.reinterpreted_batch_ndims)
        if kind is dist.MaskedDistribution:
            return scale_and_mask(log_prob, mask=mask_inside(fn))
        return log_prob.broadcast_to(torch.broadcast_shapes(fn.batch_shape, log_prob.shape))
    if preimage is None or not preimage.transforms:
        return supported_log_prob(fn, value)
    if _is_mapped(fn):
        parts = flat_transforms(fn.transforms)
        last, before = preimage.transforms[-1], preimage.before
        if parts and _same(parts[-1], last):
            x = before.raw()
            events = len(fn.event_shape) + last.domain.event_dim - last.codomain.event_dim
            inner = _without(fn, parts[:-1])
            log_prob = sum_rightmost(density(inner, x, before), events - len(inner.event_shape))
            return log_prob - sum_rightmost(_log_slope(last, x), events - last.domain.event_dim)
    for kinds, needed, formula in _RULES:
        if isinstance(fn, kinds):
            logs = [log for rules in needed if (log := preimage.log(rules)) is not None]
            found = formula(fn, value, *logs) if len(logs) == len(needed) else None
            if found is not None:
                within = inside(fn, value)
                return found if within is None else torch.where(within, found, -math.inf)
    return _resolved(fn, value, preimage)


def _resolved(fn: Distribution, value: Tensor, preimage: Preimage) -> Tensor:
    """Return the log density by the value's own digits; NaN where it needs more of them.

    That is near an end where the distance to it has too few digits, and the density minds: at four
    times the distance it is another.
    """
    log_prob = supported_log_prob(fn, value)
    shares = type(preimage.transforms[-1]) is td.StickBreakingTransform
    log = preimage.log(_LOG_VALUE if shares else _LOG_DIAGONAL)
    if log is not None:
        parts = value if shares else value.diagonal(dim1=-2, dim2=-1)[..., 1:]
        return torch.where(((log - parts.log()).abs() > _UNRESOLVED).any(-1), math.nan, log_prob)
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


def _same(a: td.Transform, b: td.Transform) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is not td.AffineTransform:
        return type(a) in _KNOWN
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("loc", "scale")]
    return all(p is q or not (torch.is_tensor(p) or torch.is_tensor(q) or p != q) for p, q in pairs)


def _log_slope(transform: td.Transform, x: Tensor) -> Tensor:
    """Return log |det| of a transform's derivative, from what goes in alone."""
    if type(transform) is td.StickBreakingTransform:
        log_stick, log_rest = _log_sticks(x)
        return (log_stick + log_rest[..., :-1]).sum(-1) + logsigmoid(-_offset(x)).sum(-1)
    if type(transform) is td.CorrCholeskyTransform:
        # log(1 - tanh(x)^2) for each entry, halved once for each entry right of it in the row.
        squares = _log_one_less_square(x)
        rows = vec_to_tril_matrix(squares, diag=-1)
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


def _log_one_less_square(x: Tensor) -> Tensor:
    """Return log(1 - tanh(x)^2)."""
    return 2 * (math.log(2) - x - softplus(-2 * x))


# --- logarithms of a value, by the last transform, from what went into that


def _log_softplus(x: Tensor) -> Tensor:
    small = x < -15  # softplus is the exponential there
    return torch.where(small, x, softplus(torch.where(small, 0.0, x)).log())


def _log_shares(x: Tensor) -> Tensor:
    log_stick, log_left = _log_sticks(x)
    return pad(log_stick, (0, 1)) + log_left


def _log_diagonal(x: Tensor) -> Tensor:
    return 0.5 * vec_to_tril_matrix(_log_one_less_square(x), diag=-1).sum(-1)[..., 1:]


# log t; of shares, the logarithm of each.
_LOG_VALUE: _Logs = {
    td.ExpTransform: lambda x: x,
    td.SigmoidTransform: logsigmoid,
    td.SoftplusTransform: _log_softplus,
    td.StickBreakingTransform: _log_shares,
}
# log(1 - t).
_LOG_COMPLEMENT: _Logs = {td.SigmoidTransform: lambda x: logsigmoid(-x)}
# Of the diagonal of a correlation's Cholesky factor, without its first entry.
_LOG_DIAGONAL: _Logs = {td.CorrCholeskyTransform: _log_diagonal}

_SATURATING = (*_LOG_VALUE, *_LOG_DIAGONAL)
# Of these the log determinant is known from what goes in.
_KNOWN = (*_SATURATING, td.AffineTransform, td.TanhTransform, OrderedTransform)


# --- priors by these logarithms


def _gamma(fn: Distribution, value: Tensor, log: Tensor) -> Tensor:
    shape, rate = fn.concentration, fn.rate
    return shape * rate.log() + (shape - 1) * log - rate * value - torch.lgamma(shape)


def _inverse_gamma(fn: Distribution, value: Tensor, log: Tensor) -> Tensor:
    shape, rate = fn.concentration, fn.rate
    return shape * rate.log() - (shape + 1) * log - rate * (-log).exp() - torch.lgamma(shape)


def _beta(fn: Distribution, value: Tensor, log: Tensor, complement: Tensor) -> Tensor:
    a, b = fn.concentration1, fn.concentration0
    norm = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    return (a - 1) * log + (b - 1) * complement - norm


def _kumaraswamy(fn: Distribution, value: Tensor, log: Tensor, complement: Tensor) -> Tensor:
    a, b = fn.concentration1, fn.concentration0
    # log(1 - t^a), which is log a + log(1 - t) where t is near one.
    near = complement < -15
    rest = (-torch.expm1(a * torch.where(near, -1.0, log))).log()
    rest = torch.where(near, a.log() + complement, rest)
    return a.log() + b.log() + (a - 1) * log + (b - 1) * rest


def _dirichlet(fn: Distribution, value: Tensor, log: Tensor) -> Tensor:
    alpha = fn.concentration
    norm = torch.lgamma(alpha).sum(-1) - torch.lgamma(alpha.sum(-1))
    return ((alpha - 1) * log).sum(-1) - norm


def _lkj(fn: Distribution, value: Tensor, log: Tensor) -> Tensor:
    # The rest of the density is that of the identity, whose logarithms are zero.
    rows = torch.arange(2, fn.dim + 1, device=log.device)
    order = 2 * (fn.concentration - 1).unsqueeze(-1) + fn.dim - rows
    identity = torch.eye(fn.dim, dtype=log.dtype, device=log.device)
    return (order * log).sum(-1) + fn.log_prob(identity)


def _weibull(fn: Distribution, value: Tensor, log: Tensor) -> Tensor:
    shape, log_scale = fn.concentration, fn.scale.log()
    log = log - log_scale
    return shape.log() - log_scale + (shape - 1) * log - (shape * log).exp()


def _half_cauchy(fn: Distribution, value: Tensor, log: Tensor) -> Tensor:
    log_scale = fn.scale.log()
    return math.log(2 / math.pi) - log_scale - softplus(2 * (log - log_scale))


def _uniform(fn: Distribution, value: Tensor) -> Tensor:
    # Torch's density of the upper end is zero, to which draws round.
    return -(fn.high - fn.low).log().expand(torch.broadcast_shapes(value.shape, fn.low.shape))


def _mapped_exponential(fn: Distribution, value: Tensor, log: Tensor) -> Tensor | None:
    """What is an exponential of something else, by the logarithm of the value."""
    parts = flat_transforms(fn.transforms)
    if not _is_mapped(fn) or type(parts[-1]) is not td.ExpTransform:
        return None
    inner, events = _without(fn, parts[:-1]), len(fn.event_shape)
    log_prob = sum_rightmost(inner.log_prob(log), events - len(inner.event_shape))
    return log_prob - sum_rightmost(log, events)


# The logarithms that a formula takes beside the distribution and the value.
_RULES: list[tuple[Any, tuple[_Logs, ...], Callable[..., Tensor | None]]] = [
    (td.Gamma, (_LOG_VALUE,), _gamma),
    (td.InverseGamma, (_LOG_VALUE,), _inverse_gamma),
    (td.Beta, (_LOG_VALUE, _LOG_COMPLEMENT), _beta),
    (td.Kumaraswamy, (_LOG_VALUE, _LOG_COMPLEMENT), _kumaraswamy),
    (td.Dirichlet, (_LOG_VALUE,), _dirichlet),
    (td.LKJCholesky, (_LOG_DIAGONAL,), _lkj),
    (td.Uniform, (), _uniform),
    (td.Weibull, (_LOG_VALUE,), _weibull),
    (td.HalfCauchy, (_LOG_VALUE,), _half_cauchy),
    # As high at the smallest positive number as at the next.
    ((td.Exponential, td.HalfNormal), (), supported_log_prob),
    (td.TransformedDistribution, (_LOG_VALUE,), _mapped_exponential),
]
