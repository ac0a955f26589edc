"""Models of data with missing values, with exact answers of what is seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.models import FactorAnalysis, factor_analysis

NAN = math.nan


SEEN = [0, 2, 3, 5]  # of the six features of factor_analysis()


@dataclass(frozen=True)
class PartlySeen:
    """Exact answers of factor analysis where each datum has missing values of its own."""

    model: FactorAnalysis
    widen: float = 1.0  # the posterior's scale, in units of the exact one

    def posterior(self, x: Tensor) -> None:
        seen = (~x.isnan()).to(x)
        loadings = self.model.loadings * seen.unsqueeze(-1)  # [N, D, L]
        precision = torch.eye(loadings.shape[-1], dtype=x.dtype) + (
            loadings.mT @ loadings / self.model.noise**2
        )
        centred = torch.where(seen.bool(), x - self.model.mean, 0.0).unsqueeze(-1)
        mean = torch.linalg.solve(precision, loadings.mT @ centred / self.model.noise**2)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z",
                dist.MultivariateNormal(
                    mean.squeeze(-1), precision_matrix=precision / self.widen**2
                ),
            )

    def log_evidence(self, x: Tensor) -> Tensor:
        values = []
        for row in x:
            seen = ~row.isnan()
            small = replace(
                self.model, loadings=self.model.loadings[seen], mean=self.model.mean[seen]
            )
            values.append(small.log_evidence(row[seen]) if seen.any() else row.new_zeros(()))
        return torch.stack(values)


def data(num_data: int = 20) -> Tensor:
    torch.manual_seed(1)
    return factor_analysis().data(num_data)


def without(x: Tensor) -> Tensor:
    """Return the data with the columns that are not SEEN missing."""
    missing = torch.ones(x.shape[1], dtype=torch.bool)
    missing[SEEN] = False
    return x.masked_fill(missing, NAN)


def scattered(x: Tensor, share: float = 0.4) -> Tensor:
    """Return the data with values missing here and there, one datum wholly, one not at all."""
    missing = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < share
    missing[0], missing[1] = True, False
    return x.masked_fill(missing, NAN)


def of(make):
    """Return a model of x [N, D] or [N, ...] whose likelihood is made from z [..., N]."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", make(z, x), obs=x)

    return model


def proposal(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.full((), 0.2, dtype=x.dtype), 0.9))


def mixture(x):
    means = torch.tensor([[-1.0, 0.5, 2.0], [1.0, -0.5, 0.0]], dtype=x.dtype)
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7], dtype=x.dtype)))
        pyro.sample("x", dist.Normal(means[c], 1.0).to_event(1), obs=x)


def wide(z, count=3):
    return z.unsqueeze(-1).expand(*z.shape, count)


def masked_outside(z, x):
    fn = dist.Normal(wide(z), 1.0)
    return fn.to_event(1).mask(torch.tensor([True] * (len(x) - 1) + [False]))


PRODUCTS = {
    "Normal": (lambda z, x: dist.Normal(wide(z), 1.0).to_event(1), 1.5),
    "Masked": (masked_outside, 1.5),
    "nested": (
        lambda z, x: dist.Independent(dist.Normal(wide(z)[..., None], 1.0).to_event(1), 1), 1.5
    ),
    "ExpandedDistribution": (
        lambda z, x: dist.ExpandedDistribution(
            dist.Normal(wide(z), 1.0).mask(True), wide(z).shape
        ).to_event(1),
        1.5,
    ),
    "Bernoulli": (lambda z, x: dist.Bernoulli(logits=wide(z)).to_event(1), 1.0),
    "Binomial": (
        lambda z, x: dist.Binomial(torch.tensor([3.0, 9.0, 4.0]), logits=wide(z)).to_event(1), 2.0
    ),
    "Poisson": (lambda z, x: dist.Poisson(wide(z).exp()).to_event(1), 3.0),
    "NegativeBinomial": (lambda z, x: dist.NegativeBinomial(2.0, logits=wide(z)).to_event(1), 3.0),
    "Categorical": (
        lambda z, x: dist.Categorical(logits=wide(wide(z), 4) * torch.arange(4)).to_event(1), 3.0
    ),
    "LogNormal": (lambda z, x: dist.LogNormal(wide(z), 1.0).to_event(1), 1.5),
    "Gamma": (lambda z, x: dist.Gamma(2.0, wide(z).exp()).to_event(1), 1.5),
    "Beta": (lambda z, x: dist.Beta(2.0, wide(z).exp()).to_event(1), 0.3),
    "Uniform": (lambda z, x: dist.Uniform(wide(z) - 90, wide(z) + 90).to_event(1), 1.5),
    "StudentT": (lambda z, x: dist.StudentT(4.0, wide(z), 1.0).to_event(1), 1.5),
    "ZeroInflatedPoisson": (
        lambda z, x: dist.ZeroInflatedPoisson(wide(z).exp(), gate=torch.tensor(0.3)).to_event(1),
        3.0,
    ),
}  # fmt: skip
