"""Models whose answers are known in closed form, for the tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


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
