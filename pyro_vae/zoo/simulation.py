"""Data drawn from a model, with a seed of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.programs.handlers import Unobserve
from pyro_vae.programs.state import evaluation, preserved_rng


def draw(
    model: nn.Module, *blank: Any, seed: int, given: Mapping[str, Tensor] | None = None
) -> Any:
    """Run a model with its observed sites drawn; the global random state stays what it is.

    Args:
        model: a Pyro model that returns the values of its observed sites.
        *blank: its arguments, the first a tensor of the data's shape; observed values in them
            are not looked at.
        seed: of the draw.
        given: values of latent sites that are not to be drawn.

    Returns:
        What the model returns.
    """
    device = blank[0].device
    with torch.no_grad(), evaluation(model), preserved_rng(device):
        # Not torch.manual_seed: it seeds every device.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        return pyro.condition(Unobserve()(model), data=dict(given or {}))(*blank)


def draw_integers(low: int, high: int, blank: Tensor, seed: int) -> tuple[Tensor, int]:
    """Draw a whole number from low to high - 1 for each row, and a seed for what depends on them.

    With the same seed again, what is drawn given the numbers would depend on them twice.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(low, high, blank.shape[:1], generator=generator).to(blank.device)
    return drawn, int(torch.randint(2**62, (), generator=generator))
