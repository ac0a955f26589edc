"""Ranks that are uniform pass at the stated level: by enumeration, by SciPy, by ArviZ's bands."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from pyro_vae.diagnostics.uniformity import UniformRanks, holm


def local_level(ranks, num_draws):
    """The smallest two-sided tail probability of the counts, by SciPy."""
    levels = []
    for i in range(1, num_draws + 1):
        count, share = int(np.sum(np.asarray(ranks) < i)), i / (num_draws + 1)
        null = stats.binom(len(ranks), share)
        levels.append(min(1.0, 2 * min(null.cdf(count), null.sf(count - 1))))
    return min(levels)


@pytest.mark.parametrize(("num_ranks", "num_draws"), [(5, 2), (4, 3), (6, 1), (1, 4)])
def test_p_values_are_those_of_all_ranks_there_can_be(num_ranks, num_draws):
    every = list(itertools.product(range(num_draws + 1), repeat=num_ranks))
    levels = np.array([local_level(ranks, num_draws) for ranks in every])
    null = UniformRanks(num_ranks, num_draws)
    for ranks, level in zip(every, levels, strict=True):
        exact = np.mean(levels <= level * (1 + 1e-6))
        assert null.p_value(np.array(ranks)) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("num_draws", [19, 250])
def test_the_level_is_what_it_is_said_to_be(num_draws):
    """1000 samples; of 250 draws, too, whose ECDF is looked at in 100 places."""
    rng = np.random.default_rng(0)
    null = UniformRanks(300, num_draws)
    p = np.array([null.p_value(r) for r in rng.integers(0, num_draws + 1, (1000, 300))])
    for level in (0.01, 0.05, 0.2, 0.5):
        error = math.sqrt(level * (1 - level) / 1000)
        assert -4 * error - 0.1 * level < (p <= level).mean() - level < 4 * error


def test_the_band_is_arviz_s_to_a_count():
    """ArviZ bounds shares by binomial quantiles, this band counts: a count apart at most."""
    ecdf = pytest.importorskip("arviz.stats.ecdf_utils")
    shares = np.arange(1, 50) / 50
    theirs = ecdf.ecdf_confidence_band(500, shares, shares, prob=0.9, method="optimized")
    for mine, other in zip(UniformRanks(500, 49).band(0.1), theirs, strict=True):
        np.testing.assert_allclose(mine, 500 * other, atol=1.01)


def test_ranks_leave_the_band_where_the_p_value_says_so():
    rng = np.random.default_rng(1)
    null = UniformRanks(200, 19)
    lower, upper = null.band(0.2)
    outside = []
    for ranks in rng.integers(0, 20, (300, 200)):
        counts = null.counts(ranks)
        outside.append(bool(((counts < lower) | (counts > upper)).any()))
        assert outside[-1] == (null.p_value(ranks) <= 0.2)
    assert 0 < sum(outside) < 300


def test_chi_squared_is_scipy_s():
    ranks = np.random.default_rng(2).binomial(99, 0.5, 400) // 3 + 30
    found = UniformRanks(400, 99).chi_squared_p_value(ranks)
    counts = np.histogram(ranks, 20, (0, 100))[0]
    assert found == pytest.approx(stats.chisquare(counts).pvalue, rel=1e-9)
    uneven = UniformRanks(400, 22)  # 23 ranks in 20 bins: two of the first three, one of the rest
    ranks = np.random.default_rng(3).integers(0, 23, 400)
    counts = np.bincount(ranks, minlength=23)
    parts = np.array([counts[0:2].sum(), counts[2:4].sum(), counts[4:6].sum(), *counts[6:]])
    expected = 400 / 23 * np.array([2, 2, 2, *[1] * 17])
    wanted = stats.chisquare(parts, expected).pvalue
    assert uneven.chi_squared_p_value(ranks) == pytest.approx(wanted, rel=1e-9)
    assert math.isnan(UniformRanks(9, 22).chi_squared_p_value(ranks[:9]))


def test_many_ranks_and_far_from_uniform():
    """Of 10,000 equal ranks the p-value is tiny and no rounding; Bonferroni's bound holds."""
    null = UniformRanks(10_000, 99)
    assert null.p_value(np.zeros(10_000, dtype=int)) < 1e-280
    few = np.random.default_rng(0).integers(0, 100, 10_000)
    few[:1500] = 50
    assert 0 <= null.p_value(few) < 1e-14
    lower, upper = null.band(0.05)
    z = (upper - lower) / 2 / np.sqrt(10_000 * null.shares * (1 - null.shares))
    assert 2.9 < z.min() < z.max() < 3.6  # between the normal quantiles of 0.05 / 13 and / 150


def test_holm_by_hand():
    """Sorted: 0.01 * 3, 0.02 * 2, 0.9; a nan is no test."""
    found = holm(np.array([0.02, np.nan, 0.01, 0.9]))
    np.testing.assert_allclose(found, [0.04, np.nan, 0.03, 0.9])
    np.testing.assert_allclose(holm(np.array([0.03, 0.02])), [0.04, 0.04])  # monotone
