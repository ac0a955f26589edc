"""Data that see the latents of one another have no weights of their own, however particles run."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

X = torch.tensor([3.0, -3.0, 2.0], dtype=torch.float64)


def of(seen, plate=lambda x: pyro.plate("data", len(x))):
    def model(x):
        with plate(x) as index:
            rows = x if isinstance(index, slice) else x[index]
            z = pyro.sample("z", dist.Normal(torch.zeros_like(rows), 1.0))
            pyro.sample("x", dist.Normal(seen(z), 0.5), obs=rows)

    return model


def prior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))


def bound(objective, model, runs):
    torch.manual_seed(0)
    return -sum(objective.loss(model, prior, X) for _ in range(runs)) / runs


@pytest.mark.parametrize(
    "seen",
    [
        lambda z: z.mean(-1, keepdim=True).expand(z.shape),
        lambda z: z.cumsum(-1),
        lambda z: z.roll(1, -1),
        lambda z: z.softmax(-1),
    ],
    ids=["mean", "walk", "neighbour", "shares"],
)
@pytest.mark.parametrize(
    "objective",
    [pv.IWAE(200, vectorize_particles=False), pv.IWAE(200), pv.WakeSleep(200)],
    ids=["loop", "together", "wake"],
)
def test_data_that_see_one_another_are_refused(objective, seen):
    """Through a mean, log p(x) is -43.35, and the sum of each datum's own bound was -21.8."""
    with pytest.raises(ValueError, match="depends on the latents of other data"):
        objective.loss(of(seen), prior, X)


def test_as_one_datum_they_have_a_bound():
    mean = of(lambda z: z.mean(-1, keepdim=True).expand(z.shape))
    covariance = 0.25 * torch.eye(3, dtype=X.dtype) + 1 / 3
    exact = dist.MultivariateNormal(torch.zeros_like(X), covariance).log_prob(X)
    objective = pv.IWAE(500, vectorize_particles=False, data_plate=False)
    assert bound(objective, mean, 4) == pytest.approx(float(exact), abs=0.3)


def test_independent_data_run_one_by_one_as_before():
    exact = dist.Normal(0.0, math.sqrt(1.25)).log_prob(X).sum()
    objective = pv.IWAE(500, vectorize_particles=False)
    assert bound(objective, of(lambda z: z), 4) == pytest.approx(float(exact), abs=0.3)


def test_noise_beside_the_sites_is_no_dependence():
    """Dropout by hand: each run draws it anew, and a bound over it is one."""
    noisy = of(lambda z: z + 0.01 * torch.randn_like(z))
    assert math.isfinite(pv.IWAE(2, vectorize_particles=False).loss(noisy, prior, X))


def test_data_of_a_drawn_minibatch_are_looked_at_too():
    def drawn(x):
        return pyro.plate("data", len(x), subsample_size=2)

    def rows(x):
        with drawn(x) as index:
            pyro.sample("z", dist.Normal(torch.zeros_like(x[index]), 1.0))

    objective = pv.IWAE(2)
    assert math.isfinite(objective.loss(of(lambda z: z, drawn), rows, X))
    with pytest.raises(ValueError, match="depends on the latents of other data"):
        objective.loss(of(lambda z: z.flip(-1), drawn), rows, X)
