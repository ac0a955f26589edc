"""Which sites have an analytic KL, and that it is the KL."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_vae.kl import analytic_kl


def node(fn, scale=1.0, mask=None):
    return {"fn": fn, "scale": scale, "mask": mask}


@pytest.mark.parametrize(
    ("guide", "model"),
    [
        (dist.Normal(0.5, 0.7), dist.Normal(0.0, 1.0)),
        (dist.Gamma(2.0, 3.0), dist.Gamma(1.5, 1.0)),
        (dist.Beta(2.0, 3.0), dist.Beta(1.0, 1.0)),
        (dist.LogNormal(0.5, 0.7), dist.LogNormal(0.0, 1.0)),
    ],
)
def test_closed_forms_agree_with_sampling(guide, model):
    """Within 4 standard errors of 200,000 draws."""
    found, reason = analytic_kl(node(guide), node(model))
    torch.manual_seed(0)
    z = guide.sample((200_000,))
    draws = guide.log_prob(z) - model.log_prob(z)
    assert "closed form" in reason
    assert abs(found - draws.mean()) < 4 * draws.std() / 200_000**0.5


@pytest.mark.parametrize(
    ("guide", "model", "reason"),
    [
        (node(dist.LogNormal(0.0, 1.0)), node(dist.Gamma(1.0, 1.0)), "no closed form"),
        (node(dist.Delta(torch.tensor(1.0), 0.5)), node(dist.Normal(0.0, 1.0)), "Delta"),
        (
            node(dist.Delta(torch.zeros(2), 0.5, event_dim=1)),
            node(dist.Normal(torch.zeros(2), 1.0).to_event(1)),
            "Delta",
        ),
        (node(dist.Normal(0.0, 1.0), scale=2.0), node(dist.Normal(0.0, 1.0)), "scale"),
        (
            node(dist.Normal(0.0, 1.0), mask=torch.tensor(True)),
            node(dist.Normal(0.0, 1.0)),
            "mask",
        ),
        (
            node(dist.Normal(torch.zeros(2), 1.0), mask=torch.tensor([True, False])),
            node(dist.Normal(torch.zeros(2), 1.0), mask=torch.tensor([True, True])),
            "mask",
        ),
    ],
)
def test_where_there_is_none_it_says_why(guide, model, reason):
    found, told = analytic_kl(guide, model)
    assert found is None and reason in told
