"""How often pv.Converged stops too early, and how late it is, on runs whose optimum is known.

    python benchmarks/stopping.py

Simulated runs take stochastic gradients of functions with a known minimum: quadratics of 1 to 50
numbers, whose curvatures lie up to a factor of 300 apart, with noise of several sizes, and the same
with a skewed term, whose average iterate is off the optimum at a constant rate. They go by SGD, SGD
with momentum and Adam, from near and from far. Fitted runs are pv.fit of factor analysis by an
amortized guide, whose best ELBO has a closed form. A run that is declared converged while its
parameters are further from the optimum than the tolerance is a false alarm. The ideal stops where
the average of the last half of all steps, of the same run, first is within the tolerance.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import machine
import numpy as np
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.training.convergence import Blocks, Stages

TOLERANCE = 0.01
OPTIMIZERS = ("sgd", "momentum", "adam")


@dataclass(frozen=True)
class Outcome:
    """Of a run: the steps until it was declared converged, None if never; its distance in nats."""

    steps: int | None
    excess: float
    ideal: int | None


class Function:
    """sum_i h_i (x_i^2 / 2 + skew (exp(x_i) - 1 - x_i)), whose minimum is 0 at 0."""

    def __init__(self, size: int, condition: float, skew: float) -> None:
        self.h = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
        self.skew = skew

    def value(self, x: Tensor) -> Tensor:
        """Return the values at points [..., D]."""
        return (self.h * (x**2 / 2 + self.skew * (x.exp() - 1 - x))).sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """Return the gradient at a point [D]."""
        return self.h * (x + self.skew * (x.exp() - 1))


def simulated(
    function: Function, optimizer: str, noise: float, start: float, seed: int, most: int
) -> Outcome:
    """Run an optimizer on noisy gradients until it is declared converged."""
    rng = np.random.default_rng(seed)
    size = len(function.h)
    x = torch.as_tensor(start * rng.standard_normal(size))
    slopes = noise * torch.as_tensor(rng.standard_normal((8, size)))

    def scores(settings: list[list[Tensor]], number: int) -> Tensor:
        """Minibatches have linear terms of their own, as their gradients have."""
        draws = noise * torch.as_tensor(
            np.random.default_rng([seed, number]).normal(size=(32, size))
        )
        points = torch.stack([setting[0] for setting in settings])
        return points @ draws.T - function.value(points).unsqueeze(1)

    def follow() -> Tensor:
        return slopes @ x - function.value(x)

    stages = Stages([x], scores, follow, TOLERANCE)
    everything, ideal = Blocks(25), None
    rate = 0.05 if optimizer == "adam" else 0.3
    first, second = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for step in range(1, most + 1):
        gradient = function.gradient(x) + noise * torch.as_tensor(rng.standard_normal(size))
        if optimizer == "sgd":
            x -= rate * gradient
        elif optimizer == "momentum":
            first = 0.9 * first + gradient
            x -= 0.1 * rate * first
        else:
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            scale = (second / (1 - 0.999**step)).sqrt() + 1e-8
            x -= rate * first / (1 - 0.9**step) / scale
        if ideal is None and everything.add([x]):
            half = everything.means[-(len(everything.means) + 1) // 2 :]
            mean = torch.stack([block[0] for block in half]).mean(0)
            ideal = step if float(function.value(mean)) < TOLERANCE else None
        verdict = stages.add()
        if verdict != "go on":
            x.copy_(stages.average[0])
            rate *= stages.factor
        if verdict == "converged":
            return Outcome(step, float(function.value(x)), ideal)
    return Outcome(None, float(function.value(x)), ideal)


def fitted(seed: int, rate: float, batch_size: int, most: int) -> Outcome:
    """Fit an amortized guide of factor analysis, whose exact posterior is in its family."""
    torch.manual_seed(seed)
    loadings = torch.randn(5, 2, dtype=torch.float64)
    model = pv.zoo.FactorAnalysis(5, 2).double()
    with torch.no_grad():
        model.loadings.copy_(loadings)
    model.requires_grad_(False)
    x = (torch.randn(200, 2, dtype=torch.float64) @ loadings.T).add_(
        torch.randn(200, 5, dtype=torch.float64)
    )
    guide = pv.AmortizedGuide(
        model, nn.Linear(5, 8).double(), example=x, family=pv.families.FullRankNormal()
    )
    best = float(model.log_evidence(x).mean())
    result = pv.fit(
        model,
        guide,
        x,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=rate),
        batch_size=batch_size,
        max_steps=most,
        seed=seed,
        stop=pv.Converged(TOLERANCE),
        progress=False,
    )
    elbo = float(pv.elbo(model, guide, x, num_particles=4000).mean)
    steps = result.steps if result.stopped_by == "converged" else None
    return Outcome(steps, best - elbo, None)


def wilson(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a share."""
    if not total:
        return 0.0, 1.0
    share, square = count / total, z * z / total
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def settings() -> Iterator[tuple[int, float, float, float, float]]:
    """Sizes, conditions, skews, noises and starts."""
    for size, condition in ((1, 1.0), (10, 1.0), (10, 30.0), (50, 30.0), (10, 300.0)):
        for skew in (0.0, 0.5):
            for noise in (0.05, 0.3):
                for start in (0.5, 3.0):
                    yield size, condition, skew, noise, start


def report(name: str, outcomes: list[Outcome], seconds: float) -> None:
    """Print a row of the table."""
    declared = [o for o in outcomes if o.steps is not None]
    false = sum(o.excess > TOLERANCE for o in declared)
    low, high = wilson(false, len(declared))
    late = [o.steps / o.ideal for o in declared if o.steps and o.ideal]
    median = f"{np.median(late):.1f} ({np.quantile(late, 0.9):.1f})" if late else ""
    worst = max((o.excess for o in declared), default=math.nan)
    print(
        f"| {name} | {len(outcomes)} | {len(declared)} | {false} | {low:.1%} - {high:.1%} | "
        f"{worst:.4f} | {median} | {seconds:.0f} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="of each of 120 simulated settings")
    parser.add_argument("--fits", type=int, default=40, help="fitted runs")
    parser.add_argument("--steps", type=int, default=20_000, help="of a run at most")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(machine.describe())
    print(
        "\n| runs | | declared | false | 95% | largest distance, nats | steps / ideal, median (90%)"
        " | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    everything: list[Outcome] = []
    for optimizer in OPTIMIZERS:
        begin, outcomes = time.process_time(), []
        for number, (size, condition, skew, noise, start) in enumerate(settings()):
            function = Function(size, condition, skew)
            for seed in range(args.seeds):
                key = 1000 * number + seed
                outcomes.append(simulated(function, optimizer, noise, start, key, args.steps))
        report(optimizer, outcomes, time.process_time() - begin)
        everything += outcomes
    begin = time.process_time()
    fits = [
        fitted(seed, 0.01 if seed % 2 else 0.03, 100 if seed % 4 < 2 else 200, args.steps)
        for seed in range(args.fits)
    ]
    report("pv.fit", fits, time.process_time() - begin)
    report("in all", everything + fits, 0.0)


if __name__ == "__main__":
    main()
