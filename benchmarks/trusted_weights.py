"""Which importance weights are trusted, and how often the bound of these is wrong.

    python benchmarks/trusted_weights.py

The posterior is a standard normal, and p(x) is one; guides are normals that are off, in location or
scale. "best" leaves the weights of an optimal Gaussian guide of a skewed posterior,
exp(0.02 (z^3 - 3 z) / 6). Of each guide and K: the share of 600 data that the rule of
pyro_vae/diagnostics/verdict.py trusts, and of these that whose IWAE-K is off by more than 5 errors.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from machine import describe

from pyro_vae.diagnostics.verdict import Weights
from pyro_vae.particles.estimators import Estimate, calibrated

NUM_DATA, COUNTS = 600, (100, 1000, 5000)
# By name: location and scale; the tail of the weights has k = 1 - scale^2 where that is above 0.
GUIDES = {
    "best": (0.0, 1.0),
    "off by 1": (1.0, 1.0),
    "off by 2": (2.0, 1.0),
    "off by 3": (3.0, 1.0),
    "0.7 times as wide": (0.0, 0.7),
    "half as wide": (0.0, 0.5),
    "a third as wide": (0.0, 1 / 3),
    "a tenth as wide": (0.0, 0.1),
    "twice as wide": (0.0, 2.0),
    "20 times as wide": (0.0, 20.0),
}


def log_weights(name: str, num_particles: int, rng: np.random.Generator) -> np.ndarray:
    """Return log weights of a guide's draws, [N, K]; the mean weight is one but for Monte Carlo."""
    shift, scale = GUIDES[name]
    noise = rng.normal(size=(NUM_DATA, num_particles))
    z = shift + scale * noise
    if name != "best":
        return np.asarray(0.5 * (noise**2 - z**2) + math.log(scale))
    grid = np.linspace(-10, 10, 100_001)
    skew = np.exp(0.02 * (grid**3 - 3 * grid) / 6 - 0.5 * grid**2) / math.sqrt(2 * math.pi)
    return np.asarray(0.02 * (z**3 - 3 * z) / 6 - math.log(skew.sum() * (grid[1] - grid[0])))


def main() -> None:
    print(describe())
    rng = np.random.default_rng(0)
    print(f"{'guide':20s} {'k':>5s}", *(f"{f'K = {count}':>12s}" for count in COUNTS))
    for name, (_, scale) in GUIDES.items():
        cells = []
        for count in COUNTS:
            found = log_weights(name, count, rng)
            estimate = Estimate.iwae(torch.as_tensor(found.T))
            error = calibrated(estimate.std_error, estimate.skewness, count)
            off = (estimate.value.abs() > 5 * error).numpy()
            trusted = Weights.of(found).trusted
            wrong = f" ({off[trusted].mean():.2f})" if trusted.any() else ""
            cells.append(f"{f'{trusted.mean():.2f}{wrong}':>12s}")
        print(f"{name:20s} {max(0.0, 1 - scale**2):5.2f}", *cells)


if __name__ == "__main__":
    main()
