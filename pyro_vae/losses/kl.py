r"""Closed-form KL between a guide site and a model site, and which sites have one.

The rules are tried in the order of this file, and torch.distributions.kl_divergence is asked
last: the rules add what it lacks, and stand before what it gets wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor

from pyro_vae.programs.handlers import same_scale, scale_parts
from pyro_vae.programs.nodes import is_point
from pyro_vae.programs.pyro_internals import mask_inside
from pyro_vae.programs.supports import flat_transforms
from pyro_vae.programs.types import Mask, Node

# A rule returns KL(q, p), or None where the pair is not its case. It raises
# NotImplementedError where no later rule may speak: there is no closed form.
_Rule: TypeAlias = Callable[[td.Distribution, td.Distribution], Tensor | None]

# TransformedDistributions for which torch has formulas of their own.
_ATOMS = (td.Gumbel, td.HalfCauchy, td.HalfNormal, td.Pareto)

# Of transforms that are one where these are.
_PARAMETERS = {td.AffineTransform: ("loc", "scale"), td.PowerTransform: ("exponent",)}

# Torch's KL of these is wrong: of two Wisharts it has no gradient by the guide's parameters,
# and cannot be had under no_grad; of the others it is infinite for Uniform(0, 1).
_WRONG_IN_TORCH = (
    (td.Wishart, td.Wishart),
    (td.ContinuousBernoulli, td.Uniform),
    (td.Uniform, td.ContinuousBernoulli),
)


def analytic_kl(guide_node: Node, model_node: Node | None) -> tuple[Tensor | None, str]:
    r"""Return KL(q, p) of one latent site where a closed form applies, and why.

    .. math:: \mathrm{KL}(q, p) = \mathbb{E}_{q(z)}[\log q(z) - \log p(z)]

    The KL takes the place of that expectation's draw in an ELBO, so it applies only where
    both terms carry the same scale and the same mask, and where the model's batch shape
    spreads over the guide's, not the other way round. A Delta is a point: its KL is its
    log density less the model's at that point, as sampling has it too. (An AutoNormal on a
    constrained support carries its density there; Pyro's KL of a Delta drops it.)

    Args:
        guide_node: the site of a guide's trace.
        model_node: the site of the same name of the replayed model's trace; None for none.

    Returns:
        The KL in nats, of the guide site's batch shape, unscaled and unmasked, or None; and
        a reason in words.

    Raises:
        ValueError: where a Delta lies outside the model's support, naming the site.

    Example:
        >>> import pyro.distributions as dist
        >>> site = {"name": "z", "scale": 1.0, "mask": None}
        >>> guide = {**site, "fn": dist.MultivariateNormal(torch.zeros(2), 2 * torch.eye(2))}
        >>> model = {**site, "fn": dist.Normal(torch.zeros(2), 1.0).to_event(1)}
        >>> analytic_kl(guide, model)
        (tensor(0.3069), 'closed form between MultivariateNormal and Normal')
    """
    reason = _refusal(guide_node, model_node)
    if reason or model_node is None:
        return None, reason
    guide, model = guide_node["fn"], model_node["fn"]
    try:
        found = _kl(guide, model)
    except NotImplementedError:
        return None, f"no closed form between {_name(guide)} and {_name(model)}"
    except ValueError as error:
        raise ValueError(
            f"latent site {guide_node['name']!r}: no KL between {guide} and {model}: {error}"
        ) from error
    if is_point(guide):
        return found, "a point: its log density less the model's there"
    return found, f"closed form between {_name(guide)} and {_name(model)}"


def kl_per_dimension(guide_node: Node, model_node: Node | None) -> tuple[Tensor | None, str]:
    r"""Return KL(q, p) of one latent site for each of its dimensions, and why.

    Where both sides factorize over the event's dimensions, so does their KL,

    .. math:: \mathrm{KL}(q, p) = \sum_d \mathrm{KL}(q_d, p_d),

    the terms that free bits bound from below (Kingma et al. 2016, arXiv:1606.04934).
    Their sum over the event's dimensions is that of :func:`analytic_kl`, and the
    conditions are the same.

    Args:
        guide_node: as in :func:`analytic_kl`, and what is raised too.
        model_node: likewise.

    Returns:
        The KL in nats, of the guide site's batch shape + event shape, unscaled and
        unmasked, or None; and a reason in words.

    Example:
        >>> import pyro.distributions as dist
        >>> site = {"name": "z", "scale": 1.0, "mask": None}
        >>> guide = {**site, "fn": dist.Normal(torch.tensor([0.0, 2.0]), 1.0).to_event(1)}
        >>> model = {**site, "fn": dist.Normal(torch.zeros(2), 1.0).to_event(1)}
        >>> kl_per_dimension(guide, model)
        (tensor([0., 2.]), 'closed form between Normal and Normal')
    """
    reason = _refusal(guide_node, model_node)
    if reason or model_node is None:
        return None, reason
    apart = []
    for fn in (guide_node["fn"], model_node["fn"]):
        if (scalars := factors(fn)) is None:
            return None, f"{_name(fn)} does not factorize over its event dimensions"
        apart.append({"name": guide_node["name"], "scale": 1.0, "mask": None, "fn": scalars})
    return analytic_kl(*apart)


def _refusal(guide_node: Node, model_node: Node | None) -> str:
    """Return why a KL cannot take the place of E_q[log q - log p]; "" where it can."""
    if model_node is None:
        return "auxiliary site of the guide"
    (scale, factor), (other, other_factor) = map(scale_parts, (guide_node, model_node))
    if factor is not other_factor or not same_scale(scale, other):
        return "model and guide scale the site differently"
    if not _same_mask(guide_node["mask"], model_node["mask"]):
        return "model and guide mask the site differently"
    guide, model = guide_node["fn"], model_node["fn"]
    if guide.event_shape != model.event_shape:
        found = f"{list(model.event_shape)} and {list(guide.event_shape)}"
        return f"model and guide have different event shapes, {found}"
    # Each term is summed over its own batch shape: a guide broadcast to a wider model
    # would have its density counted once for each copy.
    q_shape, p_shape = guide.batch_shape[::-1], model.batch_shape[::-1]
    pairs = zip(p_shape, q_shape, strict=False)
    if len(p_shape) > len(q_shape) or any(p not in (1, q) for p, q in pairs):
        found = f"{list(model.batch_shape)} and {list(guide.batch_shape)}"
        return f"model and guide have different batch shapes, {found}"
    return ""


def _kl(q: td.Distribution, p: td.Distribution) -> Tensor:
    """Return KL(q, p), of their common batch shape; raise NotImplementedError for none."""
    found = next((kl for rule in _RULES if (kl := rule(q, p)) is not None), None)
    if found is None:
        if any(isinstance(q, a) and isinstance(p, b) for a, b in _WRONG_IN_TORCH):
            raise NotImplementedError
        found = td.kl_divergence(q, p)
    return found.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))


def _point(q: td.Distribution, p: td.Distribution) -> Tensor | None:
    if not is_point(q):
        return None
    value = q.rsample()
    return q.log_prob(value) - p.log_prob(value)


def _masked(q: td.Distribution, p: td.Distribution) -> Tensor | None:
    """Both must mask alike: Pyro's rule drops what only one of them masks."""
    if not any(isinstance(d, dist.MaskedDistribution) for d in (q, p)):
        return None
    (q, q_mask), (p, p_mask) = (
        (d.base_dist, mask_inside(d)) if isinstance(d, dist.MaskedDistribution) else (d, True)
        for d in (q, p)
    )
    if not _same_mask(q_mask, p_mask):
        raise NotImplementedError
    return scale_and_mask(_kl(q, p), mask=q_mask)


def _expanded(q: td.Distribution, p: td.Distribution) -> Tensor | None:
    bases = [d.base_dist if isinstance(d, dist.ExpandedDistribution) else d for d in (q, p)]
    return None if bases[0] is q and bases[1] is p else _kl(*bases)


def _independent(q: td.Distribution, p: td.Distribution) -> Tensor | None:
    """KL(prod q_i, prod p_i) = sum KL(q_i, p_i) over the dimensions both reinterpret."""
    (q_base, q_dims), (p_base, p_dims) = _merged(q), _merged(p)
    shared = min(q_dims, p_dims)
    if not shared:
        return None
    parts = _kl(_wrapped(q_base, q_dims - shared), _wrapped(p_base, p_dims - shared))
    return sum_rightmost(parts, shared)


def _gaussian(q: td.Distribution, p: td.Distribution) -> Tensor | None:
    r"""KL of two Gaussians of which one is diagonal.

    With means m, n, covariances S, V, and k dimensions,

    .. math:: \tfrac12 [\mathrm{tr}(V^{-1} S) + (m-n)^T V^{-1} (m-n) - k + \log|V| - \log|S|]
              = -H(q) - \log p(m) + \tfrac12 \mathrm{tr}(V^{-1} S),

    and the trace needs the two diagonals only. (Rasmussen & Williams 2006, A.23.)
    """
    q_diagonal, p_diagonal = _is_diagonal(q), _is_diagonal(p)
    dense = (td.MultivariateNormal, td.LowRankMultivariateNormal)
    if not ((q_diagonal and isinstance(p, dense)) or (p_diagonal and isinstance(q, dense))):
        return None
    precision = _precision_diagonal(p) if isinstance(p, dense) else 1 / p.variance
    return -q.entropy() - p.log_prob(q.mean) + 0.5 * (precision * q.variance).sum(-1)


def _transformed(q: td.Distribution, p: td.Distribution) -> Tensor | None:
    """KL(T(q), T(p)) = KL(q, p) for a T that is one to one.

    Torch's own rule must not speak for these: it takes |z| for one to one, and holds two
    transforms equal whose parameters happen to be, though a gradient would tell them apart.
    """
    (q_base, q_parts), (p_base, p_parts) = _peeled(q), _peeled(p)
    if q_base is q and p_base is p:
        return None
    if len(q_parts) == len(p_parts) and all(map(_same_transform, q_parts, p_parts)):
        return _kl(q_base, p_base)
    if all(isinstance(_merged(d)[0], td.TransformedDistribution) for d in (q, p)):
        raise NotImplementedError
    return None


_RULES: tuple[_Rule, ...] = (_point, _masked, _expanded, _independent, _gaussian, _transformed)


def _merged(d: td.Distribution) -> tuple[td.Distribution, int]:
    """Return what Independent wraps, however often, and the dimensions it reinterprets."""
    dims = 0
    while isinstance(d, td.Independent):
        dims += d.reinterpreted_batch_ndims
        d = d.base_dist
    return d, dims


def _wrapped(d: td.Distribution, dims: int) -> td.Distribution:
    return dist.Independent(d, dims) if dims else d


def _is_diagonal(d: td.Distribution) -> bool:
    base, dims = _merged(d)
    return isinstance(base, td.Normal) and dims == 1


def _precision_diagonal(p: td.MultivariateNormal | td.LowRankMultivariateNormal) -> Tensor:
    """Return the diagonal of the inverse covariance, never inverting a low rank one."""
    if isinstance(p, td.MultivariateNormal):
        eye = torch.eye(p.event_shape[0], dtype=p.loc.dtype, device=p.loc.device)
        return torch.linalg.solve_triangular(p.scale_tril, eye, upper=False).square().sum(-2)
    # Woodbury: (D + W W')^-1 = D^-1 - A'A, A = L^-1 W' D^-1, L L' = I + W' D^-1 W.
    scaled = p.cov_factor.mT / p.cov_diag.unsqueeze(-2)
    eye = torch.eye(scaled.shape[-2], dtype=scaled.dtype, device=scaled.device)
    factor = torch.linalg.cholesky(eye + scaled @ p.cov_factor)
    solved = torch.linalg.solve_triangular(factor, scaled, upper=False)
    return 1 / p.cov_diag - solved.square().sum(-2)


def _peeled(d: td.Distribution) -> tuple[td.Distribution, list[td.Transform]]:
    """Return the base and the transforms, innermost first, that d is made of."""
    if isinstance(d, td.Independent):
        base, parts = _peeled(d.base_dist)
        return (d if base is d.base_dist else _wrapped(base, d.reinterpreted_batch_ndims)), parts
    if not isinstance(d, td.TransformedDistribution) or isinstance(d, _ATOMS):
        return d, []
    base, parts = _peeled(d.base_dist)
    return base, [*parts, *_flat(d.transforms)]


def _flat(transforms: Iterable[td.Transform]) -> list[td.Transform]:
    """Return the transforms without Compose, Independent and identities around them."""
    parts: list[td.Transform] = []
    for t in flat_transforms(transforms):
        if type(t) is not td.AffineTransform:
            parts.append(t)
        elif not (_same_parameter(t.loc, 0.0) and _same_parameter(t.scale, 1.0)):
            parts.append(td.AffineTransform(t.loc, t.scale) if t.event_dim else t)
    return parts


def _same_transform(a: td.Transform, b: td.Transform) -> bool:
    if a is b or type(a) is not type(b) or not (a.bijective and b.bijective):
        return a is b and a.bijective
    for kind, names in _PARAMETERS.items():
        if isinstance(a, kind):
            return all(_same_parameter(getattr(a, n), getattr(b, n)) for n in names)
    if type(a) is type(td.ExpTransform().inv):
        return _same_transform(a.inv, b.inv)
    return bool(a == b)


def _same_parameter(a: Any, b: Any) -> bool:
    """Whether equal for good: two learned ones that are equal now have a gradient apart."""
    if a is b or any(isinstance(x, Tensor) and x.requires_grad for x in (a, b)):
        return a is b
    return bool(torch.as_tensor(a == b).all())


def factors(d: td.Distribution) -> td.Distribution | None:
    """Return d as independent scalars, of batch shape d.batch_shape + d.event_shape, or None."""
    if not d.event_shape:
        return d
    if isinstance(d, td.Independent):
        return factors(d.base_dist)
    if not isinstance(d, dist.MaskedDistribution | td.TransformedDistribution):
        return None
    base = factors(d.base_dist)
    if base is None:
        return None
    if isinstance(d, dist.MaskedDistribution):
        mask = mask_inside(d)
        if isinstance(mask, Tensor):
            mask = mask.reshape(*mask.shape, *(1,) * len(d.event_shape))
        return dist.MaskedDistribution(base, mask)
    parts = _flat(d.transforms)
    if any(part.domain.event_dim or part.codomain.event_dim for part in parts):
        return None
    return dist.TransformedDistribution(base, parts)


def _same_mask(a: Mask, b: Mask) -> bool:
    if a is b or a is None or b is None:
        return a is b
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return a.shape == b.shape and bool((a == b).all())


def _name(fn: td.Distribution) -> str:
    while isinstance(fn, td.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return type(fn).__name__
