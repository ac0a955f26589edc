"""Laws that hold for every objective, with every kind of guide, in every setting.

The model is linear and Gaussian, so that a proposal of each guide can be the exact
posterior. Where a law is exact for given noise alone, the standard normal draws are
replaced by a table.

The combinations are many: a fifth of them runs by default, in which each objective meets
each guide in one of the settings; the others with ``-m slow``.
"""

from __future__ import annotations

import contextlib
import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import testing
from pyro_vae.schedules import LinearWarmup
from pyro_vae.testing.losses import loss_agrees

NUM_DATA = 6
K = 4
NOISE = 0.7
SCALE = 3.0

OBJECTIVES = {
    "ELBO analytic": lambda **options: pv.ELBO(K, **options),
    "ELBO sample": lambda **options: pv.ELBO(K, kl="sample", **options),
    "ELBO stl": lambda **options: pv.ELBO(K, estimator="stl", **options),
    "ELBO score": lambda **options: pv.ELBO(K, kl="sample", estimator="score", **options),
    "IWAE pathwise": lambda **options: pv.IWAE(K, **options),
    "IWAE stl": lambda **options: pv.IWAE(K, estimator="stl", **options),
    "IWAE dreg": lambda **options: pv.IWAE(K, estimator="dreg", **options),
    "WakeSleep": lambda **options: pv.WakeSleep(K, **options),
    "WakeSleep sleep": lambda **options: pv.WakeSleep(K, insomnia=0.6, **options),
}
GUIDES = ("amortized", "local", "function", "module", "autonormal", "dependent", "score")
SETTINGS = ("plain", "subsampled", "masked", "missing", "scaled")


# --- the model, and each guide at a given proposal -----------------------------------------


class Model(nn.Module):
    """a ~ N(0, 1), b ~ N(w a, 1), x ~ N((a, b) + mu, 0.7).

    A datum that is not seen is masked with its latents ("masked"), or is a datum
    without a likelihood ("missing").
    """

    def __init__(self, setting, w):
        super().__init__()
        self.setting = setting
        self.takes_particles = True
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.mu = nn.Parameter(torch.tensor([0.4, -0.3], dtype=torch.float64))

    def forward(self, x, index, seen):
        pyro.module("model", self)
        with contextlib.ExitStack() as stack:
            stack.enter_context(plate(self.setting, x, index))
            if self.setting == "scaled":
                stack.enter_context(poutine.scale(scale=SCALE))
            if self.setting == "masked":
                stack.enter_context(poutine.mask(mask=seen))
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(self.w * a, 1.0))
            if not self.takes_particles and a.ndim > 1:
                raise ValueError("one dimension, please")
            if self.setting == "missing":
                stack.enter_context(poutine.mask(mask=seen))
            pyro.sample(
                "x", dist.Normal(torch.stack([a, b], -1) + self.mu, NOISE).to_event(1), obs=x
            )

    def log_evidence(self, x):
        w = self.w.item()
        prior = torch.tensor([[1.0, w], [w, w**2 + 1]], dtype=x.dtype)
        covariance = prior + NOISE**2 * torch.eye(2, dtype=x.dtype)
        return torch.distributions.MultivariateNormal(self.mu.detach(), covariance).log_prob(x)


def plate(setting, x, index):
    if setting == "subsampled":
        return pyro.plate("data", NUM_DATA, subsample=index)
    return pyro.plate("data", len(x))


class Drawn(dist.Normal):
    """A Normal whose draws carry no gradient."""

    has_rsample = False

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return super().rsample(torch.Size(sample_shape))


def proposals(model, at):
    """Numbers of a proposal: a ~ N(S_a x + i_a, s_a), b ~ N(S_b x + i_b + c a, s_b)."""
    w, mu = model.w.detach(), model.mu.detach()
    if at == "exact":
        eye = torch.eye(2, dtype=mu.dtype)
        precision = torch.stack([torch.stack([1 + w**2, -w]), torch.stack([-w, w**0])])
        precision = precision + eye / NOISE**2
        covariance = torch.linalg.inv(precision)
        slope = torch.stack([covariance[0], eye[1] / precision[1, 1]]) / NOISE**2
        scale = torch.stack([covariance[0, 0], 1 / precision[1, 1]]).sqrt()
        return {
            "slope": slope,
            "intercept": -slope @ mu,
            "log_scale": scale.log(),
            "coupling": w / precision[1, 1],
        }
    slope = torch.tensor([[0.3, 0.1], [-0.1, 0.2]], dtype=mu.dtype)
    if at == "prior":  # of a datum x = 0
        zeros = torch.zeros_like(mu)
        return {"slope": slope, "intercept": zeros, "log_scale": zeros, "coupling": w.clone()}
    return {
        "slope": slope,
        "intercept": torch.tensor([1.0, -0.8], dtype=mu.dtype),
        "log_scale": torch.tensor([-0.4, 0.3], dtype=mu.dtype),
        "coupling": torch.tensor(0.4, dtype=mu.dtype),
    }


def propose(numbers, setting, x, index, *, dependent=False, fn=dist.Normal):
    with plate(setting, x, index):
        loc = x @ numbers["slope"].T + numbers["intercept"]
        scale = numbers["log_scale"].exp()
        a = pyro.sample("a", fn(loc[:, 0], scale[0]))
        shift = numbers["coupling"] * a if dependent else 0.0
        pyro.sample("b", fn(loc[:, 1] + shift, scale[1]))


class ModuleGuide(nn.Module):
    def __init__(self, numbers, setting):
        super().__init__()
        self.setting = setting
        self.numbers = nn.ParameterDict({n: v.clone() for n, v in numbers.items()})

    def forward(self, x, index, seen):
        pyro.module("guide", self)
        propose(self.numbers, self.setting, x, index)


class Encoder(nn.Linear):
    def forward(self, x, index, seen):
        return super().forward(x)


def make_guide(kind, model, batch, at="anywhere"):
    """A guide of a kind that proposes the numbers; for the rows of the batch as a whole."""
    numbers = proposals(model, at)
    if kind != "dependent":
        del numbers["coupling"]
    x, _, _ = batch
    loc = x @ numbers["slope"].T + numbers["intercept"]
    if kind == "amortized":
        guide = pv.AmortizedGuide(model, Encoder(2, 2).double(), example=batch)
        with torch.no_grad():
            guide.encoder.weight.copy_(torch.eye(2))
            guide.encoder.bias.zero_()
            guide.head.weight.zero_()
            guide.head.weight[[0, 2]] = numbers["slope"]
            guide.head.bias[[0, 2]] = numbers["intercept"]
            guide.head.bias[[1, 3]] = numbers["log_scale"]
            if at == "anywhere":  # a gradient reaches the weights of a scale through the draws
                guide.head.weight[[1, 3]] = 0.1
    elif kind == "local":
        guide = pv.LocalGuide(model, num_data=len(x), example=batch)
        with torch.no_grad():
            guide.table[:, :, 0] = loc
            guide.table[:, :, 1] = numbers["log_scale"]
    elif kind == "module":
        guide = ModuleGuide(numbers, model.setting)
    elif kind == "autonormal":
        guide = AutoNormal(
            model, create_plates=lambda x, index, seen: plate(model.setting, x, index)
        )
        guide(*batch)
        for i, name in enumerate("ab"):
            setattr(guide.locs, name, loc[:, i].clone())
            setattr(guide.scales, name, numbers["log_scale"][i].exp().expand(len(x)).clone())
    else:
        how = {"dependent": kind == "dependent", "fn": Drawn if kind == "score" else dist.Normal}

        def guide(x, index, seen):
            held = {name: pyro.param(name, value.clone()) for name, value in numbers.items()}
            propose(held, model.setting, x, index, **how)

    if model.setting == "scaled":
        return poutine.scale(guide, scale=SCALE)
    return guide


def make(kind, setting, at="anywhere", *, rows=None):
    """A model, a guide and a batch, all new."""
    pyro.clear_param_store()
    model = Model(setting, 0.8 if kind == "dependent" else 0.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_DATA, 2, dtype=torch.float64, generator=generator)
    seen = torch.ones(NUM_DATA, dtype=torch.bool)
    if setting in ("masked", "missing"):
        seen[2] = False
        x[2] = 0.0
    batch = (x, torch.arange(NUM_DATA), seen)
    if rows is not None:
        batch = tuple(tensor[rows] for tensor in batch)
    return model, make_guide(kind, model, batch, at), batch


def at_rows(guide, index):
    return guide.rows(index) if isinstance(guide, pv.LocalGuide) else contextlib.nullcontext()


def parameters(model, guide, batch):
    """All parameters, in the order of their names: that of the pair is the only store in use."""
    with torch.no_grad():
        poutine.replay(model, trace=poutine.trace(guide).get_trace(*batch))(*batch)
    store = dict(pyro.get_param_store().named_parameters())
    # The name of an amortized guide has a number, another for each.
    return [store[name] for name in sorted(store, key=lambda name: name.rpartition("$$$")[2])]


def value_and_gradients(loss, model, guide, batch, seed=0):
    """The loss, and the gradient by all parameters in one tensor."""
    trained = parameters(model, guide, batch)
    for parameter in trained:
        parameter.grad = None
    torch.manual_seed(seed)
    value = loss.loss_and_grads(model, guide, *batch)
    return value, torch.cat([parameter.grad.flatten() for parameter in trained])


# --- noise from a table --------------------------------------------------------------------


class Table:
    """Standard normal draws of a and b, [K, N] each, from a table; all others are 0.3.

    Args:
        noise: [2, K, N] or [2, K, 1].
    """

    def __init__(self, monkeypatch, noise):
        self.noise, self.calls, self.on = noise, 0, False
        self.original = torch.distributions.normal._standard_normal
        monkeypatch.setattr(torch.distributions.normal, "_standard_normal", self)

    def __call__(self, shape, dtype, device):
        if not self.on:
            return self.original(shape, dtype, device)
        looped, particles = self.looped, len(shape) == 2 and shape[0] == K
        repeated = len(shape) == 1 and shape[0] == self.noise[0].numel()
        if not (looped or particles or repeated):
            return torch.full(shape, 0.3, dtype=dtype)
        # One after the other, the particles draw a, b, a, b, ...; together, a and b once.
        site, particle = self.calls % 2, self.calls // 2 % K
        self.calls += 1
        if repeated:
            return self.noise[site].flatten()
        return (self.noise[site, particle] if looped else self.noise[site]).expand(shape)

    @contextlib.contextmanager
    def given(self, *, looped=False):
        self.on, self.looped, self.calls = True, looped, 0
        yield
        self.on = False


def with_table(table, loss, model, guide, batch, **options):
    with torch.no_grad():
        loss.loss(model, guide, *batch)  # how its particles run is looked at once, with noise
    trained = parameters(model, guide, batch)
    for parameter in trained:
        parameter.grad = None
    with table.given(**options):
        value = loss.loss_and_grads(model, guide, *batch)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    return value, torch.cat([grad.flatten() for grad in grads])


def signs():
    """Noise whose moments up to the second are exact: all signs of a and b."""
    return torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1]], dtype=torch.float64).unsqueeze(-1)


def one_for_all_data():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, K, 1, dtype=torch.float64, generator=generator)


def close(found, wanted, tolerance=1e-9):
    assert found[0] == pytest.approx(wanted[0], rel=tolerance, abs=tolerance)
    torch.testing.assert_close(found[1], wanted[1], rtol=tolerance, atol=tolerance)


# --- which combinations there are ----------------------------------------------------------


def refusal(objective, kind):
    """What the message of a combination that cannot be had says."""
    if kind == "score" and objective not in ("ELBO score", "WakeSleep", "WakeSleep sleep"):
        return r"site 'a' \(Drawn\) cannot be reparameterized"
    if kind == "autonormal" and objective == "WakeSleep sleep":
        return "sleep phase needs the guide's density.* its site 'a_unconstrained' hides"
    if kind == "local" and objective == "WakeSleep sleep":
        return "rows of a LocalGuide belong to the data"
    return None


EVERY = [
    (objective, kind)
    for objective, kind in itertools.product(OBJECTIVES, GUIDES)
    if refusal(objective, kind) is None
]
ORDER = {name: i for names in (OBJECTIVES, GUIDES, SETTINGS) for i, name in enumerate(names)}


def some(combinations):
    """Mark four fifths of the combinations slow."""
    found = []
    for names in combinations:
        marks = [pytest.mark.slow] if sum(map(ORDER.get, names)) % 5 else []
        found.append(pytest.param(*names, marks=marks))
    return found


def every(*settings, without=()):
    """Every objective with every guide; in each setting, if settings are given."""
    pairs = [pair for pair in EVERY if pair[0] not in without]
    if not settings:
        return pytest.mark.parametrize(("objective", "kind"), some(pairs))
    triples = [(*pair, setting) for pair in pairs for setting in settings]
    return pytest.mark.parametrize(("objective", "kind", "setting"), some(triples))


@pytest.mark.parametrize(
    ("objective", "kind"),
    [pair for pair in itertools.product(OBJECTIVES, GUIDES) if pair not in EVERY],
)
def test_what_cannot_be_had_is_refused_by_name(objective, kind):
    model, guide, batch = make(kind, "plain")
    with pytest.raises(ValueError, match=refusal(objective, kind)):
        OBJECTIVES[objective]().loss_and_grads(model, guide, *batch)


# --- the laws ------------------------------------------------------------------------------


@every(*SETTINGS)
def test_loss_and_gradients(objective, kind, setting):
    model, guide, batch = make(kind, setting)
    loss = OBJECTIVES[objective]()
    loss_agrees(loss, model, guide, batch, parameters(model, guide, batch))


_OTHER_GRADIENTS = {
    "IWAE stl": "paths alone are biased for an importance-weighted bound (Tucker et al. 2018)",
    "WakeSleep": "the guide follows the KL from the posterior to it",
    "WakeSleep sleep": "the guide follows the KL from the posterior to it",
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_keeps_the_laws_that_a_user_checks(objective):
    law = "the gradient is that of the loss in the mean"
    expected = {law: _OTHER_GRADIENTS[objective]} if objective in _OTHER_GRADIENTS else {}
    testing.check_loss(OBJECTIVES[objective](), expected)


# The posterior of a datum without likelihood ("missing") is its prior: see the law on masks.
@every("plain", "subsampled", "masked", "scaled")
def test_at_the_exact_posterior_the_loss_is_the_evidence(objective, kind, setting, monkeypatch):
    """To rounding; with an analytic KL, for draws whose second moments are exact."""
    table = Table(monkeypatch, signs())
    model, guide, batch = make(kind, setting, "exact")
    x, _, seen = batch
    wanted = -model.log_evidence(x)[seen].sum().item() * (SCALE if setting == "scaled" else 1.0)
    loss = OBJECTIVES[objective]()
    value, _ = with_table(table, loss, model, guide, batch)
    assert value == pytest.approx(wanted, rel=1e-9)
    if objective != "ELBO analytic":
        assert loss.loss(model, guide, *batch) == pytest.approx(wanted, rel=1e-9)


QUIET = ("ELBO stl", "IWAE stl", "IWAE dreg")


@every(
    *("plain", "subsampled", "masked", "scaled"),
    without=[name for name in OBJECTIVES if name not in QUIET],
)
def test_at_the_exact_posterior_the_gradient_of_the_guide_has_no_noise(objective, kind, setting):
    model, guide, batch = make(kind, setting, "exact")
    OBJECTIVES[objective]().loss_and_grads(model, guide, *batch)
    held = {id(parameter) for parameter in model.parameters()}
    for parameter in parameters(model, guide, batch):
        if id(parameter) not in held:
            torch.testing.assert_close(parameter.grad, 0 * parameter.grad, rtol=0, atol=1e-9)


# A dream has no particles; its wake phase is that of WakeSleep.
@every(*SETTINGS, without=["WakeSleep sleep"])
@pytest.mark.parametrize("mode", ["plate", "repeat"])
def test_particles_at_once_are_particles_in_a_loop(objective, kind, setting, mode, monkeypatch):
    """Value and gradient, of the same noise."""
    # AutoNormal has a row for each datum, and no rows for a batch that is repeated.
    if mode == "repeat" and kind == "autonormal":
        mode = "loop"
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, K, NUM_DATA, dtype=torch.float64, generator=generator)
    table = Table(monkeypatch, noise)
    model, guide, batch = make(kind, setting)
    model.takes_particles = mode == "plate"
    together, looped = OBJECTIVES[objective](), OBJECTIVES[objective](vectorize_particles=False)
    found = with_table(table, together, model, guide, batch, looped=mode == "loop")
    wanted = with_table(table, looped, model, guide, batch, looped=True)
    assert {plan.mode.name for plan, *_ in together._plans.values()} == {mode}
    assert {plan.mode.name for plan, *_ in looped._plans.values()} == {"loop"}
    close(found, wanted)


@every()
def test_the_mean_over_minibatches_is_the_loss_of_all_data(objective, kind, monkeypatch):
    """Value and gradient, of a partition into three and of noise that all data share."""
    table = Table(monkeypatch, one_for_all_data())
    model, guide, batch = make(kind, "subsampled")
    loss = OBJECTIVES[objective]()
    wanted = with_table(table, loss, model, guide, batch)
    parts = []
    for index in torch.arange(NUM_DATA).reshape(2, 3).T:
        with at_rows(guide, index):
            few = tuple(tensor[index] for tensor in batch)
            parts.append(with_table(table, loss, model, guide, few))
    values, gradients = zip(*parts, strict=True)
    close((sum(values) / 3, sum(gradients) / 3), wanted)


def drawing_model(x):
    """The model draws 2 of the data itself."""
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


@pytest.mark.parametrize("guide", ["amortized", "local"])
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "WakeSleep sleep"])
def test_a_minibatch_that_the_model_draws_counts_for_all_data(objective, guide, monkeypatch):
    """At the exact posterior, of data that are all alike."""
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", Alternating())
    x = torch.full((NUM_DATA,), 0.8, dtype=torch.float64)
    params = torch.tensor([0.4, math.log(0.5**0.5)], dtype=torch.float64)
    if guide == "local":
        guide = pv.LocalGuide(drawing_model, num_data=NUM_DATA, example=x)
        guide.table.data.copy_(params)
    else:
        encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1).double())
        guide = pv.AmortizedGuide(drawing_model, encoder, example=x)
        guide.head.weight.data.zero_()
        guide.head.bias.data.copy_(params)
    wanted = -dist.Normal(0.0, x.new_tensor(2.0).sqrt()).log_prob(x).sum().item()
    loss = OBJECTIVES[objective]()
    torch.distributions.normal._standard_normal.sign = 1.0
    loss.loss(drawing_model, guide, x)
    torch.distributions.normal._standard_normal.sign = 1.0
    assert loss.loss(drawing_model, guide, x) == pytest.approx(wanted, rel=1e-9)
    loss.loss_and_grads(drawing_model, guide, x)
    assert all(parameter.grad is not None for parameter in guide.parameters())


class Alternating:
    """Standard normal draws of +1 and -1 in turn, a call each."""

    sign = 1.0

    def __call__(self, shape, dtype, device):
        self.sign = -self.sign
        return torch.full(shape, self.sign, dtype=dtype)


def test_a_dream_needs_to_know_the_minibatch():
    x = torch.zeros(NUM_DATA, dtype=torch.float64)
    encoder = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 2).double())
    guide = pv.AmortizedGuide(drawing_model, encoder, example=x)
    with pytest.raises(ValueError, match="sleep phase needs the minibatch as the batch"):
        pv.WakeSleep(3, insomnia=0.5).loss_and_grads(drawing_model, guide, x)


@every("masked", "missing")
def test_masked_data_are_as_good_as_none(objective, kind, setting, monkeypatch):
    """Value, and gradient by the model; the proposal of a datum without likelihood is its prior."""
    table = Table(monkeypatch, one_for_all_data())
    at = "anywhere" if setting == "masked" else "prior"
    model, guide, batch = make(kind, setting, at)
    found = with_table(table, OBJECTIVES[objective](), model, guide, batch)
    fewer, its_guide, rows = make(kind, setting, at, rows=batch[2])
    wanted = with_table(table, OBJECTIVES[objective](), fewer, its_guide, rows)
    assert found[0] == pytest.approx(wanted[0], rel=1e-9)
    if setting == "masked":
        for one, other in zip(model.parameters(), fewer.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)
        if kind not in ("local", "autonormal"):  # whose rows are data
            torch.testing.assert_close(found[1], wanted[1], rtol=1e-9, atol=1e-9)


@every()
def test_a_scale_multiplies_the_loss(objective, kind):
    """Value and gradient, under one seed: for IWAE the scale stands outside the logarithm."""
    loss = OBJECTIVES[objective]()
    value, gradient = value_and_gradients(loss, *make(kind, "plain"))
    scaled = value_and_gradients(OBJECTIVES[objective](), *make(kind, "scaled"))
    close(scaled, (SCALE * value, SCALE * gradient))


# --- training ------------------------------------------------------------------------------


def mean_loss(loss, model, guide, batch):
    torch.manual_seed(7)
    return sum(loss.loss(model, guide, *batch) for _ in range(20)) / 20


@every()
def test_steps_of_svi_lower_the_loss(objective, kind):
    model, guide, batch = make(kind, "subsampled")
    loss = OBJECTIVES[objective]()
    before = mean_loss(loss, model, guide, batch)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    for _, index in zip(range(12), itertools.cycle(torch.arange(NUM_DATA).split(3)), strict=False):
        with at_rows(guide, index):
            svi.step(*(tensor[index] for tensor in batch))
    assert mean_loss(loss, model, guide, batch) < before - 0.1
    assert math.isfinite(svi.evaluate_loss(*batch))


@every()
def test_steps_of_a_plain_torch_loop_lower_the_loss(objective, kind):
    model, guide, batch = make(kind, "masked")
    loss = OBJECTIVES[objective]()
    before = mean_loss(loss, model, guide, batch)
    module = loss(model, guide)
    optimizer = torch.optim.Adam(parameters(model, guide, batch), lr=0.05)
    for _ in range(12):
        optimizer.zero_grad()
        module(*batch).backward()
        optimizer.step()
    assert mean_loss(loss, model, guide, batch) < before - 0.1


@pytest.mark.parametrize("schedule", [None, LinearWarmup(4, start=0.5)])
@every()
def test_fit_lowers_the_loss(objective, kind, schedule):
    model, guide, batch = make(kind, "subsampled")
    loss = OBJECTIVES[objective]()
    before = mean_loss(loss, model, guide, batch)
    result = pv.fit(
        model,
        guide,
        batch,
        loss=loss,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        schedule=schedule,
        batch_size=2,
        epochs=4,
        progress=False,
    )
    assert result.steps == 12
    assert mean_loss(loss, model, guide, batch) < before - 0.1
