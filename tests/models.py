"""Models whose answers are known in closed form: a callable each, with its answers beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NormalModel:
    """z ~ Normal(0, 1), x ~ Normal(weight z, noise); x is [N], or [N, D] of independent columns."""

    weight: float = 1.0
    noise: float = 1.0

    def __call__(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            self.sites(x)

    def sites(self, x: Tensor) -> None:
        """The statements of rows x, for a plate of another kind around them."""
        events = x.ndim - 1
        z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[1:]), 1.0).to_event(events))
        pyro.sample("x", dist.Normal(self.weight * z, self.noise).to_event(events), obs=x)

    def posterior(self, x: Tensor) -> None:
        """The exact posterior, as a guide."""
        exact = self.posterior_of(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.loc, exact.scale).to_event(x.ndim - 1))

    def posterior_of(self, x: Tensor) -> torch.distributions.Normal:
        precision = 1 + self.weight**2 / self.noise**2
        location = self.weight * x / self.noise**2 / precision
        return torch.distributions.Normal(location, torch.full_like(x, precision**-0.5))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), [N]."""
        scale = math.hypot(self.weight, self.noise)
        density = torch.distributions.Normal(x.new_zeros(()), scale).log_prob(x)
        return density.flatten(1).sum(-1) if x.ndim > 1 else density

    def elbo_of(self, x: Tensor, location: Tensor, scale: Tensor) -> Tensor:
        """The exact ELBO of a Normal guide, [N]."""
        guide = torch.distributions.Normal(location, scale)
        kl = torch.distributions.kl_divergence(guide, self.posterior_of(x))
        return self.log_evidence(x) - (kl.flatten(1).sum(-1) if x.ndim > 1 else kl)


@dataclass(frozen=True)
class HierarchicalNormal:
    """mu ~ Normal(0, prior), z ~ Normal(mu, spread), x ~ Normal(z, noise) for each datum."""

    prior: float = 3.0
    spread: float = 1.0
    noise: float = 1.0

    def __call__(self, x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), self.prior))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu + x.new_zeros(len(x)), self.spread))
            pyro.sample("x", dist.Normal(z, self.noise), obs=x)

    @property
    def width(self) -> float:
        """The standard deviation of a datum given mu."""
        return math.hypot(self.spread, self.noise)

    def posterior_of_mu(self, x: Tensor) -> tuple[Tensor, float]:
        """Mean and variance of mu given x [N]."""
        variance = 1 / (self.prior**-2 + len(x) / self.width**2)
        return variance * x.sum() / self.width**2, variance

    def posterior(self, x: Tensor, widen: float = 1.0, shift: float = 0.0) -> None:
        """The exact posterior, as a guide; of z as much wider and as far off."""
        mean, variance = self.posterior_of_mu(x)
        mu = pyro.sample("mu", dist.Normal(mean, variance**0.5))
        share = self.spread**2 / self.width**2
        scale = widen * share**0.5 * self.noise
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mu + share * (x - mu) + shift, scale))

    def leave_one_out(self, x: Tensor) -> Tensor:
        """log p(x_n | the other data), [N]."""
        found = []
        for n in range(len(x)):
            mean, variance = self.posterior_of_mu(torch.cat([x[:n], x[n + 1 :]]))
            scale = (variance + self.width**2) ** 0.5
            found.append(torch.distributions.Normal(mean, scale).log_prob(x[n]))
        return torch.stack(found)


@dataclass(frozen=True)
class GammaPoisson:
    """rate ~ Gamma(shape, rate), x ~ Poisson(rate), float64."""

    shape: float = 2.0
    rate: float = 1.0

    def __call__(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = dist.Gamma(x.new_tensor(self.shape), x.new_tensor(self.rate))
            pyro.sample("x", dist.Poisson(pyro.sample("rate", prior)), obs=x)

    def posterior(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(self.shape + x, x.new_tensor(self.rate + 1)))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), [N]: a negative binomial."""
        shape = x.new_tensor(self.shape)
        count = torch.lgamma(shape + x) - torch.lgamma(shape) - torch.lgamma(x + 1)
        return count + self.shape * math.log(self.rate) - (self.shape + x) * math.log1p(self.rate)

    def normal_gap(self, x: Tensor, location: Tensor, scale: Tensor) -> Tensor:
        """How far the ELBO of log rate ~ Normal(location, scale) lies below the best Normal's, [N].

        Up to a constant it is (a + x) m - (b + 1) exp(m + s^2 / 2) + log s; at the optimum
        (a + x) s^2 = 1 and (b + 1) exp(m + s^2 / 2) = a + x.
        """
        count, more = self.shape + x, self.rate + 1

        def elbo(m: Tensor, s: Tensor) -> Tensor:
            return count * m - more * (m + s**2 / 2).exp() + s.log()

        best = count.rsqrt()
        return elbo((count / more).log() - best**2 / 2, best) - elbo(location, scale)


@dataclass(frozen=True)
class BetaBernoulli:
    """p ~ Beta(a, b), x [N, D] of independent Bernoullis given p."""

    a: float = 2.0
    b: float = 3.0

    def __call__(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(x.new_tensor(self.a), x.new_tensor(self.b)))
            likelihood = dist.Bernoulli(p.unsqueeze(-1).expand(*p.shape, x.shape[-1]))
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def posterior(self, x: Tensor) -> None:
        ones = x.sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("p", dist.Beta(self.a + ones, self.b + x.shape[-1] - ones))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), [N]: a quotient of Beta functions."""
        ones = x.sum(-1)
        a, b = x.new_tensor(self.a), x.new_tensor(self.b)
        return _log_beta(a + ones, b + x.shape[-1] - ones) - _log_beta(a, b)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


@dataclass(frozen=True)
class GaussianMixture:
    """c ~ Categorical(weights), x ~ Normal(means[c], 1)."""

    weights: Tensor  # [C]
    means: Tensor  # [C]

    def __call__(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(self.weights))
            pyro.sample("x", dist.Normal(self.means[c], 1.0), obs=x)

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(c, x), [N, C]."""
        return self.weights.log() + dist.Normal(self.means, 1.0).log_prob(x.unsqueeze(-1))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), [N]."""
        return self.log_joint(x).logsumexp(-1)


# Of three values and of two, and their tables, as the tests of discrete latents take them.
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
TABLE = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
mixture = GaussianMixture(WEIGHTS, MEANS)


@dataclass(frozen=True)
class FactorAnalysis:
    """x = W z + mu + noise, z standard normal, noise isotropic; everything known.

    As a callable it is the Pyro model; `posterior` is the exact posterior as a guide.
    """

    loadings: Tensor  # W, [D, L]
    mean: Tensor  # [D]
    noise: float

    def __call__(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.num_latents), 1.0).to_event(1))
            location = z @ self.loadings.T + self.mean
            pyro.sample("x", dist.Normal(location, self.noise).to_event(1), obs=x)
        return z

    def posterior(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z",
                dist.MultivariateNormal(
                    self.posterior_mean(x), precision_matrix=self.posterior_precision
                ),
            )

    @property
    def num_latents(self) -> int:
        return self.loadings.shape[1]

    @property
    def posterior_precision(self) -> Tensor:
        identity = torch.eye(self.num_latents, dtype=self.loadings.dtype)
        return identity + self.loadings.T @ self.loadings / self.noise**2

    def posterior_mean(self, x: Tensor) -> Tensor:
        projected = (x - self.mean) @ self.loadings / self.noise**2
        return torch.linalg.solve(self.posterior_precision, projected.T).T

    def log_evidence(self, x: Tensor) -> Tensor:
        identity = torch.eye(len(self.mean), dtype=x.dtype)
        covariance = self.loadings @ self.loadings.T + self.noise**2 * identity
        return torch.distributions.MultivariateNormal(self.mean, covariance).log_prob(x)

    @property
    def mean_field_gap(self) -> Tensor:
        """KL from the best diagonal Gaussian, variances 1 / diag of the precision."""
        precision = self.posterior_precision
        return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))

    def elbo_of(self, x: Tensor, location: Tensor, scale: Tensor) -> Tensor:
        """The exact ELBO of a diagonal Gaussian guide, [N]."""
        precision = self.posterior_precision
        shift = location - self.posterior_mean(x)
        kl = 0.5 * (
            (precision.diagonal() * scale**2).sum(-1)
            + ((shift @ precision) * shift).sum(-1)
            - self.num_latents
            - torch.logdet(precision)
            - 2 * scale.log().sum(-1)
        )
        return self.log_evidence(x) - kl

    def data(self, num_data: int) -> Tensor:
        z = torch.randn(num_data, self.num_latents, dtype=self.loadings.dtype)
        noise = torch.randn(num_data, len(self.mean), dtype=self.loadings.dtype)
        return z @ self.loadings.T + self.mean + self.noise * noise


def factor_analysis(
    kind: str = "correlated", *, features: int = 6, latents: int = 3, seed: int = 0
) -> FactorAnalysis:
    """A factor analysis with a diagonal ("orthogonal") or a full posterior, in float64."""
    generator = torch.Generator().manual_seed(seed)
    loadings = torch.randn(features, latents, generator=generator, dtype=torch.float64)
    if kind == "orthogonal":
        scales = torch.linspace(0.3, 2.0, latents, dtype=torch.float64)
        loadings = torch.linalg.qr(loadings).Q * scales
    mean = torch.randn(features, generator=generator, dtype=torch.float64)
    return FactorAnalysis(loadings, mean, noise=0.5)


def encoder(features: int, width: int = 8) -> nn.Module:
    """A small float64 encoder."""
    return nn.Sequential(nn.Linear(features, width), nn.Tanh()).double()


def log_normal_model(x: Tensor) -> None:
    """s ~ LogNormal(0, 1) per datum, x ~ Normal(s, 1)."""
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.LogNormal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(s, 1.0), obs=x)


def log_normal_evidence(x: float) -> float:
    """log p(x) of log_normal_model by quadrature over log s."""
    t = torch.linspace(-12, 6, 200_001, dtype=torch.float64)
    joint = -0.5 * t**2 - 0.5 * (x - t.exp()) ** 2 - math.log(2 * math.pi)
    return float(torch.logsumexp(joint, 0) + math.log(float(t[1] - t[0])))
