"""A topic model: find the topics that documents were written from, and each document's mixture.

Topics are learned in an order of their own, so each true topic is compared with the learned one
that shares most of its probability: sum over words of min(true, learned), 1 where they are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyro_vae as pv

torch.manual_seed(0)
NUM_WORDS, NUM_TOPICS = 60, 4


@torch.no_grad()
def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Probability that two distributions share, for each pair of rows, [T, T]."""
    return torch.minimum(first.unsqueeze(1), second).sum(-1)


def main() -> None:
    truth = pv.zoo.TopicModel(NUM_WORDS, NUM_TOPICS, concentration=0.5)
    with torch.no_grad():
        truth.topic_logits.mul_(2.0)  # topics that prefer some words strongly
    counts = truth.simulate(1500, document_length=100)

    model = pv.zoo.TopicModel(NUM_WORDS, NUM_TOPICS, concentration=0.5)
    print(pv.describe(model, counts))
    guide = pv.AmortizedGuide(model, model.make_encoder([64]), example=counts)
    before = overlap(truth.topics, model.topics).amax(1).mean()
    result = pv.fit(
        model,
        guide,
        counts,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        epochs=30,
        progress=False,
    )
    print(result)
    shared, match = overlap(truth.topics, model.topics).max(1)
    test = truth.simulate(100, seed=1)
    learned = pv.iwae_bound(model, guide, test, num_particles=500, seed=0)
    print(f"topics matched           {len(match.unique())} of {NUM_TOPICS}")
    print(f"overlap before training  {float(before):.3f}")
    print(f"overlap after            {float(shared.mean()):.3f}")
    print(f"log p(x) of the learned  {learned.mean:.2f} ± {learned.mean_std_error:.2f}")


if __name__ == "__main__":
    main()
