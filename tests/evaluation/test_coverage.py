"""Regions of the exact posterior cover what they say; those of other guides what algebra says."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyro_vae as pv
from pyro_vae.evaluation.coverage import _features, _nearest
from pyro_vae.programs.batch import as_batch
from tests.evaluation.off_guides import GUIDES, MODEL, OffGuide
from tests.evaluation.test_calibration import joint_posterior, padded, shared_mean
from tests.models import GammaPoisson, mixture

BLANK = torch.zeros(1)


def coverage(model, guide, *batch, num_simulations=500, seed=0, **options):
    return pv.coverage(model, guide, *batch, num_simulations=num_simulations, seed=seed, **options)


@pytest.mark.parametrize("name", GUIDES)
def test_the_exact_guide_passes_and_four_others_do_not(name):
    found = coverage(MODEL, GUIDES[name], BLANK, num_simulations=1000)
    assert found.passed == (name == "exact")
    finding = found.summary().finding
    low = "regions of highest density hold the simulated latents less often than they say: "
    assert finding["density"] == {
        "overconfident": low + "the guide is too narrow, or elsewhere",
        "underconfident": low.replace("less", "more") + "the guide is too wide",
    }.get(name, "")
    assert bool(finding["TARP"]) == (name != "exact")


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_forty_repetitions(name):
    """The exact guide is accepted in 38 of 40 or more, the others in none."""
    passed = [pv.coverage(MODEL, GUIDES[name], BLANK, seed=seed).passed for seed in range(40)]
    assert sum(passed) >= 38 if name == "exact" else not any(passed)


def test_expected_coverage_is_that_of_algebra():
    """Regions of a Normal w times as wide hold the truth with probability P(|Z| < w z_a), but for
    the level's own error of L draws: E[I_p(i, L + 1 - i)] over p, by SciPy."""
    num_draws = 39
    for name, widen, shift in (("overconfident", 0.7, 0.0), ("biased", 1.0, 0.3)):
        found = coverage(
            MODEL, GUIDES[name], BLANK, num_simulations=4000, num_draws=num_draws, regions="density"
        )
        truth = np.abs(stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000) - shift) / widen
        further_in = 2 * stats.norm.cdf(truth) - 1  # of a draw
        rank_below = np.arange(1, num_draws + 1)[:, None]
        expected = stats.binom.cdf(rank_below - 1, num_draws, further_in).mean(1)
        one = found.dataset.sel(region="density")
        error = np.sqrt(expected * (1 - expected) / 4000)
        assert (np.abs(one["expected_coverage"] - expected) < 4.5 * error).all()
        np.testing.assert_allclose(one["expected_coverage_se"], error, rtol=0.3)


@pytest.mark.parametrize("name", [name for name in GUIDES if name != "biased"])
def test_five_latents_jointly(name):
    x = torch.zeros(1, 5)
    assert coverage(MODEL, GUIDES[name], x).passed == (name == "exact")


def test_a_bias_of_one_latent_of_five():
    shift = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    assert not coverage(MODEL, OffGuide(shift=shift), torch.zeros(1, 5)).passed


def test_a_guide_that_returns_the_prior_is_seen_by_tarp_alone():
    table = coverage(MODEL, GUIDES["prior"], BLANK, num_simulations=1000).summary()
    assert table.finding["density"] == "" != table.finding["TARP"]


# --- other models


def test_discrete_latents_and_float64():
    x = torch.zeros(2, dtype=torch.float64)

    def exact(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=mixture.log_joint(x)))

    assert coverage(mixture, exact, x, num_simulations=1000).passed


def test_a_constrained_latent():
    model = GammaPoisson()
    x = torch.zeros(1, dtype=torch.float64)
    assert coverage(model, model.posterior, x).passed
    encoder = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 4))
    guide = pv.AmortizedGuide(model, encoder.double(), example=x)
    assert not coverage(model, guide, x).passed


def test_latents_that_are_not_there_count_for_nothing():
    def guide(x, length):
        with pyro.plate("steps", 3, dim=-1), pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    batch = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1, 2])
    assert coverage(padded, guide, *batch, data_plate="data").passed

    def other_padding(x, length):
        with pyro.plate("steps", 3, dim=-1), pyro.plate("data", len(x), dim=-2):
            seen = torch.arange(3) < length.unsqueeze(-1)
            pyro.sample("z", dist.Normal(torch.where(seen, x / 2, 9.0), 0.5**0.5))

    one, other = (
        coverage(padded, each, *batch, data_plate="data", regions="tarp").dataset["ranks"]
        for each in (guide, other_padding)
    )
    np.testing.assert_array_equal(one, other)


def test_whole_data_sets():
    x = torch.zeros(4, dtype=torch.float64)
    few = {"num_simulations": 100, "num_draws": 49, "data_plate": False, "seed": 1}
    assert coverage(shared_mean, joint_posterior, x, **few).passed
    assert not coverage(shared_mean, lambda x: joint_posterior(x, 2.5), x, **few).passed


def test_data_that_another_program_simulates():
    def simulate(count):
        z = torch.randn(count)
        return {"z": z}, z + 2 * torch.randn(count)

    found = coverage(MODEL, MODEL.posterior, simulate=simulate)
    assert not found.passed and "less often" in found.summary().finding["density"]


def test_resampled_draws():
    guide = GUIDES["underconfident"]
    found = coverage(MODEL, guide, BLANK, resample="psis", num_simulations=200, seed=1)
    assert found.passed and "(resampled)" in repr(found)


# --- reference points


def test_the_nearest_data():
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.8], [-0.1], [9.0]])
    assert _nearest(x, y).tolist() == [1, 0]


def test_features_are_numbers_in_units_of_their_spread():
    x = torch.tensor([[1.0, math.nan], [3.0, 5.0], [5.0, 7.0]])
    found = _features([as_batch(x, torch.tensor([2, 2, 2]))])
    assert found.dtype == torch.float64 and found.shape == (3, 3)
    torch.testing.assert_close(found[:, 0], torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    assert found[0, 1] == 0 and (found[:, 2] == 0).all()
    several = _features([as_batch(row) for row in x])
    torch.testing.assert_close(several, found[:, :2])


# --- one result, texts, refusals


def test_chunks_change_nothing_and_one_seed_is_one_result():
    found, again = (
        coverage(MODEL, GUIDES["biased"], BLANK, num_simulations=300, chunk_size=size)
        for size in (None, 7)
    )
    np.testing.assert_array_equal(found.dataset["ranks"], again.dataset["ranks"])


def test_text():
    found = coverage(MODEL, GUIDES["exact"], BLANK)
    text = repr(found).splitlines()
    assert text[0] == (
        "expected coverage of credible regions, 500 simulations, 99 draws of the guide each"
    )
    assert text[1] == "passed (an exact guide is rejected with probability 0.01)"
    assert "coverage at 0.5" in text[2] and "±" in text[4]
    assert len(text) == 6
    off = repr(coverage(MODEL, GUIDES["overconfident"], BLANK)).splitlines()
    assert off[1].startswith("not calibrated")
    assert off[6].startswith("density: regions of highest density hold the simulated latents less")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="regions='hpd': 'both', 'density' or 'tarp' is needed"):
        coverage(MODEL, MODEL.posterior, BLANK, regions="hpd")
    with pytest.raises(ValueError, match=r"coverage needs an example .* coverage\(model, guide"):
        pv.coverage(MODEL, MODEL.posterior)


def test_simulations_that_are_the_same_again_are_refused():
    torch.manual_seed(0)
    z = torch.randn(100)
    own = {"simulate": lambda n: ({"z": z}, z + 1), "num_simulations": 100}
    with pytest.raises(ValueError, match="the same latents a second time.* regions='density'"):
        coverage(MODEL, MODEL.posterior, **own)
    assert coverage(MODEL, MODEL.posterior, regions="density", **own).dataset.sizes["region"] == 1


def test_a_guide_without_a_density_has_balls_alone():
    """One that makes a rate of an auxiliary draw, as Pyro's autoguides: else it has no density."""
    model = GammaPoisson()
    x = torch.zeros(30, dtype=torch.float64)

    def guide(x):
        with pyro.plate("data", len(x)):
            own = dist.Normal((1 + x).log(), 1.0)
            log_rate = pyro.sample("log rate", own, infer={"is_auxiliary": True})
            pyro.sample("rate", dist.Delta(log_rate.exp(), log_density=-log_rate))

    with pytest.raises(ValueError, match="density that this guide has .* regions='tarp'"):
        coverage(model, guide, x, num_simulations=30)
    found = coverage(model, guide, x, num_simulations=30, regions="tarp")
    assert list(found.dataset["region"].values) == ["TARP"]
