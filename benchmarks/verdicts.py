"""How often verdicts are wrong, on models whose posterior is known.

    python benchmarks/verdicts.py --data 20

The posterior means, standard deviations and log p(x) of each model come from a grid or from
algebra, written down here as plain functions; no code of the package is asked. Each model has
several guides: the best of its family, the same shifted, half and twice as wide, a thousandth as
wide, and the prior. Of each verdict (each rung of pv.repair alone, the whole ladder,
pv.sample_posterior's ``converged`` and pv.ais's ``untrusted``) the table counts

- wrong: data called good whose posterior mean is off by more than 0.2 posterior standard
  deviations, or whose bound is off by more than 5 standard errors;
- alarms: data with right answers that are called bad.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import machine
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evaluation.rungs import RUNGS

F64 = torch.float64
FAR, ERRORS = 0.2, 5.0
EVERY = ("best", "shifted", "narrow", "wide", "point", "prior")
# What starts from the prior or from modes hardly depends on the guide.
GUIDES = {"importance": EVERY, "ladder": ("narrow", "prior"), "ais": ("best", "point")}
FEW = ("narrow",)


@dataclass(frozen=True)
class Exact:
    """The exact answers of N data: mean and standard deviation [N, D], and log p(x) [N]."""

    mean: Tensor
    std: Tensor
    evidence: Tensor


@dataclass(frozen=True)
class Case:
    """D independent copies of a model of one latent, and what a grid says of its posterior.

    Attributes:
        name: for the table.
        prior: of each latent.
        likelihood: of each observed value given its latent.
        grid: points that hold all of the posterior.
        size: D.
    """

    name: str
    prior: dist.Distribution
    likelihood: Callable[[Tensor], dist.Distribution]
    grid: Tensor
    size: int = 1

    def model(self, x: Tensor) -> None:
        """Draw z and observe x, [N, ...]."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior.expand([self.size]).to_event(1))
            pyro.sample("x", self.likelihood(z).to_event(1), obs=x)

    def simulate(self, num_data: int) -> Tensor:
        """Return data of the model."""
        return self.likelihood(self.prior.sample((num_data, self.size))).sample()

    def exact(self, x: Tensor) -> Exact:
        """Return the exact answers for data."""
        z = self.grid[:, None, None]
        width = torch.gradient(self.grid)[0][:, None, None]
        mass = self.prior.log_prob(z) + self.likelihood(z).log_prob(x) + width.log()
        evidence = mass.logsumexp(0)
        weight = (mass - evidence).exp()
        mean = (weight * z).sum(0)
        std = (weight * (z - mean).square()).sum(0).sqrt()
        return Exact(mean, std, evidence.sum(-1))

    def latents(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Return draws [S, N, D]."""
        return draws["z"]


def of_grid(terms: Tensor, values: Tensor, within: Tensor) -> Exact:
    """Return the answers of parts with log masses [N, G], means [N, G, D] and variances inside."""
    evidence = terms.logsumexp(-1)
    weight = (terms - evidence.unsqueeze(-1)).exp().unsqueeze(-1)
    mean = (weight * values).sum(1)
    spread = (weight * ((values - mean.unsqueeze(1)).square() + within)).sum(1)
    return Exact(mean, spread.sqrt(), evidence)


@dataclass(frozen=True)
class Banana:
    """Two latents: z_1 ~ Normal(0, 1), z_2 ~ Normal(z_1^2, 0.5), x ~ Normal(z_1 + z_2, 0.3)."""

    name: str = "banana"

    def model(self, x: Tensor) -> None:
        """Draw z and observe x, [N, ...]."""
        with pyro.plate("data", len(x)):
            first = pyro.sample("z1", dist.Normal(x.new_tensor(0.0), 1.0))
            second = pyro.sample("z2", dist.Normal(first.square(), 0.5))
            pyro.sample("x", dist.Normal(first + second, 0.3), obs=x)

    def simulate(self, num_data: int) -> Tensor:
        """Return data of the model."""
        first, noise, error = torch.randn(3, num_data, dtype=F64)
        return first + first.square() + 0.5 * noise + 0.3 * error

    def exact(self, x: Tensor) -> Exact:
        """Return the exact answers for data."""
        first = torch.linspace(-6, 6, 4001, dtype=F64)
        # Of z_1 by a grid; x and z_2 given z_1 are Gaussian.
        middle, variance, error = first.square(), 0.5**2, 0.3**2
        terms = dist.Normal(torch.zeros((), dtype=F64), 1.0).log_prob(first)
        conditional = dist.Normal(first + middle, math.sqrt(variance + error))
        terms = terms + conditional.log_prob(x.unsqueeze(-1)) + math.log(float(first[1] - first[0]))
        gain = variance / (variance + error)
        second = middle + gain * (x.unsqueeze(-1) - first - middle)
        within = torch.tensor([0.0, variance * (1 - gain)], dtype=F64)
        return of_grid(terms, torch.stack([first.expand_as(second), second], -1), within)

    def latents(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Return draws [S, N, D]."""
        return torch.stack([draws["z1"], draws["z2"]], -1)


@dataclass(frozen=True)
class Funnel:
    """Two latents: v ~ Normal(0, 1.5), z ~ Normal(0, exp(v / 2)), x ~ Normal(z, 0.5)."""

    name: str = "funnel"

    def model(self, x: Tensor) -> None:
        """Draw v and z and observe x, [N]."""
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(x.new_tensor(0.0), 1.5))
            z = pyro.sample("z", dist.Normal(torch.zeros_like(v), (v / 2).exp()))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def simulate(self, num_data: int) -> Tensor:
        """Return data of the model."""
        v, noise, error = torch.randn(3, num_data, dtype=F64)
        return (0.75 * v).exp() * noise + 0.5 * error

    def exact(self, x: Tensor) -> Exact:
        """Return the exact answers: v by a grid, z given v and x by algebra."""
        v = torch.linspace(-14, 14, 20_001, dtype=F64)
        variance = v.exp()
        terms = dist.Normal(torch.zeros((), dtype=F64), 1.5).log_prob(v)
        spread = dist.Normal(torch.zeros_like(v), (variance + 0.25).sqrt())
        terms = terms + spread.log_prob(x.unsqueeze(-1)) + math.log(float(v[1] - v[0]))
        gain = variance / (variance + 0.25)
        within = torch.stack([torch.zeros_like(v), 0.25 * gain], -1)
        values = torch.stack([v.expand(len(x), -1), gain * x.unsqueeze(-1)], -1)
        return of_grid(terms, values, within)

    def latents(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Return draws [S, N, D]."""
        return torch.stack([draws["v"], draws["z"]], -1)


@dataclass(frozen=True)
class Answers:
    """Two latents with standard normal priors, and six answers: Bernoulli, logit by both."""

    name: str = "six answers, 2 latents"

    @property
    def slopes(self) -> Tensor:
        """Of the answers by the latents, [6, 2]."""
        rows = [[1.0, 0.5], [2.0, -1.0], [0.3, 1.5], [-1.0, 1.0], [1.5, 1.5], [0.0, 2.0]]
        return torch.tensor(rows, dtype=F64)

    def model(self, x: Tensor) -> None:
        """Draw z and observe x, [N, 6]."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = (self.slopes * z.unsqueeze(-2)).sum(-1)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def simulate(self, num_data: int) -> Tensor:
        """Return data of the model."""
        z = torch.randn(num_data, 2, dtype=F64)
        return torch.bernoulli((z @ self.slopes.T).sigmoid())

    def exact(self, x: Tensor) -> Exact:
        """Return the exact answers, by a grid of both latents."""
        line = torch.linspace(-6, 6, 301, dtype=F64)
        values = torch.cartesian_prod(line, line)
        prior = dist.Normal(torch.zeros((), dtype=F64), 1.0).log_prob(values).sum(-1)
        logits = values @ self.slopes.T
        likelihood = dist.Bernoulli(logits=logits).log_prob(x.unsqueeze(1)).sum(-1)
        terms = prior + likelihood + 2 * math.log(float(line[1] - line[0]))
        return of_grid(terms, values.expand(len(x), -1, -1), torch.zeros_like(values))

    def latents(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Return draws [S, N, D]."""
        return draws["z"]


@dataclass(frozen=True)
class Kinds:
    """A kind of three, of unequal shares, z ~ Normal(-3 or 0 or 4, 0.7), x ~ Normal(z, 1.5)."""

    name: str = "kinds, 3 modes"

    def model(self, x: Tensor) -> None:
        """Draw a kind, which is summed out, and z, and observe x, [N]."""
        shares, places = x.new_tensor([0.2, 0.5, 0.3]), x.new_tensor([-3.0, 0.0, 4.0])
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(shares))
            z = pyro.sample("z", dist.Normal(places[kind], 0.7))
            pyro.sample("x", dist.Normal(z, 1.5), obs=x)

    def simulate(self, num_data: int) -> Tensor:
        """Return data of the model."""
        kind = torch.multinomial(torch.tensor([0.2, 0.5, 0.3], dtype=F64), num_data, True)
        place = torch.tensor([-3.0, 0.0, 4.0], dtype=F64)[kind]
        noise, error = torch.randn(2, num_data, dtype=F64)
        return place + 0.7 * noise + 1.5 * error

    def exact(self, x: Tensor) -> Exact:
        """Return the exact answers: a mixture of three Gaussians, by algebra."""
        shares, places = torch.tensor([[0.2, 0.5, 0.3], [-3.0, 0.0, 4.0]], dtype=F64)
        gain = 0.49 / (0.49 + 1.5**2)
        far = x.unsqueeze(-1) - places
        terms = shares.log() + dist.Normal(torch.zeros_like(far), 2.74**0.5).log_prob(far)
        return of_grid(terms, (places + gain * far).unsqueeze(-1), torch.tensor(2.25 * gain))

    def latents(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Return draws [S, N, D]."""
        return draws["z"].unsqueeze(-1)


class Factors:
    """Factor analysis with 10 latents: a correlated Gaussian posterior, in closed form."""

    name = "factor analysis, 10 latents"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.loadings = torch.randn(20, 10, dtype=F64, generator=generator)
        self.noise = 0.7

    def model(self, x: Tensor) -> None:
        """Draw z and observe x, [N, ...]."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(10), 1.0).to_event(1))
            mean = (self.loadings @ z.unsqueeze(-1)).squeeze(-1)
            pyro.sample("x", dist.Normal(mean, self.noise).to_event(1), obs=x)

    def simulate(self, num_data: int) -> Tensor:
        """Return data of the model."""
        z, noise = torch.randn(num_data, 10, dtype=F64), torch.randn(num_data, 20, dtype=F64)
        return z @ self.loadings.T + self.noise * noise

    def exact(self, x: Tensor) -> Exact:
        """Return the exact answers for data."""
        variance = self.noise**2
        precision = torch.eye(10, dtype=F64) + self.loadings.T @ self.loadings / variance
        covariance = torch.linalg.inv(precision)
        mean = x @ self.loadings @ covariance / variance
        total = self.loadings @ self.loadings.T + variance * torch.eye(20, dtype=F64)
        evidence = dist.MultivariateNormal(x.new_zeros(20), total).log_prob(x)
        return Exact(mean, covariance.diagonal().sqrt().expand_as(mean), evidence)

    def latents(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Return draws [S, N, D]."""
        return draws["z"]


Model: TypeAlias = Case | Banana | Funnel | Answers | Kinds | Factors


def line(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 40_001, dtype=F64)


def positive(low: float, high: float) -> Tensor:
    """Return points between powers of ten, close to one another near zero."""
    return torch.logspace(low, high, 40_001, dtype=F64)


def cases() -> list[Model]:
    """Return the registry."""
    zero, one = torch.tensor([0.0, 1.0], dtype=F64)
    normal = dist.Normal(zero, 1.0)
    return [
        Case("Normal-Normal", normal, lambda z: dist.Normal(z, 0.7), line(-10, 10)),
        Case("Binomial, logit", normal, lambda z: dist.Binomial(5, logits=2 * z), line(-9, 9)),
        Case("Poisson, log rate", normal, lambda z: dist.Poisson((1.5 * z).exp()), line(-9, 9)),
        Case("Gamma(2)-Poisson", dist.Gamma(2 * one, 0.5), dist.Poisson, positive(-7, 2.3)),
        Case("Gamma(0.5)-Poisson", dist.Gamma(one / 2, 0.5), dist.Poisson, positive(-14, 2.3)),
        Case(
            "Beta-Binomial",
            dist.Beta(0.7 * one, 1.5),
            lambda z: dist.Binomial(8, probs=z),
            torch.sigmoid(line(-36, 36)),
        ),
        Case(
            "Exponential-Normal",
            dist.Exponential(one),
            lambda z: dist.Normal(z, 0.5),
            positive(-8, 1.7),
        ),
        Case(
            "Laplace prior", dist.Laplace(zero, 1.0), lambda z: dist.Normal(z, 1.0), line(-25, 25)
        ),
        Case(
            "Student prior",
            dist.StudentT(3 * one, 0.0, 1.0),
            lambda z: dist.Normal(z, 2.0),
            torch.sinh(line(-7, 7)),
        ),
        Case(
            "Student likelihood",
            dist.Normal(zero, 2.0),
            lambda z: dist.StudentT(2 * one, z, 0.5),
            line(-20, 20),
        ),
        Case("scale", normal, lambda z: dist.Normal(zero, z.exp()), line(-9, 9)),
        Case("sine, many modes", normal, lambda z: dist.Normal((3 * z).sin(), 0.2), line(-9, 9)),
        Case(
            "square, 2 modes",
            dist.Normal(zero, 2.0),
            lambda z: dist.Normal(z.square(), 0.5),
            line(-14, 14),
        ),
        *(
            Case(
                f"absolute value, {2**size} modes",
                normal,
                lambda z: dist.Normal(z.abs(), 0.1),
                line(-9, 9),
                size,
            )
            for size in (2, 3, 4)
        ),
        Banana(),
        Funnel(),
        Answers(),
        Kinds(),
        Case(
            "Poisson, single precision",
            dist.Normal(zero.float(), 1.0),
            lambda z: dist.Poisson((1.5 * z).exp()),
            line(-9, 9),
        ),
        Factors(),
    ]


def guides(case: Model, x: Tensor) -> dict[str, pv.LocalGuide]:
    """Return guides of a case: the best of the family, and bad ones."""

    def copy_of(source: pv.LocalGuide, shift: float, width: float) -> pv.LocalGuide:
        made = pv.LocalGuide(case.model, num_data=len(x), example=x)
        with torch.no_grad():
            made.table.copy_(source.table)
            made.table[..., 0] += shift * source.table[..., 1].exp()
            made.table[..., 1] += math.log(width)
        return made

    prior = pv.LocalGuide(case.model, num_data=len(x), example=x)
    best = pv.refine(case.model, prior, x, seed=0, progress=False)
    return {
        "best": copy_of(best, 0.0, 1.0),
        "shifted": copy_of(best, 1.0, 1.0),
        "narrow": copy_of(best, 0.0, 0.5),
        "wide": copy_of(best, 0.0, 2.0),
        "point": copy_of(best, 0.0, 1e-3),
        "prior": prior,
    }


@dataclass(frozen=True)
class Judged:
    """Of each datum, [N]: whether it was called good, and whether mean and bound are right."""

    good: np.ndarray
    mean: np.ndarray
    bound: np.ndarray

    def counts(self) -> dict[str, int]:
        """Return the numbers of the table."""
        right = self.mean & self.bound
        return {
            "data": self.good.size,
            "good": int(self.good.sum()),
            "mean off": int((self.good & ~self.mean).sum()),
            "bound off": int((self.good & ~self.bound).sum()),
            "wrong": int((self.good & ~right).sum()),
            "right": int(right.sum()),
            "alarms": int((right & ~self.good).sum()),
        }


def judged(case: Model, guide: pv.LocalGuide, x: Tensor, verdict: str, exact: Exact) -> Judged:
    """Return what a verdict says of each datum, and what is true."""
    options = {"seed": 0, "progress": False}
    every = np.ones(len(x), dtype=bool)

    def mean_is_right(draws: Tensor) -> np.ndarray:
        """Take draws [S, N, D]."""
        return (((draws.double().mean(0) - exact.mean).abs() / exact.std).amax(-1) <= FAR).numpy()

    def bound_is_right(value: np.ndarray, error: np.ndarray) -> np.ndarray:
        # Rounding has errors too.
        return np.abs(value - exact.evidence.numpy()) <= ERRORS * error + 1e-6

    if verdict == "sample_posterior":
        samples = pv.sample_posterior(case.model, guide, x, **options)
        draws = {name: value.flatten(0, 1) for name, value in samples.draws.items()}
        return Judged(samples.converged.numpy(), mean_is_right(case.latents(draws)), every)
    if verdict == "ais":
        bound = pv.ais(case.model, guide, x, **options)
        near = bound_is_right(bound.value.numpy(), bound.std_error.numpy())
        return Judged((~bound.untrusted).numpy(), every, near)
    rungs = RUNGS if verdict == "ladder" else (verdict,)
    found = pv.repair(case.model, guide, x, rungs=rungs, **options)
    data = found.dataset
    near = bound_is_right(data["log_evidence"].values, data["log_evidence_se"].values)
    return Judged(data["good"].values, mean_is_right(case.latents(found.draws)), near)


def together(parts: list[Judged]) -> Judged:
    """Return data of several models and guides as one."""
    columns = zip(*((part.good, part.mean, part.bound) for part in parts), strict=True)
    return Judged(*(np.concatenate(column) for column in columns))


def rate(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({100 * part / whole:.1f}%)" if whole else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=int, default=20, help="of each model; default: %(default)s")
    parser.add_argument("--models", nargs="+", help="names, or parts of them")
    parser.add_argument("--seed", type=int, default=1, help="of the data; default: %(default)s")
    names = [*RUNGS, "ladder", "ais", "sample_posterior"]
    parser.add_argument("--verdicts", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine.describe())
    found: dict[str, list[Judged]] = {verdict: [] for verdict in options.verdicts}
    columns = ("data", "good", "mean off", "bound off", "right", "alarms")
    print(f"{'model':<30}{'verdict':<18}{'guide':<10}", *(f"{name:>10}" for name in columns))
    for case in cases():
        if options.models and not any(part in case.name for part in options.models):
            continue
        torch.manual_seed(options.seed)
        x = case.simulate(options.data)
        exact = case.exact(x)
        made = guides(case, x)
        for verdict in options.verdicts:
            for name in GUIDES.get(verdict, FEW):
                begin = time.perf_counter()
                one = judged(case, made[name], x, verdict, exact)
                found[verdict].append(one)
                numbers = one.counts()
                print(
                    f"{case.name:<30}{verdict:<18}{name:<10}",
                    *(f"{numbers[column]:>10}" for column in columns),
                    f"{time.perf_counter() - begin:7.0f} s",
                    flush=True,
                )
    print()
    for verdict, parts in found.items():
        if parts:
            numbers = together(parts).counts()
            print(
                f"{verdict}: of {numbers['data']} data called good "
                f"{rate(numbers['good'], numbers['data'])}; of these wrong "
                f"{rate(numbers['wrong'], numbers['good'])}; of data with right answers called bad "
                f"{rate(numbers['alarms'], numbers['right'])}"
            )


if __name__ == "__main__":
    main()
