"""Models of counts: topics and single cells."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.zoo.counts import Multinomial
from tests.zoo.cases import cells, latents, log_joint, topics


def test_the_multinomial_is_torchs_where_totals_are_one():
    probs = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=torch.float64)
    counts = torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 6.0, 0.0]], dtype=torch.float64)
    ours = Multinomial(counts.sum(-1), probs)
    assert (ours.batch_shape, ours.event_shape) == ((2,), (4,))
    torch.testing.assert_close(
        ours.log_prob(counts), torch.distributions.Multinomial(6, probs).log_prob(counts)
    )


def test_the_multinomial_of_different_totals():
    totals = torch.tensor([0, 3, 40])
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.6, 0.4, 0.0]], dtype=torch.float64)
    fn = Multinomial(totals, probs).expand((2, 3))
    draws = fn.sample((5000,))
    assert draws.shape == (5000, 2, 3, 3)
    assert torch.equal(draws.sum(-1), totals.double().expand(5000, 2, 3))
    # Mean and variance n p (1 - p), within five standard errors over 10,000 draws.
    n, flat = totals.double().unsqueeze(-1), draws.flatten(0, 1)
    variance = n * probs * (1 - probs)
    assert ((flat.mean(0) - n * probs).abs() <= 5 * (variance / 10_000).sqrt()).all()
    torch.testing.assert_close(flat.var(0), variance, rtol=0.08, atol=1e-12)


def test_predicted_documents_keep_their_length():
    case = topics()
    tree = pv.to_arviz(case.model, case.guide, case.batch, num_draws=5, seed=0)
    predicted = tree["posterior_predictive"]["counts"].values.sum(-1)
    assert (predicted == case.batch.sum(-1).numpy()).all()


def test_topics_are_distributions_and_two_at_least():
    topics = pv.zoo.TopicModel(9, 3).double().topics
    torch.testing.assert_close(topics.sum(-1), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="num_topics=1: at least 2 are needed"):
        pv.zoo.TopicModel(9, 1)


def test_moments_of_counts():
    """Mean s softmax(f), variance mean + mean^2 / r."""
    model = cells(size_given=True).model
    with torch.no_grad():
        model.log_inverse_dispersion.normal_()
        z, size = torch.randn(3, 2).double(), torch.tensor([10.0, 100.0, 1000.0]).double()
        fn = model.likelihood(z, size)
        mean = size.unsqueeze(-1) * model.decoder(z).softmax(-1)
        torch.testing.assert_close(fn.mean, mean)
        torch.testing.assert_close(fn.variance, mean + mean**2 / model.inverse_dispersion)


def test_a_given_size_is_a_latent_one_conditioned_on():
    case = cells(size_given=True)
    counts, size = case.batch
    with torch.no_grad():
        z = latents(case.model, counts, size)
        given = log_joint(case.model, "cells", z, counts, size)
        latent = log_joint(case.model, "cells", {**z, "size": size}, counts)
    prior = dist.LogNormal(*case.model.size_prior).log_prob(size)
    torch.testing.assert_close(latent, given + prior)
