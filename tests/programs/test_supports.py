"""Supports: zero outside, in bounds and losses; densities are no proposals for masses."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td

import pyro_vae as pv
from pyro_vae.programs.supports import inside, is_discrete, supported_log_prob

F64 = torch.float64
X = torch.tensor([-1.0, 0.5, 2.0], dtype=F64)


def num(value):
    return torch.tensor(value, dtype=F64)


@pytest.mark.parametrize(
    ("fn", "value", "wanted"),
    [
        (dist.Exponential(num(1.0)), [-1.0, 0.0, 2.0], [0, 1, 1]),
        (dist.LogNormal(num(0.0), num(1.0)), [-1.0, 0.0, 2.0], [0, 0, 1]),
        (dist.Beta(num(2.0), num(2.0)), [-0.1, 0.5, 1.1], [0, 1, 0]),
        (dist.Uniform(num(-1.0), num(1.0)), [-1.1, 0.5, 1.1], [0, 1, 0]),
        (dist.Poisson(num(2.0)), [-1.0, 0.5, 3.0], [0, 0, 1]),
        (dist.Binomial(3, num(0.5)), [-1.0, 3.0, 4.0], [0, 1, 0]),
        (dist.Categorical(num([0.5, 0.5])), [0.0, 1.0, 2.0], [1, 1, 0]),
        (dist.HalfNormal(num(1.0)), [-1.0, 0.0, 2.0], [0, 1, 1]),
        (dist.Pareto(num(2.0), num(1.0)), [1.0, 2.0, 3.0], [0, 1, 1]),
        # Torch calls the support of these the reals.
        (
            dist.TransformedDistribution(
                dist.Beta(num(2.0), num(2.0)), td.AffineTransform(2.0, 3.0)
            ),
            [1.9, 2.5, 5.1],
            [0, 1, 0],
        ),
        (
            dist.TransformedDistribution(
                dist.Normal(num(0.0), num(1.0)), [td.ExpTransform(), td.AffineTransform(2.0, -1.0)]
            ),
            [1.9, 2.5, 1.0],
            [1, 0, 1],
        ),
    ],
    ids=lambda fn: type(fn).__name__ if isinstance(fn, td.Distribution) else "",
)
def test_no_density_outside(fn, value, wanted):
    with pyro.validation_enabled(False):
        value = torch.tensor(value, dtype=F64)
        if isinstance(fn, dist.Categorical):
            value = value.long()
        wanted = torch.tensor(wanted).bool()
        assert inside(fn, value).tolist() == wanted.tolist()
        found = supported_log_prob(fn, value)
        assert (found == -math.inf).tolist() == (~wanted).tolist()
        torch.testing.assert_close(found[wanted], fn.log_prob(value[wanted]))


def test_no_gradient_comes_from_outside():
    value = torch.tensor([-1.0, 0.5], dtype=F64, requires_grad=True)
    rate = torch.tensor(2.0, dtype=F64, requires_grad=True)
    supported_log_prob(dist.Gamma(rate, rate), value)[1].backward()
    assert value.grad[0] == 0
    assert rate.grad.isfinite()


@pytest.mark.parametrize(
    ("fn", "discrete"),
    [
        (dist.Poisson(1.0), True),
        (dist.OneHotCategorical(torch.ones(3)), True),
        (dist.ZeroInflatedPoisson(torch.tensor(1.0), gate=torch.tensor(0.5)), True),
        (dist.Bernoulli(0.5).expand([3]).to_event(1).mask(False), True),
        (dist.RelaxedBernoulli(torch.tensor(1.0), torch.tensor(0.5)), False),
        (dist.LogNormal(0.0, 1.0), False),
        (dist.Delta(torch.zeros(())), None),
    ],
)
def test_masses_and_densities(fn, discrete):
    assert is_discrete(fn) is discrete


# --- a proposal that is wider than the prior


def delays(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Exponential(num(1.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def wide(x):
    width = pyro.param("width", num(1.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, width))


EXACT = 0.5 - X + torch.special.log_ndtr(X - 1)  # of an Exponential plus a Normal


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("compile", [False, "replay"])
def test_importance_weights_of_a_wide_proposal(validate, compile, caplog):
    with pyro.validation_enabled(validate):
        options = {"num_particles": 40_000, "seed": 0, "compile": compile}
        bound = pv.iwae_bound(delays, wide, X, **options)
        assert ((bound.value - EXACT).abs() < 5 * bound.std_error).all()
        assert not caplog.records
        found = pv.elbo(delays, wide, X, **options)
    assert (found.value == -math.inf).all()
    assert "ELBO is -inf for 3 of 3 data" in caplog.text
    assert "'z' (Exponential)" in caplog.text


def test_draws_of_a_wide_proposal_for_arviz(caplog):
    pv.to_arviz(delays, wide, X, num_draws=50, seed=0)
    assert "have no density under the model, through 'z' (Exponential)" in caplog.text
    caplog.clear()
    data = pv.to_arviz(delays, wide, X, num_draws=2000, seed=0, resample="psis")
    assert "no density" not in caplog.text
    z = data.posterior["z"].values
    assert (z >= 0).all()
    # E[z | x] of an Exponential plus a Normal: that of Normal(x - 1, 1) above zero.
    mean = (
        X
        - 1
        + torch.exp(-0.5 * (X - 1) ** 2 - torch.special.log_ndtr(X - 1)) / (2 * torch.pi) ** 0.5
    )
    assert abs(z.mean((0, 1)) - mean.numpy()).max() < 0.15


def test_compare_and_refine_take_a_wide_proposal(caplog):
    guides = {"wide": wide, "refined": pv.families.Normal()}
    found = pv.compare(delays, guides, X, num_particles=4000, seed=0).dataset
    assert (found["elbo"].sel(guide="wide") == -math.inf).all()
    assert "the ELBO of 'wide' is -inf for 3 of 3 data" in caplog.text
    for name in ("iwae_bound", "log_evidence"):
        value = found[name] if name == "log_evidence" else found[name].sel(guide="wide")
        error = found[f"{name}_se"]
        error = error if name == "log_evidence" else error.sel(guide="wide")
        assert (abs(value.values - EXACT.numpy()) < 5 * error.values).all()
    refined = found["elbo"].sel(guide="refined").values
    assert (refined > EXACT.numpy() - 0.3).all()
    assert (refined < EXACT.numpy()).all()


@pytest.mark.parametrize("validate", [True, False])
def test_losses_say_that_a_proposal_is_wide(validate):
    pyro.clear_param_store()
    with pyro.validation_enabled(validate):
        for loss in (
            pv.ELBO(kl="sample"),
            pv.ELBO(3),
            *(pv.ELBO(4, "sample", e) for e in ("stl", "score")),
        ):
            torch.manual_seed(0)
            with pytest.raises(ValueError, match=r"loss is infinite.*'z' \(Exponential\)"):
                loss.loss(delays, wide, X)
        for estimator in ("pathwise", "stl", "dreg"):
            torch.manual_seed(0)
            with pytest.raises(ValueError, match=r"'z' \(Exponential\).*WakeSleep"):
                pv.IWAE(50, estimator).loss_and_grads(delays, wide, X)
        torch.manual_seed(0)
        value = pv.IWAE(40_000).loss(delays, wide, X)  # the value is right, and the bound tight
        assert value == pytest.approx(-EXACT.sum().item(), abs=0.05)
        svi = pv.CompiledSVI(delays, wide, pyro.optim.Adam({"lr": 0.01}), pv.WakeSleep(200))
        losses = [svi.step(X) for _ in range(150)]
        assert svi.mode == "replayed"
    assert sum(losses[-50:]) / 50 == pytest.approx(-EXACT.sum().item(), abs=0.1)
    pyro.clear_param_store()


def test_an_infinite_kl_is_told_whatever_is_drawn():
    """KL(Normal, Gamma) is infinite, though a Normal at 9 is hardly ever below zero."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(num(2.0), num(1.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(num(9.0), 1.0))

    for validate in (True, False):
        with (
            pyro.validation_enabled(validate),
            pytest.raises(ValueError, match="loss is infinite.*'z'"),
        ):
            pv.ELBO().loss(model, guide, X)
    assert math.isfinite(pv.ELBO(kl="sample").loss(model, guide, X))


def test_a_step_that_is_replayed_says_so_too():
    """At first no draw is outside; once the guide is moved there, the next step must tell."""
    pyro.clear_param_store()

    def guide(x):
        loc = pyro.param("loc", num(9.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    torch.manual_seed(0)
    optim = pyro.optim.SGD({"lr": 0.0})
    svi = pv.CompiledSVI(delays, guide, optim, pv.ELBO(kl="sample"))
    for _ in range(5):
        svi.step(X)
    assert svi.mode == "replayed"
    with torch.no_grad():
        pyro.param("loc").fill_(-3.0)
    with pytest.raises(ValueError, match=r"loss is infinite, at sites 'z' of the model, outside"):
        svi.step(X)
    pyro.clear_param_store()


def test_counts_by_a_proposal_of_more_counts():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Binomial(5, num(0.3)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Poisson(num(2.0)))

    counts = torch.arange(6, dtype=F64)
    joint = dist.Binomial(5, num(0.3)).log_prob(counts).unsqueeze(1)
    joint = joint + dist.Normal(counts.unsqueeze(1), 1.0).log_prob(X)
    bound = pv.iwae_bound(model, guide, X, num_particles=40_000, seed=0)
    assert ((bound.value - joint.logsumexp(0)).abs() < 5 * bound.std_error).all()


def test_a_rate_below_zero_weighs_nothing():
    """z ~ Exponential(1), x ~ Poisson(z): p(x) = 2^-(x + 1); a rate below zero is no rate."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(num(1.0)))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + 1) / 2, 1.0))

    x = torch.arange(3, dtype=F64)
    with pyro.validation_enabled(False):
        bound = pv.iwae_bound(model, guide, x, num_particles=40_000, seed=0)
    assert ((bound.value + (x + 1) * math.log(2)).abs() < 5 * bound.std_error).all()
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"values of 'z' \(Exponential\) outside the support"):
        pv.ELBO(20).loss(model, guide, torch.zeros(20, dtype=F64))


def test_a_likelihood_whose_support_a_latent_draws():
    """x ~ Uniform(0, t), t ~ Uniform(0, 4): p(x) = log(4 / x) / 4."""

    def model(x):
        with pyro.plate("data", len(x)):
            t = pyro.sample("t", dist.Uniform(num(0.0), num(4.0)))
            pyro.sample("x", dist.Uniform(num(0.0), t), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("t", dist.LogNormal(num(1.0), 1.0))

    x = torch.tensor([0.5, 1.0, 3.5], dtype=F64)
    bound = pv.iwae_bound(model, guide, x, num_particles=40_000, seed=0)
    assert ((bound.value - (torch.log(4 / x) / 4).log()).abs() < 5 * bound.std_error).all()
    with pytest.raises(ValueError, match=r"observed site 'x': values outside the support"):
        pv.elbo(delays_of_counts, guide, x - 1, seed=0)


def delays_of_counts(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("t", dist.Normal(num(0.0), 1.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


@pytest.mark.parametrize("where", ["statement", "distribution", "event"])
@pytest.mark.parametrize("validate", [True, False])
def test_values_outside_that_a_mask_leaves_out(where, validate):
    """A count of -1 stands for a missing one: the loss is that of the other data alone."""
    pyro.clear_param_store()
    x = torch.tensor([3.0, -1.0, 0.0], dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("z", dist.Normal(num(0.0), 1.0)).exp()
            if where == "event":
                fn = dist.Poisson(rate.unsqueeze(-1)).mask(x.unsqueeze(-1) >= 0).to_event(1)
                pyro.sample("x", fn, obs=x.unsqueeze(-1))
            elif where == "distribution":
                pyro.sample("x", dist.Poisson(rate).mask(x >= 0), obs=x)
            else:
                with pyro.poutine.mask(mask=x >= 0):
                    pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        loc = pyro.param("loc", num(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    with pyro.validation_enabled(validate):
        torch.manual_seed(0)
        loss = pv.ELBO().loss_and_grads(model, guide, x)
        gradient = pyro.param("loc").grad.item()
        total = pv.log_weights(model, guide, x, num_particles=4, seed=0).total
    torch.manual_seed(0)
    z = 0.1 + torch.randn(3, dtype=F64)
    seen = x >= 0
    score = (x * z - z.exp() - torch.lgamma(x + 1)).masked_fill(~seen, 0.0)
    assert loss == pytest.approx(3 * 0.1**2 / 2 - score.sum().item())
    slope = ((x - z.exp()) * seen).sum() - 3 * 0.1
    assert gradient == pytest.approx(-slope.item())
    assert total.isfinite().all()
    pyro.clear_param_store()


# --- a density for a mass


def kinds(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.OneHotCategorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(c @ torch.tensor([-1.0, 0.0, 1.0]), 1.0), obs=x)


def switches(x):
    with pyro.plate("data", len(x)):
        b = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0])[b.long()], 1.0), obs=x)


def shares(x):
    with pyro.plate("data", len(x)):
        t = pyro.sample("c", dist.Beta(torch.tensor(2.0), torch.tensor(2.0)))
        pyro.sample("x", dist.Normal(t, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "proposal"),
    [
        (kinds, dist.RelaxedOneHotCategorical(torch.tensor(0.5), probs=torch.ones(3) / 3)),
        (
            kinds,
            dist.RelaxedOneHotCategoricalStraightThrough(
                torch.tensor(0.5), probs=torch.ones(3, 3) / 3
            ),
        ),
        (switches, dist.RelaxedBernoulli(torch.tensor(0.5), torch.tensor(0.5))),
        (shares, dist.Bernoulli(torch.tensor(0.5))),
    ],
)
def test_a_density_for_a_mass_is_refused(model, proposal):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", proposal)

    x = torch.zeros(3)
    for call in (
        lambda: pv.iwae_bound(model, guide, x),
        lambda: pv.to_arviz(model, guide, x),
        lambda: pv.compare(model, {"guide": guide}, x),
        lambda: pv.ELBO(1).loss(model, guide, x),
        lambda: pv.ELBO(2).loss(model, guide, x),
        lambda: pv.IWAE(2).loss(model, guide, x),
        lambda: pv.WakeSleep(2).loss(model, guide, x),
    ):
        with pytest.raises(ValueError, match=r"latent site 'c' has .*whose ratio is no weight"):
            call()


def test_edges_that_differ_by_datum_are_taken_block_by_block():
    """More data than a block holds, each with an interval of its own."""
    high = torch.linspace(1.0, 2.0, 300, dtype=torch.float64)

    def model(high):
        with pyro.plate("data", len(high)):
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(high), high))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=torch.zeros_like(high))

    def guide(high):
        with pyro.plate("data", len(high)):
            pyro.sample("z", dist.Uniform(torch.zeros_like(high), high))

    total = pv.log_weights(model, guide, high, num_particles=3).total
    exact = torch.full_like(total, -0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(total, exact)


@pytest.mark.parametrize("call", [pv.iwae_bound, pv.elbo, pv.ELBO(1).loss, pv.IWAE(2).loss])
def test_a_density_over_all_of_space_is_none_on_a_simplex(call):
    """No draw of a box lies there; those within rounding of it have log p(x) - 6 nats."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(2)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.zeros(len(x), 2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="'z' lies on a surface in the model .* no weight"):
        call(model, guide, torch.zeros(3))


def test_an_infinite_loss_beside_a_baseline_is_told():
    """The score of a discrete proposal weighs -inf less the mean of others that are -inf."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.full((len(x),), 0.5, dtype=F64)))
            z = pyro.sample("z", dist.Exponential(torch.ones(len(x), dtype=F64)))
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=pyro.param("logits", lambda: 0 * x)))
            pyro.sample("z", dist.Normal(0 * x - 3, 1.0))

    pyro.clear_param_store()
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"loss is infinite.*'z' \(Exponential\)"):
        pv.ELBO(4, kl="sample", estimator="score").loss_and_grads(model, guide, X)
