"""How often the 95% intervals of the stated standard errors cover the exact values.

    python benchmarks/coverage.py

Five small models of a datum with one latent, whose evidence, ELBO and conditional mean are known by
quadrature. Each is estimated 200 times, from draws of their own, through a guide that is a little
off: elbo and both gaps by pv.compare (against the best Normal, found by quadrature), iwae_bound
where its k-hat is below 0.5, and the mean of a missing value by pv.impute, with 5,000 particles
each. An interval is value ± 1.96 standard errors, of each datum; "mean" is that of the mean over
the data.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv

WIDTH = 1.96
PARETO_K = 0.5  # above it the error of a mean of weights has no finite variance
QUANTITIES = ("elbo", "approximation_gap", "amortization_gap", "iwae_bound", "impute")
_GRID, _HALF = 20_001, 14.0  # of the quadrature: points, and standard deviations to each side


@dataclass(frozen=True)
class Problem:
    """A latent per datum, z ~ N(0, 1), and features of one likelihood given it.

    Attributes:
        likelihood: of a feature, given z.
        data: [N, D], the seen features.
        shift: of the guide's mean, in standard deviations of the best Normal.
        widen: of its standard deviation.
    """

    likelihood: Callable[[Tensor], Any]
    data: Tensor
    shift: float
    widen: float

    def model(self, x: Tensor) -> None:
        """The Pyro model of [N, any number of features]."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            features = self.likelihood(z.unsqueeze(-1).expand(*z.shape, x.shape[-1]))
            pyro.sample("x", features.to_event(1), obs=x)

    def log_joint(self, z: Tensor) -> Tensor:
        """log p(x, z) of each datum at z [..., N]."""
        seen = self.likelihood(z.unsqueeze(-1)).log_prob(self.data).sum(-1)
        return dist.Normal(z.new_zeros(()), 1.0).log_prob(z) + seen

    def elbo(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Return the ELBO of Normals, [N], by quadrature over their noise."""
        noise = torch.linspace(-10, 10, 401, dtype=loc.dtype).unsqueeze(-1)
        weight = dist.Normal(noise.new_zeros(()), 1.0).log_prob(noise).exp() * 0.05
        inside = (weight * self.log_joint(loc + scale * noise)).sum(0)
        return inside + scale.log() + 0.5 * math.log(2 * math.pi * math.e)

    def best_normal(self) -> tuple[Tensor, Tensor]:
        """Return location and scale of the best Normal for each datum, [N]."""
        params = torch.zeros(2, len(self.data), dtype=self.data.dtype, requires_grad=True)
        options = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 1e-15}
        optimizer = torch.optim.LBFGS([params], line_search_fn="strong_wolfe", **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -self.elbo(params[0], params[1].exp()).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return params[0].detach(), params[1].detach().exp()

    def exact(self) -> tuple[Tensor, Tensor]:
        """Return log p(x) and E[feature | x], [N] each."""
        z = torch.linspace(-_HALF, _HALF, _GRID, dtype=self.data.dtype).unsqueeze(-1)
        log_joint = self.log_joint(z.expand(-1, len(self.data)))
        evidence = torch.logsumexp(log_joint, 0) + math.log(2 * _HALF / (_GRID - 1))
        mean = (log_joint.softmax(0) * self.likelihood(z).mean).sum(0)
        return evidence, mean


def problems() -> dict[str, Problem]:
    """Return the five, float64."""

    def columns(*rows: tuple[float, ...]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    counts = columns((0, 1), (1, 1), (2, 0), (3, 5), (6, 4), (9, 12))
    reals = columns((-2.0, -1.2), (-0.5, 0.3), (0.1, 0.2), (0.8, -0.4), (1.5, 2.5), (3.0, 2.0))
    bits = columns((0, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1), (0, 1, 0))
    zero = torch.zeros((), dtype=torch.float64)
    return {
        "Normal, mean exp(z)": Problem(
            lambda z: dist.Normal((0.5 * z).exp(), 0.7), reals, 0.2, 1.1
        ),
        "Poisson": Problem(lambda z: dist.Poisson((0.7 + z).exp()), counts, 0.0, 1.1),
        "Bernoulli": Problem(lambda z: dist.Bernoulli(logits=2 * z - 0.5), bits, 0.3, 1.0),
        "Student": Problem(lambda z: dist.StudentT(5 + zero, z, 0.6), reals, 0.2, 1.0),
        "Gamma": Problem(lambda z: dist.Gamma(2 + zero, (-z).exp()), counts + 0.5, -0.3, 1.6),
    }


@dataclass
class Tally:
    """Whether intervals cover: of each datum, and of the mean over the data."""

    per_datum: list[bool] = field(default_factory=list)
    of_mean: list[bool] = field(default_factory=list)

    def add(self, value: Any, error: Any, exact: Any) -> None:
        """Take in values, standard errors and exact values, [n]."""
        inside = np.abs(np.asarray(value) - np.asarray(exact)) <= WIDTH * np.asarray(error)
        self.per_datum += inside.tolist()

    def add_mean(self, value: float, error: float, exact: float) -> None:
        """Take in the mean over the data."""
        self.of_mean.append(abs(value - exact) <= WIDTH * error)


def coverage(problem: Problem, repetitions: int, num_particles: int) -> dict[str, Tally]:
    """Estimate a problem again and again; return a tally of each of QUANTITIES."""
    best_loc, best_scale = problem.best_normal()
    loc, scale = best_loc + problem.shift * best_scale, problem.widen * best_scale
    evidence, mean = problem.exact()
    elbo, best = problem.elbo(loc, scale), problem.elbo(best_loc, best_scale)
    exact = {"elbo": elbo, "approximation_gap": evidence - best, "amortization_gap": best - elbo}

    def normal(loc: Tensor, scale: Tensor) -> Callable[[Tensor], None]:
        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, scale))

        return guide

    guides = {"guide": normal(loc, scale), "best": normal(best_loc, best_scale)}
    x = problem.data
    partly = torch.cat([x, torch.full_like(x[:, :1], math.nan)], 1)
    tallies = {name: Tally() for name in QUANTITIES}
    for seed in range(repetitions):
        options: dict[str, Any] = {"num_particles": num_particles, "seed": seed}
        compared = pv.compare(problem.model, guides, x, reference="best", **options)
        found, summary = compared.dataset.sel(guide="guide"), compared.summary().loc["guide"]
        for name, wanted in exact.items():
            tallies[name].add(found[name], found[f"{name}_se"], wanted)
            tallies[name].add_mean(summary[name], summary[f"{name}_se"], float(wanted.mean()))
        bound = pv.iwae_bound(problem.model, guides["guide"], x, **options)
        light = bound.pareto_k < PARETO_K
        tallies["iwae_bound"].add(bound.value[light], bound.std_error[light], evidence[light])
        filled = pv.impute(
            pv.MissingData(problem.model), guides["guide"], partly, num_draws=1, **options
        ).dataset.isel(x_dim_0=-1)
        tallies["impute"].add(filled["x_mean"], filled["x_mean_se"], mean)
    return tallies


def main() -> None:
    """Print the table."""
    import machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--num-particles", type=int, default=5000)
    arguments = parser.parse_args()
    print(machine.describe())
    print(f"{arguments.repetitions} repetitions, {arguments.num_particles} particles\n")
    print("| model | " + " | ".join(QUANTITIES) + " | seconds |")
    print("|---|" + "--:|" * (len(QUANTITIES) + 1))
    for name, problem in problems().items():
        start = time.perf_counter()
        tallies = coverage(problem, arguments.repetitions, arguments.num_particles)
        cells = []
        for tally in tallies.values():
            cell = f"{100 * np.mean(tally.per_datum):.1f}%"
            if tally.of_mean:
                cell += f" (mean {100 * np.mean(tally.of_mean):.1f}%)"
            cells.append(cell)
        seconds = time.perf_counter() - start
        print(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
