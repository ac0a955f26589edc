"""Conformal p-values, against counts written out, and their promise under exchangeability."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pyro_vae.diagnostics.conformal import Conformal, benjamini_hochberg, chance_of_as_many


def by_hand(calibration, new, two_sided):
    """The p-values of one datum, each counted in the set of all n + 1."""
    every = np.concatenate([calibration, new[None]])
    n, scores = every.shape
    p = np.empty_like(every)
    for i in range(n):
        for s in range(scores):
            more = np.mean([other >= every[i, s] for other in every[:, s]])
            less = np.mean([other <= every[i, s] for other in every[:, s]])
            p[i, s] = min(1.0, 2 * min(more, less)) if two_sided[s] else more
    fisher = -np.log(p).sum(1)
    return p[-1], np.mean(fisher >= fisher[-1] - 1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_p_values_are_those_of_counts(ties):
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(25, 3)), 2 * rng.normal(size=(12, 3))
    if ties:
        old, new = old.round(), new.round()
    two_sided = np.array([False, True, True])
    found = Conformal.of(old, new, two_sided)
    for datum, of_score, combined in zip(new, found.of_score, found.combined, strict=True):
        wanted, together = by_hand(old, datum, two_sided)
        np.testing.assert_allclose(of_score, wanted)
        assert combined == pytest.approx(together)


def test_an_ordinary_datum_is_called_strange_at_the_stated_rate():
    """Of dependent scores with heavy tails: P(p <= level) is floor(level (n + 1)) / (n + 1)."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(400):
        x = rng.standard_cauchy((59, 2))
        scores = np.stack([x[:, 0], x[:, 0] + x[:, 1], x[:, 1] ** 2], 1)
        ranked = Conformal.of(scores[:39], scores[39:], np.array([True, False, True]))
        found.append(np.column_stack([ranked.combined, ranked.of_score]) <= 0.1)
    rates = np.mean(found, (0, 1))
    error = np.std(np.mean(found, 1), axis=0) / 20
    np.testing.assert_array_less(np.abs(rates - 0.1), 4 * error)


def test_infinite_scores_are_the_strangest():
    old = np.linspace(-1, 1, 19)[:, None]
    new = np.array([[math.inf], [-math.inf], [0.0]])
    assert Conformal.of(old, new, np.array([False])).of_score[:, 0].tolist() == [0.05, 1.0, 0.55]
    assert Conformal.of(old, new, np.array([True])).of_score[:, 0].tolist() == [0.1, 0.1, 1.0]


def test_one_calibration_datum_tells_little():
    found = Conformal.of(np.zeros((1, 1)), np.ones((1, 1)), np.array([False]))
    assert (found.of_score[0, 0], found.combined[0]) == (0.5, 0.5)


def test_adjusted_p_values_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    p = np.random.default_rng(0).uniform(size=50) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p))


@pytest.mark.parametrize(
    ("count", "size", "calibration", "level"),
    [(0, 10, 50, 0.05), (1, 10, 50, 0.05), (6, 100, 200, 0.05), (3, 3, 19, 0.05), (9, 40, 99, 0.2)],
)
def test_the_chance_of_as_many_is_beta_binomial(count, size, calibration, level):
    """As SciPy has it."""
    k = int(level * (calibration + 1) + 1e-9)
    found = chance_of_as_many(count, size, calibration, level)
    expected = stats.betabinom.sf(count - 1, size, k, calibration + 1 - k)
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_chance_of_as_many_by_counting():
    """Of 20,000 draws of 30 calibration and 20 new data, to 4 standard errors."""
    rng = np.random.default_rng(0)
    old, new = rng.random((20_000, 30)), rng.random((20_000, 20))
    p_values = (1 + (old[:, :, None] >= new[:, None]).sum(1)) / 31
    share = float(((p_values <= 0.1).sum(1) >= 4).mean())
    expected = chance_of_as_many(4, 20, 30, 0.1)
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 20_000) ** 0.5


def test_chances_at_the_edges():
    assert chance_of_as_many(1, 10, 10, 0.01) == 0  # no p-value is so small
    assert chance_of_as_many(10, 10, 10, 1.0) == 1
