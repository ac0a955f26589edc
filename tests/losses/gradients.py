"""Losses and gradients of pairs: under one seed, or as means with their standard errors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch

from tests.models import NormalModel

X = torch.tensor([0.7, -1.2, 3.0], dtype=torch.float64)


def losses_and_gradients(loss, model, guide, x, seed=0):
    guide.zero_grad()
    torch.manual_seed(seed)
    value = loss.loss_and_grads(model, guide, x)
    return value, torch.cat([p.grad.flatten() for p in guide.parameters()])


def mean_gradients(loss, model, guide, parameters, count, *batch):
    """Return the mean of independent gradients, and its standard error."""
    torch.manual_seed(0)
    found = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        loss.differentiable_loss(model, guide, *batch), parameters
                    )
                ]
            )
            for _ in range(count)
        ]
    )
    return found.mean(0), found.std(0) / math.sqrt(count)


def agree(one, other):
    """Within 4 standard errors of the difference, and sharper than the value itself."""
    (mean, error), (wanted, wanted_error) = one, other
    total = torch.hypot(error, wanted_error)
    assert (4 * total < wanted.abs()).any()
    assert ((mean - wanted).abs() < 4 * total + 1e-12).all(), (mean, wanted, total)


def normal_pair():
    slope = torch.tensor(0.3, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    return NormalModel(), guide, [slope]


def enumerated_after_a_draw(twice):
    parameters = torch.tensor([0.5, -0.3], requires_grad=True)
    means, tilt = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
            u = pyro.sample("u", dist.Normal(means[c], 1.0)) if twice else means[c]
            pyro.sample("x", dist.Normal(z + u, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(parameters[0] * x, parameters[1].exp()))
            logits = z.unsqueeze(-1) * tilt + 0.2
            c = pyro.sample("c", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            if twice:
                pyro.sample("u", dist.Normal(means[c] + z, 1.0))

    return model, guide, [parameters]
