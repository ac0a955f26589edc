"""Reductions of log weights: closed forms, chunks, and standard errors by repetition."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from pyro_vae.particles import estimators
from pyro_vae.particles.estimators import (
    Estimate,
    LogWeights,
    StreamingELBO,
    StreamingIWAE,
    calibrated,
    independent_difference,
)


def log_weights(num_particles: int, num_data: int = 3) -> Tensor:
    scales = torch.linspace(0.1, 3.0, num_data, dtype=torch.float64)
    return torch.randn(num_particles, num_data, dtype=torch.float64) * scales - 700.0


def streamed(stream, weights: Tensor, sizes: list[int]):
    for chunk in weights.split(sizes):
        stream.update(chunk)
    return stream


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7], [1, 10, 1], [4, 4, 4]])
def test_streaming_equals_direct(sizes):
    weights = log_weights(12)
    elbo, iwae = (streamed(kind(), weights, sizes) for kind in (StreamingELBO, StreamingIWAE))
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(elbo.value, Estimate.elbo(weights).value, **close)
    torch.testing.assert_close(iwae.value, estimators.iwae_bound(weights), **close)
    assert elbo.num_particles == iwae.num_particles == 12
    for stream, direct in ((elbo, Estimate.elbo(weights)), (iwae, Estimate.iwae(weights))):
        torch.testing.assert_close(stream.std_error, direct.std_error, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(stream.skewness, direct.skewness, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        iwae.effective_sample_size, estimators.effective_sample_size(weights), rtol=1e-9, atol=0
    )


def test_by_hand():
    """Weights 1 and 3: mean 2, so the bound is log 2; ESS = 16 / 10."""
    weights = torch.tensor([[1.0], [3.0]], dtype=torch.float64).log()
    half_log_3 = math.log(3) / 2
    assert Estimate.elbo(weights).value.item() == pytest.approx(half_log_3)
    assert estimators.iwae_bound(weights).item() == pytest.approx(math.log(2))
    assert estimators.effective_sample_size(weights).item() == pytest.approx(1.6)
    assert Estimate.iwae(weights).influence.flatten().tolist() == pytest.approx([-0.5, 0.5])
    # Standard deviation over sqrt(K): of 0 and log 3, and of -1/2 and 1/2.
    error = Estimate.elbo(weights).std_error.item()
    assert error == pytest.approx(half_log_3)
    error = Estimate.iwae(weights).std_error.item()
    assert error == pytest.approx(0.5)


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_standard_errors_are_the_spread_of_repetitions(bound):
    """4,000 repetitions of K = 400: the spread is known to 1.1 %, tolerance 5 of these."""
    repetitions, num_particles = 4000, 400
    weights = 0.5 * torch.randn(num_particles, repetitions, dtype=torch.float64)
    estimate = {"elbo": Estimate.elbo, "iwae": Estimate.iwae}[bound](weights)
    spread = estimate.value.std().item()
    told = estimate.std_error.square().mean().sqrt().item()
    assert told == pytest.approx(spread, rel=5 / math.sqrt(2 * repetitions))
    # Log-normal weights: the coefficient of variation is sqrt(exp(s^2) - 1).
    exact = {"elbo": 0.5, "iwae": math.sqrt(math.expm1(0.25))}[bound] / math.sqrt(num_particles)
    assert told == pytest.approx(exact, rel=0.02)


def test_the_error_of_a_difference_is_paired():
    """Two bounds of the same draws, one shifted by a constant: no error in their difference."""
    weights = log_weights(50)
    one, other = (Estimate.elbo(w) for w in (weights, weights + 2.0))
    assert (one - other).std_error.max() < 1e-12
    assert one.std_error.min() > 1e-3


def test_the_error_of_a_mean_over_data():
    """Independent draws: 3-4-5."""
    assert estimators.mean_std_error(torch.tensor([3.0, 4.0])).item() == pytest.approx(2.5)


def test_skewness_widens_what_few_particles_decide():
    """Influences -1, -1, -1, 3: variance 3, third moment 6, so skewness 2 / sqrt(3)."""
    influence = torch.tensor([[-1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0], [3.0, -1.0]]).double()
    estimate = Estimate(influence[0], influence)
    skewness, plain = estimate.skewness, estimate.std_error
    assert skewness.tolist() == pytest.approx([2 / 3**0.5, 0.0])
    wider = estimators.calibrated(plain, skewness, 4) / plain
    assert wider.tolist() == pytest.approx([1 + 8 * (4 / 3) / 4, 1.0])
    # One of a hundred decides: skewness is near its largest, sqrt(K), and the error at its widest.
    spike = torch.zeros(100, 1, dtype=torch.float64)
    spike[0] = 1.0
    estimate = Estimate.elbo(spike)
    skewness, plain = estimate.skewness, estimate.std_error
    assert 9.8 < skewness.item() < 10
    assert (estimators.calibrated(plain, skewness, 100) / plain).item() == pytest.approx(4.0)


def test_the_error_of_a_mean_is_wider_by_the_skewness_of_the_mean():
    """N equal data: the skewness of their mean is less by sqrt(N); of one datum it is its own."""
    plain, skewness = torch.full((9,), 0.3).double(), torch.full((9,), 6.0).double()
    errors = estimators.calibrated(plain, skewness, 100)
    found = estimators.mean_std_error(errors, skewness, 100)
    assert found.item() == pytest.approx(0.1 * (1 + 8 * (6 / 3) ** 2 / 100))
    alone = estimators.mean_std_error(errors[:1], skewness[:1], 100)
    assert alone.item() == pytest.approx(errors[0].item())
    mirrored = skewness * torch.tensor([1.0, -1.0] * 4 + [0.0])
    found = estimators.mean_std_error(estimators.calibrated(plain, mirrored, 100), mirrored, 100)
    assert found.item() == pytest.approx(0.1)


@pytest.mark.parametrize("spread", [1e-3, 1e-6])
def test_weights_that_all_but_agree_have_an_error_all_the_same(spread):
    """Of a spread s the relative error of the mean weight is s / sqrt(K): no cancellation."""
    noise = torch.randn(4000, 2, dtype=torch.float64)
    stream = streamed(StreamingIWAE(), spread * noise - 700.0, [1000] * 4)
    wanted = spread * noise.std(0) / 4000**0.5
    torch.testing.assert_close(
        stream.std_error, wanted, rtol=1e-2 if spread > 1e-4 else 1e-5, atol=0
    )
    assert stream.skewness.abs().max() < 0.2


def test_effective_sample_size_between_one_and_all():
    constant = torch.full((8, 1), -800.0, dtype=torch.float64)
    assert estimators.effective_sample_size(constant).item() == pytest.approx(8.0)
    one = torch.full((8, 1), -math.inf)
    one[3] = -800.0
    assert estimators.effective_sample_size(one).item() == pytest.approx(1.0)


def test_one_particle_has_no_error():
    weights = log_weights(1)
    for stream in (StreamingELBO(), StreamingIWAE()):
        stream.update(weights)
        torch.testing.assert_close(stream.value, weights[0])
        assert stream.std_error.isnan().all()
    assert Estimate.elbo(weights).std_error.isnan().all()


@pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 2], [3, 1], [1] * 4])
@pytest.mark.parametrize("where", [[0], [3], [0, 1], [0, 3]])
def test_a_weight_of_zero_does_not_poison(sizes, where):
    """It makes this datum's ELBO -inf, no bound nan, and leaves the other data alone."""
    weights = log_weights(4, 2)
    clean = streamed(StreamingELBO(), weights, sizes)
    weights[where, 0] = -math.inf
    elbo, iwae = (streamed(kind(), weights, sizes) for kind in (StreamingELBO, StreamingIWAE))
    assert elbo.value[0] == -math.inf == weights.mean(0)[0]
    torch.testing.assert_close(elbo.value[1], clean.value[1])
    torch.testing.assert_close(elbo.std_error[1], clean.std_error[1])
    kept = [k for k in range(4) if k not in where]
    exact = torch.logsumexp(weights[kept, 0], 0) - math.log(4)
    torch.testing.assert_close(iwae.value[0], exact)
    torch.testing.assert_close(iwae.value, estimators.iwae_bound(weights))
    torch.testing.assert_close(iwae.std_error, Estimate.iwae(weights).std_error)
    assert iwae.std_error.isfinite().all()


def test_all_weights_zero():
    weights = torch.full((4, 1), -math.inf)
    assert estimators.iwae_bound(weights).item() == -math.inf
    assert streamed(StreamingIWAE(), weights, [2, 2]).value.item() == -math.inf


def test_mixture_is_the_mean_density():
    densities = torch.tensor([[[0.2]], [[0.6]], [[0.1]]], dtype=torch.float64)
    mixture = estimators.mixture_log_guide(densities.log())
    assert mixture.shape == (1, 1)
    assert mixture.item() == pytest.approx(math.log(0.3))


@pytest.mark.parametrize("kind", [StreamingELBO, StreamingIWAE])
def test_nothing_seen(kind):
    with pytest.raises(ValueError, match="no log weights yet"):
        _ = kind().value


def test_sums_and_differences_of_estimates_have_paired_errors():
    torch.manual_seed(0)
    weights = torch.randn(200, 3, dtype=torch.float64)
    one, other = Estimate.elbo(weights + 2.0), Estimate.iwae(weights)
    gap, total = one - other, one + other
    torch.testing.assert_close(gap.value, Estimate.elbo(weights).value + 2.0 - other.value)
    influence = one.influence - other.influence
    error = (influence.square().sum(0) / (200 * 199)).sqrt()
    torch.testing.assert_close(gap.std_error, error)
    assert (one - Estimate.elbo(weights)).std_error.max() < 1e-12
    torch.testing.assert_close(total.influence, one.influence + other.influence)
    assert gap.mean == pytest.approx(gap.value.mean().item())
    assert gap.mean_std_error == pytest.approx((gap.std_error.square().sum().sqrt() / 3).item())


def test_log_weights():
    parts = [torch.randn(4, 6, dtype=torch.float64) for _ in range(3)]
    weights = LogWeights(*parts)
    torch.testing.assert_close(weights.log_joint, parts[0] + parts[1])
    torch.testing.assert_close(weights.total, parts[0] + parts[1] - parts[2])
    assert repr(weights) == "LogWeights(num_particles=4, num_data=6)"
    for dim in (0, 1):
        chunks = [LogWeights(*each) for each in zip(*(p.split(3, dim) for p in parts), strict=True)]
        assert len(chunks) == 2
        assert torch.equal(LogWeights.concatenate(chunks, dim).log_guide, parts[2])
        assert torch.equal(LogWeights.concatenate(chunks, dim).total, weights.total)
    with pytest.raises(dataclasses.FrozenInstanceError):
        weights.log_prior = parts[0]


def test_the_error_of_a_difference_of_independent_estimates():
    """Means of exponentials, of 400 and 100 particles: against variances and third moments."""
    scales = torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    one, other = scales[0] / 400**0.5, scales[1] / 100**0.5
    skew = torch.full_like(one, 2.0)
    errors = tuple(calibrated(e, skew, k) for e, k in ((one, 400), (other, 100)))
    error, skewness = independent_difference(errors, (skew, skew), (400, 100), 400)
    variance = 4 / 400 + 1 / 100
    third = 2 * 8 / 400**2 - 2 * 1 / 100**2
    assert skewness.item() == pytest.approx(third / variance**1.5 * 400**0.5, rel=1e-5)
    assert error.item() == pytest.approx(variance**0.5 * (1 + 8 * skewness.item() ** 2 / 400))
    alone = independent_difference((errors[0], 0 * one), (skew, 0 * skew), (400, 1), 400)
    torch.testing.assert_close(torch.stack(alone), torch.stack([errors[0], skew]))
