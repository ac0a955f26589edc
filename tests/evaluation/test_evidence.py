"""log p(x) of a comparison from weights, chains or a formula: whose it is, and what follows."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

import pyro_vae as pv
from pyro_vae.evaluation import evidence as module
from pyro_vae.evaluation.bounds import Bound
from pyro_vae.evaluation.evidence import Source, _Best, take, worse
from pyro_vae.programs.batch import as_batch
from tests.models import NormalModel, mixture
from tests.sampling.pairs import local

F64 = torch.float64
X = torch.tensor([-1.0, 0.5, 3.0, 0.0], dtype=F64)


def compare(model, guides, *batch, **options):
    options = {"num_particles": 1000, "seed": 0, "progress": False, **options}
    return pv.compare(model, guides, *batch, **options)


def narrow(x):
    """Far too narrow for the first two data, the exact posterior for the rest."""
    scale = torch.full_like(x, 0.5**0.5)
    scale[:2] *= 0.3
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, scale))


@pytest.fixture(scope="module")
def found():
    """By each choice; the reference is the guide itself, so that nothing is refined."""
    model = NormalModel()
    options = {"reference": "narrow"}
    return {
        evidence: compare(model, {"narrow": narrow}, X, evidence=evidence, **options)
        for evidence in ("iwae", "auto", "ais")
    }


def test_auto_anneals_for_the_data_with_bad_weights_alone(found):
    weights, auto = found["iwae"].dataset, found["auto"].dataset
    assert weights.log_evidence_good.values.tolist() == [False, False, True, True]
    exact = NormalModel().log_evidence(X).numpy()
    for name in ("log_evidence", "log_evidence_se", "approximation_gap", "log_evidence_ess"):
        kept = auto[name].values[..., 2:]
        assert np.array_equal(kept, weights[name].values[..., 2:])  # to the last bit
        assert not np.allclose(auto[name].values[..., :2], weights[name].values[..., :2])
    assert auto.log_evidence_good.all()
    assert list(auto.evidence_from.values) == [
        *["AIS-128 from 'narrow'"] * 2,
        *["IWAE-1000 through 'narrow'"] * 2,
    ]
    assert (
        auto.attrs["log_evidence_from"]
        == "AIS-128 from 'narrow' for 2 data, IWAE-1000 through 'narrow' for 2 data"
    )
    assert auto.attrs["log_evidence_from"] in repr(found["auto"])
    error = np.abs(auto.log_evidence.values - exact)
    assert (error < 4 * auto.log_evidence_se.values + 1e-6).all()
    assert (auto.log_evidence_se < 0.2).all()
    for name in ("elbo", "iwae_bound", "pareto_k", "ess", "amortization_gap"):
        assert np.array_equal(auto[name], weights[name])


def test_without_it_the_table_says_how_many_it_would_anneal(found):
    text = repr(found["iwae"])
    assert "for 50.0% of the data one that is not to be trusted" in text
    assert "which evidence='auto' would anneal (2 data)" in text
    assert "not to be trusted" not in repr(found["auto"])
    assert "AIS - ELBO" in repr(found["auto"]) and "AIS - ELBO" not in text


def test_chains_for_all_data(found):
    data = found["ais"].dataset
    exact = NormalModel().log_evidence(X).numpy()
    assert (np.abs(data.log_evidence - exact) < 4 * data.log_evidence_se + 1e-6).all()
    assert set(data.evidence_from.values) == {"AIS-128 from 'narrow'"}
    assert np.array_equal(data.ais, data.log_evidence)
    assert np.array_equal(data.log_evidence_ess, data.ais_ess)
    assert np.array_equal(data.log_evidence_good, data.ais_good)
    assert data.log_evidence_pareto_k.isnull().all()
    gap = data.log_evidence - data.elbo.sel(guide="narrow")
    np.testing.assert_allclose(data.approximation_gap.sel(guide="narrow"), gap)


def test_errors_of_gaps_are_those_of_independent_estimates(found):
    """Chains and the ELBO's draws are independent: variances of plain errors add up."""
    data = found["ais"].dataset.sel(guide="narrow")

    def plain(name):
        """Its square over K is that of the chains, of an estimate by chains too."""
        widening = 1 + 8 * data[f"{name}_skewness"].values ** 2 / 1000
        return data[f"{name}_se"].values / np.minimum(widening, 4)

    expected = np.hypot(plain("log_evidence"), plain("elbo"))
    np.testing.assert_allclose(plain("approximation_gap"), expected)
    np.testing.assert_allclose(plain("ais_minus_elbo"), expected)
    np.testing.assert_allclose(data.ais_minus_elbo, data.ais - data.elbo)


def test_the_summary_is_of_the_data_that_have_chains(found):
    data, row = found["auto"].dataset, found["auto"].summary().loc["narrow"]
    assert data.ais.isnull().values.tolist() == [False, False, True, True]
    two = data.ais_minus_elbo.sel(guide="narrow").values[:2]
    assert row["ais_minus_elbo"] == pytest.approx(two.mean())
    errors = data.ais_minus_elbo_se.sel(guide="narrow").values[:2]
    assert 0 < row["ais_minus_elbo_se"] <= np.hypot(*errors) / 2 * (1 + 1e-9)


def test_data_whose_weights_are_all_good_need_no_chains(monkeypatch):
    monkeypatch.setattr(module, "_bound", lambda *_: pytest.fail("no chains are needed"))
    model = NormalModel()
    for evidence in ("auto", "iwae"):
        found = compare(
            model, {"exact": model.posterior}, X, reference="exact", evidence=evidence
        ).dataset
        assert found.attrs["log_evidence_from"] == "IWAE-1000 through 'exact'"
        assert "ais" not in found


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(module, "_STEPS", (10, 30))


def test_chains_start_from_the_guide_with_the_highest_elbo(short):
    """The table holds the exact posterior, so that the evidence is exact."""
    model, guide = NormalModel(), table()
    both = {"narrow": narrow, "table": guide}
    data = compare(model, both, X, evidence="ais", reference="table").dataset
    assert set(data.evidence_from.values) == {"AIS-10 from 'table'"}
    np.testing.assert_allclose(data.log_evidence, model.log_evidence(X), atol=1e-9)


def table():
    """A guide with the exact posterior of each datum in its rows."""
    guide, exact = local(NormalModel(), X), NormalModel().posterior_of(X)
    with torch.no_grad():
        guide.table.copy_(torch.stack([exact.mean, exact.stddev.log()], -1).unsqueeze(1))
    return guide


def test_chains_start_at_the_rows_of_their_data(short):
    """At the exact posterior of each datum every weight is p(x); at another's it is not."""
    model, rows = NormalModel(), torch.tensor([3, 1])
    source = module.annealed(model, ("table", table()), as_batch(X), rows, None, None, 0, False)
    np.testing.assert_allclose(source.value, model.log_evidence(X[rows]), atol=1e-9)
    assert source.rows.tolist() == [3, 1] and (source.std_error < 1e-6).all()


def test_longer_chains_for_those_that_short_ones_do_not_serve(monkeypatch):
    monkeypatch.setattr(module, "_STEPS", (1, 50))

    def off(x):
        """By four posterior standard deviations for the first two data."""
        shift = torch.zeros_like(x)
        shift[:2] = 4 * 0.5**0.5
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, 0.5**0.5))

    data = compare(NormalModel(), {"off": off}, X, reference="off", evidence="ais").dataset
    names = data.evidence_from.values
    assert set(names[:2]) == {"AIS-50 from 'off'"} and set(names[2:]) == {"AIS-1 from 'off'"}
    error = np.abs(data.log_evidence - NormalModel().log_evidence(X).numpy())
    assert (error < 4.5 * data.log_evidence_se + 1e-6).all()


def square(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, x.new_tensor(2.0)))
        pyro.sample("x", dist.Normal(z.square(), 0.5), obs=x)


def log_square(x):
    """log p(x) of it, by quadrature."""
    grid = torch.linspace(-14, 14, 40_001, dtype=F64).unsqueeze(-1)
    joint = dist.Normal(0.0, 2.0).log_prob(grid) + dist.Normal(grid.square(), 0.5).log_prob(x)
    return (joint.logsumexp(0) + (grid[1] - grid[0]).log()).numpy()


@pytest.mark.parametrize(
    ("width", "evidence"), [(1.0, "ais"), pytest.param(0.1, "auto", marks=pytest.mark.slow)]
)
def test_data_whose_chains_miss_a_mode_are_annealed_from_the_prior(width, evidence, monkeypatch):
    """z^2 with a guide at one of two equal modes: its chains stay there, alike, log 2 too low."""
    monkeypatch.setattr(module, "_STEPS", (20, 150))
    x = torch.tensor([2.0, 4.0, 9.0, 0.0], dtype=F64)

    def guide(x):
        peak = x.clamp_min(0.01).sqrt()
        with pyro.plate("data", len(x)):
            scale = torch.where(x > 0, width * 0.25 / peak, 0.6)
            pyro.sample("z", dist.Normal(torch.where(x > 0, peak, 0.0), scale))

    options = {"reference": "g", "evidence": evidence, "num_particles": 2000}
    data = compare(square, {"g": guide}, x, **options).dataset
    assert list(data.evidence_from.values[:3]) == ["AIS-150 from the prior"] * 3
    assert "prior" not in data.evidence_from.values[3] and data.log_evidence_good.all()
    error = np.abs(data.log_evidence - log_square(x))
    assert (error < 4.5 * data.log_evidence_se + 1e-3).all() and (data.log_evidence_se < 1).all()


def bound_of(values, errors, ess, missed):
    columns = (torch.tensor(each, dtype=F64) for each in (values, errors, ess))
    value, error, ess = columns
    return Bound("AIS", value, error, 16, {}, 0 * value, ess, None, None, "chains", missed)


def test_a_later_bound_replaces_a_better_one_only_where_it_is_trusted():
    """Of five data: better, lower and untrusted, higher and untrusted, lower by 6 errors, by 2."""
    best, every = _Best(5), torch.arange(5)
    ones, all_of_them = [0.1] * 5, torch.ones(5, dtype=torch.bool)
    best.take(every.numpy(), bound_of([-3.0] * 5, ones, [2.0] * 5, all_of_them), every, "g")
    assert not best.good.any() and best.missed.all() and set(best.names) == {"AIS from g"}
    values = [-2.0, -4.0, -2.5, -3.9, -3.2]
    best.take(every.numpy(), bound_of(values, ones, [9.0, 2.0, 2.0, 9.0, 9.0], None), every, "p")
    assert best.columns["value"].tolist() == [-2.0, -3.0, -2.5, -3.0, -3.2]
    assert best.columns["ess"].tolist() == [9.0, 2.0, 2.0, 2.0, 9.0]
    assert best.good.tolist() == [True, False, False, False, True] and not best.missed.any()
    assert [name[-1] for name in best.names] == ["p", "g", "p", "g", "p"]


def test_all_latents_as_one_datum(short):
    model = NormalModel()
    guide = local(model, X, data_plate=False)
    options = {"data_plate": False, "reference": "all", "evidence": "ais"}
    data = compare(model, {"all": guide}, X, **options).dataset
    error = abs(data.log_evidence.item() - float(model.log_evidence(X).sum()))
    assert error < 4.5 * data.log_evidence_se.item() + 1e-6
    with pytest.raises(ValueError, match=r"returned shape \[4\] .*one for each of 1 data"):
        compare(model, {"all": guide}, X, **{**options, "evidence": "exact"})


def test_a_table_brings_the_globals_that_it_was_fitted_at(short):
    def model(x):
        g = pyro.sample("g", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    given = {"g": torch.tensor(0.7, dtype=F64)}
    fitted = pv.refine(model, guide, X, given=given, seed=0, max_steps=20, progress=False)
    data = compare(model, {"t": fitted}, X, reference="t", evidence="ais").dataset
    error = np.abs(data.log_evidence - dist.Normal(0.7, 2**0.5).log_prob(X).numpy())
    assert (error < 4.5 * data.log_evidence_se + 1e-3).all()


# --- exact values


def test_a_formula_of_the_model():
    model = NormalModel()
    found = compare(model, {"narrow": narrow}, X, reference="narrow", evidence="exact")
    data = found.dataset.sel(guide="narrow")
    exact = model.log_evidence(X).numpy()
    np.testing.assert_allclose(data.log_evidence, exact)
    assert (data.log_evidence_se == 0).all() and data.log_evidence_good.all()
    np.testing.assert_allclose(data.approximation_gap, exact - data.elbo)
    np.testing.assert_allclose(data.approximation_gap_se, data.elbo_se)
    assert data.attrs["log_evidence_from"] == "exact, by NormalModel.log_evidence"
    assert data.pareto_k.notnull().all() and data.ess.notnull().all()  # the guide's stay its own
    assert "a lower bound" not in repr(found)


def test_a_sum_over_discrete_latents():
    x = torch.tensor([0.0, 1.0, 2.5], dtype=F64)

    def model(x):
        mixture(x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(x.new_ones(3)))

    found = compare(model, {"even": guide}, x, reference="even", evidence="exact").dataset
    np.testing.assert_allclose(found.log_evidence, mixture.log_evidence(x))
    assert "sum over all values of discrete latents" in found.attrs["log_evidence_from"]


def test_models_without_a_formula_are_refused():
    def model(x):
        NormalModel()(x)

    with pytest.raises(ValueError, match=r"no method log_evidence\(\*batch\).*evidence='auto'"):
        compare(model, {"narrow": narrow}, X, reference="narrow", evidence="exact")


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (lambda x: x.sum(), r"log_evidence returned shape \[\] with 1 finite numbers"),
        (lambda x: x / 0, "returned shape .4. with 0 finite numbers"),
        (lambda x: NormalModel().log_evidence(x) - 0.5, r"lies below an ELBO for 2 of 4 data"),
    ],
)
def test_wrong_formulas_are_refused(formula, message):
    class Wrong(NormalModel):
        def log_evidence(self, x):
            return formula(x)

    with pytest.raises(ValueError, match=message):
        compare(Wrong(), {"narrow": narrow}, X, reference="narrow", evidence="exact")


def test_a_formula_is_not_that_of_a_model_given_its_globals():
    class Hierarchy:
        def __call__(self, x):
            mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(mean, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def log_evidence(self, x):
            return 0 * x

    def guide(x):
        pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    given = {"given": {"mean": torch.tensor(1.0, dtype=F64)}, "reference": "g"}
    with pytest.raises(ValueError, match="its global latents are fixed"):
        compare(Hierarchy(), {"g": guide}, X, evidence="exact", **given)


# --- refusals, and what is not worth it


def test_chains_that_are_refused():
    """Of discrete proposals no chains can be had: "ais" says so, "auto" keeps the weights."""
    x = torch.tensor([0.0, 1.0, 30.0], dtype=F64)

    def model(x):
        mixture(x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(x.new_tensor([0.01, 0.01, 0.98])))

    options = {"reference": "g"}
    with pytest.raises(ValueError, match="no latent site is continuous"):
        compare(model, {"g": guide}, x, evidence="ais", **options)
    found = compare(model, {"g": guide}, x, evidence="auto", **options)
    assert found.dataset.attrs["log_evidence_from"] == "IWAE-1000 through 'g'"
    assert "annealed chains are not to be had: no latent site is continuous" in repr(found)
    with pytest.raises(ValueError, match=r"evidence='best': one of \('auto', 'iwae', 'ais'"):
        compare(model, {"g": guide}, x, evidence="best", **options)


def tiny(values, errors=0.1):
    """A dataset of one guide, of which nothing but log p(x) and the ELBO is looked at."""
    both, size = ("guide", "datum"), len(values)
    columns = {
        name: ("datum", np.array(values if name == "log_evidence" else [fill] * size))
        for name, fill in {
            "log_evidence": None,
            "log_evidence_se": errors,
            "log_evidence_skewness": 0.0,
            "log_evidence_ess": 2.0,
            "log_evidence_pareto_k": 1.0,
            "log_evidence_tail_share": 9.0,
            "log_evidence_good": False,
            "evidence_from": "IWAE",
        }.items()
    }
    zeros = np.zeros((1, size))
    for name in ("elbo", "elbo_se", "elbo_skewness"):
        columns[name] = (both, zeros - 5 if name == "elbo" else zeros)
    for end in ("", "_se", "_skewness"):
        columns[f"approximation_gap{end}"] = (both, zeros + 1)
    return xr.Dataset(columns, coords={"guide": ["g"]}, attrs={"num_particles": 100})


def test_a_clearly_lower_bound_is_left_out_under_auto():
    source = Source(
        np.array([0, 1]),
        np.array(["AIS", "AIS"], dtype=object),
        np.array([-1.3, -1.5]),
        np.array([0.1, 0.1]),
        np.zeros(2),
        np.array([3.0, 3.0]),
        np.array([True, True]),
        16,
    )
    assert worse(tiny([-1.0, -1.0, -1.0]), source).tolist() == [False, True]
    data = tiny([-1.0, -1.0, -1.0])
    take(data, source, {"g": "g"}, "auto")
    assert data.log_evidence.values.tolist() == [-1.3, -1.0, -1.0]
    assert list(data.evidence_from.values) == ["AIS", "IWAE", "IWAE"]
    assert data.approximation_gap.values[0] == pytest.approx([3.7, 1.0, 1.0])
    assert data.ais.values[:2].tolist() == [-1.3, -1.5] and math.isnan(data.ais.values[2])
    data = tiny([-1.0, -1.0, -1.0])
    take(data, source, {"g": "g"}, "ais")
    assert data.log_evidence.values.tolist() == [-1.3, -1.5, -1.0]


def test_a_guide_without_a_reference_keeps_gaps_of_no_number():
    data = tiny([-1.0])
    one = np.zeros(1)
    names = np.array(["AIS"], dtype=object)
    source = Source(np.array([0]), names, one, one, one, one, np.array([True]), 16)
    take(data, source, {}, "ais")
    assert data.approximation_gap.values.tolist() == [[1.0]]
