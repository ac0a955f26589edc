"""fit: where it arrives, what it keeps, what it refuses."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vae as pv
from pyro_vae.programs.handlers import LatentScale
from pyro_vae.schedules import Constant, Cyclical, LinearWarmup, Schedule
from pyro_vae.training import checkpoints
from tests.models import factor_analysis
from tests.refinement import whole
from tests.training.fits import (
    HISTORY,
    Drawn,
    Fresh,
    Interrupting,
    ctrl_c,
    equal_histories,
    exact_elbo,
    make_data,
    make_guide,
    model,
    parameters_of,
    run,
    same,
)

# --- where training arrives ----------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [None, pv.ELBO(kl="sample"), Trace_ELBO(), TraceMeanField_ELBO(), RenyiELBO(0.5, 2)]
)
def test_reaches_the_evidence(loss):
    """The optimum is the exact posterior: the ELBO is log p(x), within 0.01 nats."""
    x = make_data()
    guide = make_guide(x)
    assert (model.log_evidence(x) - exact_elbo(guide, x)).mean() > 0.1
    result, _ = run(x, guide, loss=loss, epochs=150, optim=lambda ps: torch.optim.Adam(ps, lr=0.02))
    assert (model.log_evidence(x) - exact_elbo(guide, x)).mean() < 0.01
    # The history agrees, within 5 standard errors of the last 20 epochs' mean; Rényi's
    # bound of order 1/2 lies above the ELBO, but is tight here as well.
    last = torch.tensor(result.history["elbo"][-20:])
    error = last.std() / 20**0.5
    assert abs(last.mean() - model.log_evidence(x).mean()) < 5 * error + 0.01


def test_plain_functions_train():
    """A pair with its parameters in Pyro's store: x ~ Normal(mu + z, 1), mu learned."""
    x = make_data() + 3.0

    def located(x):
        mu = pyro.param("mu", torch.zeros((), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.squeeze(-1))

    def guide(x):
        location = pyro.param("location", torch.zeros((), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.squeeze(-1) / 2 + location, 0.5**0.5))

    pv.fit(located, guide, x, epochs=100, optim=pyro.optim.Adam({"lr": 0.05}), progress=False)
    # Maximum likelihood: mu = mean(x), and location = mu / 2. Tolerance of the noise of steps.
    assert pyro.param("mu").item() == pytest.approx(x.mean().item(), abs=0.1)
    assert pyro.param("location").item() == pytest.approx(x.mean().item() / 2, abs=0.1)


class Methods(nn.Module):
    """A model and a guide as methods of one module, as in Pyro's tutorial."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).double()

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        location, log_scale = self.encoder(x).split(1, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(location, log_scale.exp()).to_event(1))


def test_methods_of_a_module_are_the_module():
    """Dropout is off in validation, and the running means belong to the best parameters."""
    x, pair, seen = make_data(), Methods(), []

    def record(told):
        seen.append(pair.encoder[1].running_mean.clone())

    options = {"validation_data": x, "optim": lambda ps: torch.optim.SGD(ps, lr=0.0)}
    result, _ = run(x, pair.guide, epochs=4, callbacks=[record], **options)
    assert pair.training
    assert torch.equal(pair.encoder[1].running_mean, seen[result.best_epoch - 1])
    assert not torch.equal(seen[0], seen[1])
    pair.eval()  # the same validation ELBO again, so there was no dropout in it
    frozen, _ = run(x, pair.guide, epochs=1, **options)
    assert frozen.history["validation_elbo"] == [max(result.history["validation_elbo"])]


def test_a_local_guide_stays_aligned_with_shuffled_minibatches():
    """Each row arrives at its own datum's posterior, but for the noise of the steps.

    The posterior means have a standard deviation of 1.4: a row that held another datum
    would be off by 1.6 on average.
    """
    x = make_data(30) * 2
    guide = pv.LocalGuide(model, num_data=30, example=x)
    run(x, guide, epochs=150, batch_size=7, optim=lambda ps: torch.optim.Adam(ps, lr=0.03))
    posterior_mean = x.squeeze(-1) / 2
    assert (guide.table[:, 0, 0] - posterior_mean).abs().max() < 0.5
    assert torch.corrcoef(torch.stack([guide.table[:, 0, 0].detach(), posterior_mean]))[0, 1] > 0.99


def test_a_local_guide_with_particles_and_a_schedule():
    x = make_data(30)
    guide = pv.LocalGuide(model, num_data=30, example=x)
    loss = pv.ELBO(num_particles=3)
    run(x, guide, loss=loss, batch_size=7, schedule=lambda step: 0.5)
    assert loss.vectorize_particles


def test_one_datum_of_global_latents_with_an_autoguide():
    """mu ~ Normal(0, 1), 10 data: the posterior is Normal(sum x / 11, 1 / 11)."""
    x = make_data(10).squeeze(-1).float()

    def regression(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    guide = AutoNormal(regression)
    result = pv.fit(
        regression,
        guide,
        x,
        data_plate=False,
        max_steps=600,
        loss=pv.ELBO(num_particles=5),
        optim=lambda ps: torch.optim.Adam(ps, lr=0.02),
        progress=False,
    )
    assert result.steps == len(result.history["step"]) == 600
    assert guide.median()["mu"].item() == pytest.approx(x.sum().item() / 11, abs=0.05)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(10), torch.eye(10) + 1).log_prob(
        x
    )
    # The ELBO is of the whole, not per row.
    last = sum(result.history["elbo"][-100:]) / 100
    assert last == pytest.approx(evidence.item(), abs=0.1)
    with pytest.raises(pv.DataPlateError, match="data_plate=False"):
        pv.fit(regression, guide, x, epochs=1, progress=False)


def test_a_mapping_and_a_device():
    x = make_data()
    guide = pv.AmortizedGuide(model, Named(), example={"x": x})
    result = pv.fit(model, guide, {"x": x}, epochs=1, device="cpu", progress=False)
    assert result.steps == 1
    moved = pv.fit(model, guide, {"x": x}, epochs=1, device=torch.device("cpu"), progress=False)
    assert moved.stopped_by == "epochs"


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2).double()

    def forward(self, *, x):
        return self.net(x)


# --- one seed, one result --------------------------------------------------------------


def test_one_seed_one_result_and_the_global_state_stays():
    x = make_data()
    guides = [make_guide(x) for _ in range(3)]
    before = torch.get_rng_state()
    results = [run(x, guides[0], seed=4)[0]]
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(7)
    results.append(run(x, guides[1], seed=4)[0])
    equal_histories(results[0].history, results[1].history)
    assert same(parameters_of(guides[0]), parameters_of(guides[1]))
    run(x, guides[2], seed=5)
    assert not same(parameters_of(guides[0]), parameters_of(guides[2]))


def test_without_a_seed_the_global_state_decides():
    x = make_data()
    histories = []
    for seed in (1, 1, 2):
        guide = make_guide(x)
        torch.manual_seed(seed)
        histories.append(run(x, guide, seed=None)[0].history["elbo"])
    assert histories[0] == histories[1] != histories[2]


def test_a_table_of_too_few_rows_is_refused_by_name():
    x = make_data()
    guide = pv.LocalGuide(model, num_data=20, example=x[:20])
    with pytest.raises(IndexError, match="rows 0 to 19, but there are 40 data"):
        run(x, guide)


def test_gradients_outside_of_the_optimizer_do_not_pile_up():
    """Of minibatches of two sizes, the last of them run eagerly after recorded ones."""
    x = make_data()
    guide = make_guide(x)
    some = list(guide.parameters())[:1]
    result, _ = run(
        x, guide, optim=torch.optim.SGD(some, lr=0.01), batch_size=16, epochs=4, compile="replay"
    )
    assert result.steps == 12


# --- checkpoints -----------------------------------------------------------------------


class Normed(nn.Module):
    """An encoder with buffers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)).double()

    def forward(self, x):
        return self.net(x)


def stop(epoch):
    return lambda told: told.epoch == epoch


@pytest.mark.parametrize(
    ("end", "seed"), [("epochs", 0), ("ctrl_c", 0), ("callback", 0), ("ctrl_c", None)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, end, seed):
    x, validation = make_data(), make_data(10, seed=2)
    options = {
        "seed": seed,
        "validation_data": validation,
        "schedule": LinearWarmup(8),
        "checkpoint": tmp_path / "run.pt",
    }

    def fresh_guide():
        torch.manual_seed(3)
        return pv.AmortizedGuide(model, Normed(), example=x)

    guide = fresh_guide()
    torch.manual_seed(9)
    whole, _ = run(x, guide, **(options | {"epochs": 5, "checkpoint": None}))
    pieces = fresh_guide()
    torch.manual_seed(9)
    first = {
        "epochs": {"epochs": 2},
        "ctrl_c": {"epochs": 5, "callbacks": [ctrl_c(2)]},
        "callback": {"epochs": 5, "callbacks": [stop(2)]},
    }[end]
    begun, _ = run(x, pieces, **(options | first))
    assert begun.history["epoch"] == [1, 2]
    assert begun.stopped_by == {"ctrl_c": "interrupted"}.get(end, end)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["progress"]["epoch"] == 2, "the epoch whose callback was broken off is whole"
    with torch.no_grad():
        for parameter in pieces.parameters():
            parameter.add_(1.0)  # the file decides, not what the guide holds
    torch.randn(5)
    resumed, _ = run(x, pieces, **(options | {"epochs": 5}))
    equal_histories(whole.history, resumed.history)
    assert resumed.steps == whole.steps == 15
    assert resumed.best_epoch == whole.best_epoch
    assert resumed.elapsed > begun.elapsed
    for name, value in guide.state_dict().items():
        assert torch.equal(value, pieces.state_dict()[name]), name
    # There is nothing left to do: the result stands.
    again, _ = run(x, pieces, **(options | {"epochs": 5}))
    equal_histories(whole.history, again.history)
    assert again.stopped_by == "epochs"


def test_a_checkpoint_of_another_pair_or_optimizer_is_refused(tmp_path):
    x, path = make_data(), tmp_path / "run.pt"
    run(x, checkpoint=path)
    other = pv.AmortizedGuide(model, nn.Linear(1, 3).double(), example=x)
    with pytest.raises(ValueError, match=r"not this pair's: encoder.bias: saved \(1,\), here \(3,"):
        run(x, other, checkpoint=path)
    with pytest.raises(ValueError, match="written with the optimizer Adam, not SGD"):
        run(x, checkpoint=path, optim=torch.optim.SGD)
    path.write_text("a poem")
    with pytest.raises(ValueError, match=r"run.pt is not a checkpoint"):
        run(x, checkpoint=path, checkpoint_keep=1)
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        run(x, checkpoint=tmp_path / "no" / "run.pt")


# --- the schedule ----------------------------------------------------------------------


def still(parameters):
    """An optimizer that moves nothing."""
    return torch.optim.SGD(parameters, lr=0.0)


class Diagonal(nn.Module):
    """A guide with one location and scale for all data; remembers its last data and draw."""

    def __init__(self, latents):
        super().__init__()
        self.location = nn.Parameter(torch.linspace(-0.5, 0.5, latents, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.linspace(-1.0, 0.0, latents, dtype=torch.float64))

    def forward(self, x):
        pyro.module("diagonal", self)
        with pyro.plate("data", len(x)):
            fn = dist.Normal(self.location, self.log_scale.exp()).to_event(1)
            self.seen, self.draw = x, pyro.sample("z", fn).detach()


@pytest.mark.parametrize(
    ("loss", "analytic"),
    [
        (pv.ELBO(), True),
        (pv.ELBO(kl="sample"), False),
        (Trace_ELBO(), False),
        (TraceMeanField_ELBO(), True),
    ],
)
def test_the_factor_scales_latent_terms_and_not_the_likelihood(loss, analytic):
    """One step at 1/4: the ELBO and its gradient by hand, log p(x | z) + (log p - log q) / 4."""
    fa = factor_analysis()
    x, guide = fa.data(30), Diagonal(fa.num_latents)
    before = parameters_of(guide)
    result = pv.fit(
        fa,
        guide,
        x,
        loss=loss,
        max_steps=1,
        schedule=Constant(0.25),
        optim=lambda ps: torch.optim.SGD(ps, lr=1e-4),
        progress=False,
    )
    # The same draw as a function of the parameters before the step.
    location, scale = before[0].requires_grad_(), before[1].requires_grad_()
    q = torch.distributions.Normal(location, scale.exp())
    p = torch.distributions.Normal(0.0, 1.0)
    with torch.no_grad():
        noise = (guide.draw - q.loc) / q.scale
    z = q.loc + q.scale * noise
    likelihood = torch.distributions.Normal(z @ fa.loadings.T + fa.mean, fa.noise)
    kl = (
        torch.distributions.kl_divergence(q, p).expand(z.shape)
        if analytic
        else q.log_prob(z) - p.log_prob(z)
    )
    by_hand = likelihood.log_prob(guide.seen).sum() - 0.25 * kl.sum()
    assert result.history["elbo"] == [pytest.approx(by_hand.item() / 30, rel=1e-12)]
    gradients = torch.autograd.grad(-by_hand, [location, scale])
    for old, new, gradient in zip(before, guide.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.detach(), old.detach() - 1e-4 * gradient)
    assert result.history["beta"] == [0.25]


def test_a_factor_of_zero_takes_the_kl_away():
    """At rate 0: the loss without KL is the likelihood alone."""
    x = make_data()
    options = {"epochs": 1, "optim": still}
    full, guide = run(x, **options)
    none, _ = run(x, schedule=Constant(0.0), **options)
    params = guide.family_params(x).detach().squeeze(1)
    kl = torch.distributions.kl_divergence(
        dist.Normal(params[:, 0], params[:, 1].exp()), dist.Normal(0.0, 1.0)
    ).mean()
    difference = none.history["elbo"][0] - full.history["elbo"][0]
    assert difference == pytest.approx(kl.item(), rel=1e-9)
    assert kl > 1e-4


@pytest.mark.parametrize("loss", [None, Trace_ELBO()])
def test_evaluation_is_never_scaled(loss):
    x = make_data()
    options = {"epochs": 3, "validation_data": x, "optim": still, "loss": loss}
    plain, guide = run(x, **options)
    before = pv.elbo(model, guide, x, seed=1).value
    scaled, same_guide = run(x, schedule=LinearWarmup(5), **options)
    assert scaled.history["validation_elbo"] == plain.history["validation_elbo"]
    assert scaled.history["elbo"] != plain.history["elbo"]
    assert torch.equal(pv.elbo(model, same_guide, x, seed=1).value, before)
    assert torch.equal(
        pv.log_weights(model, guide, x, num_particles=3, seed=1).log_prior,
        pv.log_weights(model, same_guide, x, num_particles=3, seed=1).log_prior,
    )


@pytest.mark.parametrize("beta", [0.25, torch.tensor(0.25), torch.tensor(0.25).double()])
def test_pyro_s_losses_with_a_scale_of_either_kind(beta):
    """By the handler alone, without fit: a number and a tensor give the same."""
    fa = factor_analysis()
    x, guide, scale = fa.data(20), Diagonal(fa.num_latents), LatentScale(beta)
    loss = Trace_ELBO().loss(scale(fa), scale(guide), x)
    likelihood = dist.Normal(guide.draw @ fa.loadings.T + fa.mean, fa.noise).log_prob(x).sum()
    q = dist.Normal(guide.location.detach(), guide.log_scale.exp().detach())
    latent = (dist.Normal(0.0, 1.0).log_prob(guide.draw) - q.log_prob(guide.draw)).sum()
    assert loss == pytest.approx(-(likelihood + 0.25 * latent).item(), rel=1e-12)


def test_a_tensor_factor_stays_an_input_of_a_traced_graph():
    fa = factor_analysis()
    x, scale = fa.data(5), LatentScale()
    scaled = scale(fa)

    def log_joint(beta):
        scale.factor = beta
        return poutine.trace(scaled).get_trace(x).log_prob_sum()

    def run_at(fn, beta):
        torch.manual_seed(0)
        return fn(torch.tensor(beta, dtype=torch.float64))

    with pyro.validation_enabled(False):  # it looks at values, which a graph does not have yet
        graph = make_fx(log_joint)(x.new_tensor(0.25))
        found = [run_at(graph, beta) for beta in (0.0, 0.25, 1.0)]
        wanted = [run_at(log_joint, beta) for beta in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(found, wanted)
    assert wanted[0] != wanted[2]


def test_the_schedule_is_asked_at_each_step():
    asked = []
    run(make_data(), schedule=lambda step: asked.append(step) or 1.0, epochs=2)
    assert asked == list(range(6))


def test_a_factor_of_one_changes_nothing():
    x = make_data()
    (plain, one), (scaled, other) = run(x), run(x, schedule=lambda step: 1.0)
    equal_histories(plain.history, scaled.history)
    assert same(parameters_of(one), parameters_of(other))


def test_the_history_has_the_factor_of_each_epoch_s_last_step():
    x = make_data()  # 3 steps an epoch
    for validation in ({}, {"validation_data": x}):
        result, _ = run(x, epochs=4, schedule=LinearWarmup(8, start=0.5), **validation)
        assert result.history["beta"] == [0.625, 0.8125, 1.0, 1.0]


class Recording(Schedule):
    """A warm-up of 8 steps that remembers at which it was asked."""

    def __init__(self):
        self.asked, self.warmup = [], LinearWarmup(8)

    def __call__(self, step):
        self.asked.append(step)
        return self.warmup(step)

    def full_at(self, since=0):
        return self.warmup.full_at(since)


def test_a_resumed_run_goes_on_at_its_step_of_the_schedule(tmp_path):
    """Broken off in step 5, within epoch 2, which is taken again."""
    x, path, begun, resumed = make_data(), tmp_path / "run.pt", Recording(), Recording()
    run(x, epochs=4, schedule=begun, checkpoint=path, loss=Interrupting(5))
    assert begun.asked[:5] == [0, 1, 2, 3, 4]
    result, _ = run(x, epochs=4, schedule=resumed, checkpoint=path, loss=Interrupting(99))
    assert resumed.asked == list(range(3, 12))
    assert result.history["beta"] == [0.25, 0.625, 1.0, 1.0]


def test_a_checkpoint_without_the_column(tmp_path):
    """What an earlier version wrote: its factors are unknown, what follows is not."""
    x, path = make_data(), tmp_path / "run.pt"
    run(x, epochs=2, schedule=LinearWarmup(8), checkpoint=path)
    content = checkpoints.load(path)
    del content["progress"]["history"]["beta"]
    checkpoints.save(content, path)
    result, _ = run(x, epochs=4, schedule=LinearWarmup(8), checkpoint=path)
    assert list(result.history) == HISTORY
    assert result.history["beta"] == pytest.approx([math.nan, math.nan, 1.0, 1.0], nan_ok=True)


# --- a warm-up that training cuts short ------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "stopped_by", "step", "factor"),
    [
        ({"epochs": 2}, "epochs", 6, "0.25"),
        ({"epochs": None, "max_steps": 4}, "max_steps", 4, "0.15"),
        ({"epochs": 50, "patience": 2}, "patience", 9, "0.4"),
        ({"epochs": 50, "callbacks": [lambda epoch: True]}, "callback", 3, "0.1"),
        ({"epochs": 50, "callbacks": [ctrl_c(2)]}, "interrupted", 6, "0.25"),
        ({"epochs": 30, "loss": Interrupting(5)}, "interrupted", 4, "0.15"),
    ],
)
def test_a_warm_up_cut_short_is_said_at_the_end(caplog, options, stopped_by, step, factor):
    x = make_data()
    warmup = LinearWarmup(20)
    result, _ = run(x, schedule=warmup, validation_data=x, optim=still, **options)
    assert result.stopped_by == stopped_by
    assert caplog.messages[-1] == (
        f"training ended ({stopped_by}) at step {step}, with the factor {factor} on the latent "
        f"terms; {warmup!r} comes to 1 at step 21. Train longer, or shorten it"
    )
    assert caplog.records[-1].name == "pyro_vae.training.trainer"
    assert caplog.records[-1].levelname == "WARNING"
    assert caplog.text.count("training ended") == 1


def test_a_warm_up_that_cannot_be_done_is_said_at_the_start(caplog):
    messages = []
    seen = [lambda epoch: messages.append(list(caplog.messages))]
    x, told = make_data(), "training will end by step 6, with the factor 0.25 on"
    run(x, schedule=LinearWarmup(20), epochs=2, callbacks=seen)
    assert len(messages[0]) == len(messages[1]) == 1
    assert messages[0][0].startswith(told)
    assert "comes to 1 at step 21" in messages[0][0]
    caplog.clear()
    run(x, schedule=LinearWarmup(20), epochs=50, max_steps=6)  # the sooner of the two
    assert caplog.messages[0].startswith(told)
    caplog.clear()
    run(x, schedule=Cyclical(10), max_steps=11, epochs=None)  # in the second rise
    assert [message.split(",")[0] for message in caplog.messages] == [
        "training will end by step 11",
        "training ended (max_steps) at step 11",
    ]


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        Constant(0.25),
        LinearWarmup(5),  # the sixth step, the last, is the first at 1
        Cyclical(4, cycles=1),
        Cyclical(2),
        lambda step: step / 1000,
    ],
)
def test_nothing_is_said_of_a_schedule_that_is_done(caplog, schedule):
    run(make_data(), schedule=schedule, epochs=2)
    assert caplog.messages == []


def test_one_step_too_few_is_said(caplog):
    run(make_data(), schedule=LinearWarmup(6), epochs=2)
    assert "comes to 1 at step 7" in caplog.messages[-1]


def test_nothing_but_the_interrupt_is_said_before_the_first_step(caplog):
    run(make_data(), schedule=LinearWarmup(5), loss=Interrupting(1), epochs=9)
    assert [message.split(";")[0] for message in caplog.messages] == ["interrupted after step 0"]


def test_a_finished_run_that_is_opened_again_says_how_it_ended(caplog, tmp_path):
    x, path = make_data(), tmp_path / "run.pt"
    options = {"schedule": LinearWarmup(20), "checkpoint": path}
    run(x, epochs=2, **options)
    caplog.clear()
    run(x, epochs=2, **options)
    assert [message.split(",")[0] for message in caplog.messages] == [
        "training ended (epochs) at step 6"
    ]
    caplog.clear()
    run(x, epochs=7, **options)
    assert caplog.messages == []


# --- schedules that are refused ----------------------------------------------------------


@pytest.mark.parametrize("found", [-0.5, math.nan, math.inf, None])
def test_a_factor_that_is_not_finite_or_negative(found):
    x = make_data()
    unbroken, guide = make_guide(x), make_guide(x)
    run(x, unbroken, epochs=None, max_steps=4)
    with pytest.raises(ValueError, match="factor at step 4, counted from 0, is") as raised:
        run(x, guide, schedule=lambda step: 1.0 if step < 4 else found)
    assert f"is {found!r}; a finite number of at least 0 is needed" in str(raised.value)
    assert same(parameters_of(guide), parameters_of(unbroken))


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")  # Pyro's own, before ours
def test_a_factor_of_zero_does_not_hide_an_infinite_prior():
    """0 times -inf is nan: the step stops, and the site is named."""

    def positive(x):
        with pyro.plate("data", len(x)):
            prior = dist.Uniform(x.new_zeros(1), 1.0, validate_args=False).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            location = pyro.param("location", x.new_tensor([-5.0]))
            pyro.sample("z", dist.Normal(location, 0.1).to_event(1))

    with pytest.raises(pv.NonFiniteLossError) as raised:
        run(make_data(), guide, fn=positive, schedule=Constant(0.0), loss=Trace_ELBO())
    assert raised.value.sites == ["'z' of the model, outside its support"]


# --- what is refused -------------------------------------------------------------------


def counts(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(z.exp()).to_event(1), obs=x)


def test_data_outside_the_likelihood_s_support():
    x = torch.ones(9, 1, dtype=torch.float64)
    guide = make_guide(x, fn=counts)
    bad = x.clone()
    bad[[4, 7]] = -1.0
    with pytest.raises(ValueError, match=r"'x'.*support.*Poisson.*rows 4, 7 \(2 of 9\)"):
        run(bad, guide, fn=counts)
    with pytest.raises(ValueError, match=r"rows 4, 7 \(2 of 9\)") as raised:
        run(x, guide, fn=counts, validation_data=bad)
    assert raised.value.__notes__ == ["in validation_data"]


def test_data_that_are_not_finite_or_empty():
    x = make_data()
    guide = make_guide(x)
    bad = x.clone()
    bad[3] = math.nan
    for options in ({"validation_data": bad}, {}):
        with pytest.raises(ValueError, match=r"NaN or infinite values in rows 3 \(1 of 40\)"):
            run(x if options else bad, guide, **options)
    with pytest.raises(ValueError, match="the batch is empty"):
        run(x[:0], guide)


def test_a_guide_without_the_model_s_sites():
    def other(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(pyro.param("y0", x.new_zeros(())), 1.0))

    with pytest.raises(ValueError, match=r"no sample statement for .*\['z'\].*has \['y'\]"):
        run(make_data(), other)


def test_a_loss_that_sees_no_parameters():
    """Pyro's losses look for param sites; a bare nn.Module makes none."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.location = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.location, 1.0).to_event(1))

    with pytest.raises(ValueError, match="no gradient by any parameter.*registered"):
        run(make_data(), Bare(), loss=Trace_ELBO())
    result, _ = run(make_data(), Bare())  # ours follows the gradient
    assert result.stopped_by == "epochs"


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0: a whole number of at least 1"),
        ({"batch_size": 2.5}, ValueError, "batch_size=2.5: a whole number"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"max_steps": -1}, ValueError, "max_steps=-1"),
        ({"patience": 0, "validation_data": make_data(3)}, ValueError, "patience=0"),
        ({"patience": 3}, ValueError, "patience counts epochs.*give validation_data"),
        ({"compile": 1}, ValueError, "compile=1: 'auto', 'replay', True or False"),
        ({"loss": Trace_ELBO}, TypeError, "an instance of a pyro.infer.ELBO is needed"),
        ({"loss": ReweightedWakeSleep()}, TypeError, "ReweightedWakeSleep has two losses"),
        ({"optim": "adam"}, TypeError, "optim='adam'"),
        ({"schedule": 0.5}, TypeError, r"schedule=0.5: a function from .*Constant\(beta\)"),
        ({"schedule": LinearWarmup}, TypeError, "schedule=<class .*a function from a step"),
        ({"validation_data": Fresh(make_data(3))}, ValueError, "drawn anew each time"),
        ({"validation_data": Drawn(make_data(3))}, ValueError, "drawn anew each time"),
        ({"data_plate": "rows"}, pv.DataPlateError, "data_plate='rows'.*it has .*'data'"),
    ],
)
def test_bad_arguments(options, error, told):
    x = make_data()
    guide = make_guide(x)
    before = parameters_of(guide)
    with pytest.raises(error, match=told):
        run(x, guide, **options)
    assert same(parameters_of(guide), before)


# --- minibatches of one datum, rows that overflow, dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_data_of_another_dtype_than_the_networks(dtype):
    def cast(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x.double())

    x = make_data()
    guide = make_guide(x, fn=cast)
    for use in (lambda data: run(data, guide), lambda data: pv.elbo(cast, guide, data)):
        with pytest.raises(TypeError, match=f"argument 0 is {dtype}.*pass x.float") as caught:
            use(x.to(dtype))
        assert "Trace Shapes" not in str(caught.value)


def test_half_precision_throughout():
    x = make_data().bfloat16()
    guide = pv.AmortizedGuide(model, nn.Linear(1, 1).bfloat16(), example=x)
    result, _ = run(x, guide, epochs=2, optim=None)
    assert math.isfinite(result.history["elbo"][-1])


def test_sparse_minibatches_made_dense_in_the_step():
    """What the refusal of sparse tensors says to do."""
    x = make_data()
    matrix = x.to_sparse()

    class Dense:
        source = torch.arange(40)

        def draw(self, index):
            return matrix.index_select(0, index).to_dense()

    wanted, _ = run(x, make_guide(x), compile=False)
    found, _ = run(Dense(), make_guide(x), compile=False)
    assert found.history["elbo"] == pytest.approx(wanted.history["elbo"], rel=1e-9)


def test_a_gaussian_of_all_latents_that_is_not_at_its_optimum_is_told(caplog):
    """A constant learning rate leaves it nats below, the ELBO flat: the slope knows, by algebra."""
    x = whole.data(50)
    guide = whole.full_rank(x)
    result = pv.fit(
        whole.model,
        guide,
        x,
        optim=lambda p: torch.optim.Adam(p, lr=0.02),
        max_steps=1500,
        data_plate=False,
        progress=False,
    )
    below = whole.off(guide, x).nats
    promised, error = result.promised
    assert below > 2 and below / 3 < promised < 3 * below and error < promised / 3
    assert "its slope promises" in repr(result)
    assert "rows of the LocalGuide are not at their optimum" in caplog.text
    caplog.clear()
    refined = pv.refine(whole.model, guide, x, data_plate=False, seed=0, progress=False)
    again = pv.fit(
        whole.model,
        refined,
        x,
        optim=lambda p: torch.optim.Adam(p, lr=1e-9),
        max_steps=2,
        data_plate=False,
        progress=False,
    )
    assert not again.unfinished and abs(again.promised[0]) < 0.02 + 3 * again.promised[1]
    assert "optimum" not in caplog.text
