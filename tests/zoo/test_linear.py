"""Reference models other than images: factors, counts, sequences, tables."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.programs.nodes import latent_nodes, sample_nodes
from pyro_vae.zoo.counts import Multinomial

NUM_DATA = 7


@dataclass(frozen=True)
class Case:
    """A model with its batch and its description."""

    model: nn.Module
    batch: Any
    encoder: nn.Module
    data_plate: str
    latents: list[str]
    observed: list[str]

    @property
    def guide(self) -> pv.AmortizedGuide:
        return pv.AmortizedGuide(self.model, self.encoder, example=self.batch)


def linear(kind: type) -> Case:
    model = kind(6, 2).double()
    with torch.no_grad():
        model.mean.normal_()
        model.log_noise.normal_(-0.5, 0.3)
    return Case(model, model.simulate(NUM_DATA), model.make_encoder([8]), "data", ["z"], ["x"])


def topics() -> Case:
    model = pv.zoo.TopicModel(20, 3, concentration=0.7).double()
    # Documents of different lengths.
    counts = torch.cat([model.simulate(3, document_length=30), model.simulate(NUM_DATA - 3)])
    return Case(model, counts, model.make_encoder([8]), "documents", ["topic_shares"], ["counts"])


def cells(*, size_given: bool) -> Case:
    model = pv.zoo.SingleCellCounts(12, 2, hidden=[8], size_prior=(4.0, 0.5)).double()
    size = torch.linspace(20, 200, NUM_DATA, dtype=torch.float64) if size_given else None
    batch = model.simulate(NUM_DATA, size=size)
    latents = ["z"] if size_given else ["z", "size"]
    return Case(model, batch, model.make_encoder([8]), "cells", latents, ["counts"])


def sequences() -> Case:
    model = pv.zoo.DeepMarkovModel(3, 2, hidden=[8]).double()
    batch = model.simulate(NUM_DATA, num_steps=4)
    steps = range(1, 5)
    return Case(
        model,
        batch,
        model.make_encoder(5),
        "sequences",
        [f"z_{t}" for t in steps],
        [f"x_{t}" for t in steps],
    )


CASES = {
    "factor analysis": lambda: linear(pv.zoo.FactorAnalysis),
    "probabilistic PCA": lambda: linear(pv.zoo.ProbabilisticPCA),
    "topics": topics,
    "cells": lambda: cells(size_given=False),
    "cells of given size": lambda: cells(size_given=True),
    "sequences": sequences,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def arguments(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def latents(model: Callable[..., Any], *batch: Any) -> dict[str, Tensor]:
    """Draws from the prior."""
    trace = poutine.trace(model).get_trace(*batch)
    return {name: node["value"] for name, node in latent_nodes(trace)}


def log_joint(
    model: Callable[..., Any], plate: str, values: dict[str, Tensor], *batch: Any
) -> Tensor:
    """Sum of the log densities of the sites in the data plate, [..., N]."""
    conditioned = poutine.condition(model, data=values)
    trace = poutine.trace(conditioned).get_trace(*batch)
    return sum(
        node["fn"].log_prob(node["value"])
        for _, node in sample_nodes(trace)
        if plate in {frame.name for frame in node["cond_indep_stack"]}
    )


# --- laws of all of them ----------------------------------------------------------------------


def test_the_description(case: Case):
    told = pv.describe(case.model, case.batch)
    kinds = {row["site"]: row["kind"] for row in told.rows}
    assert told.data_plate == case.data_plate
    assert [name for name, kind in kinds.items() if kind == "local latent"] == case.latents
    assert [name for name, kind in kinds.items() if kind == "observed"] == case.observed
    assert len(kinds) == len(case.latents) + len(case.observed)


def assert_vectorized_is_looped(model: Callable[..., Any], plate: str, *batch: Any) -> None:
    with torch.no_grad():
        draws = [latents(model, *batch) for _ in range(4)]
        one_by_one = torch.stack([log_joint(model, plate, values, *batch) for values in draws])
        values = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        particles = pyro.plate("particles", 4, dim=-2)
        together = log_joint(particles(model), plate, values, *batch)
    assert together.shape == (4, NUM_DATA)
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)
    assert one_by_one.std(0).min() > 0  # the draws differ, and with them the densities


def test_particles_at_once_are_particles_one_by_one(case: Case):
    assert_vectorized_is_looped(case.model, case.data_plate, *arguments(case.batch))


@pytest.mark.parametrize("particles", ["plate", "repeat"])
def test_particles_run_together(case: Case, particles: str):
    """A way of running particles that disagrees with a loop is refused."""
    pv.log_weights(case.model, case.guide, case.batch, num_particles=2, particles=particles, seed=0)


def test_chunks_change_nothing(case: Case):
    guide = case.guide

    def weights(chunk_size: int | None) -> Tensor:
        found = pv.log_weights(
            case.model, guide, case.batch, num_particles=6, seed=0, chunk_size=chunk_size
        )
        return found.total

    for chunk_size in (1, 11):
        torch.testing.assert_close(weights(chunk_size), weights(None), rtol=1e-12, atol=1e-12)


def test_float64_throughout(case: Case):
    batch = arguments(case.batch)
    for fn in (case.guide, case.model):
        for name, node in sample_nodes(poutine.trace(fn).get_trace(*batch)):
            assert node["value"].dtype == torch.float64, name
    assert pv.log_weights(case.model, case.guide, case.batch, num_particles=2).total.dtype == (
        torch.float64
    )


@pytest.mark.parametrize("loss", [pv.ELBO(), pv.IWAE(5)], ids=["ELBO", "IWAE"])
def test_a_gradient_reaches_every_parameter(case: Case, loss: pyro.infer.ELBO):
    guide = case.guide
    loss(case.model, guide)(*arguments(case.batch)).backward()
    for owner in (case.model, guide):
        for name, parameter in owner.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("loss", [pv.ELBO(), pv.IWAE(5)], ids=["ELBO", "IWAE"])
def test_a_few_steps_lower_the_loss(case: Case, loss: pyro.infer.ELBO):
    guide, batch = case.guide, arguments(case.batch)
    pair = loss(case.model, guide)

    def mean_loss() -> Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            return torch.stack([pair(*batch) for _ in range(10)]).mean()

    before = mean_loss()
    parameters = {*case.model.parameters(), *guide.parameters()}
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        pair(*batch).backward()
        optimizer.step()
    assert mean_loss() < before - 0.1 * NUM_DATA


def assert_simulates(model: Any) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (arguments(model.simulate(50, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    for tensor, same in zip(first, again, strict=True):
        assert len(tensor) == 50
        assert torch.equal(tensor, same)
    assert not torch.equal(first[0], other[0])


def test_simulations_have_a_seed_of_their_own(case: Case):
    assert_simulates(case.model)


# --- linear Gaussian models: exact --------------------------------------------------------------


@pytest.mark.parametrize("kind", [pv.zoo.FactorAnalysis, pv.zoo.ProbabilisticPCA])
def test_every_log_weight_of_the_exact_posterior_is_the_evidence(kind: type):
    case = linear(kind)
    model, x = case.model, case.batch

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    exact = model.log_evidence(x).detach()
    weights = pv.log_weights(model, guide, x, num_particles=20, seed=0)
    torch.testing.assert_close(weights.total, exact.expand(20, -1), rtol=1e-12, atol=1e-12)
    covariance = model.loadings @ model.loadings.T + torch.diag(model.noise**2)
    by_hand = dist.MultivariateNormal(model.mean, covariance).log_prob(x)
    torch.testing.assert_close(exact, by_hand.detach(), rtol=1e-12, atol=1e-12)


def test_noise_scales():
    assert pv.zoo.FactorAnalysis(5, 2).log_noise.shape == (5,)
    model = pv.zoo.ProbabilisticPCA(5, 2)
    assert model.log_noise.shape == (1,)
    assert model.noise.shape == (5,)


@pytest.mark.parametrize("num_latents", [0, 6])
def test_a_wrong_number_of_factors(num_latents: int):
    with pytest.raises(ValueError, match=f"num_latents={num_latents}: between 1 and num_features"):
        pv.zoo.FactorAnalysis(5, num_latents)


# --- counts -----------------------------------------------------------------------------------


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


# --- sequences: exact where the networks are linear ----------------------------------------------


class LinearTransition(nn.Module):
    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return 0.8 * state + 0.1, torch.full_like(state, 0.6)


def linear_sequences() -> tuple[nn.Module, Tensor, Tensor]:
    """z_t ~ Normal(0.8 z_(t-1) + 0.1, 0.6), x_t ~ Normal(a z_t + b, noise), of lengths 1 to 4."""
    model = pv.zoo.DeepMarkovModel(2, 1, hidden=[]).double()
    model.transition = LinearTransition()
    with torch.no_grad():
        model.log_noise.copy_(torch.tensor([-0.5, 0.2]))
    sequences, _ = model.simulate(NUM_DATA, num_steps=4)
    return model, sequences, torch.tensor([4, 1, 2, 3, 4, 2, 1])


def exact_posterior(
    model: nn.Module, sequences: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [N, T] and Cholesky factor [N, T, T] of p(z_1..z_T | x up to the length); log p(x)."""
    num_steps = sequences.shape[1]
    # z = start + A noise, with A_ts = 0.8^(t - s) for s <= t
    power = torch.arange(num_steps).unsqueeze(1) - torch.arange(num_steps)
    mixing = torch.where(power >= 0, 0.8 ** power.double(), 0.0)
    prior_mean, prior = 0.1 * mixing.sum(1), 0.36 * mixing @ mixing.T
    slope = model.emission(torch.ones(1).double()) - model.emission(torch.zeros(1).double())
    means, factors, evidence = [], [], []
    for x, length in zip(sequences, lengths, strict=True):
        seen = x[:length].flatten()
        emission = torch.kron(torch.eye(num_steps).double()[:length], slope.unsqueeze(-1))
        mean = emission @ prior_mean + model.emission(torch.zeros(1).double()).repeat(length)
        noise = torch.diag(model.noise.repeat(length) ** 2)
        covariance = emission @ prior @ emission.T + noise
        gain = torch.linalg.solve(covariance, emission @ prior).T
        means.append(prior_mean + gain @ (seen - mean))
        factors.append(torch.linalg.cholesky(prior - gain @ emission @ prior))
        evidence.append(dist.MultivariateNormal(mean, covariance).log_prob(seen))
    return tuple(torch.stack(t).detach() for t in (means, factors, evidence))


def padded(sequences: Tensor) -> Tensor:
    """Three more steps of numbers that must not matter."""
    return torch.cat([sequences, 7 * torch.ones_like(sequences[:, :3])], 1)


@pytest.mark.parametrize("pad", [False, True], ids=["plain", "padded"])
def test_log_weights_of_sequences_are_the_evidence_of_what_is_there(pad: bool):
    """Latents past the length are not there, nor are their proposals."""
    model, sequences, lengths = linear_sequences()
    if pad:
        sequences = padded(sequences)
    mean, factor, evidence = exact_posterior(model, sequences, lengths)

    def guide(sequences: Tensor, lengths: Tensor) -> None:
        noise: list[Tensor] = []
        with pyro.plate("sequences", len(sequences)):
            for t in range(sequences.shape[1]):
                location = mean[:, t] + sum(factor[:, t, s] * e for s, e in enumerate(noise))
                scale = factor[:, t, t]
                proposal = dist.Normal(location.unsqueeze(-1), scale.unsqueeze(-1)).to_event(1)
                z = pyro.sample(f"z_{t + 1}", proposal).squeeze(-1)
                noise.append((z - location) / scale)

    weights = pv.log_weights(model, guide, sequences, lengths, num_particles=5, seed=0)
    torch.testing.assert_close(weights.total, evidence.expand(5, -1), rtol=1e-10, atol=1e-10)
    loss = pv.ELBO(kl="sample").loss(model, guide, sequences, lengths)
    assert loss == pytest.approx(-float(evidence.sum()), abs=1e-9)


@pytest.mark.parametrize("loss", [pv.ELBO(), pv.IWAE(5)], ids=["ELBO", "IWAE"])
def test_padding_changes_no_loss(loss: pyro.infer.ELBO):
    case = sequences()

    def guide(sequences: Tensor, lengths: Tensor) -> None:
        with pyro.plate("sequences", len(sequences)):
            for t in range(sequences.shape[1]):
                location = sequences[:, t, :2]
                pyro.sample(f"z_{t + 1}", dist.Normal(location, 0.5).to_event(1))

    x, lengths = case.batch

    def value(x: Tensor) -> float:
        torch.manual_seed(0)
        return loss.loss(case.model, guide, x, lengths)

    assert value(padded(x)) == pytest.approx(value(x), rel=1e-12)


def test_features_of_a_sequence_know_nothing_of_its_padding():
    x, lengths = (case := sequences()).batch
    found = case.encoder(x, lengths)
    more = case.encoder(padded(x), lengths)
    assert (found.shape, more.shape) == ((NUM_DATA, 4 * 10), (NUM_DATA, 7 * 10))
    torch.testing.assert_close(more[:, : found.shape[1]], found)
    assert not more[:, found.shape[1] :].any()
    alone = case.encoder(x[:1, : int(lengths[0])], lengths[:1])
    torch.testing.assert_close(found[:1, : alone.shape[1]], alone)
    # The first step knows the last of its sequence.
    longest = int(lengths.argmax())
    changed = x.clone()
    changed[longest, int(lengths[longest]) - 1] += 1.0
    assert (case.encoder(changed, lengths) - found)[longest, :10].abs().max() > 0


def test_simulated_sequences():
    model = sequences().model
    x, lengths = model.simulate(200, num_steps=5)
    assert x.shape == (200, 5, 3)
    assert set(lengths.tolist()) == {3, 4, 5}
    for steps, length in zip(x, lengths, strict=True):
        assert not steps[length:].any()
        assert steps[:length].abs().min() > 0


# --- tables ------------------------------------------------------------------------------------


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


def test_the_evidence_of_small_noise_is_right_in_float32():
    """Of a low-rank marginal it would be a difference of large numbers."""
    model = pv.zoo.FactorAnalysis(20, 3)
    with torch.no_grad():
        model.log_noise.fill_(-6.0)
    x = model.simulate(5)
    found = model.log_evidence(x)
    exact = copy.deepcopy(model).double().log_evidence(x.double())
    assert (found - exact).abs().max() < 1e-2
