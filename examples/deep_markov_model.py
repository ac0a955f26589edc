"""A deep Markov model of sequences of different length: the phase of a noisy rotation.

Each sequence is two coordinates of a point that goes round, at a radius and from a phase of its
own, seen with noise. What the model learned of the motion shows in its predictions: the next step
from the state that it infers, against the best guess that knows no motion, the last step again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyro_vae as pv

torch.manual_seed(0)
NUM_STEPS, NOISE = 6, 0.1


def simulate(num_data: int) -> tuple[Tensor, Tensor]:
    """Return sequences [N, T, 2], zero after their lengths, and lengths [N]."""
    lengths = torch.randint(4, NUM_STEPS + 1, (num_data,))
    steps = torch.arange(NUM_STEPS)
    angle = 2 * math.pi * (torch.rand(num_data, 1) + steps / 6)
    radius = 1 + 0.2 * torch.randn(num_data, 1)
    clean = radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)
    noisy = clean + NOISE * torch.randn_like(clean)
    return noisy * (steps < lengths.unsqueeze(-1)).unsqueeze(-1), lengths


def main() -> None:
    sequences, lengths = simulate(300)
    model = pv.zoo.DeepMarkovModel(num_features=2, num_latents=2, hidden=[16])
    guide = pv.AmortizedGuide(model, model.make_encoder(16), example=(sequences, lengths))
    print(pv.describe(model, sequences, lengths))
    result = pv.fit(
        model,
        guide,
        (sequences, lengths),
        # Without it the states are given up at the start, before the motion is learned.
        schedule=pv.schedules.LinearWarmup(steps=80),
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        batch_size=100,
        epochs=50,
        progress=False,
    )
    print(result)

    # Hide the last step of each test sequence, infer the rest, and predict one step on.
    sequences, lengths = simulate(300)
    rows, last = torch.arange(300), lengths - 1
    hidden = sequences[rows, last]
    with torch.no_grad():
        draws = []
        for _ in range(20):
            sites = guide(sequences, last)
            states = torch.stack([sites[f"z_{t + 1}"] for t in range(NUM_STEPS)], 1)
            draws.append(model.emission(model.transition(states[rows, last - 1])[0]))
    predicted = torch.stack(draws).mean(0)
    repeated = sequences[rows, last - 1]
    bound = pv.iwae_bound(model, guide, sequences, lengths, num_particles=100, seed=0)
    print(f"log p(x) per step       {bound.value.sum() / lengths.sum():.3f}")
    print(f"noise, true             {NOISE:.3f}")
    print(f"noise, learned          {float(model.noise.detach().mean()):.3f}")
    print(f"error of the prediction {float((predicted - hidden).square().mean().sqrt()):.3f}")
    print(f"error of the last step  {float((repeated - hidden).square().mean().sqrt()):.3f}")


if __name__ == "__main__":
    main()
