"""A VAE with more latents than the data need: which does it use, and is the posterior the prior?

Data of ten dimensions lie on a curved surface of two, with noise. A VAE of six latents uses two of
them and leaves the posterior of the others at the prior, where they cost nothing.
"""

from __future__ import annotations

import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.zoo.likelihoods import Gaussian


def main() -> None:
    torch.manual_seed(0)
    truth = pv.zoo.VAE(10, 2, hidden=[20], likelihood=Gaussian(0.2))
    for layer in truth.decoder.layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.6)
    data, test = truth.simulate(2500, seed=1).split([2000, 500])

    model = pv.zoo.VAE(10, 6, hidden=[32], likelihood=Gaussian())
    guide = pv.AmortizedGuide(model, model.make_encoder([32]), example=data[:5])
    for learning_rate in (0.01, 0.001):
        pv.fit(
            model,
            guide,
            data,
            optim=lambda parameters, lr=learning_rate: torch.optim.Adam(parameters, lr=lr),
            epochs=60,
            progress=False,
        )
    print(pv.rate_distortion(model, guide, test, seed=0))
    print()
    print(pv.active_units(model, guide, test, seed=0).summary().round(3).to_string())
    print()
    print(pv.aggregate_posterior(model, guide, test, seed=0))


if __name__ == "__main__":
    main()
