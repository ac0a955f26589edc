"""How often sbc and coverage accept an exact guide, and guides that are wrong in a known way.

    python benchmarks/calibration.py

z ~ Normal(0, 1), x ~ Normal(z, 1), one latent or five independent ones; the posterior is known by
algebra. Each guide is asked 40 times, from seeds of their own, with the default settings (2000
simulations, 99 draws, an error rate of 0.01 over all quantities). Counted is how often it is
accepted: by sbc; by ranks of the latents alone, at the same rate; by coverage; and by each of its
two kinds of regions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv

Guide = Callable[[Tensor], None]

ERROR_RATE = 0.01  # the default


def model(x: Tensor) -> None:
    """z ~ Normal(0, 1), x ~ Normal(z, 1), of [N, D]."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def posterior(shift: float = 0.0, widen: float = 1.0) -> Guide:
    """The posterior, Normal(x / 2, 0.5**0.5), shifted by its standard deviations and widened."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            normal = dist.Normal(x / 2 + shift * 0.5**0.5, widen * 0.5**0.5)
            pyro.sample("z", normal.to_event(1))

    return guide


def prior(x: Tensor) -> None:
    """The prior, whatever the data."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))


GUIDES: dict[str, Guide] = {
    "exact": posterior(),
    "0.7 times as wide": posterior(widen=0.7),
    "1.4 times as wide": posterior(widen=1.4),
    "shifted by 0.3": posterior(shift=0.3),
    "the prior": prior,
}


def accepted(guide: Guide, num_latents: int, seed: int) -> dict[str, bool]:
    """Return by which tests a guide is accepted."""
    x = torch.zeros(1, num_latents)
    calibration = pv.sbc(model, guide, x, seed=seed)
    coverage = pv.coverage(model, guide, x, seed=seed)
    of_latents = calibration.dataset["p_value"].values[:num_latents]
    regions = coverage.dataset["p_value"]
    return {
        "sbc": calibration.passed,
        "latents alone": bool((of_latents > ERROR_RATE / num_latents).all()),
        "coverage": coverage.passed,
        "density alone": bool(regions.sel(region="density") > ERROR_RATE),
        "TARP alone": bool(regions.sel(region="TARP") > ERROR_RATE),
    }


def main() -> None:
    """Print the table."""
    import machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--guides", nargs="+", choices=list(GUIDES), default=list(GUIDES))
    arguments = parser.parse_args()
    repetitions = arguments.repetitions
    print(machine.describe())
    print(f"accepted, of {repetitions} repetitions\n")
    names = ("sbc", "latents alone", "coverage", "density alone", "TARP alone")
    print(f"| latents | guide | {' | '.join(names)} | seconds |")
    print("|--:|---|" + "--:|" * (len(names) + 1))
    for num_latents in (1, 5):
        for name in arguments.guides:
            start = time.perf_counter()
            found = [accepted(GUIDES[name], num_latents, seed) for seed in range(repetitions)]
            counts = [str(sum(each[test] for each in found)) for test in names]
            seconds = (time.perf_counter() - start) / repetitions
            cells = [str(num_latents), name, *counts, f"{seconds:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
