"""What the log weights say of a guide, and what a loss does with each site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae import arviz_bridge
from pyro_vae.batches import as_batch
from pyro_vae.objectives import Objective
from pyro_vae.results import LogWeights

__all__ = ["explain", "pareto_k"]


def pareto_k(log_weights: LogWeights | Tensor) -> Tensor:
    """Return the Pareto k-hat of each datum's importance weights (Vehtari et al. 2024).

    Above 0.7 the guide misses so much of the posterior that importance sampling
    through it, standard errors included, is not to be trusted. ArviZ's PSIS fits it,
    to each datum alone: a k-hat of weights summed over data grows with their number.

    Args:
        log_weights: LogWeights, or a tensor [K, N] of log weights in nats.

    Returns:
        [N], float64; 0 where the weights are constant to rounding, nan where K is too
        small to fit a tail.

    Raises:
        ValueError: for weights that are not [K, N], or hold nan or +inf.

    Example:
        >>> import torch
        >>> pareto_k(torch.zeros(100, 2)).tolist()
        [0.0, 0.0]
    """
    total = log_weights.total if isinstance(log_weights, LogWeights) else log_weights
    if total.ndim != 2:
        raise ValueError(f"log weights of shape [K, N] are needed, found {tuple(total.shape)}")
    _, k_hat = arviz_bridge.psis(total.T.detach().cpu().numpy())
    return torch.as_tensor(k_hat, dtype=torch.float64)


def explain(
    loss: Objective, model: Callable[..., Any], guide: Callable[..., Any], *batch: Any
) -> dict[str, str]:
    """Return, for each latent site, whether a loss takes its KL analytically, and why.

    Args:
        loss: a loss of ours, for example ELBO().
        model: a Pyro model.
        guide: a Pyro guide.
        *batch: their arguments.

    Returns:
        Site name to "analytic: ..." or "sampled: ...".

    Raises:
        TypeError: for a loss that is not ours.
    """
    if not isinstance(loss, Objective):
        raise TypeError(f"explain knows the losses of pyro_vae, not {type(loss).__name__}")
    arguments = as_batch(*batch)
    return loss.explain(model, guide, *arguments.args, **arguments.kwargs)
