"""Models of sequences: exact where the networks are linear."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from tests.zoo.cases import NUM_DATA, sequences


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
