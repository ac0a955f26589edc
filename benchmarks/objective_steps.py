"""What a training step of each objective costs, beside the plain ELBO with as many particles.

    python benchmarks/objective_steps.py --data mnist.npz

A step is loss, gradients and Adam on a minibatch of a Bernoulli VAE (784-200-200-50 on MNIST; the
8x8 digits stand in without --data). All objectives run in turns in one process, each on the same
minibatch, and each step's time is divided by that of the plain ELBO (analytic KL, pathwise) in the
same turn: the medians of these ratios are printed with the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import machine
import pyro.infer
import torch
from torch import Tensor

import pyro_vae as pv

NUM_LATENTS = 50
HIDDEN = (200, 200)


def objectives(num_particles: int) -> dict[str, pyro.infer.ELBO]:
    """Return the losses to compare; the first is what the others are measured against."""
    found: dict[str, pyro.infer.ELBO] = {
        "ELBO": pv.ELBO(num_particles),
        "ELBO, sampled KL": pv.ELBO(num_particles, kl="sample"),
        "ELBO, stl": pv.ELBO(num_particles, estimator="stl"),
        "IWAE": pv.IWAE(num_particles),
        "IWAE, stl": pv.IWAE(num_particles, "stl"),
        "IWAE, dreg": pv.IWAE(num_particles, "dreg"),
    }
    if num_particles > 1:
        found["WakeSleep"] = pv.WakeSleep(num_particles)
        found["WakeSleep, half asleep"] = pv.WakeSleep(num_particles, insomnia=0.5)
    vectorized = {"vectorize_particles": num_particles > 1, "max_plate_nesting": 1}
    found["pyro Trace_ELBO"] = pyro.infer.Trace_ELBO(num_particles, **vectorized)
    found["pyro TraceMeanField_ELBO"] = pyro.infer.TraceMeanField_ELBO(num_particles, **vectorized)
    if num_particles > 1:
        found["pyro RenyiELBO"] = pyro.infer.RenyiELBO(0.0, num_particles, **vectorized)
    return found


def stepper(loss: pyro.infer.ELBO, images: Tensor) -> Callable[[Tensor], float]:
    """Return a function that trains a pair of its own by one step, and times it."""
    torch.manual_seed(0)
    num_features = images.shape[1]
    model = pv.zoo.VAE(num_features, NUM_LATENTS, hidden=HIDDEN[::-1])
    encoder = pv.nets.MLP([num_features, *HIDDEN], activate_last=True)
    guide = pv.AmortizedGuide(model, encoder, example=images[:2])
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=1e-3)

    def step(batch: Tensor) -> float:
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss.loss_and_grads(model, guide, batch)
        optimizer.step()
        return time.perf_counter() - begin

    return step


def measure(images: Tensor, batch_size: int, num_particles: int, turns: int) -> None:
    """Print a table of the steps' times and ratios."""
    steps = {name: stepper(loss, images) for name, loss in objectives(num_particles).items()}
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, turns):  # the first two turns warm up, and check the particles
        batch = images[torch.randperm(len(images))[:batch_size]]
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = steps[name](batch)
            if turn >= 0:
                times[name].append(seconds)
    print(f"\nbatch {batch_size}, {num_particles} particles, {turns} turns")
    print(f"{'objective':<26}{'ms per step':>12}{'ratio to ELBO':>15}   (quartiles)")
    for name in names:
        ratios = [a / b for a, b in zip(times[name], times[names[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name:<26}{1e3 * statistics.median(times[name]):>12.2f}{middle:>15.2f}"
            f"   ({low:.2f} - {high:.2f})"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="an .npz of MNIST (x_train, y_train, x_test, y_test)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[20, 128])
    parser.add_argument("--num-particles", type=int, nargs="+", default=[1, 5, 50])
    parser.add_argument("--turns", type=int, default=40)
    options = parser.parse_args()
    loaded = pv.datasets.digits() if options.data is None else pv.datasets.load(options.data)
    binary = pv.datasets.StochasticBinarization(loaded.train, loaded.max_value)
    torch.manual_seed(0)
    images = binary.fixed(0)
    print(machine.describe())
    print(f"{images.shape[1]}-{HIDDEN[0]}-{HIDDEN[1]}-{NUM_LATENTS} Bernoulli VAE")
    for batch_size in options.batch_size:
        for num_particles in options.num_particles:
            # A step of many particles takes long; its time varies less.
            turns = max(8, options.turns // (1 + num_particles * batch_size // 1000))
            measure(images, batch_size, num_particles, turns)


if __name__ == "__main__":
    main()
