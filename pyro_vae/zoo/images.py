"""Variational autoencoders of images and other vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.handlers import register
from pyro_vae.nets import MLP

__all__ = ["VAE"]


class VAE(nn.Module):
    r"""A variational autoencoder's generative half (Kingma & Welling 2014).

    .. math::
        z \sim \mathrm{Normal}(0, I_L), \quad
        x_d | z \sim \mathrm{Binomial}(\mathrm{num\_trials}, \mathrm{logits}_d(z))

    Args:
        num_features: D, dimensions of a datum.
        num_latents: L.
        hidden: widths of the decoder's hidden layers.
        num_trials: 1 for binary data (a Bernoulli likelihood), or the largest count.

    Raises:
        ValueError: for num_trials < 1.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> model = pv.zoo.VAE(64, 10, hidden=[32], num_trials=16)
        >>> pv.describe(model, torch.zeros(3, 64)).data_plate
        'data'
    """

    def __init__(
        self, num_features: int, num_latents: int, *, hidden: Sequence[int], num_trials: int = 1
    ) -> None:
        super().__init__()
        if num_trials < 1:
            raise ValueError(f"num_trials={num_trials}: at least 1 is needed")
        self.num_latents = num_latents
        self.num_trials = num_trials
        self.decoder = MLP([num_latents, *hidden, num_features])

    def forward(self, x: Tensor) -> Tensor:
        """Run the model on data [N, D]; return the latents [N, L]."""
        register(self)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(self.num_latents), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", self.likelihood(z).to_event(1), obs=x)
        return z

    def likelihood(self, z: Tensor) -> Any:
        """Return the distribution of each feature given latents [..., L]."""
        logits = self.decoder(z)
        if self.num_trials == 1:
            return dist.Bernoulli(logits=logits)
        return dist.Binomial(self.num_trials, logits=logits)
