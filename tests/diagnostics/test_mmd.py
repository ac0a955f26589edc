"""Maximum mean discrepancy against sums written out, and its test by swaps against all swaps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from pyro_vae.diagnostics.mmd import mmd_of_swaps, normal_scores, p_value_of


def by_loops(x, y):
    """Gretton et al. (2012), eq. 4, its Lemma 6 form, with the width of the median distance."""
    points = torch.cat([x, y])
    pairs = itertools.combinations(range(len(points)), 2)
    distances = sorted(float((points[i] - points[j]).norm()) for i, j in pairs)
    width = distances[(len(distances) - 1) // 2]

    def k(a, b):
        return math.exp(-float((a - b).square().sum()) / (2 * width**2))

    size = len(x)
    total = sum(
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
        for i in range(size)
        for j in range(size)
        if i != j
    )
    return total / (size * (size - 1))


@pytest.fixture
def pairs():
    torch.manual_seed(0)
    return torch.randn(6, 2, dtype=torch.float64), 1 + torch.randn(6, 2, dtype=torch.float64)


def every_swap(size):
    return torch.tensor(list(itertools.product([1.0, -1.0], repeat=size)))


def test_each_sign_swaps_a_pair(pairs):
    x, y = pairs
    signs = every_swap(6)
    found = mmd_of_swaps(x, y, signs)
    swapped = []
    for row in signs:
        keep = (row > 0)[:, None]
        swapped.append(by_loops(torch.where(keep, x, y), torch.where(keep, y, x)))
    exact = torch.tensor(swapped, dtype=torch.float64)
    # Over all swaps the mean is zero and the unit is the standard deviation.
    assert abs(float(exact.mean())) < 1e-12
    unit = exact.square().mean().sqrt()
    torch.testing.assert_close(found.swapped, exact / unit)
    assert found.statistic == pytest.approx(float(exact[0] / unit))


def test_the_p_value_is_the_rank_among_swaps(pairs):
    found = mmd_of_swaps(*pairs, every_swap(6))
    larger = sum(value >= found.statistic - 1e-9 for value in found.swapped.tolist())
    assert found.p_value == (1 + larger) / 65
    assert p_value_of(2.0, torch.tensor([1.0, 2.0, 3.0])) == 0.75


def test_the_level_is_exact_for_few_pairs_of_a_heavy_tail():
    """Pairs with a common part, exchangeable but not independent: 5 % of 2,000 are rejected."""
    generator = np.random.default_rng(1)
    rejected = 0
    for _ in range(2000):
        common = generator.standard_cauchy((12, 1))
        x, y = (torch.tensor(common + generator.standard_cauchy((12, 1))) for _ in range(2))
        signs = torch.tensor(generator.choice([-1.0, 1.0], (99, 12)))
        rejected += mmd_of_swaps(x, y, signs).p_value <= 0.05
    assert abs(rejected / 2000 - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 2000)


def test_what_is_all_one_point_differs_in_nothing():
    x = torch.ones(9, 1, dtype=torch.float64)
    found = mmd_of_swaps(x, x, torch.ones(5, 9))
    assert found.statistic == 0 and found.p_value == 1
    x[0] = 2.0  # the median distance is zero still
    assert mmd_of_swaps(x, x - 1, torch.ones(5, 9)).statistic > 0


def test_normal_scores_are_those_of_ranks():
    x = torch.tensor([[1.0, -math.inf], [3.0, 2.0], [1.0, 7.0]], dtype=torch.float64)
    y = torch.tensor([[2.0, 0.5], [1.0, math.inf], [0.0, 7.0]], dtype=torch.float64)
    scores = torch.cat(normal_scores(x, y)).numpy()
    ranks = scipy.stats.rankdata(torch.cat([x, y]).numpy(), axis=0)
    np.testing.assert_allclose(scores, scipy.stats.norm.ppf(ranks / 7), atol=1e-12)
    mapped = torch.cat(normal_scores(x.exp(), y.exp())).numpy()
    np.testing.assert_allclose(mapped, scores)
