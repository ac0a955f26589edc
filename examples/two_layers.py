"""Two stochastic layers: what does a second one add to the first?

Black and white digits. Both models have six latents next to the data; in one their prior is
standard normal, in the other it is made of two more latents above them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pyro_vae as pv


def train(model: nn.Module, data: pv.datasets.StochasticBinarization, x: Tensor) -> nn.Module:
    guide = pv.AmortizedGuide(model, model.make_encoder([64]), example=x)
    pv.fit(
        model,
        guide,
        data,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        epochs=25,
        progress=False,
    )
    return guide


def main() -> None:
    torch.manual_seed(0)
    digits = pv.datasets.digits()
    data = pv.datasets.StochasticBinarization(digits.train, digits.max_value)
    x = pv.datasets.StochasticBinarization(digits.test, digits.max_value).fixed(seed=0)[:200]

    two = pv.zoo.TwoLayerVAE(64, (6, 2), hidden=[64])
    print(pv.describe(two, x))
    models = {"one layer": pv.zoo.VAE(64, 6, hidden=[64]), "two layers": two}
    bounds = {}
    for name, model in models.items():
        guide = train(model, data, x)
        bounds[name] = pv.iwae_bound(model, guide, x, num_particles=300, seed=0)
        print(f"log p(x), {name:10} {bounds[name].mean:.3f} ± {bounds[name].mean_std_error:.3f}")
    print(f"gain of the second   {bounds['two layers'].mean - bounds['one layer'].mean:.3f}")


if __name__ == "__main__":
    main()
