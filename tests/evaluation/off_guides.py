"""The exact posterior of a Normal model as a guide, and guides that are off in a known way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.models import NormalModel

MODEL = NormalModel()


@dataclass(frozen=True)
class OffGuide:
    """The posterior of NormalModel, its mean shifted by standard deviations, its scale widened."""

    shift: float = 0.0
    widen: float = 1.0
    model: NormalModel = MODEL

    def __call__(self, x: Tensor) -> None:
        exact = self.model.posterior_of(x)
        with pyro.plate("data", len(x)):
            normal = dist.Normal(exact.loc + self.shift * exact.scale, self.widen * exact.scale)
            pyro.sample("z", normal.to_event(x.ndim - 1))


def prior(x: Tensor) -> None:
    """The prior, whatever the data."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(x.ndim - 1))


GUIDES: dict[str, Callable[[Tensor], None]] = {
    "exact": OffGuide(),
    "overconfident": OffGuide(widen=0.7),
    "underconfident": OffGuide(widen=1.4),
    "biased": OffGuide(shift=0.3),
    "prior": prior,
}
