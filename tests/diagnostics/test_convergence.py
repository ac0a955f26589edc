"""R-hat and effective sample sizes are ArviZ's, and say nan where there is nothing to say."""

from __future__ import annotations

import arviz as az
import numpy as np
import pytest
import xarray as xr

from pyro_vae.diagnostics import convergence
from pyro_vae.diagnostics.convergence import Convergence

IS_1 = int(az.__version__.split(".")[0]) >= 1
SHAPES = [(4, 300), (2, 40), (2, 7), (3, 101), (4, 8), (4, 50), (2, 4), (2, 5), (4, 6), (3, 9)]


def arviz(draws):
    """R-hat, bulk and tail effective sample size of one quantity [C, S], by ArviZ itself."""
    if not IS_1:
        return float(az.rhat(draws)), float(az.ess(draws)), float(az.ess(draws, method="tail"))
    azstats = xr.DataArray(draws, dims=("chain", "draw")).azstats
    # ArviZ 1.x takes the ends of its default credible interval where no quantiles are named.
    tail = azstats.ess(method="tail", prob=(0.05, 0.95))
    return float(azstats.rhat()), float(azstats.ess()), float(tail)


def chains(num_chains, num_draws):
    """Quantities that mix well and badly, with heavy tails, ties and chains apart, [C, S, M]."""
    rng = np.random.default_rng(num_chains * 1000 + num_draws)
    draws = rng.normal(size=(num_chains, num_draws, 16))
    for t in range(1, num_draws):
        draws[:, t, :8] += np.linspace(-0.95, 0.98, 8) * draws[:, t - 1, :8]
    draws[0, :, 8] += 3  # one chain elsewhere
    draws[:, :, 9] = draws[:, :, 9].round()
    draws[:, :, 10] = rng.standard_cauchy(size=(num_chains, num_draws))
    draws[:, :, 11] = draws[:, :, 11] > 0
    draws[:, :, 12] = 1e9 + 1e-3 * draws[:, :, 12]
    draws[:, :, 13] = np.arange(num_draws) + draws[:, :, 13]  # a drift
    draws[0, :, 14] *= 10  # one chain wider: seen by folded draws alone
    # Each chain stuck, but for its first draw. ArviZ's quantiles of equal numbers are off by
    # rounding where the numbers are not round.
    draws[:, 1:, 15] = draws[:, :1, 15].round()
    draws[:, :1, 15] = 7.0
    return draws


@pytest.mark.parametrize(("num_chains", "num_draws"), SHAPES)
def test_numbers_are_those_of_arviz(num_chains, num_draws):
    draws = chains(num_chains, num_draws)
    found = Convergence.of(draws)
    with np.errstate(all="ignore"):
        wanted = np.array([arviz(draws[..., m].copy()) for m in range(draws.shape[-1])]).T
    for numbers, exact in zip(found, wanted, strict=True):
        np.testing.assert_allclose(numbers, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_short_chains_of_many_kinds_have_the_numbers_of_arviz():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        draws = rng.normal(size=(rng.integers(2, 5), rng.integers(4, 60), 8)).cumsum(1)
        draws *= rng.uniform(0, 1, size=8)
        draws += 3 * rng.normal(size=draws.shape)
        wanted = np.array([arviz(draws[..., m].copy()) for m in range(draws.shape[-1])]).T
        for numbers, exact in zip(Convergence.of(draws), wanted, strict=True):
            np.testing.assert_allclose(numbers, exact, rtol=1e-9, atol=1e-9)


def test_chains_that_do_not_mix_are_seen():
    draws_in_all = 4 * 300
    rhat, bulk, tail = Convergence.of(chains(4, 300))
    assert rhat[8] > 1.1 and rhat[14] > 1.05 and rhat[13] > 1.5
    assert bulk[7] < 0.1 * draws_in_all and bulk[0] > draws_in_all
    assert tail[14] < 0.1 * draws_in_all < 0.5 * draws_in_all < bulk[14]


def test_what_does_not_vary_or_is_not_finite_is_nan_and_disturbs_no_other():
    draws = chains(4, 50)
    alone = Convergence.of(draws)
    draws[..., 1] = 2.5
    draws[0, 3, 2], draws[1, 4, 3], draws[0, 0, 4] = np.nan, np.inf, -np.inf
    for numbers, before in zip(Convergence.of(draws), alone, strict=True):
        assert np.isnan(numbers[1:5]).all()
        left = np.delete(np.arange(16), range(1, 5))
        np.testing.assert_array_equal(numbers[left], before[left])


def test_many_quantities_are_done_in_parts(monkeypatch):
    draws = chains(4, 50)
    whole = Convergence.of(draws)
    monkeypatch.setattr(convergence, "_AT_ONCE", 3 * 200)
    for numbers, other in zip(Convergence.of(draws), whole, strict=True):
        np.testing.assert_allclose(numbers, other, rtol=1e-12)


def test_chains_that_stand_still_have_no_finite_rhat():
    draws = np.repeat(np.arange(4.0)[:, None, None], 20, axis=1)
    assert Convergence.of(draws).rhat == np.inf


def test_two_values_have_an_rhat():
    draws = np.random.default_rng(0).permuted(np.tile([0.0, 1.0], (4, 20)), axis=1)[..., None]
    found = Convergence.of(draws)
    assert 0.9 < found.rhat < 1.2 and np.isfinite(found.ess_bulk)


def test_draws_are_left_as_they_are():
    draws = chains(4, 8)
    kept = draws.copy()
    Convergence.of(draws)
    np.testing.assert_array_equal(draws, kept)


def test_single_precision_is_taken():
    draws = chains(4, 50)[..., :8].astype(np.float32)
    found = Convergence.of(draws)
    assert all(numbers.dtype == np.float64 for numbers in found)
    np.testing.assert_allclose(found.rhat, Convergence.of(draws.astype(np.float64)).rhat)
