"""Registration without shared names, and the scale on latent sites."""

from __future__ import annotations

import copy
import gc

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

from pyro_vae.programs.handlers import LatentScale, register


def params_of(module):
    """The values of the param sites that registering a module makes."""
    trace = poutine.trace(lambda: register(module)).get_trace()
    return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "param"}


def test_two_modules_of_one_class_do_not_share():
    one, other = nn.Linear(2, 1), nn.Linear(2, 1)
    mine, theirs = params_of(one), params_of(other)
    assert len(mine) == len(theirs) == 2
    assert not set(mine) & set(theirs)
    assert any(value is one.weight for value in mine.values())
    assert any(value is other.weight for value in theirs.values())


def test_one_module_keeps_its_names():
    module = nn.Linear(2, 1)
    assert params_of(module).keys() == params_of(module).keys()
    assert len(pyro.get_param_store()) == 2


def test_a_copy_stands_alone():
    original = nn.Linear(2, 1)
    params_of(original)
    other = copy.deepcopy(original)
    before = original.weight.detach().clone()
    with torch.no_grad():
        other.weight.add_(1.0)
    found = params_of(other)
    assert torch.equal(original.weight, before)
    assert torch.equal(other.weight, before + 1.0)
    assert any(value is other.weight for value in found.values())
    assert any(value is original.weight for value in params_of(original).values())
    assert len(pyro.get_param_store()) == 4


def test_a_name_is_not_given_twice():
    names = set()
    for _ in range(3):
        module = nn.Linear(2, 1)
        found = set(params_of(module))
        assert not names & found
        names |= found
        del module
        gc.collect()


def model():
    with pyro.plate("data", 3), poutine.scale(scale=2.0):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))


def scales_of(fn):
    nodes = poutine.trace(fn).get_trace().nodes
    return {name: node["scale"] for name, node in nodes.items() if node["type"] == "sample"}


def test_latent_scale_scales_latent_sites_alone():
    handler = LatentScale(0.25)
    scaled = handler(model)
    scales = scales_of(scaled)
    assert scales["z"] == 0.5
    assert scales["x"] == 2.0
    handler.factor = 1.0  # in force from the next run on
    scales = scales_of(scaled)
    assert scales["z"] == scales["x"] == 2.0


def test_latent_scale_leaves_a_plate_s_subsample_alone():
    def subsampled():
        with pyro.plate("data", 10, subsample_size=5):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert scales_of(LatentScale(0.0)(subsampled)) == {"data": 1.0, "z": 0.0}


def test_names_leave_the_store_with_their_module():
    def names():
        return {name for name in pyro.get_param_store() if name.startswith("Linear-")}

    kept, gone = nn.Linear(2, 1), nn.Linear(2, 1)
    for module in (kept, gone):
        register(module)
    assert len(names()) == 4
    del gone, module
    gc.collect()
    assert len(names()) == 2
    register(kept)
    assert len(names()) == 2
