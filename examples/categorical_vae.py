"""A questionnaire: twelve questions of four answers each, and two traits behind them.

A categorical VAE against the model that takes the answers to be independent, on people that
neither has seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.zoo.likelihoods import Categorical

NUM_QUESTIONS, NUM_ANSWERS = 12, 4


def make() -> pv.zoo.VAE:
    return pv.zoo.VAE(NUM_QUESTIONS, 2, hidden=[], likelihood=Categorical(NUM_ANSWERS))


def answers(num_people: int) -> Tensor:
    truth = make()
    for parameter in truth.decoder.parameters():
        nn.init.normal_(parameter, std=1.0)
    return truth.simulate(num_people, seed=1)


def log_prob_independent(train: Tensor, test: Tensor) -> float:
    counts = torch.stack([q.bincount(minlength=NUM_ANSWERS) for q in train.T])
    shares = (counts + 1) / (counts + 1).sum(1, keepdim=True)
    return torch.distributions.Categorical(shares).log_prob(test).sum(1).mean().item()


def main() -> None:
    torch.manual_seed(0)
    train, test = answers(1700).split([1600, 100])
    model = make()
    guide = pv.AmortizedGuide(model, model.make_encoder([32]), example=train[:5])
    print(pv.describe(model, train))
    pv.fit(
        model,
        guide,
        train,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        epochs=15,
        progress=False,
    )
    bound = pv.iwae_bound(model, guide, test, num_particles=1000, seed=0)
    independent = log_prob_independent(train, test)
    print(f"log p(x), two traits      {bound.mean:.3f} ± {bound.mean_std_error:.3f}")
    print(f"log p(x), independent     {independent:.3f}")
    print(f"gain in nats per person   {bound.mean - independent:.3f}")
    guides = {"encoder": guide, "mean-field": pv.families.Normal()}
    print(pv.compare(model, guides, test[:10], num_particles=300, max_steps=300, seed=0))


if __name__ == "__main__":
    main()
