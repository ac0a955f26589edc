"""Digits given their class: a conditional VAE is a classifier, by Bayes' rule.

The model gives log p(x | y), so p(y | x) is a softmax of ten bounds, one for each class that an
image might have.
"""

from __future__ import annotations

import torch

import pyro_vae as pv
from pyro_vae.zoo.likelihoods import Binomial


def main() -> None:
    torch.manual_seed(0)
    digits = pv.datasets.digits()
    train = {"x": digits.train.float(), "y": digits.train_labels}
    x, y = digits.test[:100].float(), digits.test_labels[:100]
    model = pv.zoo.ConditionalVAE(64, 6, 10, hidden=[64], likelihood=Binomial(digits.max_value))
    guide = pv.AmortizedGuide(model, model.make_encoder([64]), example=train)
    print(pv.describe(model, train))
    pv.fit(
        model,
        guide,
        train,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        epochs=25,
        progress=False,
    )
    bounds = [
        pv.iwae_bound(model, guide, x, torch.full_like(y, label), num_particles=50, seed=0)
        for label in range(10)
    ]
    log_likelihood = torch.stack([bound.value for bound in bounds], 1)  # [N, 10]
    right = log_likelihood.gather(1, y[:, None]).mean()
    wrong = log_likelihood.median(1).values.mean()
    print(f"log p(x | y), right class    {right:.2f}")
    print(f"log p(x | y), the median one {wrong:.2f}")
    accuracy = (log_likelihood.argmax(1) == y).float().mean()
    print(f"accuracy of p(y | x)         {accuracy:.3f}")


if __name__ == "__main__":
    main()
