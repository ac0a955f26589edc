"""Log weights: exact where the guide is, the same for any chunks, by seed."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from tests.models import encoder, factor_analysis


@pytest.fixture
def exact():
    model = factor_analysis()
    torch.manual_seed(1)
    return model, model.data(7)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 7, 23, 10_000])
@pytest.mark.parametrize("particles", ["auto", "plate", "repeat", "loop"])
def test_weights_of_the_exact_posterior_are_the_evidence(exact, particles, chunk_size):
    model, x = exact
    weights = pv.log_weights(
        model, model.posterior, x, num_particles=11, particles=particles, chunk_size=chunk_size
    )
    assert weights.total.shape == (11, 7)
    assert weights.total.std(0).max() < 1e-10
    torch.testing.assert_close(
        weights.total, model.log_evidence(x).expand(11, -1), rtol=0, atol=1e-10
    )


def test_the_three_parts_are_what_they_say(exact):
    model, x = exact
    evaluator = Evaluator(model, model.posterior, as_batch(x), seed=0)
    (chunk,) = evaluator.chunks(4)
    z = chunk.values["z"]
    likelihood = dist.Normal(z @ model.loadings.T + model.mean, model.noise).log_prob(x).sum(-1)
    torch.testing.assert_close(chunk.weights.log_likelihood, likelihood)
    torch.testing.assert_close(chunk.weights.log_prior, dist.Normal(0.0, 1.0).log_prob(z).sum(-1))
    posterior = torch.distributions.MultivariateNormal(
        model.posterior_mean(x), precision_matrix=model.posterior_precision
    )
    torch.testing.assert_close(chunk.weights.log_guide, posterior.log_prob(z))


def test_more_particles_are_the_same_and_others():
    """The first hundreds of them do not depend on how many there are."""
    model = factor_analysis()
    x = model.data(300)
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    few, many = (
        pv.log_weights(model, guide, x, num_particles=k, seed=3).log_guide for k in (100, 270)
    )
    torch.testing.assert_close(many[:100], few, rtol=1e-12, atol=1e-12)


def test_one_seed_one_result_and_the_global_state_is_left_alone(exact):
    model, x = exact
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = pv.log_weights(model, guide, x, num_particles=4, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.total, pv.log_weights(model, guide, x, num_particles=4, seed=1).total)
    other = pv.log_weights(model, guide, x, num_particles=4, seed=2)
    assert not torch.equal(first.total, other.total)


def test_without_a_seed_the_global_state_decides(exact):
    model, x = exact
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    draws = []
    for _ in range(2):
        torch.manual_seed(8)
        draws.append(pv.log_weights(model, guide, x, num_particles=4).total)
        draws.append(pv.log_weights(model, guide, x, num_particles=4).total)
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])


def test_bad_numbers_are_refused(exact):
    model, x = exact
    with pytest.raises(ValueError, match="num_particles=0: a whole number of at least 1"):
        pv.log_weights(model, model.posterior, x, num_particles=0)
    with pytest.raises(ValueError, match="chunk_size=0: a whole number of at least 1"):
        pv.log_weights(model, model.posterior, x, num_particles=2, chunk_size=0)
    with pytest.raises(ValueError, match="particles='fast'"):
        pv.log_weights(model, model.posterior, x, num_particles=2, particles="fast")
    with pytest.raises(ValueError, match=r"argument 0 .* NaN or infinite values in rows 2 \(1 of"):
        pv.log_weights(
            model, model.posterior, x.index_fill(0, torch.tensor([2]), torch.nan), num_particles=2
        )
    with pytest.raises(ValueError, match="the batch is empty"):
        pv.log_weights(model, model.posterior, x[:0], num_particles=2)


@pytest.mark.parametrize("seed", [-1, 0.5])
def test_a_bad_seed_is_refused(exact, seed):
    model, x = exact
    with pytest.raises(ValueError, match="whole number of at least 0"):
        pv.log_weights(model, model.posterior, x, num_particles=2, seed=seed)
