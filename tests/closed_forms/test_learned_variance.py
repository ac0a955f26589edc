"""The variance that a guide learns, by each direction of the KL."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from tests.models import factor_analysis


def trained_variance(exact, x, loss, steps, lr=0.05):
    """Variances [N, L] of a diagonal Gaussian for each datum, after training."""
    torch.manual_seed(0)
    guide = pv.LocalGuide(exact, num_data=len(x), example=x)
    optimizer = torch.optim.Adam(guide.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.005 ** (1 / steps))
    for _ in range(steps):
        optimizer.zero_grad()
        loss.loss_and_grads(exact, guide, x)
        optimizer.step()
        schedule.step()
    trace = poutine.trace(guide).get_trace(x)
    return trace.nodes["z"]["fn"].variance.detach()


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_variance_that_a_diagonal_guide_learns(direction):
    """On a correlated posterior: ELBO, 1 / diag of the precision; wake-phi, the variance; 1 %."""
    exact = factor_analysis(latents=2, features=2, seed=10)
    covariance = torch.linalg.inv(exact.posterior_precision)
    reverse, forward = 1 / exact.posterior_precision.diagonal(), covariance.diagonal()
    assert (forward / reverse).min() > 1.2  # far apart
    torch.manual_seed(0)
    x = exact.data(3)
    if direction == "reverse":
        found = trained_variance(exact, x, pv.ELBO(1000), 500)
    else:
        found = trained_variance(exact, x, pv.WakeSleep(4000), 400)
    wanted = reverse if direction == "reverse" else forward
    torch.testing.assert_close(found, wanted.expand_as(found), rtol=0.01, atol=0)


@pytest.mark.slow
def test_the_variance_that_sleep_learns():
    """An encoder that can be exact in its mean: the posterior's variances within 1 %."""
    exact = factor_analysis(latents=2, features=2, seed=10)
    weights = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weights + bias, log_scale.exp()).to_event(1))

    optimizer = torch.optim.Adam([weights, bias, log_scale], lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.005 ** (1 / 500))
    loss, x = pv.WakeSleep(1, insomnia=0.0), torch.zeros(2000, 2, dtype=torch.float64)
    for _ in range(500):
        optimizer.zero_grad()
        loss.loss_and_grads(exact, guide, x)
        optimizer.step()
        schedule.step()
    covariance = torch.linalg.inv(exact.posterior_precision)
    found = (2 * log_scale.detach()).exp()
    torch.testing.assert_close(found, covariance.diagonal(), rtol=0.01, atol=0)
