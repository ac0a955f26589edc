"""Verdicts of importance weights: a heavy tail is bad where it carries weight, and only there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyro_vae.diagnostics.verdict import FEWEST_EFFECTIVE, Weights, pareto_k_threshold

K = 4000


def normal(seed=0, size=K):
    return np.random.default_rng(seed).normal(size=size)


def look(log_weights) -> Weights:
    return Weights.of(np.atleast_2d(np.asarray(log_weights, dtype=float)))


@pytest.mark.parametrize(
    ("num_particles", "wanted"),
    [(100, 0.5), (1000, 2 / 3), (10_000, 0.7), (10, 0.0), (1, -math.inf)],
)
def test_the_threshold_of_k_hat(num_particles: int, wanted: float):
    """Vehtari et al. (2024): min(1 - 1 / log10 K, 0.7)."""
    assert pareto_k_threshold(num_particles) == pytest.approx(wanted)


def test_weights_that_are_nearly_equal_are_good_whatever_their_k_hat():
    """What an optimal Gaussian guide leaves of a skewed posterior: exp(0.02 (z^3 - 3 z) / 6)."""
    z = normal()
    weights = look(0.02 * (z**3 - 3 * z) / 6)
    assert weights.pareto_k[0] > 0.7
    assert weights.ess[0] > 0.999 * K
    assert weights.good[0]


def test_weights_of_a_tail_that_carries_their_sum_are_bad():
    """A standard normal proposed by one of half its width: the weights' tail index is 3/4."""
    z = 0.5 * normal()
    weights = look(-0.5 * z**2 + 0.5 * (z / 0.5) ** 2)
    assert weights.pareto_k[0] > 0.6
    assert not weights.good[0]


def test_weights_of_a_light_tail_are_bad_where_few_are_effective():
    """A proposal so wide that few draws count: k-hat is low, and the mean is a mean of few."""
    z = 20 * normal()
    weights = look(-0.5 * z**2 + 0.5 * (z / 20) ** 2)
    assert weights.pareto_k[0] < 0.7
    assert weights.ess[0] < FEWEST_EFFECTIVE
    assert not weights.good[0]


def test_equal_weights():
    weights = look(np.full(K, -3.0))
    assert weights.ess[0] == pytest.approx(K)
    assert weights.tail_share[0] == pytest.approx(1.0)
    assert weights.good[0]


def test_weights_that_are_all_zero():
    weights = Weights.of(np.array([[-np.inf] * K, [0.0] * K]))
    assert weights.good.tolist() == [False, True]
    assert weights.ess[0] == 0


def test_the_share_of_the_tail_is_in_units_of_average_weights():
    """Of K weights M are the tail: here they are ten times as large as the others."""
    size = math.ceil(3 * K**0.5) + 1
    log_weights = np.zeros(K)
    log_weights[:size] = math.log(10.0)
    share = 10 * size / (10 * size + K - size)
    assert look(log_weights).tail_share[0] == pytest.approx(share * K / size)


def verdict(ess, pareto_k=0.3, tail_share=1.5, num_particles=1000) -> bool:
    numbers = (np.array([each], dtype=float) for each in (pareto_k, ess, tail_share))
    return bool(Weights(num_particles, *numbers).trusted[0])


def test_a_mean_takes_fewer_effective_draws_than_a_posterior():
    """A tenth of the draws, or 400; a tail that carries no weight; nearly equal ones always."""
    assert verdict(101) and not verdict(99)
    assert verdict(401, num_particles=50_000) and not verdict(399, num_particles=50_000)
    assert verdict(500, pareto_k=0.6) and verdict(500, pareto_k=2.0, tail_share=1.9)
    assert not verdict(500, pareto_k=2.0, tail_share=2.1)
    assert not verdict(500, pareto_k=0.68, tail_share=2.1)  # the threshold of 1000 is 0.67
    assert verdict(901, pareto_k=4.0, tail_share=2.1)
    assert not verdict(5, pareto_k=math.nan, num_particles=10)
    assert verdict(9.5, pareto_k=math.nan, num_particles=10)
    assert not verdict(0, pareto_k=math.inf, tail_share=math.inf)


def test_weights_that_all_but_agree_are_trusted_whatever_their_tail():
    """A tail of k = 1 on a thousandth of the weight: the error is small and right."""
    pareto = 1 / np.random.default_rng(0).uniform(size=K)
    weights = look(np.log1p(1e-3 * np.minimum(pareto, 1000)))
    assert weights.pareto_k[0] > 0.7 and weights.ess[0] > 3900
    assert weights.trusted[0] and weights.doubt == ""


def test_ess_and_tail_of_weights_far_from_one():
    """Of log weights -1e4 + (0, ln 3): ESS = 16 K / 20, whatever the scale; the tail is of 3."""
    log_weights = -1e4 + np.tile([0.0, math.log(3.0)], 500)
    found = look(log_weights)
    assert found.ess[0] == pytest.approx(1000 * 4 / 5)
    assert found.tail_share[0] == pytest.approx(1.5)


def test_a_doubt_says_what_was_found_and_what_to_do():
    numbers = (
        [0.3, 2.0, 2.0, 0.3, np.inf],
        [800.0, 300.0, 50.0, 60.0, 0.0],
        [1.2, 3, 3, 3, np.inf],
    )
    weights = Weights(1000, *(np.array(each) for each in numbers))
    assert weights.trusted.tolist() == [True, False, False, False, False]
    assert weights.doubt == (
        "for 4 of 5 data the importance weights are not to be trusted: 1 of which every draw has "
        "no density under the model; 2 with a heavy tail (k-hat above 0.67, and the largest "
        "weights carry more than 2 times their share); 2 with fewer than 100 effective particles; "
        "pyro_vae.refine brings the guide closer, pyro_vae.repair mends datum by datum"
    )


def test_too_few_weights_for_a_k_hat_are_said_to_be_too_few():
    z = normal(size=29)
    few = look(z)
    assert np.isnan(few.pareto_k[0]) and not few.trusted[0]
    assert few.doubt == (
        "for 1 of 1 data the importance weights are not to be trusted: 29 particles are too few "
        "for a k-hat, and the weights are far from equal: take 30 particles or more"
    )
    assert look(0.01 * z).doubt == ""
    assert "too few" not in look(normal(size=30)).doubt
