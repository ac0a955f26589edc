"""A comparison as a result: its table, its paired errors, what it says of the evidence."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.evaluation.comparison import tightest


def test_paired_errors_are_those_of_repetition(compared):
    """60 seeds: the spread of each gap is its error within 40% (about 4 errors).

    The error but for what skewness adds: with that, intervals cover what they should.
    """
    model, x, guide, found = compared
    local = found.guides["mean-field"]
    runs = [
        pv.compare(
            model,
            {"amortized": guide, "local": local},
            x[:30],
            reference="local",
            num_particles=400,
            seed=seed,
        ).dataset
        for seed in range(60)
    ]
    for name in ("elbo", "amortization_gap", "approximation_gap", "log_evidence"):
        values = torch.stack([torch.as_tensor(r[name].values) for r in runs])
        errors = torch.stack([torch.as_tensor(r[f"{name}_se"].values) for r in runs])
        skewness = torch.stack([torch.as_tensor(r[f"{name}_skewness"].values) for r in runs])
        errors = errors / (1 + 8 * skewness**2 / 400).clamp(max=4)
        spread, reported = values.std(0), errors.square().mean(0).sqrt()
        if name == "amortization_gap":
            spread, reported = spread[0], reported[0]  # of the reference it is zero
        assert ((spread / reported - 1).abs() < 0.4).all(), name


def test_pairing_pays_where_guides_are_near(compared):
    """The difference of two near guides is known twice as well as from draws of their own."""
    model, x, _, found = compared
    near = copy.deepcopy(found.guides["mean-field"])
    with torch.no_grad():
        near.table += 0.02
    both = {"near": near, "local": found.guides["mean-field"]}
    data = pv.compare(model, both, x, reference="local", num_particles=400, seed=0).dataset
    paired = data.amortization_gap_se.sel(guide="near")
    independent = (data.elbo_se**2).sum("guide") ** 0.5
    assert float((paired / independent).max()) < 0.5


def test_the_evidence_says_where_it_is_from(compared):
    data = compared[3].dataset
    assert data.attrs["log_evidence_from"] in (
        "IWAE-10000 through the mixture of 'amortized' and 'mean-field'",
        "IWAE-5000 through 'mean-field'",
    )
    assert (data.log_evidence_pareto_k < 0.7).mean() > 0.8
    assert data.attrs["log_evidence_from"] in repr(compared[3])
    assert list(data.reference.values) == ["mean-field", "mean-field"]


def test_the_threshold_of_k_hat_is_that_of_so_many_particles(compared):
    """min(1 - 1 / log10 K, 0.7): 0.5 for a hundred."""
    model, x, _, found = compared
    assert found.dataset.attrs["pareto_k_threshold"] == 0.7
    few = pv.compare(model, found.guides, x, num_particles=100, seed=0)
    assert few.dataset.attrs["pareto_k_threshold"] == pytest.approx(0.5)
    k_hat = few.dataset.pareto_k.values
    assert ((k_hat > 0.5) & (k_hat < 0.7)).any()
    np.testing.assert_allclose(few.summary().pareto_k_bad, (k_hat > 0.5).mean(1))


def test_unconverged_data_are_said(compared):
    model, x, guide, _ = compared
    found = pv.compare(
        model, {"amortized": guide, "mf": pv.families.Normal()}, x, num_particles=50,
        max_steps=2, seed=0,
    )  # fmt: skip
    assert not found.dataset.converged.any()
    assert found.summary().loc["mf", "not_converged"] == 30
    assert "mf: 30 of 30 data have not converged" in repr(found)


def test_summary_and_table(compared):
    found = compared[3]
    summary = found.summary()
    assert list(summary.index) == ["amortized", "mean-field"]
    data = found.dataset
    assert summary.loc["amortized", "elbo"] == pytest.approx(
        float(data.elbo.sel(guide="amortized").mean())
    )
    error = data.elbo_se.sel(guide="amortized").values
    # Of a mean over data: not wider by the skewness of each.
    plain = error / (1 + 8 * data.elbo_skewness.sel(guide="amortized").values ** 2 / 5000)
    assert summary.loc["amortized", "elbo_se"] == pytest.approx(
        (plain**2).sum() ** 0.5 / 30, rel=1e-3
    )
    lines = repr(found).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == [
        "guide", "ELBO", "log p(x)", "approximation gap", "amortization gap", "IWAE - ELBO",
        "worst k-hat", "median ESS", "good",
    ]  # fmt: skip
    cells = [cell.strip() for cell in lines[2].split("|")]
    one = data.sel(guide="amortized")
    assert cells[-3:] == [
        f"{float(one.pareto_k.max()):.2f}",
        f"{float(one.ess.median()):.0f}",
        f"{float(one.good.mean()):.1%}",
    ]
    assert lines[2].split("|")[0].strip() == "amortized"


def test_the_gain_of_weights_is_paired(compared):
    """IWAE - ELBO of each guide, its error that of one difference, not of two estimates."""
    data = compared[3].dataset
    np.testing.assert_allclose(data.iwae_minus_elbo, data.iwae_bound - data.elbo, atol=1e-12)
    local = data.sel(guide="mean-field")
    alone = np.hypot(local.iwae_bound_se, local.elbo_se)
    assert (local.iwae_minus_elbo_se < alone).mean() > 0.7
    assert float(compared[3].summary().loc["amortized", "iwae_minus_elbo"]) > 0


def test_verdicts_are_those_of_the_weights(compared):
    """From k-hat, ESS and the tail's share, by the rule written out."""
    data = compared[3].dataset
    light = (data.pareto_k <= 0.7) | (data.tail_share <= 2)
    assert (data.good == (light & (data.ess >= 400))).all()
    assert 0 < float(data.good.mean()) < 1
    assert (compared[3].summary()["good"] == data.good.mean("datum").values).all()
    count = data.attrs["log_evidence_num_particles"]
    light = (data.log_evidence_pareto_k <= 0.7) | (data.log_evidence_tail_share <= 2)
    enough = light & (data.log_evidence_ess >= 400)
    assert (data.log_evidence_good == enough | (data.log_evidence_ess > 0.9 * count)).all()


def test_a_heavy_tail_of_no_weight_is_no_cause_for_alarm():
    """Weights exp(0.02 (z^3 - 3 z) / 6) of a normal z: k-hat far above 0.7, ESS nearly K."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.factor("f", 0.02 * (z**3 - 3 * z) / 6)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    x = torch.zeros(5, dtype=torch.float64)
    found = pv.compare(model, {"guide": guide}, x, reference="guide", seed=0, progress=False)
    data = found.dataset
    assert (data.pareto_k > 0.7).all() and (data.ess > 0.999 * 5000).all()
    assert data.good.all() and data.log_evidence_good.all()
    assert "not to be trusted" not in repr(found)


def test_data_of_no_weight_are_bad_and_do_not_stop_the_others():
    """Draws at which the model has no density: an ELBO of -inf, and no evidence of that datum."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Poisson(z.exp() * (z > 0)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_tensor([9.0, -99.0]), 1.0))

    x = torch.full((2,), 8000.0, dtype=torch.float64)
    options = {"reference": "a", "num_particles": 1000, "seed": 0, "progress": False}
    data = pv.compare(model, {"a": guide}, x, **options).dataset
    assert data.good.values.tolist() == [[False, False]]
    assert data.log_evidence_pareto_k[1] == np.inf and not data.log_evidence_good[1]
    assert np.isfinite(data.log_evidence[0]) and data.log_evidence[1] == -np.inf


def test_the_table_says_what_good_is(compared):
    text = repr(compared[3])
    assert "400 effective ones (ESS) or more, and no heavy tail (k-hat above 0.70" in text
    model, x, guide, _ = compared
    few = pv.compare(model, {"a": guide}, x[:4], reference="a", num_particles=100, seed=0)
    assert not few.dataset.good.any()
    text = repr(few)
    assert "or more, more than K = 100 can give" in text and "k-hat above 0.50 for K = 100" in text


# --- which lower bound is taken for log p(x)


@pytest.mark.parametrize(
    ("means", "errors", "chosen"),
    [
        ([-10.0, -9.0, -9.01], [0.01, 0.3, 0.02], 2),  # a lucky heavy tail does not win
        ([-9.0, -9.7, -9.01], [0.0, 0.001, 0.02], 0),  # an exact guide does
        ([-9.7, -9.0], [0.001, 0.02], 1),  # a missed mode is precise, and low
        ([-9.0, -9.5], [math.nan, math.nan], 0),  # a single particle tells no error
    ],
)
def test_the_tightest_bound(means, errors, chosen):
    assert tightest(np.array(means), np.array(errors), None) == chosen


@pytest.mark.parametrize(
    ("means", "errors", "chosen"),
    [
        ([-1.0, -1.0, -1.0], [0.1, 0.3, 0.19], 2),  # the mixture, whose tail is the lightest
        ([-1.0, -1.0, -1.0], [0.1, 0.3, 0.21], 0),  # too coarse
        ([-1.0, -1.0, -9.0], [0.1, 0.3, 0.1], 0),  # not tight
        ([-1.0, -1.0, -1.0], [0.0, 0.3, 0.1], 0),  # beside an exact posterior
    ],
)
def test_the_mixture_is_taken_where_it_is_about_as_close(means, errors, chosen):
    assert tightest(np.array(means), np.array(errors), 2) == chosen


def test_a_mean_leaves_out_what_is_no_number(compared):
    """Gaps of data whose ELBO is -inf have no value; those of the others have a mean."""
    *_, comparison = compared
    data = comparison.dataset.copy(deep=True)
    data["amortization_gap"][0, 0] = np.nan
    found = pv.Comparison(data, comparison.guides).summary()["amortization_gap"]
    assert found.iloc[0] == pytest.approx(data["amortization_gap"].values[0, 1:].mean())
