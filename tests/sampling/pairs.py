"""Pairs made ready for chains, one block of data each, and their densities."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.refinement.blocks import Block
from pyro_vae.sampling.density import Start, TemperedDensity
from pyro_vae.sampling.prepare import Ready, ready


def prepared(
    model, guide, *batch, given=None, data_plate=None, seed: int | None = 0, compile: Any = False
) -> Ready:
    return ready(model, guide, batch, given, data_plate, seed, compile)


def only_block(model, guide, *batch, **options) -> tuple[Ready, slice, Block]:
    """What chains need, and its only block with its rows."""
    made = prepared(model, guide, *batch, **options)
    ((rows, block),) = made.each()
    return made, rows, block


def density_of(model, guide, *batch, start: Start = "guide", **options) -> TemperedDensity:
    made, rows, block = only_block(model, guide, *batch, **options)
    return TemperedDensity(block, made.table[rows], start, 1000)


def local(model, x, *, family=None, data_plate=None, seed=0):
    """A guide with a row per datum that is a little off the prior."""
    num_data = 1 if data_plate is False else len(x)
    guide = pv.LocalGuide(
        model, num_data=num_data, example=x, family=family, data_plate=data_plate
    ).double()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(guide.table.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        guide.table += 0.2 * noise
    return guide


def grid(size: int, low: float, high: float, count: int) -> tuple[Tensor, float]:
    """Points [count ** size, size] of a grid, and the log of the volume of each."""
    axis = torch.linspace(low, high, count, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * size).reshape(-1, size)
    return points, size * float((axis[1] - axis[0]).log())


def integrals(density, num_data, power, *, size=1, low=-12.0, high=12.0, count=4001) -> Tensor:
    """log of the integral of the density to a power, [N], by the trapezoid rule."""
    points, log_volume = grid(size, low, high, count)
    z = points.unsqueeze(1).expand(-1, num_data, -1)
    height = density(z).height(torch.full((num_data,), power, dtype=torch.float64))
    return height.logsumexp(0) + log_volume


# --- models of their own


def dirichlet_model(x: Tensor) -> None:
    """p ~ Dirichlet(1.5, 1, 2), x [N, 3] counts of ten draws."""
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Dirichlet(x.new_tensor([1.5, 1.0, 2.0])))
        pyro.sample("x", dist.Multinomial(10, p), obs=x)


def dirichlet_evidence(x: Tensor) -> Tensor:
    return dist.DirichletMultinomial(x.new_tensor([1.5, 1.0, 2.0]), total_count=10).log_prob(x)


def normal_mixture(x: Tensor) -> None:
    """c ~ Categorical, z ~ Normal(means[c], 1), x ~ Normal(z, 0.5): two modes of z."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(x.new_tensor([0.3, 0.7])))
        z = pyro.sample("z", dist.Normal(x.new_tensor([-2.0, 1.5])[c], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def normal_mixture_joint(x: Tensor) -> Tensor:
    """log p(c, x), [N, 2]."""
    means, weights = x.new_tensor([-2.0, 1.5]), x.new_tensor([0.3, 0.7])
    return weights.log() + dist.Normal(means, 1.25**0.5).log_prob(x.unsqueeze(-1))


def two_sites(x: Tensor) -> None:
    """m ~ Normal(0, 2), z ~ Normal(m, 1) twice in an inner plate, x [N, 2] ~ Normal(z, 0.5)."""
    with pyro.plate("data", len(x), dim=-2):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("inner", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def two_sites_posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [N, 3] and covariance [3, 3] of (m, z_1, z_2) given x."""
    precision = x.new_tensor([[2.25, -1.0, -1.0], [-1.0, 5.0, 0.0], [-1.0, 0.0, 5.0]])
    pull = torch.cat([x.new_zeros(len(x), 1), 4 * x], -1)
    return torch.linalg.solve(precision, pull.T).T, precision.inverse()


def two_sites_evidence(x: Tensor) -> Tensor:
    covariance = 4.0 * torch.ones(2, 2, dtype=x.dtype) + 1.25 * torch.eye(2, dtype=x.dtype)
    return dist.MultivariateNormal(x.new_zeros(2), covariance).log_prob(x)


def masked_model(x: Tensor, seen: Tensor) -> None:
    """z ~ Normal(0, 1) and w ~ Gamma(2, 1) per datum; w is there for some data alone."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.poutine.mask(mask=seen):
            w = pyro.sample("w", dist.Gamma(x.new_tensor(2.0), 1.0))
        location = z + torch.where(seen, w, torch.zeros_like(w))
        pyro.sample("x", dist.Normal(location, 0.7), obs=x)


def chain_after_data(x: Tensor) -> None:
    """z given the first number of a datum; the second given z. x is [N, 2]."""
    with pyro.plate("data", len(x)):
        first = pyro.sample("first", dist.Normal(x.new_zeros(()), 3.0), obs=x[:, 0])
        z = pyro.sample("z", dist.Normal(first, 1.0))
        pyro.sample("second", dist.Normal(z, 0.5), obs=x[:, 1])


def chain_after_data_evidence(x: Tensor) -> Tensor:
    first, second = x.unbind(-1)
    there = dist.Normal(first, 1.25**0.5).log_prob(second)
    return dist.Normal(0.0, 3.0).log_prob(first) + there
