"""A model that decides by a missing value is refused, and names the site; others are not."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

NAN = math.nan
X = torch.tensor([0.0, 2.0, NAN], dtype=torch.float64)


def of(sites):
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
        pv.elbo(pv.MissingData(of(sites)), prior, X)
    complete = X.nan_to_num(1.0)
    assert pv.elbo(pv.MissingData(of(sites)), prior, complete).value.isfinite().all()


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
        pv.elbo(pv.MissingData(of(sites)), prior, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_that_takes_missing_data_refuses_it(name):
    with pytest.raises(ValueError, match="'b': its log density .* decides by a missing value"):
        FUNCTIONS[name](pv.MissingData(of(positive)), X)
    seen = (~X.isnan(), {"mask": "seen"})
    with pytest.raises(ValueError, match="'b': its log density .* decides by a missing value"):
        pv.elbo(pv.MissingData(of(positive), **seen[1]), lambda x, m: prior(x), X, seen[0])


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
        found = pv.iwae_bound(pv.MissingData(of(sites)), prior, X, num_particles=20_000, seed=0)
        assert ((found.value - exact).abs() <= 5 * found.std_error + 1e-6).all()


def test_a_factor_of_a_models_own_for_missing_values_is_taken():
    def own(z, x):
        gap = torch.where(x.isnan(), torch.zeros_like(x), (z - x).square())
        pyro.factor("b", -gap)
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones_like(x))

    assert pv.elbo(pv.MissingData(of(own)), prior, X).value.isfinite().all()


def test_the_look_leaves_no_trace():
    """Random numbers, parameters of a first run and buffers are as without it."""
    shift = []

    def lazy(z, x):
        shift.append(pyro.param("shift", lambda: z.mean().detach()))
        pyro.sample("x", dist.Normal(z + shift[-1], 1.0), obs=x)

    values = []
    for model in (pv.MissingData(of(lazy)), of(lazy)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        pyro.poutine.trace(model).get_trace(X if not values else X.nan_to_num(1.0))
        values.append((pyro.param("shift").item(), torch.rand(()).item()))
    assert values[0] == values[1]
