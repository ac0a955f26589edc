"""What the log weights say of a guide, and what a loss does with each site."""

from __future__ import annotations

from typing import Any

from pyro_vae.losses.base import Objective
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.types import Program

__all__ = ["explain"]


def explain(loss: Objective, model: Program, guide: Program, *batch: Any) -> dict[str, str]:
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
