"""Exact guides pass at the stated level; wrong ones are rejected, and it is said in which way."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

import pyro_vae as pv
from tests.evaluation.off_guides import GUIDES, MODEL, OffGuide
from tests.missing_data.models import PartlySeen, factor_analysis
from tests.models import GammaPoisson, mixture

BLANK = torch.zeros(1)


def sbc(model, guide, *batch, num_simulations=500, seed=0, **options):
    return pv.sbc(model, guide, *batch, num_simulations=num_simulations, seed=seed, **options)


# --- the five guides


@pytest.mark.parametrize("name", GUIDES)
def test_the_exact_guide_passes_and_four_others_do_not(name):
    found = sbc(MODEL, GUIDES[name], BLANK, num_simulations=1000)
    assert found.passed == (name == "exact")
    assert (
        found.rejected
        == {
            "exact": [],
            "overconfident": ["z", "log p(x, z)", "log p(x | z)"],
            "underconfident": ["z", "log p(x, z)", "log p(x | z)"],
            "biased": ["z"],
            "prior": ["log p(x, z)", "log p(x | z)"],  # ranks of z alone cannot see it
        }[name]
    )
    assert found.summary().finding["z"] == {
        "overconfident": "draws are too narrow",
        "underconfident": "draws are too wide",
        "biased": "draws are too high",
    }.get(name, "")


def test_words_of_log_densities():
    finding = sbc(MODEL, GUIDES["prior"], BLANK).summary().finding
    assert finding["log p(x, z)"] == "draws are less probable than the simulated latents"
    assert finding["log p(x | z)"] == "draws fit the data worse than the simulated latents"
    finding = sbc(MODEL, GUIDES["overconfident"], BLANK).summary().finding
    assert finding["log p(x | z)"] == "draws fit the data better than the simulated latents"


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_forty_repetitions(name):
    """The exact guide is accepted in 38 of 40 or more, the others in none."""
    passed = [pv.sbc(MODEL, GUIDES[name], BLANK, seed=seed).passed for seed in range(40)]
    assert sum(passed) >= 38 if name == "exact" else not any(passed)


# --- ranks by algebra


def test_ranks_are_binomial_given_latents_and_data():
    """Each draw is below z* with the probability that the guide, a Normal, says; likewise for
    log p(x | z), which grows with -|x - z|, and log p(x, z), with -|z - x / 2|."""
    torch.manual_seed(0)
    z = torch.randn(2000, dtype=torch.float64)
    x = z + torch.randn(2000, dtype=torch.float64)
    guide = OffGuide(shift=0.5, widen=1.3)
    found = sbc(MODEL, guide, simulate=lambda n: ({"z": z}, x), num_simulations=2000, num_draws=40)
    q = dist.Normal(x / 2 + 0.5 * 0.5**0.5, 1.3 * 0.5**0.5)

    def outside(centre, radius):
        return 1 - q.cdf(centre + radius) + q.cdf(centre - radius)

    ranks = found.dataset["ranks"]
    for name, p in (
        ("z", q.cdf(z)),
        ("log p(x | z)", outside(x, (x - z).abs())),
        ("log p(x, z)", outside(x / 2, (z - x / 2).abs())),
    ):
        p = p.numpy()
        apart = ranks.sel(quantity=name).values - 40 * p
        for_one = apart / np.sqrt(40 * p * (1 - p)).clip(1e-6)
        assert abs(apart.mean()) < 4 * np.sqrt((40 * p * (1 - p)).mean() / 2000)
        inner = (p > 0.05) & (p < 0.95)  # of a skewed one 2000 are too few for a variance
        assert abs((for_one[inner] ** 2).mean() - 1) < 4 * (2 / inner.sum()) ** 0.5


def test_moments_and_curves_are_those_of_the_ranks():
    data = sbc(MODEL, GUIDES["biased"], BLANK, num_draws=24).dataset.sel(quantity="z")
    ranks = data["ranks"].values
    table = stats.norm.ppf((np.arange(25) + 0.5) / 25)
    assert float(data["shift"]) == pytest.approx(table[ranks].mean())
    assert float(data["shift_se"]) == pytest.approx(table[ranks].std() / 500**0.5)
    assert float(data["spread"]) == pytest.approx(table[ranks].std() / table.std())
    expected = [np.mean(ranks < i) - i / 25 for i in range(1, 25)]
    np.testing.assert_allclose(data["ecdf_difference"], expected, atol=1e-12)
    assert stats.chisquare(np.bincount(ranks, minlength=25)).pvalue < 0.01


def test_shift_and_spread_are_those_of_the_guide_and_their_errors_cover():
    """In units of the guide's standard deviation; within two errors in about 95 % of 100 units."""
    x = torch.zeros(1, 100)
    guide = OffGuide(shift=-0.4, widen=1.6)
    found = sbc(MODEL, guide, x, num_simulations=200, num_draws=199).dataset
    z = found.isel(quantity=slice(0, 100))
    for name, exact in (("shift", 0.4 / 1.6), ("spread", 1 / 1.6)):
        inside = np.abs(z[name] - exact) < 1.96 * z[f"{name}_se"]
        assert int(inside.sum()) >= 85


def test_the_family_of_a_hundred_latents_is_one_test():
    x = torch.zeros(1, 100)
    few = {"num_simulations": 100, "num_draws": 19, "error_rate": 0.05}
    passed = [sbc(MODEL, MODEL.posterior, x, seed=s, **few).passed for s in range(12)]
    assert sum(passed) >= 10  # each alone at 0.05 would reject about five of the 100 in each
    one_off = OffGuide(widen=torch.ones(100).index_fill(0, torch.tensor(7), 0.5))
    assert "z[7]" in sbc(MODEL, one_off, x).rejected


# --- other models


def test_discrete_latents_have_ties_in_a_random_order():
    """c of three values: ranks of the exact posterior are uniform although most draws are ties."""

    def exact(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=mixture.log_joint(x)))

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(mixture.weights.expand(len(x), 3)))

    x = torch.zeros(1, dtype=torch.float64)
    found = sbc(mixture, exact, x, num_simulations=1000)
    assert found.passed
    assert list(found.dataset["quantity"].values) == ["c", "log p(x, z)", "log p(x | z)"]
    assert not sbc(mixture, prior, x).passed
    # In float32 equal log densities of runs of other shapes differ in their last bits.
    narrow = type(mixture)(mixture.weights.float(), mixture.means.float())
    assert sbc(narrow, lambda x: exact(x.double()), x.float(), num_simulations=1000).passed


def test_an_exact_guide_of_enumerated_latents_passes():
    x = torch.zeros(3, dtype=torch.float64)
    assert sbc(mixture, pv.ExactGuide(mixture, example=x), x).passed


def two_sites(x, y, size):
    """c is summed out, w depends on it; x and y are observed, size is a covariate."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
        w = pyro.sample("w", dist.Normal(4 * c - 2, 1.0))
        pyro.sample("x", dist.Normal(w, size), obs=x)
        pyro.sample("y", dist.Normal(w, 2.0), obs=y)


def two_sites_posterior(x, y, size, of_y=1.0):
    """A mixture of two Normals, by algebra: given c the precisions add."""
    precision = 1 + size**-2 + of_y / 4
    seen = x / size**2 + of_y * y / 4
    means = torch.tensor([-2.0, 2.0], dtype=x.dtype)
    location = (means + seen.unsqueeze(-1)) / precision.unsqueeze(-1)
    log_c = 0.5 * precision.unsqueeze(-1) * location**2 - 0.5 * means**2
    scale = (precision**-0.5).unsqueeze(-1).expand(*location.shape)
    with pyro.plate("data", len(x)):
        parts = dist.Normal(location, scale)
        pyro.sample("w", dist.MixtureSameFamily(dist.Categorical(logits=log_c), parts))


def test_several_sites_covariates_and_a_latent_summed_out():
    size = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    batch = (torch.zeros_like(size), torch.ones_like(size), size)
    found = sbc(two_sites, two_sites_posterior, *batch, num_simulations=1000)
    assert list(found.dataset["quantity"].values) == ["w", "log p(x, z)", "log p(x | z)"]
    assert found.passed

    def without_y(x, y, size):
        two_sites_posterior(x, y, size, of_y=0.0)

    assert not sbc(two_sites, without_y, *batch, num_simulations=1000).passed


def test_a_constrained_latent():
    model = GammaPoisson()
    x = torch.zeros(1, dtype=torch.float64)
    assert sbc(model, model.posterior, x).passed

    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(3 * (2 + x), 6.0 + 0 * x))

    assert sbc(model, narrow, x).summary().finding["rate"] == "draws are too narrow"


def padded(x, length):
    """Steps z_t, [N, 3] in a plate, of which those past the length are not there."""
    with pyro.plate("steps", 3, dim=-1), pyro.plate("data", len(x), dim=-2):
        seen = torch.arange(3) < length.unsqueeze(-1)
        with poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_latents_that_a_mask_leaves_out_have_no_rank():
    """Of lengths 1, 2, 1, 2, ...: z[0] is always there, z[1] in every other one, z[2] never."""

    def guide(x, length):
        with pyro.plate("steps", 3, dim=-1), pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x, length = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1, 2])
    found = sbc(padded, guide, x, length, data_plate="data")
    data = found.dataset
    assert list(data["quantity"].values) == ["z[0]", "z[1]", "log p(x, z)", "log p(x | z)"]
    assert data["num_ranks"].values.tolist() == [500, 250, 500, 500]
    ranks = data["ranks"].sel(quantity="z[1]").values
    assert (ranks[::2] == -1).all() and (ranks[1::2] >= 0).all()
    assert found.passed


def test_missing_data_stay_missing():
    exact = PartlySeen(factor_analysis())
    x = torch.zeros(6, 6, dtype=torch.float64)
    x[torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.4] = math.nan
    model = pv.MissingData(exact.model)
    assert sbc(model, exact.posterior, x).passed
    assert not sbc(model, PartlySeen(exact.model, widen=1.5).posterior, x).passed
    whole = pv.sbc(model, exact.model.posterior, x.nan_to_num(), num_simulations=500, seed=0)
    assert whole.passed  # where nothing is missing


def shared_mean(x):
    """mu is global; all x [N] are one datum of it."""
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def joint_posterior(x, widen=1.0):
    precision = 1 / 4 + len(x) / 2
    mu = pyro.sample("mu", dist.Normal(x.sum() / 2 / precision, widen * precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + mu) / 2, 0.5**0.5))


def test_whole_data_sets_where_latents_are_global():
    """The exact joint posterior of mu and each z, by algebra; each simulation is a data set."""
    x = torch.zeros(4, dtype=torch.float64)
    few = {"num_simulations": 100, "num_draws": 49, "data_plate": False}
    found = sbc(shared_mean, joint_posterior, x, **few)
    assert found.passed
    names = found.dataset["quantity"].values.tolist()
    assert names[:-2] == ["mu", "z[0]", "z[1]", "z[2]", "z[3]"]
    wide = sbc(shared_mean, lambda x: joint_posterior(x, 2.0), x, **few)
    assert wide.summary().finding["mu"] == "draws are too wide"


def test_global_latents_at_given_values():
    def local(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + 3.0) / 2, 0.5**0.5))

    x = torch.zeros(4, dtype=torch.float64)
    found = sbc(shared_mean, local, x, given={"mu": 3.0}, seed=1)
    assert found.passed and "mu at the values passed" in repr(found)
    assert not sbc(shared_mean, local, x, given={"mu": 0.0}).passed


def test_an_encoder_is_asked_in_one_pass():
    torch.manual_seed(0)
    x = torch.zeros(5, 3)
    guide = pv.AmortizedGuide(MODEL, torch.nn.Linear(3, 4), example=x)
    found = sbc(MODEL, guide, x, num_simulations=300)
    assert not found.passed
    assert found.dataset.sizes["simulation"] == 300 and found.dataset.sizes["quantity"] == 5


# --- latents and data of the user's own


def test_data_that_another_program_simulates():
    """x ~ Normal(z, 2) where the model says 1: the posterior of the model is too sure of itself."""

    def simulate(count):
        z = torch.randn(count)
        return {"z": z.numpy()}, (z + 2 * torch.randn(count),)

    found = pv.sbc(MODEL, MODEL.posterior, simulate=simulate, num_simulations=500, seed=0)
    assert found.summary().finding["z"] == "draws are too narrow"
    again = pv.sbc(MODEL, MODEL.posterior, simulate=simulate, num_simulations=500, seed=0)
    assert again.dataset.identical(found.dataset)  # PyTorch's random numbers are seeded


@pytest.mark.slow
def test_a_table_that_is_refined_on_the_simulated_data_passes():
    torch.manual_seed(0)
    z = torch.randn(300, dtype=torch.float64)
    x = z + torch.randn(300, dtype=torch.float64)
    guide = pv.LocalGuide(MODEL, num_data=300, example=x).double()
    own = {"simulate": lambda n: ({"z": z}, x), "num_simulations": 300}
    assert not sbc(MODEL, guide, **own).passed  # its rows are where they start
    refined = pv.refine(MODEL, guide, x, progress=False)
    assert sbc(MODEL, refined, **own).passed
    with pytest.raises(ValueError, match="other data|another order"):
        sbc(MODEL, refined, simulate=lambda n: ({"z": z.flip(0)}, x.flip(0)), num_simulations=300)


def test_a_table_has_no_rows_for_data_that_are_simulated_anew():
    guide = pv.LocalGuide(MODEL, num_data=300, example=torch.zeros(300))
    with pytest.raises(ValueError, match="sbc: .* a row of parameters for each datum"):
        sbc(MODEL, guide, BLANK, num_simulations=300)


def test_whole_data_sets_of_another_program():
    def simulate(count):
        assert count == 1
        mu = 2 * torch.randn((), dtype=torch.float64)
        z = mu + torch.randn(4, dtype=torch.float64)
        return {"mu": mu, "z": z}, z + torch.randn(4, dtype=torch.float64)

    few = {"num_simulations": 100, "num_draws": 49, "data_plate": False}
    assert sbc(shared_mean, joint_posterior, simulate=simulate, **few).passed


def test_a_dream_holds_what_is_drawn():
    def scaled(tenfold):
        MODEL(tenfold / 10)

    x = torch.zeros(3)
    found = sbc(scaled, lambda t: MODEL.posterior(t / 10), x, dream=lambda drawn: 10 * drawn["x"])
    assert found.passed


# --- importance-corrected posteriors


def test_resampled_draws_of_a_wide_guide_are_calibrated():
    guide = GUIDES["underconfident"]
    found = sbc(MODEL, guide, BLANK, resample="psis", num_particles=1000)
    assert found.passed and found.dataset.attrs["doubt"] == ""
    assert "99 draws (resampled) of the guide" in repr(found)
    narrow = OffGuide(widen=0.4)
    found = sbc(MODEL, narrow, BLANK, num_simulations=200, resample="psis")
    assert not found.passed and "the importance weights are not to be trusted" in repr(found)


# --- one result


def test_chunks_change_nothing_and_one_seed_is_one_result():
    options = {"num_simulations": 300, "seed": 3}
    found = pv.sbc(MODEL, GUIDES["biased"], BLANK, **options)
    state = torch.get_rng_state()
    again = pv.sbc(MODEL, GUIDES["biased"], BLANK, chunk_size=7, **options)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(found.dataset["ranks"], again.dataset["ranks"])
    other = pv.sbc(MODEL, GUIDES["biased"], BLANK, num_simulations=300, seed=4)
    assert (found.dataset["ranks"] != other.dataset["ranks"]).any()
    torch.manual_seed(0)
    free = pv.sbc(MODEL, GUIDES["biased"], BLANK, num_simulations=3e1, num_draws=2e1)
    torch.manual_seed(0)
    same = pv.sbc(MODEL, GUIDES["biased"], BLANK, num_simulations=30, num_draws=20)
    assert same.dataset.identical(free.dataset)


def test_simulations_are_independent_of_each_other():
    """Were the guide's random numbers those of another simulation, ranks of neighbours agree."""
    ranks = (
        sbc(MODEL, MODEL.posterior, BLANK, num_simulations=2000).dataset["ranks"].sel(quantity="z")
    )
    assert stats.pearsonr(ranks[:-1], ranks[1:]).pvalue > 1e-3
    blocks = ranks.values[:1750].reshape(-1, 250)  # data are drawn for in blocks of 250
    assert stats.pearsonr(blocks[0], blocks[1]).pvalue > 1e-3
    few = {"num_simulations": 100, "num_draws": 19, "data_plate": False}
    x = torch.zeros(2, dtype=torch.float64)
    whole = sbc(shared_mean, joint_posterior, x, **few).dataset["ranks"]
    assert len(np.unique(whole.sel(quantity="mu"))) > 10


def test_text():
    found = sbc(MODEL, GUIDES["exact"], BLANK)
    assert repr(found) == (
        "simulation-based calibration, 500 simulations, 99 draws of the guide each\n"
        "passed: the ranks of all 3 quantities may be uniform; the smallest p-value is "
        f"{found.dataset['p_value'].values.min():.3g} (an exact guide is rejected with "
        "probability 0.01)"
    )
    text = repr(sbc(MODEL, GUIDES["overconfident"], BLANK, error_rate=0.01))
    assert "not calibrated: the ranks of 3 of 3 quantities are not uniform" in text
    assert "probability 0.01" in text and "draws are too narrow" in text


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_simulations": 19}, "num_simulations=19: a whole number of at least 20"),
        ({"num_draws": 18}, "num_draws=18: a whole number of at least 19"),
        ({"error_rate": 0.0}, "error_rate=0.0: a number between 0 and 1"),
        ({"resample": "sir"}, "resample='sir': None or 'psis'"),
        ({"num_particles": 100}, "num_particles= is how many draws resample='psis'"),
        ({"resample": "psis", "num_particles": 50}, "num_particles=50: .* at least 99"),
        ({"seed": -1}, "seed=-1"),
        ({"simulate": lambda n: None, "dream": lambda d: d}, "dream= .* one of the two"),
    ],
)
def test_arguments_that_say_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pv.sbc(MODEL, MODEL.posterior, BLANK, **options)


def test_no_example_is_refused():
    with pytest.raises(ValueError, match=r"sbc needs an example of the model's arguments, sbc\("):
        pv.sbc(MODEL, MODEL.posterior)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (torch.zeros(50), TypeError, "simulate= returned Tensor; a pair is needed"),
        ((torch.zeros(50), torch.zeros(50)), TypeError, "latents of type Tensor; a mapping"),
        (({"z": torch.zeros(50)}, torch.zeros(49)), ValueError, r"simulate\(50\) .* of 49 rows"),
        (({"y": torch.zeros(50)}, torch.zeros(50)), ValueError, r"no values of .* 'z', only of"),
        (({"z": torch.zeros(50, 1)}, torch.zeros(50)), ValueError, r"shape \[50, 1\]; \[50\] is"),
        (({"z": torch.full((50,), math.nan)}, torch.zeros(50)), ValueError, "NaN for .* 'z'"),
    ],
)
def test_simulations_that_do_not_fit_are_refused(returned, error, message):
    with pytest.raises(error, match=message):
        pv.sbc(MODEL, MODEL.posterior, simulate=lambda n: returned, num_simulations=50)


def test_simulations_that_the_model_does_not_allow_are_refused():
    model = GammaPoisson()
    x = torch.ones(50, dtype=torch.float64)
    with pytest.raises(ValueError, match="50 of the simulations have no density under the model"):
        pv.sbc(model, model.posterior, simulate=lambda n: ({"rate": -x}, x), num_simulations=50)


def test_models_without_draws_and_guides_without_latents_are_refused():
    def with_factor(x):
        with pyro.plate("data", len(x)):
            MODEL.sites(x)
            pyro.factor("f", x.square())

    with pytest.raises(ValueError, match="pyro.factor statements.* Or pass simulate="):
        sbc(with_factor, MODEL.posterior, BLANK)
    with pytest.raises(ValueError, match="sbc: the guide proposes no latent of the model"):
        sbc(mixture, lambda x: None, torch.zeros(2, dtype=torch.float64))


def test_masks_by_draws_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with poutine.mask(mask=z > 0):
                pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            pyro.sample("w", dist.Normal(torch.zeros_like(x), 1.0))

    with pytest.raises(ValueError, match=r"masks latents by what it draws \(\['w'\]\)"):
        sbc(model, guide, BLANK)
