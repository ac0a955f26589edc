"""Topics, single cells, item response theory and the table of eye colours: by hand, and exact."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_vae as pv
from pyro_vae.zoo.tables import Multinomial
from tests.zoo.cases import (
    NUM_DATA,
    assert_simulates,
    assert_vectorized_is_looped,
    cells,
    latents,
    log_joint,
    topics,
)


def item_response(**settings: Any) -> tuple[pv.zoo.ItemResponse, Tensor, pv.AmortizedGuide]:
    model = pv.zoo.ItemResponse(5, **settings)
    responses = model.simulate(NUM_DATA).double()
    guide = pv.AmortizedGuide(
        model,
        model.make_encoder([8]).double(),
        example=responses,
        global_guide=model.make_global_guide(),
    )
    return model, responses, guide


@pytest.mark.parametrize("discrimination", [True, False])
def test_items_are_global_and_persons_the_data(discrimination: bool):
    model, responses, guide = item_response(discrimination=discrimination)
    told = pv.describe(model, responses)
    items = ["difficulty", "discrimination"][: 1 + discrimination]
    assert told.data_plate == "persons"
    assert {row["site"]: (row["kind"], row["plates"]) for row in told.rows} == {
        **dict.fromkeys(items, ("global latent", "items[5]")),
        "ability": ("local latent", "persons[7]"),
        "responses": ("observed", "persons[7]"),
    }
    assert sorted(guide(responses)) == ["ability", *items]
    assert_vectorized_is_looped(model, "persons", responses)
    assert all(value.dtype == torch.float64 for value in guide(responses).values())


def test_responses_by_hand():
    model, responses, _ = item_response()
    values = latents(model, responses)
    logits = values["discrimination"] * (values["ability"][:, None] - values["difficulty"])
    by_hand = (responses * logits - logits.exp().log1p()).sum(-1)
    by_hand += dist.Normal(0.0, 1.0).log_prob(values["ability"])
    torch.testing.assert_close(log_joint(model, "persons", values, responses), by_hand)


@pytest.mark.parametrize("loss", [pv.ELBO(), pv.ELBO(num_particles=3)], ids=["one", "three"])
def test_items_and_persons_are_trained_together(loss: pv.ELBO):
    model, responses, guide = item_response()
    pair = loss(model, guide)
    pair(responses).backward()
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)

    def mean_loss() -> Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            return torch.stack([pair(responses) for _ in range(30)]).mean()

    before = mean_loss()
    for _ in range(40):
        optimizer.zero_grad()
        pair(responses).backward()
        optimizer.step()
    assert mean_loss() < before - 1.0


def test_the_likelihood_of_a_minibatch_of_persons_is_scaled_up():
    """The mean over the halves of what is scored is what the whole scores, items counted once."""
    model = pv.zoo.ItemResponse(5, num_persons=6)
    responses = model.simulate(6).double()
    values = latents(model, responses)

    def score(rows: slice) -> Tensor:
        data = {**values, "ability": values["ability"][rows]}
        trace = poutine.trace(poutine.condition(model, data=data)).get_trace(responses[rows])
        return trace.log_prob_sum()

    halves = (score(slice(0, 3)) + score(slice(3, 6))) / 2
    torch.testing.assert_close(halves, score(slice(0, 6)))


def test_more_responses_than_persons():
    with pytest.raises(ValueError, match="responses of 7 persons, but num_persons=6"):
        pv.zoo.ItemResponse(5, num_persons=6)(torch.zeros(7, 5))


def test_simulated_responses():
    model = pv.zoo.ItemResponse(4)
    assert_simulates(model)
    items = {"difficulty": torch.tensor([-50.0, 50.0, -50.0, 50.0])}
    responses = model.simulate(10, items=items)
    assert torch.equal(responses, torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(10, -1))


def eye_colour() -> tuple[pv.zoo.EyeColour, Tensor]:
    table = torch.tensor([[30.0, 10.0, 5.0], [5.0, 48.0, 2.0]], dtype=torch.float64)
    return pv.zoo.EyeColour(table), torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize("guide", ["exact", "none"])
def test_the_evidence_of_eye_colours_is_the_tables(guide: str):
    model, colour = eye_colour()
    assert pv.describe(model, colour).note == (
        "discrete ['nationality']: summed out where no guide proposes them"
    )
    by_hand = torch.tensor([0.35, 0.58, 0.07], dtype=torch.float64).log()[colour]
    torch.testing.assert_close(model.log_evidence(colour).detach(), by_hand)
    proposal = pv.ExactGuide(model, example=colour) if guide == "exact" else lambda colour: None
    weights = pv.log_weights(model, proposal, colour, num_particles=3, seed=0)
    torch.testing.assert_close(weights.total, by_hand.expand(3, -1), rtol=1e-12, atol=1e-12)


def test_the_posterior_of_nationalities_is_a_column_over_its_sum():
    model, colour = eye_colour()
    by_hand = torch.tensor([[30, 5], [10, 48], [5, 2]], dtype=torch.float64)
    by_hand = (by_hand / by_hand.sum(-1, keepdim=True))[colour]
    torch.testing.assert_close(model.posterior(colour).detach(), by_hand)
    guide = pv.ExactGuide(model, example=colour)
    torch.testing.assert_close(guide.posterior(colour)["nationality"].detach(), by_hand)


@pytest.mark.parametrize("loss", [pv.ELBO(), pv.IWAE(3)], ids=["ELBO", "IWAE"])
def test_losses_of_eye_colours_are_minus_the_evidence(loss: pyro.infer.ELBO):
    model, colour = eye_colour()
    value = loss(model, lambda colour: None)(colour)
    exact = -model.log_evidence(colour).sum()
    torch.testing.assert_close(value, exact)
    (gradient,) = torch.autograd.grad(value, model.logits)
    (wanted,) = torch.autograd.grad(exact, model.logits)
    torch.testing.assert_close(gradient, wanted)
    assert (wanted != 0).all()


def test_simulated_colours():
    model, _ = eye_colour()
    assert_simulates(model)
    drawn = torch.bincount(model.simulate(10_000), minlength=3) / 10_000
    shares = torch.tensor([0.35, 0.58, 0.07])
    assert ((drawn - shares).abs() < 5 * (shares * (1 - shares) / 10_000).sqrt()).all()


@pytest.mark.parametrize("table", [torch.ones(3), torch.tensor([[1.0, 0.0], [2.0, 3.0]])])
def test_a_table_needs_positive_cells(table: Tensor):
    with pytest.raises(ValueError, match=r"positive cells \[nationality, colour\] are needed"):
        pv.zoo.EyeColour(table)


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
