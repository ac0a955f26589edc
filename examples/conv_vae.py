"""A convolutional VAE of digits, with batch normalization and dropout in its networks.

Training runs them in one mode and every bound in the other, so that one seed gives one number.
"""

from __future__ import annotations

import torch

import pyro_vae as pv
from pyro_vae.zoo.likelihoods import Binomial


def main() -> None:
    torch.manual_seed(0)
    digits = pv.datasets.digits()
    train = digits.train.float().reshape(-1, 1, *digits.shape)
    test = digits.test[:100].float().reshape(-1, 1, *digits.shape)

    likelihood = Binomial(digits.max_value)
    model = pv.zoo.ConvVAE((1, 8, 8), 8, channels=[16, 8], likelihood=likelihood, batch_norm=True)
    encoder = model.make_encoder(32, channels=[8, 16], batch_norm=True, dropout=0.05)
    guide = pv.AmortizedGuide(model, encoder, example=train[:5])
    print(pv.describe(model, train))
    result = pv.fit(
        model,
        guide,
        train,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        epochs=16,
        progress=False,
    )
    print(result)

    first, second = (pv.iwae_bound(model, guide, test, num_particles=100, seed=0) for _ in "ab")
    print(f"one seed, one number: {torch.equal(first.value, second.value)}")
    share = train.mean(0) / digits.max_value
    pixels = torch.distributions.Binomial(digits.max_value, share.clamp(1e-3, 1 - 1e-3))
    independent = pixels.log_prob(test).sum((1, 2, 3)).mean()
    print(f"log p(x), independent pixels {independent:.2f}")
    print(f"log p(x), convolutional VAE  {first.mean:.2f} ± {first.mean_std_error:.2f}")


if __name__ == "__main__":
    main()
