"""Models that take their particles in one way only."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import nn


class ConvModel(nn.Module):
    """Needs [N, C, H, W]: cannot take a dimension of particles."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 1, 3), nn.BatchNorm2d(1)
        ).double()

    def forward(self, x):
        pyro.module("conv", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(3), obs=x)
