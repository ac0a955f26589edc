"""The normal model with its losses of importance weights, by seed and by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv
from tests.models import MEANS, WEIGHTS, NormalModel

X = torch.tensor([0.3, -1.1, 2.0, 0.8, -0.4], dtype=torch.float64)
model = NORMAL = NormalModel(weight=1.5, noise=0.8)
WEIGHT, NOISE = model.weight, model.noise
latent, posterior = model.sites, model.posterior
LOSSES = {
    "pathwise": lambda k, **options: pv.IWAE(k, **options),
    "stl": lambda k, **options: pv.IWAE(k, estimator="stl", **options),
    "dreg": lambda k, **options: pv.IWAE(k, estimator="dreg", **options),
    "wake": lambda k, **options: pv.WakeSleep(k, **options),
}


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x, 0.7))


def value(loss, model, guide, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return loss.loss(model, guide, *args, **kwargs)


def parts(x, num_particles, seed=0):
    """log p(x | z), log p(z), log q(z | x) of the draws that a plate of particles makes."""
    torch.manual_seed(seed)
    q = dist.Normal(0.3 * x, torch.full_like(x, 0.7))
    z = q.rsample((num_particles,))
    likelihood = dist.Normal(WEIGHT * z, NOISE).log_prob(x)
    return likelihood, dist.Normal(torch.zeros_like(z), 1.0).log_prob(z), q.log_prob(z)


def log_weights_by_hand(x, num_particles, seed=0):
    likelihood, prior, proposal = parts(x, num_particles, seed)
    return likelihood + prior - proposal


def subsampled(x):
    with pyro.plate("data", 200, subsample=x):
        latent(x)


def subsampled_guide(x):
    with pyro.plate("data", 200, subsample=x):
        pyro.sample("z", dist.Normal(0.3 * x, 0.7))


def drawn_minibatch(fn):
    def run(x):
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            fn(x[rows])

    return run


def drawn_posterior(x):
    precision = 1 + WEIGHT**2 / NOISE**2
    pyro.sample("z", dist.Normal(WEIGHT * x / NOISE**2 / precision, precision**-0.5))


def mixed(x, subsample=False):
    plate = pyro.plate("data", 200, subsample=x) if subsample else pyro.plate("data", len(x))
    with plate:
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        c = pyro.sample("c", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(MEANS[c] + z, 1.0), obs=x)
