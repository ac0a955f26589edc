"""Both bounds lie where they should: exact evidence between them, by algebra and quadrature."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.evaluation.bounds import Bound
from pyro_vae.sampling.annealing import Path
from tests.models import GammaPoisson, NormalModel, encoder, factor_analysis
from tests.sampling.pairs import (
    chain_after_data,
    chain_after_data_evidence,
    local,
    masked_model,
    normal_mixture,
    normal_mixture_joint,
    two_sites,
    two_sites_evidence,
)

F64 = torch.float64


def bdmc(model, guide, *batch, **options):
    """Few eager steps, unless said otherwise."""
    options = {"num_chains": 8, "num_steps": 10, "seed": 0, "compile": False, **options}
    return pv.bdmc(model, guide, *batch, progress=False, **options)


def blank(num_data, *shape):
    return torch.zeros(num_data, *shape, dtype=F64)


def holds(sandwich, exact, errors=3.0):
    """Whether mean bounds enclose the mean evidence, their errors from the spread over data."""
    low, high = sandwich.lower.value - exact, sandwich.upper.value - exact
    error = [float(each.std()) / len(exact) ** 0.5 for each in (low, high)]
    return bool(low.mean() < errors * error[0]) and bool(high.mean() > -errors * error[1])


# --- data simulated from the model


def two_modes(x):
    """z ~ Normal(0, 2) in the plate, x ~ Normal(z^2, 1): modes at plus and minus sqrt(x)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 2.0))
        pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)


def two_modes_evidence(x):
    """By quadrature over z."""
    z = torch.linspace(-14, 14, 40_001, dtype=F64)
    joint = dist.Normal(0.0, 2.0).log_prob(z) + dist.Normal(z**2, 1.0).log_prob(x.unsqueeze(-1))
    return joint.logsumexp(-1) + math.log(float(z[1] - z[0]))


def masked_evidence(x, seen):
    """By quadrature over w where it is there; z is integrated out by algebra."""
    w = torch.linspace(1e-6, 40, 40_001, dtype=F64)
    scale = (1 + 0.7**2) ** 0.5
    log_prior = dist.Gamma(w.new_tensor(2.0), 1.0).log_prob(w)
    joint = log_prior + dist.Normal(w, scale).log_prob(x.unsqueeze(-1))
    there = joint.logsumexp(-1) + math.log(float(w[1] - w[0]))
    return torch.where(seen, there, dist.Normal(0.0, scale).log_prob(x))


EXACT = {
    "factor analysis": (factor_analysis(), (6,), factor_analysis().log_evidence),
    "Gamma-Poisson": (GammaPoisson(), (), GammaPoisson().log_evidence),
    "two modes": (two_modes, (), two_modes_evidence),
    "summed out": (normal_mixture, (), lambda x: normal_mixture_joint(x).logsumexp(-1)),
    "inner plate": (two_sites, (2,), two_sites_evidence),
    "latent after data": (chain_after_data, (2,), chain_after_data_evidence),
}


@pytest.mark.parametrize(
    ("name", "start"), [*((each, "guide") for each in EXACT), ("Gamma-Poisson", "prior")]
)
def test_bounds_enclose_the_exact_evidence(name, start):
    """On average over 60 data, to three standard errors; and neither is far."""
    model, shape, log_evidence = EXACT[name]
    x = blank(60, *shape)
    dream = None
    if name == "latent after data":
        dream = lambda drawn: torch.stack([drawn["first"], drawn["second"]], -1)  # noqa: E731
    options = {"num_data": 60, "start": start, "num_steps": 30, "dream": dream}
    sandwich = bdmc(model, local(model, x), x, **options)
    (data,) = sandwich.data
    assert data.shape == x.shape and data.std() > 0.1 and sandwich.simulated
    exact = log_evidence(data)
    assert holds(sandwich, exact)
    assert sandwich.mean_width > -2 * sandwich.mean_width_std_error
    for bound in (sandwich.lower, sandwich.upper):
        assert (bound.value - exact).abs().median() < 1.2


@pytest.mark.parametrize("family", [None, pv.families.FullRankNormal()])
def test_latents_that_a_mask_leaves_out_are_drawn_from_the_base(family):
    """Half of the w are not there. Their coordinates have the base's density on the whole way."""
    seen = torch.arange(80) % 2 == 0
    x = blank(80)
    guide = pv.LocalGuide(masked_model, num_data=80, example=(x, seen), family=family).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        guide.table += 0.2 * torch.randn(guide.table.shape, generator=generator, dtype=F64)
    sandwich = bdmc(masked_model, guide, x, seen, num_data=80, num_steps=25)
    data, same = sandwich.data
    assert torch.equal(same, seen)
    exact = masked_evidence(data, seen)
    for some in (seen, ~seen):
        low, high = (b.value[some] - exact[some] for b in (sandwich.lower, sandwich.upper))
        assert low.mean() < 3 * low.std() / 40**0.5 and high.mean() > -3 * high.std() / 40**0.5
        assert low.abs().median() < 0.4 and high.abs().median() < 0.4


def test_reverse_chains_that_do_not_leave_their_draw_are_untrusted(monkeypatch):
    """All weights of a datum are then equal: the error is zero, and the bound far above."""
    monkeypatch.setattr(
        Path, "kernel", lambda *_: lambda density, point, power, stream: (point,) * 3
    )
    model, x = NormalModel(), blank(5)
    sandwich = bdmc(model, local(model, x), x, num_data=5)
    assert (sandwich.upper.std_error < 1e-12).all() and sandwich.untrusted.all()
    assert "for 5 of 5 data reverse chains have not left the draw" in repr(sandwich)


def test_without_a_draw_to_start_at_the_upper_bound_is_infinite(monkeypatch):
    """Of a draw on the edge of a support, whose coordinate is infinite."""
    model, x = NormalModel(), blank(3)
    guide = local(model, x)
    usual = bdmc(model, guide, x, num_data=3)
    module = importlib.import_module("pyro_vae.evaluation.bdmc")
    starts = module.starts_of_latents

    def beyond(*arguments):
        z = starts(*arguments)
        z[:, 0], z[0, 1] = math.inf, math.inf
        return z

    monkeypatch.setattr(module, "starts_of_latents", beyond)
    found = bdmc(model, guide, x, num_data=3)
    assert found.upper.value[0] == math.inf and found.untrusted[0]
    assert found.upper.value[1].isfinite()
    assert found.upper.value[2] == usual.upper.value[2]
    assert torch.equal(found.lower.value, usual.lower.value)


def test_reverse_chains_from_the_exact_posterior_know_the_evidence():
    """With the base equal to the posterior every weight is p(x), forth and back."""
    model = factor_analysis()
    torch.manual_seed(0)
    example = model.data(6)
    first = bdmc(model, local(model, example), example, num_data=6)
    (x,) = first.data
    guide = pv.LocalGuide(model, num_data=6, example=x, family=pv.families.FullRankNormal())
    guide = guide.double()
    root = torch.linalg.cholesky(model.posterior_precision.inverse()).expand(6, -1, -1)
    with torch.no_grad():
        guide.table.copy_(guide.family.from_gaussian(model.posterior_mean(x), root))
    again = bdmc(model, guide, example, num_data=6)
    assert torch.equal(again.data[0], x)
    torch.testing.assert_close(again.upper.value, model.log_evidence(x), rtol=0, atol=1e-9)
    torch.testing.assert_close(again.lower.value, model.log_evidence(x), rtol=0, atol=1e-9)
    assert (again.width.abs() < 1e-9).all()


def test_few_steps_are_wide_apart_and_many_close():
    model = factor_analysis()
    x = blank(40, 6)
    wide, close = (bdmc(model, local(model, x), x, num_data=40, num_steps=n) for n in (1, 50))
    assert torch.equal(wide.data[0], close.data[0])
    exact = model.log_evidence(wide.data[0])
    assert (wide.upper.value - exact).mean() > 1 and (exact - wide.lower.value).mean() > 1
    assert wide.upper.value.mean() > exact.mean() > wide.lower.value.mean()
    assert close.mean_width < 0.2 * wide.mean_width
    assert wide.untrusted.sum() > 2 * close.untrusted.sum()
    assert "few chains carry a bound" in repr(wide)


@pytest.mark.slow
def test_the_sandwich_of_ten_latents_is_under_a_tenth_of_a_nat():
    """Factor analysis of 10 latents and 20 features, from a fitted encoder."""
    model = factor_analysis(features=20, latents=10)
    torch.manual_seed(0)
    x = model.data(200)
    guide = pv.AmortizedGuide(model, encoder(20, 64), example=x)
    pv.fit(model, guide, x, epochs=200, seed=0, progress=False)
    sandwich = pv.bdmc(model, guide, x, num_data=50, seed=0, progress=False)
    exact = model.log_evidence(*sandwich.data)
    assert holds(sandwich, exact)
    assert sandwich.mean_width + 2 * sandwich.mean_width_std_error < 0.1
    assert not sandwich.untrusted.any()
    covered = (sandwich.upper.value - exact).abs() < 3 * sandwich.upper.std_error
    assert covered.double().mean() > 0.95


def test_covariates_stay_row_by_row():
    def model(x, weight):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(weight * z, 0.1), obs=x)

    x, weight = blank(2), torch.tensor([0.1, 100.0], dtype=F64)
    guide = pv.LocalGuide(model, num_data=60, example=(x, weight)).double()
    sandwich = bdmc(model, guide, x, weight, num_data=60)
    data, same = sandwich.data
    assert torch.equal(same, weight.repeat(30))
    assert data[::2].std() < 1 < 30 < data[1::2].std()
    assert holds(sandwich, dist.Normal(0.0, (same**2 + 0.01).sqrt()).log_prob(data))


def test_a_mapping_comes_back_as_one_and_dream_makes_the_arguments():
    model = NormalModel()

    def logs(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("log", dist.Normal(z, 1.0), obs=x.log())

    x = blank(20)
    named = bdmc(model, local(model, x), {"x": x}, num_data=20)
    assert set(named.data) == {"x"} and holds(named, model.log_evidence(named.data["x"]))
    positive = torch.ones(20, dtype=F64)
    guide = local(logs, positive)
    with pytest.raises(ValueError, match=r"bdmc cannot tell .* observed site 'log' .*give dream="):
        bdmc(logs, guide, positive, num_data=20)
    found = bdmc(logs, guide, positive, num_data=20, dream=lambda drawn: drawn["log"].exp())
    assert holds(found, model.log_evidence(found.data[0].log()))


def test_globals_are_held_while_data_are_drawn():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    mean = torch.tensor(50.0, dtype=F64)
    sandwich = bdmc(model, guide, blank(30), num_data=30, given={"mean": mean})
    assert (sandwich.data[0].mean() - 50).abs() < 2
    assert holds(sandwich, dist.Normal(50.0, 2**0.5).log_prob(sandwich.data[0]))
    assert "given mean at the values passed" in repr(sandwich)


def test_one_datum_of_all_latents():
    model = NormalModel()
    x = blank(5)
    guide = local(model, x, data_plate=False)
    sandwich = bdmc(model, guide, x, data_plate=False, num_data=1, num_steps=50, num_chains=50)
    exact = model.log_evidence(*sandwich.data).sum()
    assert sandwich.width.shape == (1,)
    assert (sandwich.lower.value - exact).abs() < 4 * sandwich.lower.std_error + 0.05
    assert (sandwich.upper.value - exact).abs() < 4 * sandwich.upper.std_error + 0.05
    assert sandwich.mean_width_std_error == pytest.approx(float(sandwich.width_std_error))
    with pytest.raises(ValueError, match="num_data=5: with data_plate=False"):
        bdmc(model, guide, x, data_plate=False, num_data=5)


def test_missing_values_stay_missing():
    model = pv.MissingData(NormalModel())
    x = blank(40, 2)
    x[::2, 0] = math.nan
    sandwich = bdmc(model, local(model, x), x, num_data=40)
    (data,) = sandwich.data
    assert torch.equal(data.isnan(), x.isnan())
    each = dist.Normal(0.0, 2**0.5).log_prob(data.nan_to_num(0.0))
    assert holds(sandwich, torch.where(x.isnan(), 0.0, each).sum(-1))


# --- data at hand


@pytest.fixture(scope="module")
def drawn():
    """Three data of a normal model, a guide, and draws of chains that have not converged."""
    model, x = NormalModel(), torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    guide = local(model, x)
    few = {"num_draws": 20, "num_warmup": 20, "seed": 0, "progress": False, "compile": False}
    return model, guide, x, pv.sample_posterior(model, guide, x, **few)


def test_data_at_hand_are_bounded_from_draws_of_chains():
    model = GammaPoisson()
    x = torch.tensor([0.0, 3.0, 8.0], dtype=F64)
    guide = local(model, x)
    chains = {"num_draws": 200, "num_warmup": 60, "seed": 1, "progress": False, "compile": False}
    samples = pv.sample_posterior(model, guide, x, **chains)
    sandwich = bdmc(model, guide, x, posterior=samples, num_chains=60)
    assert not sandwich.simulated and torch.equal(sandwich.data[0], x)
    for bound in (sandwich.lower, sandwich.upper):
        error = (bound.value - model.log_evidence(x)).abs()
        assert (error < 4.5 * bound.std_error + 0.02).all() and bound.std_error.median() < 0.25
    assert "(3 data at hand)" in repr(sandwich)
    assert "as good as the draws of chains" in repr(sandwich)
    assert torch.equal(sandwich.mixed, samples.converged)
    expected = math.hypot(sandwich.lower.mean_std_error, sandwich.upper.mean_std_error)
    assert sandwich.mean_width_std_error == pytest.approx(expected)


def test_data_whose_chains_have_not_converged_are_untrusted(drawn):
    model, guide, x, samples = drawn
    assert not samples.converged.any()
    sandwich = bdmc(model, guide, x, posterior=samples, num_steps=20)
    text = "for 3 of 3 data these chains have not converged"
    assert sandwich.untrusted.all() and text in repr(sandwich)


def test_without_draws_chains_are_run(monkeypatch):
    import importlib

    module = importlib.import_module("pyro_vae.evaluation.bdmc")
    model = NormalModel()
    x = torch.tensor([0.0, 1.0], dtype=F64)
    called = []
    original = module.sample_posterior

    def few(*args, **options):
        called.append(options["seed"])
        return original(*args, num_draws=100, num_warmup=50, **options)

    monkeypatch.setattr(module, "sample_posterior", few)
    assert bdmc(model, local(model, x), x, seed=7).width.shape == (2,)
    assert called == [7]


def test_draws_of_other_data_are_refused(drawn):
    model, guide, x, samples = drawn
    assert bdmc(model, guide, x, posterior=samples).width.isfinite().all()
    with pytest.raises(ValueError, match=r"another model or of other data.* 1 of 3 data \(\[1\]\)"):
        bdmc(model, guide, torch.tensor([0.0, 3.0, 2.0], dtype=F64), posterior=samples)
    with pytest.raises(ValueError, match="has 80 draws of 3 data, but 8 chains of 2 data"):
        bdmc(model, local(model, x[:2]), x[:2], posterior=samples)
    with pytest.raises(ValueError, match="has 80 draws of 3 data, but 81 chains of 3 data"):
        bdmc(model, guide, x, posterior=samples, num_chains=81)
    other = dataclasses.replace(samples, draws={"y": samples.draws["z"]})
    with pytest.raises(ValueError, match=r"no draws of latent sites \['z'\], only of \['y'\]"):
        bdmc(model, guide, x, posterior=other)


# --- the result


def sandwich_of(lower, upper, *, simulated=True, error=0.1, ess=8.0, mixed=True):
    lower, upper = (torch.tensor(each, dtype=F64) for each in (lower, upper))
    errors, sizes = torch.full_like(lower, error), torch.full_like(lower, ess)
    bounds = [
        Bound(name, value, errors, 10, skewness=0 * errors, ess=sizes, mean_of="chains")
        for name, value in (("BDMC-9 from below", lower), ("BDMC-9 from above", upper))
    ]
    good = torch.full(lower.shape, mixed)
    return pv.Sandwich(*bounds, (lower,), simulated, good)


def test_widths_and_errors_by_hand():
    sandwich = sandwich_of([-3.0, -4.0, -6.0], [-2.5, -3.9, -5.7])
    torch.testing.assert_close(sandwich.width, torch.tensor([0.5, 0.1, 0.3], dtype=F64))
    torch.testing.assert_close(sandwich.width_std_error, torch.full((3,), 0.02**0.5, dtype=F64))
    assert sandwich.mean_width == pytest.approx(0.3)
    assert sandwich.mean_width_std_error == pytest.approx(0.2 / 3**0.5)
    alike = sandwich_of([-3.0, -4.0], [-2.5, -3.5])  # of two data, as wide by chance
    assert alike.mean_width_std_error == pytest.approx(0.1)
    at_hand = sandwich_of([-3.0, -4.0], [-2.5, -3.9], simulated=False)
    assert at_hand.mean_width_std_error == pytest.approx(0.1)  # hypot of two of 0.1 / sqrt(2)
    assert repr(sandwich) == (
        "BDMC-9: log p(x) between -4.3333 ± 0.0577 and -4.0333 ± 0.0577 nats per datum, 0.3000 ± "
        "0.1155 apart (3 data simulated from the model)"
    )


def test_bounds_that_cross_are_untrusted():
    """Five errors of sqrt(0.02) are 0.71 nats."""
    sandwich = sandwich_of([-3.0, -3.0, -3.0], [-2.0, -3.6, -3.8])
    assert sandwich.untrusted.tolist() == [False, False, True]
    assert "for 1 of 3 data the upper bound lies below the lower one" in repr(sandwich)


def test_data_of_which_forward_chains_miss_a_mode_are_untrusted():
    sandwich = sandwich_of([-3.0, -3.0, -3.0], [-2.0, -2.0, -2.0])
    lower = dataclasses.replace(sandwich.lower, missed=torch.tensor([False, True, False]))
    sandwich = dataclasses.replace(sandwich, lower=lower)
    assert sandwich.untrusted.tolist() == [False, True, False]
    assert "for 1 of 3 data forward chains miss a mode that holds more than 0.01" in repr(sandwich)
    assert "few chains" not in repr(sandwich) and "lies below" not in repr(sandwich)


def test_few_chains_are_untrusted():
    assert sandwich_of([-3.0], [-2.0], ess=2.9).untrusted.all()
    assert not sandwich_of([-3.0], [-2.0], ess=3.1).untrusted.any()
    assert sandwich_of([-3.0], [-2.0], mixed=False).untrusted.all()


def test_a_dataset_holds_both_sides():
    sandwich = sandwich_of([-3.0, -4.0], [-2.5, -3.9])
    data = sandwich.dataset
    assert data["lower"].values.tolist() == [-3.0, -4.0]
    assert data["upper_se"].values.tolist() == [0.1, 0.1]
    assert data["width"].values.tolist() == pytest.approx([0.5, 0.1])
    assert data["lower_ess"].values.tolist() == [8.0, 8.0]
    assert data["untrusted"].values.tolist() == [False, False]
    assert data.attrs["name"] == "BDMC-9" and data.attrs["units"] == "nats"
    assert data.attrs["simulated"] == 1 and data.attrs["num_chains"] == 10


def test_a_seed_decides():
    model, x = NormalModel(), blank(4)
    guide = local(model, x)
    one, same, other = (bdmc(model, guide, x, num_data=4, seed=s) for s in (3, 3, 4))
    assert torch.equal(one.upper.value, same.upper.value) and torch.equal(one.data[0], same.data[0])
    assert not torch.equal(one.data[0], other.data[0])
    torch.manual_seed(5)
    first = bdmc(model, guide, x, num_data=4, seed=None)
    torch.manual_seed(5)
    assert torch.equal(first.width, bdmc(model, guide, x, num_data=4, seed=None).width)


# --- refusals


def test_bad_input_is_refused_by_name(drawn):
    model, guide, x, samples = drawn
    for options, message in (
        ({"num_data": 0}, "num_data=0"),
        ({"num_data": 3, "num_chains": 1}, "num_chains=1"),
        ({"num_data": 3, "num_steps": 0}, "num_steps=0"),
        ({"num_data": 3, "start": "posterior"}, "start='posterior'"),
        ({"num_data": 3, "schedule": "cosine"}, "schedule='cosine'"),
        ({"num_data": 3, "seed": -1}, "seed=-1"),
        ({"dream": dict}, "dream= puts simulated values into a batch: give num_data"),
    ):
        with pytest.raises(ValueError, match=message):
            bdmc(model, guide, x, **options)
    with pytest.raises(TypeError, match="posterior=3: what pyro_vae.sample_posterior returns"):
        bdmc(model, guide, x, posterior=3)
    with pytest.raises(ValueError, match="posterior= is for the data at hand"):
        bdmc(model, guide, x, num_data=3, posterior=samples)
