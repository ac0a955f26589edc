"""Ranks as a dataset: what counts, bands of as many as count, and words."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pyro_vae.diagnostics.uniformity import UniformRanks
from pyro_vae.evaluation.rank_tests import rank_dataset, way_off
from pyro_vae.evaluation.simulations import Settings

PHI = stats.norm.cdf


def settings(num_draws=19, error_rate=0.05):
    free = dict.fromkeys(("simulate", "dream", "resample", "num_particles", "given", "data_plate"))
    sizes = {"num_simulations": 0, "num_draws": num_draws, "error_rate": error_rate}
    return Settings(who="a test", particles="auto", chunk_size=None, seed=0, **sizes, **free)


def dataset(ranks, there=None, **options):
    ranks = np.asarray(ranks)
    there = np.ones(ranks.shape, bool) if there is None else there
    names = [f"q{k}" for k in range(ranks.shape[1])]
    return rank_dataset(ranks, names, "quantity", settings(**options), there)


def test_what_is_not_there_does_not_count():
    rng = np.random.default_rng(0)
    ranks, there = rng.integers(0, 20, (300, 2)), np.ones((300, 2), bool)
    there[100:, 1] = False
    ranks[100:, 1] = 0  # were they counted, the test would reject
    found = dataset(ranks, there)
    assert found["num_ranks"].values.tolist() == [300, 100]
    assert (found["ranks"].values[100:, 1] == -1).all()
    null = UniformRanks(100, 19)
    one = found.sel(quantity="q1")
    assert float(one["p_value"]) == null.p_value(ranks[:100, 1])
    lower, upper = null.band(0.05 / 2)
    np.testing.assert_allclose(one["band_lower"], lower / 100 - null.shares)
    np.testing.assert_allclose(one["band_upper"], upper / 100 - null.shares)


def test_the_band_is_left_where_the_family_rejects():
    """Of ten quantities: outside of the band means p at most 0.2 / 10, for each of them."""
    seen = set()
    for seed in range(20):
        ranks = np.random.default_rng(seed).integers(0, 20, (100, 10))
        found = dataset(ranks, error_rate=0.2)
        curve = found["ecdf_difference"]
        outside = (curve < found["band_lower"] - 1e-9) | (curve > found["band_upper"] + 1e-9)
        off = found["p_value"] <= 0.02
        np.testing.assert_array_equal(outside.any("level"), off)
        seen.add(bool(off.any()))
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (np.array([0.0, 1.0]), "draws are too narrow"),
        (np.array([0.4, 0.6]), "draws are too wide"),
        (PHI(np.linspace(-3, 3, 1000) / 1.7 + 0.3), "draws are too low"),
        (PHI(np.linspace(-3, 3, 1000) / 1.7 - 0.3), "draws are too high"),
        (PHI(np.linspace(-3, 3, 1000) / 4 + 0.3), "draws are too wide and too low"),
        (PHI(np.array([-1.2, 0.0, 1.2])), "draws have another shape"),
    ],
)
def test_words(shares, words):
    ranks = np.round(np.resize(shares, 1000) * 99).astype(int)[:, None]
    found = dataset(ranks, num_draws=99).sel(quantity="q0")
    assert way_off(found) == words


def test_equal_ranks_have_no_error_and_say_so():
    """A guide that is a point: all ranks at one end, whose spread is none."""
    found = dataset(np.zeros((100, 1), int)).sel(quantity="q0")
    assert float(found["shift_se"]) == pytest.approx(0.0, abs=1e-12)
    assert float(found["spread"]) == pytest.approx(0.0, abs=1e-12)
    assert float(found["p_value"]) < 1e-50
    assert way_off(found) == "draws are too high"
