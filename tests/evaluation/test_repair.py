"""Repair: each datum as far up the ladder as it needs, and a right answer where it ends."""

from __future__ import annotations

import copy
import math

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation.repair import _Result, repair
from pyro_vae.evaluation.rungs import EVERY_RUNG, RUNGS, Found
from pyro_vae.particles.global_latents import Given
from pyro_vae.programs.guide_kinds import on_rows
from pyro_vae.sampling import annealing, chains, importance
from pyro_vae.sampling.far_modes import FarMode
from tests.arviz_calls import groups
from tests.sampling.test_importance import absolute, counts, gamma_poisson, local, square

matplotlib.use("Agg")
# Without the audit, which has its own tests below.
SETTINGS = {"seed": 0, "progress": False, "compile": False, "audit": 0}


def exact_of_square(x):
    """Means, standard deviations and log p(x) on a grid of z."""
    z = torch.linspace(-14, 14, 100_001, dtype=torch.float64).unsqueeze(1)
    terms = dist.Normal(torch.zeros((), dtype=torch.float64), 2.0).log_prob(z)
    terms = terms + dist.Normal(z.square(), 0.5).log_prob(x)
    evidence = terms.logsumexp(0)
    weight = (terms - evidence).exp()
    mean = (weight * z).sum(0)
    std = (weight * (z - mean).square()).sum(0).sqrt()
    return mean, std, evidence + math.log(float(z[1] - z[0]))


def test_a_guide_that_is_right_stays_on_the_first_rung():
    x = counts()
    guide = pv.refine(gamma_poisson, local(gamma_poisson, x), x, seed=0, progress=False)
    found = repair(gamma_poisson, guide, x, **SETTINGS)
    assert found.good.all()
    assert set(found.dataset["rung"].values) == {"importance"}
    mean, std = (x + 2) / 1.5, (x + 2).sqrt() / 1.5
    away = (found.draws["z"].mean(0) - mean).abs() / std
    assert (away < 0.2).all()
    assert (found.draws["z"].std(0) / std - 1).abs().max() < 0.15
    evidence = dist.NegativeBinomial(2.0, probs=torch.tensor(1 / 1.5).double()).log_prob(x)
    off = np.abs(found.dataset["log_evidence"].values - evidence.numpy())
    assert (off < 5 * found.dataset["log_evidence_se"].values).all()


def test_a_narrow_guide_is_refined():
    x = counts()
    guide = local(gamma_poisson, x, loc=-3.0, log_scale=-4.0)
    found = repair(gamma_poisson, guide, x, **SETTINGS)
    assert found.good.all()
    assert "refined" in found.dataset["rung"].values
    away = (found.draws["z"].mean(0) - (x + 2) / 1.5).abs() / ((x + 2).sqrt() / 1.5)
    assert (away < 0.2).all()


@pytest.mark.slow
def test_two_modes_are_found_and_weighed():
    """At x = 9 the modes are at -3 and 3, 37 of their widths apart: annealed chains find both."""
    x = torch.tensor([9.0, 4.0, 0.2], dtype=torch.float64)
    found = repair(square, local(square, x, loc=3.0, log_scale=-2.0), x, **SETTINGS)
    mean, std, evidence = exact_of_square(x)
    assert found.good.all()
    assert "annealed" in found.dataset["rung"].values
    assert ((found.draws["z"].mean(0) - mean).abs() < 0.2 * std).all()
    assert (found.draws["z"].std(0) / std - 1).abs().max() < 0.1
    off = np.abs(found.dataset["log_evidence"].values - evidence.numpy())
    assert (off < 5 * found.dataset["log_evidence_se"].values).all()


@pytest.mark.parametrize(("second", "good"), [(-4.0, True), (-4.3, True), (-4.6, False)])
def test_a_bound_below_an_earlier_one_is_no_good_verdict(second: float, good: bool):
    """Chains of one of two modes agree; the bound of an earlier rung lies above by 5 errors."""

    def found(value: float, verdict: bool) -> Found:
        one = torch.ones(1, dtype=torch.float64)
        flag = torch.tensor([verdict])
        return Found(flag, value * one, 0.1 * one / 2**0.5, one, one, one, {"z": torch.zeros(3, 1)})

    result = _Result(("importance", "chains"), 1)
    result.take(0, found(-4.0, False), torch.tensor([0]))
    result.take(1, found(second, True), torch.tensor([0]))
    assert result.good.tolist() == [good]
    ended = result.repair(Given({}), is_whole=False)
    assert ended.dataset["log_evidence"].values[0] == (second if good else -4.0)
    assert ended.dataset["rung"].values[0] == "chains"


def rung_found(value: float, error: float, verdict: bool = False) -> Found:
    one = torch.ones(1, dtype=torch.float64)
    draws = {"z": torch.zeros(3, 1)}
    return Found(torch.tensor([verdict]), value * one, error * one, one, one, one, draws)


def test_of_bounds_without_a_verdict_a_noisy_one_is_not_taken_for_being_high():
    """A bound of -3 that may be off by 2 is not known to be above one of -4."""
    result, row = _Result(("importance", "refined", "chains"), 1), torch.tensor([0])
    for number, pair in enumerate([(-4.0, 0.1), (-3.0, 2.0), (-math.inf, math.nan)]):
        result.take(number, rung_found(*pair), row)
    data = result.repair(Given({}), is_whole=False).dataset
    assert data["log_evidence"].values[0] == -4.0 and data["log_evidence_se"].values[0] == 0.1


def test_a_bound_is_set_against_every_earlier_one():
    """One of large error lies highest, but another of a small error is as surely above."""
    result, row = _Result(("importance", "refined", "chains"), 1), torch.tensor([0])
    result.take(0, rung_found(-4.0, 0.1), row)
    result.take(1, rung_found(-3.0, 2.0), row)
    result.take(2, rung_found(-6.0, 0.1, verdict=True), row)
    assert not result.good[0]


def test_only_what_failed_goes_on():
    x = counts()
    guide = pv.refine(gamma_poisson, local(gamma_poisson, x), x, seed=0, progress=False)
    with torch.no_grad():
        guide.table[2, 0, 0] += 8.0
        guide.table[2, 0, 1] -= 3.0
    found = repair(gamma_poisson, guide, x, **SETTINGS)
    assert found.dataset["rung"].values.tolist() == ["importance"] * 2 + ["refined"] + [
        "importance"
    ]
    assert found.dataset["tried"].sel(rung_name="refined").values.tolist() == [
        False,
        False,
        True,
        False,
    ]
    # Seconds of a rung are shared among those that it took up.
    first, second = found.dataset["seconds"].values[:2]
    costs = [first / 4, first / 4, first / 4 + second, first / 4]
    np.testing.assert_allclose(found.dataset["cost"].values, costs)
    summary = found.summary()
    assert summary["tried"].tolist() == [4, 1, 0, 0, 0]
    assert summary["ended"].tolist() == [3, 1, 0, 0, 0]
    assert summary["good"].tolist() == [3, 1, 0, 0, 0]


def test_an_amortized_guide_of_several_sites():
    torch.manual_seed(0)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Exponential(x.new_tensor(1.0)))
            pyro.sample("x", dist.Normal(a[..., 0] + b, 0.5), obs=x)

    x = torch.randn(6, dtype=torch.float64)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 4).double()

        def forward(self, x):
            return self.layer(x.unsqueeze(-1)).tanh()

    guide = pv.AmortizedGuide(model, Encoder(), example=x)
    found = repair(model, guide, x, num_draws=50, **SETTINGS)
    assert {name: tuple(v.shape) for name, v in found.draws.items()} == {
        "a": (50, 6, 2),
        "b": (50, 6),
    }
    assert (found.draws["b"] > 0).all()


def test_one_datum():
    """Two normals, jointly: data_plate=False."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = torch.tensor([0.5, 1.0, -0.2], dtype=torch.float64)
    guide = pv.LocalGuide(model, num_data=1, example=x, data_plate=False)
    found = repair(model, guide, x, data_plate=False, **SETTINGS)
    assert found.good.tolist() == [True]
    mean, std = x.sum() / 4, 0.5
    assert float((found.draws["mu"].mean() - mean).abs()) < 0.2 * std
    assert float(found.draws["mu"].std()) == pytest.approx(std, rel=0.1)


def test_a_seed_repeats():
    x = counts()
    one, two = (repair(gamma_poisson, local(gamma_poisson, x), x, **SETTINGS) for _ in range(2))
    assert torch.equal(one.draws["z"], two.draws["z"])
    assert one.dataset["log_evidence"].equals(two.dataset["log_evidence"])


def test_what_no_rung_mends_is_named(caplog):
    """Many modes far apart, and no rung but the first."""
    x = torch.tensor([9.0, 0.1], dtype=torch.float64)
    guide = local(square, x, loc=3.0, log_scale=-4.0)
    found = repair(square, guide, x, rungs=("importance",), **SETTINGS)
    assert not found.good[0]
    assert f"{(~found.good).sum()} of 2 data have no good verdict on any rung" in caplog.text
    assert "have no good verdict: 0" in repr(found)
    assert found.plot().get_title(loc="left") == (
        f"Repair: {found.good.mean():.0%} of the data have a good verdict"
    )
    plt.close("all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rungs": ("magic",)}, r"rungs=\('magic',\): some of"),
        ({"rungs": ()}, "some of"),
        ({"rungs": ("importance", "importance")}, "each once"),
        ({"num_particles": 500}, "num_particles=500"),
        ({"num_draws": 0}, "num_draws=0"),
        ({"seed": -1}, "seed=-1"),
        ({"audit": -1}, "audit=-1"),
        # Before any rung is climbed, though the first one asks for neither.
        ({"tolerance": -1.0}, "tolerance=-1"),
        ({"max_steps": 0}, "max_steps=0"),
    ],
)
def test_bad_input(options, message: str):
    x = counts()
    with pytest.raises(ValueError, match=message):
        repair(gamma_poisson, local(gamma_poisson, x), x, **{**SETTINGS, **options})


def test_all_rungs_are_in_the_documentation():
    assert all(f'"{rung}"' in repair.__doc__ for rung in EVERY_RUNG)
    assert set(EVERY_RUNG) - set(RUNGS) == {"flow"}


@pytest.mark.parametrize("whole", [False, True])
def test_to_arviz(whole: bool, tmp_path):
    x = counts()
    if whole:

        def model(x):
            mu = pyro.sample("mu", dist.Normal(x.new_tensor(0.0), 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

        guide = pv.LocalGuide(model, num_data=1, example=x, data_plate=False)
    else:
        model, guide = gamma_poisson, local(gamma_poisson, x)
    plate = False if whole else None
    found = repair(model, guide, x, data_plate=plate, num_draws=30, **SETTINGS)
    made = found.to_arviz()
    (name,) = found.draws
    dims = ("chain", "draw") if whole else ("chain", "draw", "datum")
    assert made.posterior[name].dims == dims
    assert made.constant_data["good"].dims == ("datum",)
    assert made.log_likelihood["x"].dims == ("chain", "draw", "data" if whole else "datum")
    assert {"log_prior", "prior_predictive", "observed_data"} <= set(groups(made))
    assert "verdict, k-hat, ESS and R-hat of each datum" in made.posterior.attrs["note"]
    with pytest.raises(ValueError, match="is without its model: make the container before"):
        copy.copy(found).to_arviz()
    made.to_netcdf(tmp_path / "found.nc")
    assert (tmp_path / "found.nc").stat().st_size > 0


def test_a_datum_without_evidence_is_never_good():
    """log p(x, z) = -inf for every z: no weights, no verdict, no -1.8e308."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.factor("never", torch.where(x > 0, 0.0 * z, -math.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([1.0, -1.0], dtype=torch.float64)
    guide = pv.LocalGuide(model, num_data=2, example=x)
    found = repair(model, guide, x, rungs=("importance",), **SETTINGS)
    assert found.good.tolist() == [True, False]
    assert found.dataset["log_evidence"].values[1] == -math.inf
    assert found.dataset["ess"].values[1] == 0


@pytest.mark.slow
def test_a_guide_far_too_narrow_in_float32():
    """z ~ LogNormal(0, 1), x ~ Normal(log z, 1): the map's log determinant is not rounded away."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    x = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    guide = local(model, x, log_scale=math.log(1e-4))
    with torch.no_grad():
        guide.table[:, 0, 0] = x / 2
    found = repair(model, guide, x, rungs=("annealed",), **SETTINGS)
    exact = dist.Normal(torch.zeros(4).double(), 2**0.5).log_prob(x.double()).numpy()
    off = np.abs(found.dataset["log_evidence"].values - exact)
    assert (off < 5 * found.dataset["log_evidence_se"].values).all()


def test_rows_of_a_guide_are_those_that_the_batch_holds():
    """A batch of rows 2 and 3; its second datum alone goes on, from row 3."""
    x = counts()
    guide = pv.refine(gamma_poisson, local(gamma_poisson, x), x, seed=0, progress=False)
    with guide.rows(torch.tensor([2, 3])), on_rows(guide, torch.tensor([1])):
        assert guide.given_rows.tolist() == [3]


def test_an_exact_guide_has_nothing_to_mend():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_ones(2)))
            pyro.sample("x", dist.Normal(c.to(x), 1.0), obs=x)

    x = torch.zeros(3)
    with pytest.raises(ValueError, match="nothing to sample or to mend"):
        repair(model, pv.ExactGuide(model, example=x), x, **SETTINGS)


def test_a_datum_without_an_answer_climbs_alone(caplog):
    """The encoder gives no number for one datum: the others stay where they were."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 4).double()

        def forward(self, x):
            return self.layer(x.unsqueeze(-1)).tanh().masked_fill(x.unsqueeze(-1) > 5, math.nan)

    torch.manual_seed(0)
    x = torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64)
    guide = pv.AmortizedGuide(model, Encoder(), example=x[:2])
    found = repair(model, guide, x, rungs=("importance", "refined"), **SETTINGS)
    assert found.good.all()
    assert found.dataset["rung"].values[:2].tolist() == ["importance"] * 2
    exact = dist.Normal(torch.zeros(3).double(), 2**0.5).log_prob(x).numpy()
    off = np.abs(found.dataset["log_evidence"].values - exact)
    assert (off < 5 * found.dataset["log_evidence_se"].values).all()
    assert "AmortizedGuide has no answer for data [2]" in caplog.text


# --- the audit


def at_one_mode(num_data=12, size=4):
    """Data of a model with sixteen modes, and a guide that is exact at one."""
    generator = torch.Generator().manual_seed(1)
    x = 0.7 + torch.rand(num_data, size, generator=generator, dtype=torch.float64)
    guide = local(absolute, x, log_scale=math.log(0.1))
    with torch.no_grad():
        guide.table[..., 0] = x / 1.01
    evidence = dist.Normal(torch.zeros((), dtype=torch.float64), 1.01**0.5).log_prob(x)
    return x, guide, (evidence + math.log(2.0)).sum(-1).numpy()


@pytest.fixture
def no_search(monkeypatch):
    """No mode out of reach is found, of the guide's draws nor of chains."""

    def blind(ready, rows, block, centre):
        width = torch.diag_embed(ready.base_scale(rows))
        return FarMode(centre, width, torch.zeros(len(centre), dtype=torch.bool))

    monkeypatch.setattr(importance, "far_mode", blind)
    for module in (annealing, chains):
        monkeypatch.setattr(module, "is_missed", lambda *a: torch.zeros(len(a[4]), dtype=bool))


def test_an_audit_takes_wrong_verdicts_back(no_search, caplog):
    """Without the search for modes the guide's weights look good, and say p(x) / 16."""
    x, guide, exact = at_one_mode()
    rungs = ("importance",)
    blind = repair(absolute, guide, x, rungs=rungs, **SETTINGS)
    fooled = blind.good
    assert fooled.sum() >= 3
    off = blind.dataset["log_evidence"].values - exact
    assert off[fooled] == pytest.approx(math.log(1 / 16), abs=0.1)
    assert not blind.dataset["audited"].values.any()
    found = repair(absolute, guide, x, rungs=rungs, **{**SETTINGS, "audit": 3})
    assert not found.good.any()
    audited, contradicted = (found.dataset[n].values for n in ("audited", "contradicted"))
    assert audited.sum() == 3 and (audited <= fooled).all()
    assert contradicted.any() and (contradicted <= audited).all()
    assert f"The good verdicts of {fooled.sum()} data are taken back; rungs" in caplog.text


@pytest.mark.slow
def test_data_whose_verdicts_are_taken_back_climb_on(no_search, caplog):
    x, guide, exact = at_one_mode()
    found = repair(absolute, guide, x, rungs=("importance", "annealed"), **{**SETTINGS, "audit": 3})
    assert found.dataset["tried"].sel(rung_name="annealed").values.all()
    off = np.abs(found.dataset["log_evidence"].values - exact)
    assert (off < 5 * found.dataset["log_evidence_se"].values).all()
    assert "and they climb on 'annealed'" in caplog.text


def test_right_verdicts_stand_an_audit(caplog):
    x = counts()
    guide = local(gamma_poisson, x)
    with torch.no_grad():  # near the posterior's logarithm
        guide.table[:, 0, 0] = ((x + 2) / 1.5).log()
        guide.table[:, 0, 1] = -0.5 * (x + 2).log()
    found = repair(gamma_poisson, guide, x, **{**SETTINGS, "audit": 1})
    assert found.good.all() and not caplog.records
    assert found.dataset["audited"].values.sum() == 1
    assert not found.dataset["contradicted"].values.any()


def test_bounds_without_errors_differ_by_rounding():
    """No likelihood: every weight is one, and rounding is no contradiction."""

    def nothing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    x = torch.tensor([0.5, 1.0, -1.0])
    found = repair(nothing, local(nothing, x), x, **{**SETTINGS, "audit": 3})
    assert found.good.all() and found.dataset["audited"].values.all()


@pytest.mark.slow
def test_chains_that_agree_in_one_of_many_modes_do_not_stand_an_audit(no_search):
    """R-hat below 1.01, and a bound that is log 8 too low."""
    x, guide, exact = at_one_mode(2, 3)
    settings = {**SETTINGS, "compile": "auto", "rungs": ("chains",)}
    agreed = repair(absolute, guide, x, **settings)
    assert agreed.good.all()
    assert agreed.dataset["log_evidence"].values - exact == pytest.approx(-math.log(8), abs=0.1)
    found = repair(absolute, guide, x, **{**settings, "audit": 2})
    assert not found.good.any() and found.dataset["contradicted"].values.any()
