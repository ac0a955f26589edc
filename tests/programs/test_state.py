"""Looks leave a pair as it was: the parameter store, random numbers, buffers, first values."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyro_vae as pv
from pyro_vae.programs.state import as_in_training, random_state, set_random_state
from tests.runs import structure_of

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100.0


class Counting(nn.Module):
    """Counts its calls, in whatever mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, z):
        self.calls += 1
        return z * self.scale


def pair():
    """A parameter whose first value is made of the first draw; one that is drawn; a module."""
    net = Counting()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 100.0).to_event(1))
            shift = pyro.param("shift", z.mean().detach())
            drawn = pyro.param("drawn", lambda: torch.randn(3, dtype=x.dtype))
            pyro.sample("x", dist.Normal(net(z) - shift + drawn, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", x.clone())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))

    return model, guide, net


def adam():
    return pyro.optim.Adam({"lr": 0.01})


def steps(make, model, guide, loss, seed=3):
    """Losses, and the first value of the shift."""
    torch.manual_seed(seed)
    svi = make(model, guide, adam(), loss)
    first = svi.step(X)
    return first, pyro.param("shift").item(), [svi.step(X) for _ in range(5)]


LOOKS = {
    "describe": lambda model, guide: pv.describe(model, X),
    "inspect": lambda model, guide: structure_of(model, X),
    "explain": lambda model, guide: pv.explain(pv.ELBO(), model, guide, X),
    "elbo": lambda model, guide: pv.elbo(model, guide, X, num_particles=3, seed=0),
    "log_weights": lambda model, guide: pv.log_weights(model, guide, X, num_particles=2, seed=0),
    "iwae_bound": lambda model, guide: pv.iwae_bound(model, guide, X, num_particles=3, seed=0),
    "amortized": lambda model, guide: pv.AmortizedGuide(model, nn.Linear(3, 2).double(), example=X),
    "local": lambda model, guide: pv.LocalGuide(model, num_data=8, example=X),
    "to_arviz": lambda model, guide: pv.to_arviz(model, guide, X, num_draws=5, seed=0),
    "refine": lambda model, guide: pv.refine(model, guide, X, max_steps=2, seed=0),
    "compare": lambda model, guide: pv.compare(
        model, {"by hand": guide}, X, num_particles=5, seed=0, reference="by hand"
    ),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_leaves_everything_as_it_was(look):
    """Under one seed the first values and losses are those of SVI without the look."""
    model, guide, net = pair()
    wanted = steps(SVI, model, guide, Trace_ELBO())
    pyro.clear_param_store()
    model, guide, net = pair()
    pyro.param("of another pair", torch.ones(2))
    before, names = torch.get_rng_state(), list(pyro.get_param_store().keys())
    look(model, guide)
    assert list(pyro.get_param_store().keys()) == names
    assert list(pyro.get_param_store()._param_to_name.values()) == names
    assert net.calls == 0
    if look is not LOOKS["amortized"]:  # which draws an encoder
        assert torch.equal(torch.get_rng_state(), before)
    assert steps(SVI, model, guide, Trace_ELBO()) == wanted


@pytest.mark.parametrize("how", [False, "replay"])
@pytest.mark.parametrize("loss", [Trace_ELBO, lambda: pv.ELBO(kl="sample")])
def test_first_values_are_those_of_svi(loss, how):
    wanted = steps(SVI, *pair()[:2], Trace_ELBO())
    pyro.clear_param_store()

    def make(*args):
        return pv.CompiledSVI(*args, compile=how)

    found = steps(make, *pair()[:2], loss())
    assert found[:2] == wanted[:2]
    assert found[2] == pytest.approx(wanted[2], rel=1e-9)


def test_the_particles_of_a_loss_see_one_first_value(caplog):
    """Compared one by one and together, from the same values, they agree."""
    model, guide, _ = pair()
    torch.manual_seed(0)
    SVI(model, guide, adam(), pv.ELBO(4, kl="sample")).step(X)
    assert not caplog.records
    assert pyro.param("shift").item() == pytest.approx(X.mean().item(), abs=0.1)


@pytest.mark.parametrize("loss", [pv.ELBO(1), pv.ELBO(3), pv.IWAE(3)])
@pytest.mark.parametrize("layer", [nn.Identity(), nn.Dropout(0.5)])
def test_a_batch_norm_counts_training_steps_alone(loss, layer):
    """In the encoder: not the comparisons of particles before the first step."""
    net = nn.Sequential(nn.Linear(3, 3).double(), layer)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    norm = nn.BatchNorm1d(3).double()
    guide = pv.AmortizedGuide(model, norm, example=X)
    SVI(model, guide, adam(), loss).step(X)
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * X.mean(0))


def test_fit_begins_with_the_guides_draws_and_resumes(tmp_path):
    found = []
    for parts in ([6], [3, 6]):
        path = tmp_path / str(len(parts))
        for epochs in parts:
            pyro.clear_param_store()
            model, guide, _ = pair()
            result = pv.fit(
                model, guide, X, optim=adam(), epochs=epochs, checkpoint=path, progress=False
            )
        state = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        found.append((result.history["elbo"], state))
        assert state["shift"].item() == pytest.approx(X.mean().item(), abs=0.2)
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[0][1][name], value) for name, value in found[1][1].items())


def test_a_pyro_module_keeps_its_own_parameters():
    """Reading one puts the store's in its place: not in a look."""

    class Noisy(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            positive = dist.constraints.positive
            self.sigma = PyroParam(torch.tensor(2.0, dtype=torch.float64), positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, self.sigma), obs=x)

    pyro.param("sigma", torch.tensor(0.5, dtype=torch.float64))
    model = Noisy()
    own = dict(model.named_parameters())
    pv.describe(model, X[:, 0])
    pv.LocalGuide(model, num_data=8, example=X[:, 0])
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in own.items())
    assert list(pyro.get_param_store().keys()) == ["sigma"]


@pytest.mark.parametrize("how", [False, "replay"])
def test_fit_is_svi_under_one_seed(how):
    """On all the data, with first values that are drawn: loss by loss, and in what is stored."""
    x = X[:, 0]

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 10.0))
        shift = pyro.param("shift", (2 * mu).detach())
        drawn = pyro.param("drawn", lambda: torch.randn((), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu + shift + drawn, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.randn((), dtype=x.dtype))
        pyro.sample("mu", dist.Normal(loc, 1.0))

    torch.manual_seed(5)
    svi = SVI(model, guide, adam(), Trace_ELBO())
    losses = [svi.step(x) for _ in range(110)]
    stored = {name: value.item() for name, value in pyro.get_param_store().items()}
    pyro.clear_param_store()
    result = pv.fit(
        model,
        guide,
        x,
        data_plate=False,
        loss=Trace_ELBO(),
        optim=adam(),
        seed=5,
        max_steps=110,
        compile=how,
        progress=False,
    )
    assert [-elbo for elbo in result.history["elbo"]] == pytest.approx(losses, rel=1e-10)
    found = {name: value.item() for name, value in pyro.get_param_store().items()}
    assert found == pytest.approx(stored, rel=1e-10)


def test_random_state_comes_back():
    state = random_state()
    first = torch.randn(3)
    set_random_state(state)
    assert torch.equal(torch.randn(3), first)


def test_a_look_in_training_mode_leaves_the_statistics_of_every_module():
    norms = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
    with torch.no_grad(), as_in_training(norms[:1]):
        for norm in norms:
            norm(torch.ones(3, 2))
    for norm in norms:
        assert norm.running_mean.tolist() == [0.0, 0.0]
        assert norm.num_batches_tracked.item() == 0
