"""The observed part of a model: the smaller model, exactly; what decides by missing values."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.programs.handlers import register
from pyro_vae.programs.state import module_of
from tests.missing_data.models import (
    NAN,
    PRODUCTS,
    SEEN,
    PartlySeen,
    data,
    mixture,
    of,
    proposal,
    scattered,
    wide,
    without,
)
from tests.models import encoder, factor_analysis
from tests.runs import structure_of


class Guide(nn.Module):
    """A guide that does not look at the data, so that it fits any number of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor([-0.5, 0.1, -0.3], dtype=torch.float64))

    def forward(self, x: Tensor, *_: Tensor) -> None:
        register(self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


class Learned(nn.Module):
    """Factor analysis whose loadings are learned, of the columns given; plates as they come."""

    def __init__(self, columns: list[int]) -> None:
        super().__init__()
        known = factor_analysis()
        self.loadings = nn.Parameter(known.loadings[columns].clone())
        self.mean = nn.Parameter(known.mean[columns].clone())

    def forward(self, x: Tensor) -> None:
        register(self)
        with pyro.plate("data", 40, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            location = z @ self.loadings.T + self.mean
            pyro.sample("x", dist.Normal(location, 0.5).to_event(1), obs=x)


# --- the smaller model


@pytest.mark.parametrize("num_particles", [1, 30])
def test_the_spine_is_that_of_the_model_without_these_columns(num_particles):
    x = data()
    full = pv.MissingData(Learned(list(range(6))))
    small, guide = Learned(SEEN), Guide()
    ours = pv.log_weights(full, guide, without(x), num_particles=num_particles, seed=0)
    theirs = pv.log_weights(small, guide, x[:, SEEN], num_particles=num_particles, seed=0)
    for part in ("log_likelihood", "log_prior", "log_guide", "total"):
        torch.testing.assert_close(
            getattr(ours, part), getattr(theirs, part), rtol=1e-13, atol=1e-13
        )
    torch.testing.assert_close(
        pv.iwae_bound(full, guide, without(x), num_particles=50, seed=0).value,
        pv.iwae_bound(small, guide, x[:, SEEN], num_particles=50, seed=0).value,
        rtol=1e-13,
        atol=1e-13,
    )


@pytest.mark.parametrize(
    "loss",
    [
        pv.ELBO(),
        pv.ELBO(num_particles=3, kl="sample"),
        pv.ELBO(num_particles=3, estimator="stl"),
        pv.IWAE(5),
        pv.IWAE(5, "dreg"),
        pv.WakeSleep(5),
        pyro.infer.Trace_ELBO(),
    ],
    ids=lambda loss: f"{type(loss).__name__}-{getattr(loss, 'estimator', '')}",
)
def test_losses_and_gradients_are_those_of_the_smaller_model(loss):
    x = data()
    found = []
    for columns, batch in ((list(range(6)), without(x)), (SEEN, x[:, SEEN])):
        inner, guide = Learned(columns), Guide()
        model = pv.MissingData(inner) if len(columns) == 6 else inner
        torch.manual_seed(0)
        value = loss.loss_and_grads(model, guide, batch)
        rows = SEEN if len(columns) == 6 else slice(None)
        gradients = [guide.loc.grad, guide.log_scale.grad]
        gradients += [inner.loadings.grad[rows], inner.mean.grad[rows]]
        found.append((torch.as_tensor(value), *gradients))
        if len(columns) == 6:
            rest = [i for i in range(6) if i not in SEEN]
            assert not inner.loadings.grad[rest].any()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_the_exact_posterior_gives_the_exact_evidence_of_what_is_seen():
    exact = PartlySeen(factor_analysis())
    x = scattered(data())
    model = pv.MissingData(exact.model)
    weights = pv.log_weights(model, exact.posterior, x, num_particles=7, seed=0).total
    torch.testing.assert_close(weights, exact.log_evidence(x).expand(7, -1), rtol=1e-11, atol=1e-11)
    assert weights[:, 0].abs().max() < 1e-12  # nothing seen
    bound = pv.elbo(model, exact.posterior, x, num_particles=3)
    torch.testing.assert_close(bound.value, exact.log_evidence(x), rtol=1e-11, atol=1e-11)


def test_the_iwae_bound_meets_the_exact_evidence():
    exact = PartlySeen(factor_analysis(), widen=1.5)
    x = scattered(data())
    bound = pv.iwae_bound(
        pv.MissingData(exact.model), exact.posterior, x, num_particles=5000, seed=0
    )
    error = bound.value - exact.log_evidence(x)
    assert (error.abs() < 4 * bound.std_error).all()
    assert abs(float(error.mean())) < 4 * bound.mean_std_error < 0.02


# --- likelihoods


@pytest.mark.parametrize("name", PRODUCTS)
def test_of_a_product_each_number_can_be_missing(name):
    make, value = PRODUCTS[name]
    x = torch.full((4, 3, 1) if name == "nested" else (4, 3), value, dtype=torch.float64)
    missing = torch.zeros_like(x, dtype=torch.bool)
    missing[1, 2], missing[2] = True, True
    model = of(make)
    found = pv.log_weights(
        pv.MissingData(model), proposal, x.masked_fill(missing, NAN), num_particles=3, seed=0
    )
    # By hand: each number of every particle on its own.
    values = _draws(x)
    fn = make(values, x)
    if name == "Masked":
        fn = fn.base_dist
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    by_number = fn.log_prob(x).masked_fill(missing, 0.0).reshape(3, 4, 3)
    wanted = by_number.sum(-1)
    if name == "Masked":
        wanted[:, -1] = 0.0
    torch.testing.assert_close(found.log_likelihood, wanted, rtol=1e-12, atol=1e-12)
    assert not found.log_likelihood[:, 2].any()
    whole = pv.log_weights(pv.MissingData(model), proposal, x, num_particles=3, seed=0)
    torch.testing.assert_close(
        whole.total, pv.log_weights(model, proposal, x, num_particles=3, seed=0).total
    )


def _draws(x: Tensor) -> Tensor:
    """The particles of seed 0, [3, N]."""
    tree = pv.to_arviz(of(lambda z, x: dist.Normal(z, 1.0)), proposal, x.reshape(4, 3)[:, 0],
                       num_draws=3, predictive=False, seed=0)  # fmt: skip
    return torch.as_tensor(tree["posterior"]["z"].values[0])


JOINT = {
    "MultivariateNormal": (
        lambda z, x: dist.MultivariateNormal(wide(z), torch.eye(3, dtype=x.dtype)),
        [0.5, -1.0, 2.0],
    ),
    "Multinomial": (
        lambda z, x: dist.Multinomial(4, logits=wide(z) * torch.arange(3)), [1.0, 0.0, 3.0]
    ),
    "OneHotCategorical": (
        lambda z, x: dist.OneHotCategorical(logits=wide(z) * torch.arange(3)), [0.0, 1.0, 0.0]
    ),
    "Dirichlet": (lambda z, x: dist.Dirichlet(wide(z).exp()), [0.2, 0.5, 0.3]),
    "DirichletMultinomial": (
        lambda z, x: dist.DirichletMultinomial(wide(z).exp(), torch.tensor(4.0)), [1.0, 0.0, 3.0]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINT)
def test_of_a_joint_event_all_or_nothing_is_missing(name):
    make, event = JOINT[name]
    x = torch.tensor([event] * 4, dtype=torch.float64)
    model = of(make)
    complete = pv.log_weights(model, proposal, x, num_particles=3, seed=0)
    x[2] = NAN
    found = pv.log_weights(pv.MissingData(model), proposal, x, num_particles=3, seed=0)
    wanted = complete.log_likelihood.clone()
    wanted[:, 2] = 0.0
    torch.testing.assert_close(found.log_likelihood, wanted)
    x[1, 0] = NAN
    message = rf"'x': a part of an event is missing in rows 1 .*{name}"
    with pytest.raises(ValueError, match=message) as caught:
        pv.log_weights(pv.MissingData(model), proposal, x, num_particles=3, seed=0)
    assert "may only be values of observed" not in str(caught.value)


def test_a_support_of_which_no_value_is_known_is_refused():
    model = of(lambda z, x: dist.ProjectedNormal(wide(z, 2)))
    x = torch.tensor([[1.0, 0.0], [NAN, NAN]])
    with pytest.raises(ValueError, match="'x': no value is known inside the support of Projected"):
        structure_of(pv.MissingData(model), x)


def test_a_value_outside_the_support_is_refused_beside_missing_ones():
    make, _ = PRODUCTS["Poisson"]
    x = torch.tensor([[1.0, NAN, 2.0], [NAN, -1.0, 0.0]])
    with pytest.raises(ValueError, match="'x': values outside the support .* rows 1 "):
        structure_of(pv.MissingData(of(make)), x)


# --- models


def test_several_sites_inner_plates_and_scales():
    def model(x, y):
        plate, inner = pyro.plate("data", len(x), dim=-2), pyro.plate("items", 3, dim=-1)
        with plate:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 2.0), obs=y.unsqueeze(-1))
            with inner, pyro.poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.new_full((), 0.1), 1.2))

    x, y = data(5)[:, :3], data(5)[:, 3]
    whole = pv.to_arviz(model, guide, x, y, num_draws=4, seed=0, predictive=False)
    z = torch.as_tensor(whole["posterior"]["z"].values[0]).reshape(4, 5)
    x[0, 1], x[3], y[2] = NAN, NAN, NAN
    found = pv.log_weights(pv.MissingData(model), guide, x, y, num_particles=4, seed=0)
    by_hand = torch.distributions.Normal(z, 2.0, validate_args=False).log_prob(y).nan_to_num(0.0)
    of_items = torch.distributions.Normal(z.unsqueeze(-1), 1.0, validate_args=False).log_prob(x)
    torch.testing.assert_close(found.log_likelihood, by_hand + of_items.nan_to_num(0.0).sum(-1))
    tree = pv.to_arviz(pv.MissingData(model), guide, x, y, num_draws=4, seed=0)
    torch.testing.assert_close(
        torch.as_tensor(tree["observed_data"]["x"].values), x, equal_nan=True
    )
    assert not torch.as_tensor(tree["posterior_predictive"]["x"].values).isnan().any()


def test_discrete_latents_are_summed_out_over_what_is_seen():
    x = scattered(data(12)[:, :3])
    found = pv.iwae_bound(pv.MissingData(mixture), lambda x: None, x, num_particles=2).value
    means = torch.tensor([[-1.0, 0.5, 2.0], [1.0, -0.5, 0.0]], dtype=x.dtype)
    by_number = torch.distributions.Normal(means, 1.0, validate_args=False).log_prob(x.unsqueeze(1))
    joint = by_number.nan_to_num(0.0).sum(-1) + torch.tensor([0.3, 0.7], dtype=x.dtype).log()
    torch.testing.assert_close(found, joint.logsumexp(-1))
    guide = pv.ExactGuide(pv.MissingData(mixture), example=x)
    bound = pv.elbo(pv.MissingData(mixture), guide, x, num_particles=2)
    torch.testing.assert_close(bound.value, joint.logsumexp(-1))


def test_a_network_that_takes_no_particles_gets_the_batch_repeated():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 6).double()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                if z.ndim != 2:
                    raise RuntimeError("two dimensions only")
                pyro.sample("x", dist.Normal(self.layer(z), 0.5).to_event(1), obs=x)

    torch.manual_seed(0)
    model, x = Flat(), data(6)
    found = pv.log_weights(pv.MissingData(model), Guide(), without(x), num_particles=5, seed=0)
    small = factor_analysis()
    small = replace(small, loadings=model.layer.weight[SEEN], mean=model.layer.bias[SEEN])
    wanted = pv.log_weights(small, Guide(), x[:, SEEN], num_particles=5, seed=0)
    torch.testing.assert_close(found.total, wanted.total)


def test_obs_mask_and_missing_values_go_together():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=torch.tensor([True, False, True]))

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x_unobserved", dist.Normal(z, 1.0))

    x = torch.tensor([0.7, NAN, NAN], dtype=torch.float64)
    found = pv.log_weights(pv.MissingData(model), guide, x, num_particles=4, seed=0).log_likelihood
    assert found[:, 0].all()
    assert not found[:, 1:].any()


@pytest.mark.parametrize("kind", ["module", "method", "function"])
def test_the_wrapper_is_the_model_to_torch_and_pyro(kind):
    inner = Learned(list(range(6)))

    def function(x):
        pyro.module("inner", inner)
        inner(x)

    model = pv.MissingData({"module": inner, "method": inner.forward, "function": function}[kind])
    assert module_of(model) is model
    assert len(list(model.parameters())) == (0 if kind == "function" else 2)
    x, guide = without(data()), Guide()
    before = inner.mean.detach().clone()
    pv.fit(model, guide, x, epochs=1, batch_size=10, progress=False)
    assert not torch.equal(inner.mean[SEEN], before[SEEN])
    if kind == "function":
        return
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert inner.mean.any()
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    ours = pv.elbo(model, guide, x, num_particles=2, seed=0).value
    assert torch.equal(pv.elbo(other, guide, x, num_particles=2, seed=0).value, ours)


def test_handlers_around_the_wrapper_do_no_harm():
    x, guide = without(data()), Guide()
    plain = pv.MissingData(factor_analysis())
    wanted = pv.log_weights(plain, guide, x, num_particles=3, seed=0).total
    for model in (pyro.poutine.scale(plain, scale=0.5), lambda x: plain(x)):
        found = pv.log_weights(model, guide, x, num_particles=3, seed=0).total
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        pv.log_weights(
            pv.MissingData(pyro.poutine.scale(factor_analysis(), scale=0.5)), guide, x,
            num_particles=3, seed=0,
        ).total,
        wanted,
    )  # fmt: skip


def test_wrapped_twice_is_wrapped_once():
    x = scattered(data())
    once = pv.MissingData(factor_analysis())
    twice = pv.MissingData(once)
    assert torch.equal(structure_of(twice, x).sites["x"].missing, x.isnan())
    weights = [pv.log_weights(m, Guide(), x, num_particles=3, seed=0).total for m in (once, twice)]
    assert torch.equal(*weights)


def test_a_model_that_draws_its_own_minibatch():
    def model(columns):
        small = factor_analysis()
        small = replace(small, loadings=small.loadings[columns], mean=small.mean[columns])

        def run(x):
            with pyro.plate("data", len(x), subsample_size=8) as index:
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                location = z @ small.loadings.T + small.mean
                pyro.sample("x", dist.Normal(location, 0.5).to_event(1), obs=x[index])

        return run

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=8):
            pyro.sample("z", dist.Normal(x.new_zeros(3), 1.1).to_event(1))

    x, found = data(), []
    for run, batch in (
        (pv.MissingData(model(list(range(6)))), without(x)),
        (model(SEEN), x[:, SEEN]),
    ):
        torch.manual_seed(0)
        found.append(pv.ELBO(num_particles=2).loss(run, guide, batch))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_float32_stays_float32():
    model = of(PRODUCTS["Normal"][0])
    x = torch.tensor([[1.0, NAN, 2.0]])
    assert pv.log_weights(pv.MissingData(model), proposal, x, num_particles=2).total.dtype == (
        torch.float32
    )


@pytest.mark.slow
def test_refine_compare_and_arviz():
    exact = PartlySeen(factor_analysis("orthogonal"))
    x = scattered(data(8))
    model = pv.MissingData(exact.model)
    guide = pv.AmortizedGuide(model, pv.MissingEncoder(encoder(12)), example=x)
    refined = pv.refine(model, guide, x, seed=0)
    assert refined.converged.all()
    comparison = pv.compare(model, {"encoder": guide, "exact": exact.posterior,
        "mean-field": pv.families.Normal()}, x, num_particles=200, reference="mean-field",
        seed=0)  # fmt: skip
    evidence = torch.as_tensor(comparison.dataset["log_evidence"].values)
    torch.testing.assert_close(evidence, exact.log_evidence(x), rtol=1e-9, atol=1e-9)
    tree = pv.to_arviz(model, guide, x, num_draws=50, resample="psis", seed=0)
    shown = torch.as_tensor(tree["observed_data"]["x"].values)
    torch.testing.assert_close(shown, x, equal_nan=True, rtol=0, atol=0)
    assert not tree["log_likelihood"]["x"].values[..., 0].any()


# --- refusals


def test_nan_without_the_wrapper_is_refused_and_says_what_to_do():
    x = data(4)
    x[2, 1] = NAN
    with pytest.raises(
        ValueError, match=r"NaN or infinite values in rows 2 .*MissingData\(model\)"
    ):
        pv.log_weights(factor_analysis(), Guide(), x, num_particles=2)


def test_infinite_values_are_refused_under_the_wrapper():
    x = data(4)
    x[2, 1], x[0, 0] = math.inf, NAN
    with pytest.raises(
        ValueError, match="argument 0 of the batch holds infinite values in rows 2 "
    ):
        pv.log_weights(pv.MissingData(factor_analysis()), Guide(), x, num_particles=2)


def covariate(x, y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(y, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def chain(x, y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        first = pyro.sample("x", dist.Normal(z, 1.0), obs=y)
        pyro.sample("next", dist.Normal(first, 1.0), obs=x)


@pytest.mark.parametrize("model", [covariate, chain])
def test_a_missing_value_that_something_depends_on_is_refused(model):
    batch = torch.ones(3), torch.tensor([0.0, NAN, 1.0])
    with pytest.raises(ValueError, match="may only be values of observed sites"):
        structure_of(pv.MissingData(model), *batch)
    with pytest.raises(ValueError, match="argument 1 of the batch holds NaN"):
        structure_of(model, *batch)


X = torch.tensor([0.0, 2.0, NAN], dtype=torch.float64)


def deciding(sites):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            sites(z, x)

    return model


def prior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))


def positive(z, x):
    pyro.sample("b", dist.Bernoulli(logits=z), obs=(x > 0).to(x))
    pyro.sample("x", dist.LogNormal(z, 1.0).mask(x > 0), obs=x.clamp(min=1e-6))


def zero(z, x):
    pyro.sample("b", dist.Bernoulli(logits=z), obs=(x == 0).to(x))


def python(z, x):
    decided = [1.0 if value > 0 else 0.0 for value in x.tolist()]
    pyro.sample("b", dist.Bernoulli(logits=z), obs=torch.tensor(decided, dtype=x.dtype))


def largest(z, x):
    found = torch.stack([x, torch.ones_like(x)], -1).argmax(-1)
    pyro.sample("b", dist.Normal(z, 1.0), obs=found.to(x))


def width(z, x):
    pyro.sample("b", dist.Normal(z, 1.0 + (x > 0).to(x)), obs=torch.ones_like(x))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def in_an_event(z, x):
    both = torch.stack([x, (x > 0).to(x)], -1)
    pyro.sample("b", dist.Normal(z[..., None], 1.0).to_event(1), obs=both)


def factor(z, x):
    pyro.factor("b", torch.where(x > 0, z, -z))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


DECIDE = [positive, zero, python, largest, width, in_an_event, factor]
FUNCTIONS = {
    "elbo": lambda model, x: pv.elbo(model, prior, x),
    "iwae_bound": lambda model, x: pv.iwae_bound(model, prior, x, num_particles=10),
    "impute": lambda model, x: pv.impute(model, prior, x),
    "compare": lambda model, x: pv.compare(model, {"prior": prior}, x, num_particles=10),
    "refine": lambda model, x: pv.refine(model, prior, x),
    "fit": lambda model, x: pv.fit(model, prior, x, epochs=1, progress=False),
    "ELBO": lambda model, x: pv.ELBO().loss_and_grads(model, prior, x),
    "Trace_ELBO": lambda model, x: pyro.infer.Trace_ELBO().loss(model, prior, x),
}


@pytest.mark.parametrize("sites", DECIDE)
def test_a_decision_by_a_missing_value_is_refused(sites):
    told = r"observed site 'b': its log density of what was seen changes .* decides by a missing"
    with pytest.raises(ValueError, match=told):
        pv.elbo(pv.MissingData(deciding(sites)), prior, X)
    complete = X.nan_to_num(1.0)
    assert pv.elbo(pv.MissingData(deciding(sites)), prior, complete).value.isfinite().all()


@pytest.mark.parametrize(
    "decide",
    [lambda x: (x > 0.5) & (x < 1.0), lambda x: x == 2.0, lambda x: (x - 3.0).abs() > 2.5],
    ids=["interval", "code", "outside"],
)
def test_a_decision_between_the_extremes_is_refused(decide):
    """The third row has no value: log p of it is 0, and -0.7 with the answer that NaN gives."""

    def sites(z, x):
        pyro.sample("b", dist.Bernoulli(logits=z), obs=decide(x).to(x))

    x = torch.tensor([0.0, 2.0, NAN, 0.7, 3.0, 4.0, 6.0, 1.0, 5.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="'b': its log density .* decides by a missing value"):
        pv.elbo(pv.MissingData(deciding(sites)), prior, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_that_takes_missing_data_refuses_it(name):
    with pytest.raises(ValueError, match="'b': its log density .* decides by a missing value"):
        FUNCTIONS[name](pv.MissingData(deciding(positive)), X)
    seen = (~X.isnan(), {"mask": "seen"})
    with pytest.raises(ValueError, match="'b': its log density .* decides by a missing value"):
        pv.elbo(pv.MissingData(deciding(positive), **seen[1]), lambda x, m: prior(x), X, seen[0])


def test_a_prior_that_depends_on_a_missing_value_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal((x > 0).to(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="latent site 'z': its log density .* missing value"):
        pv.elbo(pv.MissingData(model), prior, X)


def test_a_hurdle_whose_decision_is_missing_too_is_the_smaller_model():
    """log p by quadrature; both ways that the message tells, and a mask of the model's own."""

    def as_missing(z, x):
        pyro.sample("b", dist.Bernoulli(logits=z), obs=torch.where(x.isnan(), x, (x > 0).to(x)))
        pyro.sample("x", dist.LogNormal(z, 1.0).mask(x > 0), obs=x.clamp(min=1e-6))

    def masked(z, x):
        with pyro.poutine.mask(mask=~x.isnan()):
            pyro.sample("b", dist.Bernoulli(logits=z), obs=(x > 0).to(x))
        filled = x.nan_to_num(1.0).clamp(min=1e-6)
        pyro.sample("x", dist.LogNormal(z, 1.0).mask(x > 0), obs=filled)

    z = torch.linspace(-8, 8, 4001).double()
    amount = dist.LogNormal(z, 1.0).log_prob(X[1])
    terms = [
        torch.nn.functional.logsigmoid(-z), torch.nn.functional.logsigmoid(z) + amount, 0 * z
    ]  # fmt: skip
    log_prior = dist.Normal(X.new_zeros(()), 1.0).log_prob(z)
    exact = torch.stack([torch.logsumexp(t + log_prior, 0) for t in terms]) + math.log(16 / 4000)
    for sites in (as_missing, masked):
        found = pv.iwae_bound(
            pv.MissingData(deciding(sites)), prior, X, num_particles=20_000, seed=0
        )
        assert ((found.value - exact).abs() <= 5 * found.std_error + 1e-6).all()


def test_a_factor_of_a_models_own_for_missing_values_is_taken():
    def own(z, x):
        gap = torch.where(x.isnan(), torch.zeros_like(x), (z - x).square())
        pyro.factor("b", -gap)
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones_like(x))

    assert pv.elbo(pv.MissingData(deciding(own)), prior, X).value.isfinite().all()


def test_the_look_leaves_no_trace():
    """Random numbers, parameters of a first run and buffers are as without it."""
    shift = []

    def lazy(z, x):
        shift.append(pyro.param("shift", lambda: z.mean().detach()))
        pyro.sample("x", dist.Normal(z + shift[-1], 1.0), obs=x)

    values = []
    for model in (pv.MissingData(deciding(lazy)), deciding(lazy)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        pyro.poutine.trace(model).get_trace(X if not values else X.nan_to_num(1.0))
        values.append((pyro.param("shift").item(), torch.rand(()).item()))
    assert values[0] == values[1]
