"""Where parameters live: nn.Modules, the param store, both; and the optimizer over them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae.programs.batch import as_batch
from pyro_vae.training.optimizers import make_optimizer
from pyro_vae.training.parameters import Parameters, all_finite

X = torch.linspace(-1.0, 1.0, 5)


def plain_model(x, decoder=None):
    location = pyro.param("location", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(location, 1.0))
        if decoder is not None:
            z = pyro.module("decoder", decoder)(z.unsqueeze(-1)).squeeze(-1)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def plain_guide(x):
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, scale))


class ModuleModel(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("offset", torch.tensor(0.1))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.offset, 1.0))
            pyro.sample("x", dist.Normal(self.net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)


def test_plain_functions_keep_theirs_in_the_store():
    decoder = nn.Linear(1, 1)
    parameters = Parameters(lambda x: plain_model(x, decoder), plain_guide, as_batch(X))
    assert len(parameters.trained) == 4
    assert any(p is decoder.weight for p in parameters.trained)
    assert set(parameters.state()["store"]) == {
        "decoder$$$bias",
        "decoder$$$weight",
        "location",
        "scale",
    }
    # Pyro keeps a constrained parameter's logarithm: that one is trained.
    torch.testing.assert_close(parameters.state()["store"]["scale"].exp(), torch.tensor(0.5))


def test_other_parameters_of_the_store_are_left_alone():
    pyro.param("stranger", torch.zeros(2))
    parameters = Parameters(plain_model, plain_guide, as_batch(X))
    assert "stranger" not in parameters.state()["store"]
    assert len(parameters.trained) == 2


def test_modules_keep_theirs_and_shared_tensors_count_once():
    net = nn.Linear(1, 1)
    model = ModuleModel(net)
    guide = pv.AmortizedGuide(model, nn.Sequential(nn.Unflatten(0, (-1, 1)), net), example=X)
    parameters = Parameters(model, guide, as_batch(X))
    # net's two, shared, and the head's two.
    assert len(parameters.trained) == len({id(p) for p in parameters.trained}) == 4
    state = parameters.state()
    assert "offset" in state["model"]
    # Registered in the store as well, by the guide; kept once.
    assert state["store"] == {}


def test_an_autoguide_s_late_parameters_are_found():
    guide = AutoNormal(plain_model)
    parameters = Parameters(plain_model, guide, as_batch(X))
    shapes = sorted(tuple(p.shape) for p in parameters.trained)
    assert shapes == [(), (5,), (5,)]  # location of the model; locs and scales of z


def test_frozen_parameters_are_not_trained():
    model = ModuleModel(nn.Linear(1, 1))
    model.net.requires_grad_(False)
    guide = pv.LocalGuide(model, num_data=5, example=X)
    assert [p is guide.table for p in Parameters(model, guide, as_batch(X)).trained] == [True]


def test_nothing_to_train():
    net = nn.Linear(1, 1)

    def closes_over(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match=r"no parameters to train.*pyro.module.*invisible"):
        Parameters(closes_over, guide, as_batch(X))


def test_looking_draws_no_random_numbers():
    before = torch.get_rng_state()
    Parameters(plain_model, plain_guide, as_batch(X))
    assert torch.equal(torch.get_rng_state(), before)


def pair():
    model = ModuleModel(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))
    parameters = Parameters(model, plain_guide, as_batch(X))
    assert parameters.late == ("scale",)
    parameters.initialize()
    return parameters, model


def test_a_state_is_a_copy_and_comes_back_in_place():
    parameters, model = pair()
    before, norm = parameters.state(), model.net[1]
    objects = list(parameters.trained)
    with torch.no_grad():
        for parameter in parameters.trained:
            parameter.add_(1.0)
        norm.running_mean.fill_(5.0)
    changed = parameters.state()
    assert changed["model"]["net.0.weight"] == before["model"]["net.0.weight"] + 1
    assert changed["store"]["scale"] == before["store"]["scale"] + 1
    parameters.restore(before)
    found = parameters.state()
    for role in before:
        for name, value in before[role].items():
            assert torch.equal(found[role][name], value), name
    assert norm.running_mean.item() == 0.0
    assert all(a is b for a, b in zip(parameters.trained, objects, strict=True))
    torch.testing.assert_close(pyro.param("scale"), torch.tensor(0.5))


def test_finite():
    parameters, model = pair()
    assert parameters.finite()
    model.net[1].running_var.fill_(torch.inf)
    assert not parameters.finite()
    model.net[1].running_var.fill_(1.0)
    pyro.get_param_store().get_param("scale").unconstrained().data.fill_(torch.nan)
    assert not parameters.finite()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_all_finite(bad):
    tensors = [torch.zeros(3), torch.zeros(0), torch.tensor([1, 2]), torch.tensor(3e38)]
    assert all_finite(tensors)
    assert all_finite([])
    assert not all_finite([*tensors, torch.tensor([0.0, bad])])


@pytest.mark.parametrize(
    ("role", "name", "value", "told"),
    [
        ("model", "net.0.weight", torch.zeros(2, 1), r"saved \(2, 1\), here \(1, 1\)"),
        ("store", "scale", None, r"scale: saved none, here \(\)"),
        ("store", "other", torch.zeros(3), r"other: saved \(3,\), here none"),
        ("guide", "table", torch.zeros(3), r"table: saved \(3,\), here none"),
    ],
)
def test_another_pair_s_state_is_refused(role, name, value, told):
    parameters, model = pair()
    state = parameters.state()
    state.setdefault(role, {})[name] = value
    if value is None:
        del state[role][name]
    with torch.no_grad():
        model.net[0].weight.fill_(7.0)
    with pytest.raises(ValueError, match=rf"the saved parameters .*are not this pair's.*{told}"):
        parameters.restore(state)
    assert model.net[0].weight.item() == 7.0  # nothing was put back


# --- the optimizer ----------------------------------------------------------------------


def some_parameters():
    return [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]


@pytest.mark.parametrize(
    ("optim", "kind", "rate"),
    [
        (None, torch.optim.Adam, 1e-3),
        (torch.optim.AdamW, torch.optim.AdamW, 1e-3),
        (lambda ps: torch.optim.SGD(ps, lr=0.2), torch.optim.SGD, 0.2),
        (pyro.optim.Adam({"lr": 0.3}), torch.optim.Adam, 0.3),
    ],
)
def test_forms_of_optim(optim, kind, rate):
    parameters = some_parameters()
    made = make_optimizer(optim, parameters)
    assert type(made) is kind
    assert [p for group in made.param_groups for p in group["params"]] == parameters
    assert made.param_groups[0]["lr"] == rate


def test_clipped_adam_of_pyro_clips():
    parameter = nn.Parameter(torch.zeros(2))
    made = make_optimizer(pyro.optim.ClippedAdam({"lr": 0.1, "clip_norm": 1.0}), [parameter])
    assert made.param_groups[0]["clip_norm"] == 1.0


def test_an_optimizer_is_taken_as_it_is():
    parameters = some_parameters()
    made = torch.optim.SGD(parameters[:1], lr=0.1)
    assert make_optimizer(made, parameters) is made


@pytest.mark.parametrize(
    ("optim", "error", "told"),
    [
        (
            pyro.optim.Adam(lambda name: {"lr": 0.1}),
            ValueError,
            "arguments that are a function of the parameter cannot be translated",
        ),
        (
            pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}),
            ValueError,
            "clip_args cannot be translated.*ClippedAdam",
        ),
        (
            pyro.optim.ExponentialLR(
                {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.5}
            ),
            ValueError,
            "a learning rate scheduler cannot be translated",
        ),
        (torch.optim.SGD(some_parameters(), lr=0.1), ValueError, "none of its parameters"),
        (lambda ps: None, TypeError, "a function from parameters to a torch optimizer"),
        (0.01, TypeError, "optim=0.01"),
        ("adam", TypeError, "optim='adam'"),
    ],
)
def test_what_is_no_optimizer(optim, error, told):
    with pytest.raises(error, match=told):
        make_optimizer(optim, some_parameters())


def test_buffers_of_modules_that_functions_close_over_are_kept():
    net = nn.BatchNorm1d(2)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    parameters = Parameters(model, guide, as_batch(torch.zeros(4, 2)))
    state = parameters.state()
    net.running_mean += 3
    parameters.restore(state)
    assert torch.equal(net.running_mean, torch.zeros(2))


def test_buffers_that_are_infinite_by_what_they_are():
    """A table's memory of its data, a mask: they do not hide a parameter that overflowed."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(()))
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x)

    model, x = Masked(), torch.zeros(4)
    guide = pv.LocalGuide(model, num_data=4, example=x)
    parameters = Parameters(model, guide, as_batch(x))
    assert parameters.finite()
    model.mean.fill_(math.nan)
    assert not parameters.finite()
    model.mean.fill_(0.0)
    with torch.no_grad():
        guide.table[2, 0, 1] = math.inf
    assert not parameters.finite()
