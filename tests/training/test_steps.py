"""Steps: what is said and undone where a loss, a gradient or an update is not finite."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from tests.training.fits import make_data, make_guide, parameters_of, run, same


class Breaking(nn.Module):
    """Breaks at a given run in training mode, in the way that is asked for."""

    def __init__(self, how, at):
        super().__init__()
        self.how, self.at, self.runs = how, at, 0
        self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        pyro.module("breaking", self)
        self.runs += self.training and torch.is_grad_enabled()
        broken = self.runs == self.at
        scale = self.scale.exp()
        if broken and self.how == "overflow":
            scale = (self.scale + 1000.0).exp()
        if broken and self.how == "nan":
            scale = scale * math.nan
        if broken and self.how == "gradient":
            scale = scale + (self.scale - self.scale).sqrt()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("how", "told", "sites"),
    [
        (
            "overflow",
            r"the loss \(inf\) of step 5 is not finite, at sites 'x'",
            ["'x' of the model"],
        ),
        (
            "nan",
            r"the loss of step 5 is not finite, at sites 'x' of the model",
            ["'x' of the model"],
        ),
        ("gradient", "the gradient of step 5 is not finite, though each site's", []),
    ],
)
@pytest.mark.parametrize("loss", [None, Trace_ELBO()])
@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")  # Pyro's own, before ours
def test_a_step_that_is_not_finite(how, told, sites, loss):
    x = make_data()
    unbroken, sound = make_guide(x), Breaking("not", 0)
    run(x, unbroken, fn=sound, epochs=None, max_steps=4, loss=loss)
    guide, broken = make_guide(x), Breaking(how, 5)
    with pytest.raises(pv.NonFiniteLossError, match=told) as raised:
        run(x, guide, fn=broken, loss=loss)
    assert raised.value.step == 5
    assert raised.value.sites == sites
    assert "keep the parameters of the step before" in str(raised.value)
    assert same(parameters_of(guide), parameters_of(unbroken))
    assert same(parameters_of(broken), parameters_of(sound))
    assert all(p.isfinite().all() for p in [*guide.parameters(), *broken.parameters()])


def test_a_guide_that_is_not_finite_is_named():
    x = make_data()
    guide = make_guide(x)
    with torch.no_grad():
        guide.head.bias[1] = 800.0  # a log scale
    with pytest.raises(pv.NonFiniteLossError, match="'z' of the guide") as raised:
        run(x, guide)
    assert raised.value.step == 1


def test_the_second_look_has_the_same_random_numbers():
    """The scale overflows for a latent beyond 2.5, which few minibatches of 4 hold."""

    def rare(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            scale = torch.where(z > 2.5, math.inf, 1.0)
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    x = make_data() * 0.0
    optim = {"optim": lambda ps: torch.optim.SGD(ps, lr=0.0)}
    with pytest.raises(pv.NonFiniteLossError, match="loss") as raised:
        run(x, fn=rare, batch_size=4, epochs=100, **optim)
    assert raised.value.step > 5
    assert raised.value.sites == ["'x' of the model"]


def test_an_update_that_overflows_is_taken_back():
    """A rate that makes the parameters themselves infinite at step 4, in epoch 2."""
    x = make_data()
    guide, rates = make_guide(x), []
    kept = []

    def optim(parameters):
        rates.append(torch.optim.SGD(parameters, lr=1e-3))
        return rates[0]

    def grow(told):
        kept.extend(parameters_of(guide))
        rates[0].param_groups[0]["lr"] = math.inf

    with pytest.raises(pv.NonFiniteLossError, match="keep the parameters of the end of epoch 1"):
        run(x, guide, optim=optim, callbacks=[grow])
    assert same(parameters_of(guide), kept)


def test_another_error_in_a_step_passes_with_the_step_noted():
    class Failing(Trace_ELBO):
        def loss_and_grads(self, *args, **kwargs):
            raise RuntimeError("of the loss")

    with pytest.raises(RuntimeError, match="of the loss") as raised:
        run(make_data(), loss=Failing())
    assert raised.value.__notes__ == ["in step 1 of training"]


# --- on_nan="skip" -------------------------------------------------------------------------


class Flaky(nn.Module):
    """A model that is not finite on batches that hold a large number; with a running mean."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        pyro.module("flaky", self)
        bad = (x.abs() > 50).any()
        if self.training and torch.is_grad_enabled():
            self.mean.mul_(0.9).add_(0.1 * x.mean() + torch.where(bad, math.nan, 0.0))
        poison = torch.where(bad, self.shift - self.shift, 1.0)
        scale = poison.sqrt() if self.how == "gradient" else poison.log().exp()
        scale = torch.where(bad & (self.how == "gradient"), scale + 1, scale)
        scale = scale * torch.where(bad & (self.how == "nan"), math.nan, 1.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.shift + x.new_zeros(1), 1.0).to_event(1))
            with pyro.validation_enabled(False):
                pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)


def flaky_fit(how, batches, **options):
    """Train on minibatches of 4 in order, as a DataLoader gives them."""
    loader = torch.utils.data.DataLoader(torch.cat(batches), batch_size=4)
    pair = Flaky(how), None
    pair = pair[0], make_guide(batches[0], fn=pair[0])
    options = {"optim": lambda ps: torch.optim.Adam(ps, lr=0.05, fused=True)} | options
    return pv.fit(*pair, loader, on_nan="skip", progress=False, **options), pair


def batch(seed, bad=False):
    found = make_data(4, seed=seed)
    return torch.full_like(found, 100.0) if bad else found


@pytest.mark.parametrize("how", ["gradient", "nan"])
@pytest.mark.parametrize("compile", [False, "replay"])
@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")  # Pyro's own
def test_a_step_that_is_skipped_moves_nothing(how, compile, caplog):
    """Steps 1, 4 and 7 of 8 are bad, of SGD on losses without draws: as if they were not there.

    Without their moments, running means, and learning.
    """
    good = [batch(seed) for seed in range(5)]
    bad = batch(0, bad=True)
    mixed = [bad, *good[:2], bad, *good[2:4], bad, good[4]]
    still = {"epochs": 2, "compile": compile, "seed": None}

    def fit(batches):
        torch.manual_seed(0)
        loss = Still()
        return flaky_fit(how, batches, loss=loss, **still)

    result, pair = fit(mixed)
    wanted, other = fit(good)
    assert result.skipped == 6 and wanted.skipped == 0
    assert result.steps == 16 and wanted.steps == 10
    for one, two in zip(pair, other, strict=True):
        for name, value in one.state_dict().items():
            torch.testing.assert_close(value, two.state_dict()[name], msg=name)
    assert result.history["elbo"] == pytest.approx(wanted.history["elbo"])
    assert "skipped=6" in repr(result)
    assert "of step 1 is not finite" in caplog.text
    assert "6 of 16 steps had a loss or a gradient that was not finite" in caplog.text


class Still(Trace_ELBO):
    """With draws that are the same at each step."""

    def loss_and_grads(self, *args, **kwargs):
        with pv.programs.state.seeded(torch.device("cpu"), 0):
            return super().loss_and_grads(*args, **kwargs)


def test_many_in_a_row_are_an_error(tmp_path):
    """In a run that was taken up again too."""
    batches, options = [batch(0), *[batch(0, bad=True)] * 25], {"epochs": 1, "compile": False}
    with pytest.raises(pv.NonFiniteLossError, match="step 22") as raised:
        flaky_fit("nan", batches, **options)
    assert "the 20 steps before it were skipped too" in raised.value.__notes__[0]
    options["checkpoint"] = tmp_path / "run.ckpt"
    flaky_fit("nan", batches, max_steps=12, **options)
    with pytest.raises(pv.NonFiniteLossError, match="step 22") as raised:
        flaky_fit("nan", batches, **options)
    assert "the 20 steps before it were skipped too" in raised.value.__notes__[0]


def test_parameters_that_are_not_finite_are_not_skipped_over():
    """The update itself overflows: no later step could mend it."""
    x = make_data()

    def optim(parameters):
        return torch.optim.SGD(parameters, lr=1e308)

    guide = make_guide(x)
    with pytest.raises(pv.NonFiniteLossError):
        run(x, guide, optim=optim, on_nan="skip", epochs=3)
    assert all(p.isfinite().all() for p in parameters_of(guide))


def test_a_whole_epoch_that_is_skipped():
    x = [batch(0, bad=True)] * 2
    result, _ = flaky_fit("nan", x, epochs=2)
    assert result.skipped == result.steps == 4
    assert all(map(math.isnan, result.history["elbo"]))


def test_skips_are_counted_by_a_resumed_run(tmp_path):
    x = [batch(0), batch(0, bad=True)]
    for epochs in (1, 2):
        result, _ = flaky_fit("nan", x, epochs=epochs, checkpoint=tmp_path / "run.pt")
    assert result.skipped == 2


def test_another_word_for_on_nan():
    with pytest.raises(ValueError, match=r"on_nan='ignore': \"raise\" or \"skip\""):
        run(make_data(), on_nan="ignore")
