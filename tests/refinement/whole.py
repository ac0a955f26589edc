"""A Gaussian model of all data jointly: a mean that they share, and a latent of each."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv


def model(x: Tensor) -> None:
    """mu ~ N(0, 3), z_n ~ N(mu, 1), x_n ~ N(z_n, 1)."""
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def data(num_data: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2.0 + 2**0.5 * torch.randn(num_data, generator=generator)


def full_rank(x: Tensor) -> pv.LocalGuide:
    family = pv.families.FullRankNormal()
    return pv.LocalGuide(model, num_data=1, example=x, family=family, data_plate=False)


@dataclass(frozen=True)
class Off:
    """How far a full-rank guide is from the posterior, by algebra.

    Attributes:
        nats: KL of the guide and the posterior: what its ELBO is below log p(x).
        mean: the largest error of a mean, in posterior standard deviations.
        widths: ratio of each standard deviation, of mu first, to the posterior's.
    """

    nats: float
    mean: float
    widths: Tensor


@torch.no_grad()
def off(guide: pv.LocalGuide, x: Tensor) -> Off:
    size = len(x) + 1
    precision = 2 * torch.eye(size, dtype=torch.float64)
    precision[0, 0] = 1 / 9 + len(x)
    precision[0, 1:] = precision[1:, 0] = -1.0
    covariance = torch.linalg.inv(precision)
    mean = covariance @ torch.cat([torch.zeros(1), x]).double()
    params = guide.family_params(x)[0].double()
    loc, log_scale, below = params.split([size, size, len(params) - 2 * size])
    factor = torch.eye(size, dtype=torch.float64)
    row, column = torch.tril_indices(size, size, -1)
    factor[row, column] = below
    factor = log_scale.exp().unsqueeze(-1) * factor
    posterior = torch.distributions.MultivariateNormal(mean, covariance)
    found = torch.distributions.MultivariateNormal(loc, scale_tril=factor)
    sd = covariance.diagonal().sqrt()
    return Off(
        float(torch.distributions.kl_divergence(found, posterior)),
        float(((loc - mean).abs() / sd).max()),
        found.variance.sqrt() / sd,
    )
