"""Models for EM: a mixture, a spread of Gaussians and a hierarchy, with their exact answers."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints


def half_steps(result, kind):
    history = result.history
    return np.array(
        [e for e, half in zip(history["elbo"], history["half_step"], strict=True) if half == kind]
    )


START = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def mixture_params():
    weights = pyro.param(
        "weights", torch.full((3,), 1 / 3, dtype=torch.float64), constraint=constraints.simplex
    )
    means = pyro.param("means", START.clone())
    scales = pyro.param(
        "scales", torch.ones(3, 2, dtype=torch.float64), constraint=constraints.positive
    )
    return weights, means, scales


def mixture(x):
    weights, means, scales = mixture_params()
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(means[c], scales[c]).to_event(1), obs=x)


def mixture_log_joint(x):
    weights, means, scales = mixture_params()
    return weights.log() + dist.Normal(means, scales).log_prob(x.unsqueeze(1)).sum(-1)


def mixture_data(num_data):
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-2.0, 0.0], [1.0, 1.0], [2.0, -2.0]], dtype=torch.float64)
    scales = torch.tensor([[0.5, 1.0], [1.0, 0.7], [0.8, 0.8]], dtype=torch.float64)
    c = torch.randint(3, (num_data,), generator=generator)
    noise = torch.randn(num_data, 2, generator=generator, dtype=torch.float64)
    return centres[c] + scales[c] * noise


def hierarchical(x):
    """A Normal mean of Normal means: z ~ Normal(mean, 1), x ~ Normal(z, 1)."""
    mean = pyro.param("mean", torch.tensor(0.0, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def spread(x):
    """z ~ Normal(mean, scale), x ~ Normal(z, 1): x ~ Normal(mean, sqrt(scale^2 + 1))."""
    mean = pyro.param("mean", torch.tensor(0.0, dtype=torch.float64))
    scale = pyro.param(
        "scale", torch.tensor(1.0, dtype=torch.float64), constraint=constraints.positive
    )
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def spread_evidence(x, mean, scale):
    return dist.Normal(mean, (scale**2 + 1) ** 0.5).log_prob(x).mean().item()


def wide(x):
    """Near the posterior, and wider."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.7 * x + 0.6, 1.2))


def spread_data(num_data):
    generator = torch.Generator().manual_seed(1)
    return 2 + 5**0.5 * torch.randn(num_data, generator=generator, dtype=torch.float64)
