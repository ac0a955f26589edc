"""Annealed importance sampling gives bounds: below the evidence, closing on it, honest in print."""

from __future__ import annotations

import importlib
import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.particles import pair_runner
from pyro_vae.particles.estimators import Estimate, calibrated
from tests.models import GammaPoisson, NormalModel, encoder, factor_analysis
from tests.sampling.pairs import local, masked_model
from tests.sampling.test_importance import absolute

F64 = torch.float64
X = torch.tensor([-1.0, 0.5, 3.0], dtype=F64)
COUNTS = torch.tensor([0.0, 3.0, 8.0], dtype=F64)


def ais(model, guide, *batch, **options):
    """A few eager steps, unless said otherwise."""
    options = {"num_chains": 8, "num_steps": 5, "seed": 0, "compile": False, **options}
    return pv.ais(model, guide, *batch, progress=False, **options)


@pytest.fixture(scope="module")
def setting():
    model = factor_analysis()
    torch.manual_seed(0)
    x = model.data(6)
    return model, x, pv.AmortizedGuide(model, encoder(6), example=x)


# --- what it is


@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("schedule", ["linear", "sigmoidal", "adaptive"])
def test_the_bound_is_the_evidence_within_its_error(start, schedule):
    """500 chains of ten steps: 4.5 standard errors, which are below 0.2 nat."""
    model = GammaPoisson()
    bound = ais(
        model,
        local(model, COUNTS),
        COUNTS,
        start=start,
        schedule=schedule,
        num_chains=500,
        num_steps=10,
    )
    assert (bound.std_error < 0.2).all()
    assert ((bound.value - model.log_evidence(COUNTS)).abs() < 4.5 * bound.std_error).all()


def test_with_the_exact_posterior_it_is_the_evidence(setting):
    model, x, _ = setting
    guide = pv.LocalGuide(
        model, num_data=6, example=x, family=pv.families.FullRankNormal()
    ).double()
    covariance = model.posterior_precision.inverse()
    with torch.no_grad():
        root = torch.linalg.cholesky(covariance).expand(6, -1, -1)
        guide.table.copy_(guide.family.from_gaussian(model.posterior_mean(x), root))
    bound = ais(model, guide, x, num_chains=3, num_steps=2)
    torch.testing.assert_close(bound.value, model.log_evidence(x), rtol=0, atol=1e-10)
    assert (bound.std_error < 1e-7).all()
    torch.testing.assert_close(bound.ess, torch.full((6,), 3.0, dtype=F64))


def test_more_steps_close_the_bound(setting):
    """Of a guide that knows nothing yet: 1 step is importance sampling, far below."""
    model, x, guide = setting
    exact = model.log_evidence(x)
    few = ais(model, guide, x, num_chains=16, num_steps=1)
    many = ais(model, guide, x, num_chains=16, num_steps=100, compile="replay")
    assert (exact - few.value).mean() > 1.0
    assert (many.value - exact).mean().abs() < 0.2
    assert many.ess.mean() > 2 * few.ess.mean()


def test_value_error_and_ess_by_hand(setting, monkeypatch):
    model, x, guide = setting
    seen = []
    original = Estimate.iwae
    monkeypatch.setattr(Estimate, "iwae", lambda weights: seen.append(weights) or original(weights))
    bound = ais(model, guide, x)
    (weights,) = seen
    assert weights.shape == (8, 6) and bound.num_particles == 8 and bound.name == "AIS-5"
    torch.testing.assert_close(bound.value, weights.logsumexp(0) - math.log(8))
    torch.testing.assert_close(bound.ess, weights.softmax(0).square().sum(0).reciprocal())
    relative = (weights - bound.value).exp()
    plain = relative.std(0) / 8**0.5
    torch.testing.assert_close(bound.std_error, calibrated(plain, bound.skewness, 8))
    assert (bound.std_error >= plain - 1e-12).all()


# --- what it prints


def test_a_bound_says_that_few_chains_carry_the_mean(setting):
    model, x, guide = setting
    bad = ais(model, guide, x, num_steps=1, num_chains=20)
    assert torch.equal(bad.untrusted, bad.ess <= 0.3 * 20) and bad.untrusted.any()
    text = repr(bad)
    assert text.startswith("AIS-1: ") and "(6 data)" in text
    assert (
        f"for {int(bad.untrusted.sum())} of 6 data neither value nor error is to be trusted: "
        "few chains carry the mean. More steps bring their weights together"
    ) in text
    assert "k-hat" not in text and bad.pareto_k.isnan().all()
    good = ais(GammaPoisson(), local(GammaPoisson(), COUNTS), COUNTS, num_steps=60)
    assert not good.untrusted.any() and "trusted" not in repr(good)
    assert good.mean_of == "chains"


def test_a_bar_counts_every_step_of_every_datum(setting, monkeypatch):
    module = importlib.import_module("pyro_vae.evaluation.ais")  # the function has its name
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.n = total, 0
            bars.append(self)

        def update(self, n):
            self.n += n

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(module, "tqdm", Bar)
    monkeypatch.setattr(pair_runner, "_DRAW_DATA", 4)
    model, x, guide = setting
    ais(model, guide, x)
    (bar,) = bars
    assert bar.n == bar.total == 6 * 5


# --- seeds, graphs, blocks, dtypes


def test_graphs_change_nothing(setting):
    model, x, guide = setting
    eager = ais(model, guide, x, num_steps=6)
    replayed = ais(model, guide, x, num_steps=6, compile="replay")
    torch.testing.assert_close(replayed.value, eager.value, rtol=0, atol=1e-8)
    torch.testing.assert_close(replayed.std_error, eager.std_error, rtol=1e-6, atol=1e-8)


def test_a_seed_decides(setting):
    model, x, guide = setting
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = ais(model, guide, x, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.value, ais(model, guide, x, seed=3).value)
    assert not torch.equal(one.value, ais(model, guide, x, seed=4).value)
    torch.manual_seed(6)
    other = ais(model, guide, x, seed=None)
    torch.manual_seed(6)
    assert torch.equal(other.value, ais(model, guide, x, seed=None).value)


def test_data_in_blocks_come_in_order(monkeypatch):
    """Every datum's bound lies at its own evidence, to 4.5 standard errors."""
    monkeypatch.setattr(pair_runner, "_DRAW_DATA", 3)
    model = NormalModel()
    x = torch.linspace(-4, 4, 7, dtype=F64)
    bound = ais(model, local(model, x), x, num_chains=200)
    assert bound.value.shape == (7,)
    assert ((bound.value - model.log_evidence(x)).abs() < 4.5 * bound.std_error).all()


def test_single_precision_gives_bounds_in_double():
    model = GammaPoisson()
    x = COUNTS.float()
    bound = ais(model, pv.LocalGuide(model, num_data=3, example=x), x, num_chains=300)
    assert bound.value.dtype == F64
    assert ((bound.value - model.log_evidence(COUNTS)).abs() < 4.5 * bound.std_error).all()


def test_one_datum():
    model = NormalModel()
    x = X[:1]
    bound = ais(model, local(model, x), x, num_chains=300)
    assert ((bound.value - model.log_evidence(x)).abs() < 4.5 * bound.std_error).all()


def test_all_latents_as_one_datum():
    model = NormalModel()
    guide = local(model, X, data_plate=False)
    bound = ais(model, guide, X, data_plate=False, num_chains=300)
    assert bound.value.shape == (1,)
    assert ((bound.value - model.log_evidence(X).sum()).abs() < 4.5 * bound.std_error).all()


def test_globals_are_held_where_they_are_given():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    value = torch.tensor(2.0, dtype=F64)
    bound = ais(model, guide, X, given={"mean": value}, num_chains=300, start="prior")
    assert torch.equal(bound.given["mean"], value) and "given mean at the values passed" in repr(
        bound
    )
    exact = dist.Normal(2.0, 2**0.5).log_prob(X)
    assert ((bound.value - exact).abs() < 4.5 * bound.std_error).all()


def test_whole_numbers_may_be_floats(setting):
    model, x, guide = setting
    bound = ais(model, guide, x, num_chains=8.0, num_steps=5.0)
    assert bound.name == "AIS-5"
    assert torch.equal(bound.value, ais(model, guide, x).value)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 1}, "num_chains=1: a whole number of at least 2"),
        ({"num_steps": 0}, "num_steps=0: a whole number of at least 1"),
        ({"start": "posterior"}, r"start='posterior': one of \('guide', 'prior'\)"),
        ({"schedule": "cosine"}, "schedule='cosine': one of"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_input_is_refused_by_name(setting, options, message):
    model, x, guide = setting
    with pytest.raises(ValueError, match=message):
        ais(model, guide, x, **options)


def test_the_prior_is_no_start_where_masks_leave_latents_out():
    seen = torch.tensor([True, False, True])
    guide = pv.LocalGuide(masked_model, num_data=3, example=(X, seen)).double()
    with pytest.raises(ValueError, match="start='prior': a mask of the model .*start='guide'"):
        ais(masked_model, guide, X, seen, start="prior")
    assert ais(masked_model, guide, X, seen).value.isfinite().all()


def test_nothing_is_logged_where_nothing_is_wrong(setting, caplog):
    model, x, guide = setting
    with caplog.at_level(logging.WARNING):
        ais(model, guide, x)
    assert not caplog.records


# --- modes that chains from the guide miss


def at_one_mode(size):
    """|z| with noise of 0.1: of 2^D equal modes the guide is exact at one, and its evidence."""
    generator = torch.Generator().manual_seed(1)
    x = 0.7 + torch.rand(3, size, generator=generator, dtype=F64)
    guide = pv.LocalGuide(absolute, num_data=3, example=x)
    with torch.no_grad():
        guide.table[..., 0], guide.table[..., 1] = x / 1.01, -0.5 * math.log(101)
    alone = dist.Normal(0.0, 1.01**0.5).log_prob(x).sum(-1)
    return guide, x, alone


@pytest.mark.parametrize("size", [1, 3])
def test_a_guide_at_one_of_many_modes_is_untrusted(size):
    """Chains all stay there, their weights alike, and the bound is D log 2 too low."""
    guide, x, alone = at_one_mode(size)
    bound = ais(absolute, guide, x)
    torch.testing.assert_close(bound.value, alone, rtol=0, atol=1e-4)
    assert not bound.few_carry.any() and bound.missed.all() and bound.untrusted.all()
    assert "for 3 of 3 data log p(x) is higher: chains from the guide miss a mode" in repr(bound)
    assert "start='prior'" in repr(bound) and "few chains" not in repr(bound)


@pytest.mark.parametrize(("size", "num_steps"), [(1, 60), (3, 200)])
def test_chains_from_the_prior_see_all_modes(size, num_steps):
    guide, x, alone = at_one_mode(size)
    bound = ais(absolute, guide, x, start="prior", num_chains=64, num_steps=num_steps)
    assert not bound.untrusted.any() and not bound.missed.any()
    exact = alone + size * math.log(2)
    assert (bound.std_error < 0.4).all()
    assert ((bound.value - exact).abs() < 4.5 * bound.std_error).all()


def test_chains_that_reach_both_modes_miss_none():
    """A guide as wide as the prior goes to both modes of |z|."""
    _, x, alone = at_one_mode(1)
    guide = pv.LocalGuide(absolute, num_data=3, example=x)
    bound = ais(absolute, guide, x, num_chains=32, num_steps=60)
    assert not bound.missed.any()
    assert ((bound.value - alone - math.log(2)).abs() < 4.5 * bound.std_error + 1e-6).all()


def test_chains_that_cross_to_a_mode_late_are_untrusted():
    """z^2 = 1.7: of chains from a point at z = 1.3 some cross, with weights alike, too low."""

    def square(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, x.new_tensor(2.0)))
            pyro.sample("x", dist.Normal(z.square(), 0.5), obs=x)

    x = torch.full((8,), 1.7, dtype=F64)
    guide = pv.LocalGuide(square, num_data=8, example=x)
    with torch.no_grad():
        guide.table.copy_(torch.tensor([[[1.26, -8.5]]], dtype=F64).expand(8, 1, 2))
    bound = ais(square, guide, x, num_chains=16, num_steps=500)
    grid = torch.linspace(-14, 14, 40_001, dtype=F64)
    joint = dist.Normal(0.0, 2.0).log_prob(grid) + dist.Normal(grid.square(), 0.5).log_prob(x[0])
    exact = joint.logsumexp(0) + (grid[1] - grid[0]).log()
    assert (exact - bound.value > 5 * bound.std_error).any() and not bound.few_carry.any()
    assert bound.missed.all() and bound.untrusted.all()


def test_one_mode_is_not_missed_wherever_the_guide_is(setting):
    model, x, guide = setting
    assert not ais(model, guide, x, num_steps=30).missed.any()
    model = GammaPoisson()
    guide = local(model, COUNTS)
    with torch.no_grad():
        guide.table[..., 0] += 2.0
        guide.table[..., 1] -= 3.0
    assert not ais(model, guide, COUNTS, num_steps=30).missed.any()


def test_without_a_prior_modes_are_not_looked_for():
    seen = torch.tensor([True, False, True])
    guide = pv.LocalGuide(masked_model, num_data=3, example=(X, seen)).double()
    assert ais(masked_model, guide, X, seen).missed.tolist() == [False] * 3
