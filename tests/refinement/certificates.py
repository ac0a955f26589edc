"""How often refine says "converged" of a row that is not: models whose optimum is known.

    python -m tests.refinement.certificates --data 24

Each problem has a Pyro model and, written apart from it in plain torch, log p(x, u) in the
unconstrained coordinates u of a datum, one or two of them. The ELBO of independent Gaussians is
then a sum over a grid of their standard deviates, exact to 1e-5 nats and far into the tails; its
optimum that of L-BFGS (SciPy) from many starts. A certificate is false where a row is said to have
converged and lies further below the optimum than the tolerance. Nothing in it is Monte Carlo but
refine itself. Rows begin at fresh guides, and at displaced, wide and narrow ones.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.optimize
import torch
from torch import Tensor

import pyro_vae as pv

TOLERANCE = 0.02
_REACH, _SPACING = 12.0, {1: 0.1, 2: 0.3}


@dataclass(frozen=True)
class Problem:
    """A model of data [N, ...] and its log density, by datum.

    Attributes:
        model: the Pyro model.
        log_joint: of coordinates [..., N, D] and data [N, ...], in plain torch, [..., N].
        data: of a number of data and a generator.
        size: D.
    """

    model: Callable[[Tensor], Any]
    log_joint: Callable[[Tensor, Tensor], Tensor]
    data: Callable[[int, torch.Generator], Tensor]
    size: int = 1

    def elbo(self, params: Tensor, x: Tensor) -> Tensor:
        """Return the ELBO of independent Gaussians, params [..., N, D, 2] -> [..., N]."""
        loc, log_scale = params.unbind(-1)
        axis = torch.arange(-_REACH, _REACH + 1e-9, _SPACING[self.size], dtype=torch.float64)
        noise = torch.cartesian_prod(*[axis] * self.size).reshape(-1, self.size)
        mass = (-0.5 * noise.square().sum(-1)).exp()
        noise, mass = noise[mass > 1e-35], mass[mass > 1e-35]
        mass = mass / mass.sum()
        noise = noise.reshape(-1, *[1] * (loc.ndim - 1), self.size)
        log_joint = self.log_joint(loc + log_scale.exp() * noise, x)
        entropy = (log_scale + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
        return torch.tensordot(mass, log_joint, 1) + entropy

    def optimum(self, x: Tensor) -> Tensor:
        """Return the highest ELBO of the family, [N], from a grid of starts."""
        best = torch.full((len(x),), -math.inf, dtype=torch.float64)
        for scale in (0.1, 0.5, 1.5):
            ends = [(-30.0, -12.0, -5.0, -2.5, -1.0, 0.0, 1.0, 2.5, 5.0)]
            if self.size == 2:
                ends = [(-2.5, -0.5, 0.5, 2.5)] * 2
            places = torch.cartesian_prod(*map(torch.tensor, ends)).reshape(-1, self.size).double()
            start = torch.stack([places, torch.full_like(places, math.log(scale))], -1)
            start = start.unsqueeze(1).expand(-1, len(x), -1, -1)
            found = self._climbed(start, x)
            best = torch.maximum(best, found.max(0).values)
        return best

    def _climbed(self, start: Tensor, x: Tensor) -> Tensor:
        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            params = torch.from_numpy(flat).reshape(start.shape).requires_grad_()
            # What overflows is as bad as can be, and has no slope.
            value = -self.elbo(params, x).clamp_min(-1e12)
            value = torch.where(value.isfinite(), value, 1e12)
            value = torch.asinh(value / 100) * 100
            (slope,) = torch.autograd.grad(value.sum(), [params])
            return value.sum().item(), torch.nan_to_num(slope).numpy().ravel()

        result = scipy.optimize.minimize(
            objective,
            start.numpy().ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 500, "maxcor": 20, "ftol": 1e-13, "gtol": 1e-6},
        )
        with torch.no_grad():
            found = self.elbo(torch.from_numpy(result.x).reshape(start.shape), x)
        return torch.nan_to_num(found, nan=-math.inf, neginf=-math.inf)


def _local(body: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            body(x)

    return model


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def gamma_poisson(a: float) -> Problem:
    """rate ~ Gamma(a, 1), x ~ Poisson(rate); u = log rate."""

    def body(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(_number(a), _number(1.0)))
        pyro.sample("x", dist.Poisson(rate), obs=x)

    def log_joint(u: Tensor, x: Tensor) -> Tensor:
        u = u[..., 0]
        return (a + x) * u - 2 * u.exp() - math.lgamma(a) - torch.lgamma(x + 1)

    return Problem(_local(body), log_joint, lambda n, g: _counts(n))


def gamma_normal(a: float) -> Problem:
    """v ~ Gamma(a, 0.8), x ~ Normal(v, 1); u = log v."""

    def body(x: Tensor) -> None:
        v = pyro.sample("v", dist.Gamma(_number(a), _number(0.8)))
        pyro.sample("x", dist.Normal(v, 1.0), obs=x)

    def log_joint(u: Tensor, x: Tensor) -> Tensor:
        u = u[..., 0]
        prior = a * math.log(0.8) - math.lgamma(a) + a * u - 0.8 * u.exp()
        return prior - 0.5 * math.log(2 * math.pi) - 0.5 * (x - u.exp()).square()

    return Problem(_local(body), log_joint, lambda n, g: _normal(n, g))


def beta_binomial(a: float, b: float) -> Problem:
    """p ~ Beta(a, b), x ~ Binomial(20, p); u = logit p."""

    def body(x: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(_number(a), _number(b)))
        pyro.sample("x", dist.Binomial(20, p), obs=x)

    def log_joint(u: Tensor, x: Tensor) -> Tensor:
        u = u[..., 0]
        log_p, log_1p = -torch.nn.functional.softplus(-u), -torch.nn.functional.softplus(u)
        constant = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        choose = math.lgamma(21) - torch.lgamma(x + 1) - torch.lgamma(21 - x)
        return constant + choose + (a + x) * log_p + (b + 20 - x) * log_1p

    return Problem(_local(body), log_joint, lambda n, g: _counts(n).clamp_max(20))


def dirichlet_multinomial(a: float) -> Problem:
    """theta ~ Dirichlet(a, a, a), x ~ Multinomial(12, theta); u by stick breaking."""

    def body(x: Tensor) -> None:
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((3,), a, dtype=torch.float64)))
        pyro.sample("x", dist.Multinomial(12, theta), obs=x)

    def log_joint(u: Tensor, x: Tensor) -> Tensor:
        stick = u - torch.tensor([2.0, 1.0], dtype=torch.float64).log()
        log_z, log_rest = (
            -torch.nn.functional.softplus(-stick),
            -torch.nn.functional.softplus(stick),
        )
        shares = [log_z[..., 0], log_rest[..., 0] + log_z[..., 1], log_rest.sum(-1)]
        log_det = (log_z + log_rest).sum(-1) + log_rest[..., 0]
        log_theta = torch.stack(shares, -1)
        constant = math.lgamma(3 * a) - 3 * math.lgamma(a) + math.lgamma(13)
        return ((a - 1 + x) * log_theta).sum(-1) + constant - torch.lgamma(x + 1).sum(-1) + log_det

    def data(n: int, g: torch.Generator) -> Tensor:
        theta = torch.rand(n, 3, generator=g, dtype=torch.float64) ** 3
        picks = torch.multinomial(theta, 12, replacement=True, generator=g)
        return torch.nn.functional.one_hot(picks, 3).sum(1).double()

    return Problem(_local(body), log_joint, data, 2)


def _log_normal(value: Tensor, loc: Any, scale: Any) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float64)
    return -0.5 * ((value - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)


def funnel(spread: float) -> Problem:
    """v ~ Normal(0, spread), z ~ Normal(0, exp(v / 2)), x ~ Normal(z, 0.5)."""

    def body(x: Tensor) -> None:
        v = pyro.sample("v", dist.Normal(_number(0.0), spread))
        z = pyro.sample("z", dist.Normal(_number(0.0), (v / 2).exp()))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def log_joint(u: Tensor, x: Tensor) -> Tensor:
        v, z = u.unbind(-1)
        prior = -0.5 * z.square() * (-v).exp() - v / 2 - 0.5 * math.log(2 * math.pi)
        return _log_normal(v, 0.0, spread) + prior + _log_normal(x, z, 0.5)

    return Problem(_local(body), log_joint, lambda n, g: 3 * _normal(n, g), 2)


def logistic(scale: float) -> Problem:
    """Two coefficients of a logistic regression, 8 answers for each datum."""
    design = torch.tensor(
        [[1.0, t] for t in (-2.0, -1.2, -0.7, -0.1, 0.3, 0.8, 1.5, 2.2)], dtype=torch.float64
    )

    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), scale).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z @ design.T).to_event(1), obs=x)

    def log_joint(u: Tensor, x: Tensor) -> Tensor:
        logits = u @ design.T
        like = x * logits - torch.nn.functional.softplus(logits)
        return _log_normal(u, 0.0, scale).sum(-1) + like.sum(-1)

    def data(n: int, g: torch.Generator) -> Tensor:
        return (torch.rand(n, 8, generator=g, dtype=torch.float64) < 0.4).double()

    return Problem(_local(body), log_joint, data, 2)


def square(center: float) -> Problem:
    """z ~ Normal(center, 1), x ~ Normal(z^2, 0.4): two modes, of equal mass for center 0."""

    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(_number(center), 1.0))
        pyro.sample("x", dist.Normal(z**2, 0.4), obs=x)

    def log_joint(u: Tensor, x: Tensor) -> Tensor:
        u = u[..., 0]
        return _log_normal(u, center, 1.0) + _log_normal(x, u.square(), 0.4)

    return Problem(_local(body), log_joint, lambda n, g: _normal(n, g).square() + 0.4)


def outlier(freedom: float) -> Problem:
    """z ~ Normal(0, 4), x1, x2, x3 ~ StudentT(freedom, z, 0.3): they may disagree."""

    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(_number(0.0), 4.0))
        location = z.unsqueeze(-1).expand(*z.shape, 3)
        pyro.sample("x", dist.StudentT(_number(freedom), location, 0.3).to_event(1), obs=x)

    def log_joint(u: Tensor, x: Tensor) -> Tensor:
        residual = (x - u) / 0.3
        constant = (
            math.lgamma((freedom + 1) / 2)
            - math.lgamma(freedom / 2)
            - 0.5 * math.log(freedom * math.pi)
            - math.log(0.3)
        )
        like = constant - (freedom + 1) / 2 * (residual.square() / freedom).log1p()
        return _log_normal(u[..., 0], 0.0, 4.0) + like.sum(-1)

    def data(n: int, g: torch.Generator) -> Tensor:
        return 2 * torch.randn(n, 3, generator=g, dtype=torch.float64)

    return Problem(_local(body), log_joint, data)


def correlated(correlation: float) -> Problem:
    """z1, z2 ~ Normal(0, 1) correlated, x ~ Normal(z, 1): a mean field misses by a known amount."""
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    precision = torch.linalg.inv(covariance)

    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2).double(), covariance))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def log_joint(u: Tensor, x: Tensor) -> Tensor:
        prior = -0.5 * (u @ precision * u).sum(-1) - math.log(2 * math.pi)
        prior = prior - 0.5 * math.log(1 - correlation**2)
        return prior + _log_normal(x, u, 1.0).sum(-1)

    def data(n: int, g: torch.Generator) -> Tensor:
        return 2 * torch.randn(n, 2, generator=g, dtype=torch.float64)

    return Problem(_local(body), log_joint, data, 2)


def _counts(n: int) -> Tensor:
    return torch.tensor([0.0, 20, 1, 10, 19, 2, 3, 5, 40, 7, 4, 100])[torch.arange(n) % 12].double()


def _normal(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g, dtype=torch.float64)


PROBLEMS = {
    "Gamma(2)-Poisson": gamma_poisson(2.0),
    "Gamma(0.5)-Poisson": gamma_poisson(0.5),
    "Gamma(0.3)-Poisson": gamma_poisson(0.3),
    "Gamma(0.1)-Poisson": gamma_poisson(0.1),
    "Gamma(0.05)-Poisson": gamma_poisson(0.05),
    "Gamma(0.02)-Poisson": gamma_poisson(0.02),
    "Gamma(2)-Normal": gamma_normal(2.0),
    "Gamma(0.3)-Normal": gamma_normal(0.3),
    "Beta(5, 2)-Binomial": beta_binomial(5.0, 2.0),
    "Beta(1, 1)-Binomial": beta_binomial(1.0, 1.0),
    "Beta(0.5, 0.5)-Binomial": beta_binomial(0.5, 0.5),
    "Dirichlet(2)-Multinomial": dirichlet_multinomial(2.0),
    "Dirichlet(0.5)-Multinomial": dirichlet_multinomial(0.5),
    "funnel, 1": funnel(1.0),
    "funnel, 2": funnel(2.0),
    "logistic, 1": logistic(1.0),
    "logistic, 5": logistic(5.0),
    "square, 0": square(0.0),
    "square, 0.3": square(0.3),
    "Student t(2)": outlier(2.0),
    "Student t(1)": outlier(1.0),
    "correlation 0.9": correlated(0.9),
    "correlation 0.9999": correlated(0.9999),
}


def starts(problem: Problem, x: Tensor, generator: torch.Generator) -> Iterator[tuple[str, Any]]:
    """Yield guides to start from: fresh, displaced, wide, narrow."""
    for name, shift, stretch in (
        ("fresh", 0.0, 0.0),
        ("displaced", 4.0, 0.0),
        ("wide", 1.0, 1.5),
        ("narrow", 1.0, -3.0),
    ):
        guide = pv.LocalGuide(problem.model, num_data=len(x), example=x)
        with torch.no_grad():
            width = guide.table[..., 1].exp()
            noise = torch.randn(width.shape, generator=generator, dtype=torch.float64)
            guide.table[..., 0] += shift * width * noise
            guide.table[..., 1] += stretch
        yield name, guide


def measure(name: str, num_data: int, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Return counts of rows, of certificates and of false ones, and the gaps of all rows."""
    problem = PROBLEMS[name]
    generator = torch.Generator().manual_seed(seed)
    x = problem.data(num_data, generator)
    begin = time.perf_counter()
    optimum = problem.optimum(x)
    between = time.perf_counter()
    gaps, converged = [], []
    for _, guide in starts(problem, x, generator):
        refined = pv.refine(
            problem.model, guide, x, seed=seed, tolerance=TOLERANCE, progress=False, **options
        )
        with torch.no_grad():
            gaps.append(optimum - problem.elbo(refined.table.detach(), x))
        converged.append(refined.converged)
    gap, certificate = torch.cat(gaps), torch.cat(converged)
    false = certificate & ~(gap <= TOLERANCE)
    return {
        "problem": name,
        "rows": len(gap),
        "converged": int(certificate.sum()),
        "false": int(false.sum()),
        "worst": float(gap[certificate].max()) if bool(certificate.any()) else math.nan,
        "below": float(-gap.min()),
        "seconds": (between - begin, time.perf_counter() - between),
        "gaps": gap.reshape(-1, num_data),
        "certificates": certificate.reshape(-1, num_data),
    }


def line(found: dict[str, Any]) -> str:
    """Return a line of the table."""
    return (
        f"{found['problem']:<27}{found['rows']:>5}{found['converged']:>11}{found['false']:>7}"
        f"{found['worst']:>11.4f}{found['seconds'][1]:>9.1f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=int, default=12, help="of each problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("pyro_vae").setLevel(logging.ERROR)
    print(f"{'problem':<27}{'rows':>5}{'converged':>11}{'false':>7}{'worst gap':>11}{'seconds':>9}")
    total = {"rows": 0, "converged": 0, "false": 0}
    for name in arguments.problems:
        found = measure(name, arguments.data, arguments.seed)
        print(line(found), flush=True)
        if arguments.verbose:
            for gaps, certificates in zip(found["gaps"], found["certificates"], strict=True):
                print(
                    "   ",
                    " ".join(
                        f"{g:.3f}{'' if c else '?'}"
                        for g, c in zip(gaps, certificates, strict=True)
                    ),
                )
            print(
                "    below the optimum at least", -found["below"], "optimum s", found["seconds"][0]
            )
        total = {key: total[key] + found[key] for key in total}
    print(
        f"{total['false']} of {total['converged']} certificates are false "
        f"({100 * total['false'] / max(1, total['converged']):.2f}%); "
        f"{total['rows'] - total['converged']} of {total['rows']} rows have none"
    )


if __name__ == "__main__":
    main()
