"""A Gaussian VAE learns its noise: sigma is found, where a guessed one costs nats.

Data of ten dimensions lie on a curved surface of two, with noise of standard deviation 0.2. One
model learns sigma with everything else, the other has it fixed at one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.zoo.likelihoods import Gaussian

SIGMA = 0.2


def surface(num_data: int) -> Tensor:
    truth = pv.zoo.VAE(10, 2, hidden=[20], likelihood=Gaussian(SIGMA))
    for layer in truth.decoder.layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.6)
    return truth.simulate(num_data, seed=1)


def train(likelihood: Gaussian, data: Tensor) -> tuple[nn.Module, nn.Module]:
    model = pv.zoo.VAE(10, 2, hidden=[32], likelihood=likelihood)
    guide = pv.AmortizedGuide(model, model.make_encoder([32]), example=data[:5])
    pv.fit(
        model,
        guide,
        data,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        epochs=40,
        progress=False,
    )
    return model, guide


def main() -> None:
    torch.manual_seed(0)
    data, test = surface(1100).split([1000, 100])
    learned, guide = train(Gaussian(), data)
    print(pv.describe(learned, test))
    print(f"sigma of the data       {SIGMA}")
    print(f"learned sigma           {learned.observation.sigma.item():.4f}")

    bound = pv.iwae_bound(learned, guide, test, num_particles=500, seed=0)
    print(f"log p(x), learned sigma {bound.mean:.3f} ± {bound.mean_std_error:.3f}")
    bound = pv.iwae_bound(*train(Gaussian(1.0), data), test, num_particles=500, seed=0)
    print(f"log p(x), sigma of one  {bound.mean:.3f} ± {bound.mean_std_error:.3f}")


if __name__ == "__main__":
    main()
