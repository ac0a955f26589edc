"""Analytic KL between a guide site and a model site, and which sites have one."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence

__all__ = ["analytic_kl"]


def analytic_kl(guide_node: Any, model_node: Any) -> tuple[Tensor | None, str]:
    """Return KL(q, p) of one latent site where a closed form applies, and why.

    The KL takes the place of E_q[log q - log p], so it applies only where both
    terms carry the same scale and the same mask; and where the guide's density is
    not hidden in a Delta (an AutoNormal on a constrained support carries it as
    the Delta's log_density, which a KL would drop).

    Args:
        guide_node: the site of a guide's trace.
        model_node: the site of the same name of the replayed model's trace.

    Returns:
        The KL in nats, of the site's batch shape, unscaled and unmasked, or None; and
        a reason in words.
    """
    guide, model = guide_node["fn"], model_node["fn"]
    if _is_delta(guide):
        return None, "the guide's site is a Delta; its density is elsewhere"
    if not _same(guide_node["scale"], model_node["scale"]):
        return None, "model and guide scale the site differently"
    if not _same(guide_node["mask"], model_node["mask"]):
        return None, "model and guide mask the site differently"
    try:
        kl = kl_divergence(guide, model)
    except NotImplementedError:
        return None, f"no closed form between {_name(guide)} and {_name(model)}"
    return kl, f"closed form between {_name(guide)} and {_name(model)}"


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if a is None or b is None:
        return False
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return a.shape == b.shape and bool((a == b).all())


def _name(fn: Any) -> str:
    while type(fn).__name__ in ("Independent", "ExpandedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__
