"""Pyro ELBO subclasses over the spine of log weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pyro.infer
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.batches import Batch
from pyro_vae.kl import analytic_kl
from pyro_vae.logweights import Scorer
from pyro_vae.sites import evaluation, inspect, latent_nodes, preserved_rng, sample_nodes
from pyro_vae.traces import site_log_prob, trace_pair

__all__ = ["ELBO"]

logger = logging.getLogger(__name__)


class ELBO(pyro.infer.ELBO):
    r"""The evidence lower bound, with an analytic KL wherever there is one.

    .. math::
        \mathbb{E}_q[\log p(x | z)] - \mathrm{KL}(q(z | x), p(z))
        \quad\text{or}\quad \mathbb{E}_q[\log p(x, z) - \log q(z | x)]

    Site by site, a latent whose guide and model distributions have a closed-form KL
    gets it; the others are sampled (:func:`pyro_vae.explain` says which and why).
    Gradients are pathwise (Kingma & Welling 2014). The loss is the negative ELBO,
    summed over the data, with scales and masks applied, as Pyro's is:
    ``pyro.infer.SVI(model, guide, optim, loss=pv.ELBO())`` and
    ``pv.ELBO()(model, guide)(x).backward()`` both work.

    Args:
        num_particles: draws of the guide for an estimate.
        kl: "analytic", or "sample" for the same estimate as pyro.infer.Trace_ELBO.
        estimator: of the gradient: "pathwise".
        vectorize_particles: whether several particles run at once, in a plate outside
            the model's own. The first call compares them with single particles and
            falls back to a loop, with a logged warning, if the networks cannot take
            the extra dimension.

    Raises:
        ValueError: for an unknown option, num_particles < 1, a guide that does not
            propose just the model's latent sites, or one whose draws cannot be
            reparameterized.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.zeros(5)
        >>> guide = pv.LocalGuide(model, num_data=5, example=x)
        >>> optim = pyro.optim.Adam({"lr": 0.01})
        >>> isinstance(pyro.infer.SVI(model, guide, optim, loss=pv.ELBO()).step(x), float)
        True
    """

    def __init__(
        self,
        num_particles: int = 1,
        kl: str = "analytic",
        estimator: str = "pathwise",
        *,
        vectorize_particles: bool = True,
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles={num_particles}: at least 1 is needed")
        if kl not in ("analytic", "sample"):
            raise ValueError(f"kl={kl!r}: 'analytic' or 'sample' is needed")
        if estimator != "pathwise":
            raise ValueError(f"estimator={estimator!r}: 'pathwise' is needed")
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles and num_particles > 1,
        )
        self.kl = kl
        self.estimator = estimator
        self._may_vectorize = self.vectorize_particles
        self._checked: tuple[Any, Any] | None = None

    def __repr__(self) -> str:
        return (
            f"ELBO(num_particles={self.num_particles}, kl={self.kl!r}, "
            f"estimator={self.estimator!r})"
        )

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss, a scalar to differentiate: the negative ELBO in nats."""
        if self._may_vectorize:
            self._check_vectorized(model, guide, args, kwargs)
        total: Tensor | float = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            for _, term in self._terms(model_trace, guide_trace):
                total = total + term.sum()
        if not isinstance(total, Tensor):
            raise ValueError("the model has no sample statement: there is nothing to fit")
        return -total / self.num_particles

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Return the loss as a number, in nats, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Return the loss as a number, and add its gradients to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def explain(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> dict[str, str]:
        """Return, for each latent site, whether its KL is analytic or sampled, and why."""
        device = Batch(args, kwargs).device
        with torch.no_grad(), preserved_rng(device), evaluation(model, guide):
            model_trace, guide_trace = trace_pair(model, guide, args, kwargs)
        told = {}
        for name, node in latent_nodes(guide_trace):
            if name not in model_trace.nodes:
                told[name] = "sampled: auxiliary site of the guide"
            elif self.kl == "sample":
                told[name] = "sampled: kl='sample'"
            else:
                found, reason = analytic_kl(node, model_trace.nodes[name])
                told[name] = f"{'sampled' if found is None else 'analytic'}: {reason}"
        return told

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        return trace_pair(model, guide, args, kwargs)

    def _terms(self, model_trace: Any, guide_trace: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield the terms of the ELBO: for each site, of its batch shape."""
        analytic: dict[str, Tensor] = {}
        for name, node in latent_nodes(guide_trace):
            _require_pathwise(name, node)
            if self.kl == "analytic" and name in model_trace.nodes:
                found, _ = analytic_kl(node, model_trace.nodes[name])
                if found is not None:
                    analytic[name] = found
        for name, node in sample_nodes(model_trace):
            if name not in analytic:
                yield name, site_log_prob(name, node, scaled=True)
        for name, node in latent_nodes(guide_trace):
            if name in analytic:
                yield name, -scale_and_mask(analytic[name], node["scale"], node["mask"])
            else:
                yield name, -site_log_prob(name, node, scaled=True)

    def _check_vectorized(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> None:
        """Compare a plate of particles with single ones, once for a pair."""
        if self._checked is not None and self._checked == (model, guide):
            return
        batch = Batch(args, kwargs)
        structure = inspect(model, batch, data_plate=False)
        if any(plate.drawn for site in structure.sites.values() for plate in site.plates):
            reason = "the model draws its own minibatch, another at each run"
        else:
            scorer = Scorer(model, guide, batch, data_plate=False, seed=0)
            self.max_plate_nesting = scorer.nesting + 1
            modes = scorer.modes
            reason = "" if set(modes.values()) == {"plate"} else f"modes are {modes}"
        self.vectorize_particles = not reason
        if reason:
            logger.warning("particles run in a loop, which is slow: %s", reason)
        self._checked = (model, guide)


def _require_pathwise(name: str, node: Any) -> None:
    fn = node["fn"]
    if not fn.has_rsample:
        raise ValueError(
            f"the guide's site {name!r} ({type(fn).__name__}) cannot be reparameterized, which "
            "pathwise gradients need; sum a discrete latent out "
            "(pyro.infer.TraceEnum_ELBO) or use score-function gradients "
            "(pyro.infer.Trace_ELBO)"
        )
