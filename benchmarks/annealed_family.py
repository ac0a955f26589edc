"""Steps along the model's gradient beside a flow: gaps and cost, on two modes and on a funnel.

Evidence is exact (quadrature on a grid), so that a gap is log p(x) - ELBO and nothing else.

    python benchmarks/annealed_family.py
"""

from __future__ import annotations

import argparse
import math
import time

import machine
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.families import Annealed, Family, Flow, Normal

X = torch.tensor([0.3, 1.0, 2.0])
PARTICLES, DRAWS = 16, 20_000
FAMILIES: dict[str, Family] = {
    "Normal": Normal(),
    "Flow": Flow(),
    "Annealed, 1 step": Annealed(Normal(), 1),
    "Annealed, 4 steps": Annealed(Normal(), 4),
    "Annealed, 16 steps": Annealed(Normal(), 16),
}


def two_modes(x: Tensor) -> None:
    """z ~ N(0, 1.5), x ~ N(z^2, 0.5): a mode on either side."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.5))
        pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)


def funnel(x: Tensor) -> None:
    """s ~ LogNormal(0, 1), z ~ N(0, s), x ~ N(z, 0.5)."""
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, s))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def exact(name: str) -> Tensor:
    """Return log p(x) by the trapezoid rule over z, or over log s with z integrated by hand."""
    at = torch.linspace(-14, 14, 40_001, dtype=torch.float64).unsqueeze(1)
    x = X.double()
    if name == "two modes":
        joint = dist.Normal(0.0, 1.5).log_prob(at) + dist.Normal(at**2, 0.5).log_prob(x)
    else:
        wide = dist.Normal(0.0, (at.exp() ** 2 + 0.25).sqrt())
        joint = dist.Normal(0.0, 1.0).log_prob(at) + wide.log_prob(x)
    return joint.logsumexp(0) + math.log(float(at[1] - at[0]))


def main() -> None:
    """Train a table of each family from the prior; print gaps and seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="of Adam, at each of two rates")
    steps = parser.parse_args().steps
    print(machine.describe())
    print("| posterior | family | gap of each datum, nats | seconds | draws a second |")
    print("|---|---|---|---|---|")
    for name, model in (("two modes", two_modes), ("funnel", funnel)):
        truth = exact(name)
        for label, family in FAMILIES.items():
            torch.manual_seed(0)
            guide = pv.LocalGuide(model, num_data=len(X), example=X, family=family)
            start = time.perf_counter()
            for rate in (0.05, 0.005):
                optim = torch.optim.Adam(guide.parameters(), lr=rate)
                options = {"loss": pv.ELBO(PARTICLES), "max_steps": steps, "progress": False}
                pv.fit(model, guide, X, optim=optim, compile="replay", **options)
            trained = time.perf_counter() - start
            pv.elbo(model, guide, X, num_particles=DRAWS, seed=0)  # its graph
            start = time.perf_counter()
            bound = pv.elbo(model, guide, X, num_particles=DRAWS, seed=1)
            rate = DRAWS * len(X) / (time.perf_counter() - start)
            gaps = zip(truth - bound.value, bound.std_error, strict=True)
            told = ", ".join(f"{float(gap):.3f} ± {float(error):.3f}" for gap, error in gaps)
            print(f"| {name} | {label} | {told} | {trained:.0f} | {rate:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
