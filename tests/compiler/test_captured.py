"""Plain Python values that code reads beside its arguments: a change is seen at the next step."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.compiler.captured import Captured, Place, identity_check
from tests.runs import D, data, functions, replayed, some, warned

BETA = 1.0
SETTINGS = types.ModuleType("settings_of_the_test")
SETTINGS.beta = 1.0
sys.modules[SETTINGS.__name__] = SETTINGS


def scaled(x, beta):
    """z ~ Normal(0, 1), its log density times beta; x ~ Normal(z, 1)."""
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=beta):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x):
    loc = pyro.param("loc", torch.zeros(D, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + 0.1 * x, 1.0).to_event(1))


def a_variable_of_a_closure():
    beta = 1.0

    def model(x):
        scaled(x, beta)

    def change(value):
        nonlocal beta
        beta = value

    return model, change


def a_dict_in_a_closure():
    state = {"warm-up": {"beta": [1.0]}}

    def model(x):
        scaled(x, state["warm-up"]["beta"][-1])

    return model, lambda value: state["warm-up"]["beta"].append(value)


def set_global(value):
    global BETA
    BETA = value


def of_a_helper():
    return BETA


def a_global():
    set_global(1.0)
    return lambda x: scaled(x, BETA), set_global


def a_global_of_a_helper_s_helper():
    set_global(1.0)

    def helper(x):
        inner = [of_a_helper]
        return inner[0]()

    return lambda x: scaled(x, helper(x)), set_global


def a_module_for_settings():
    return lambda x: scaled(x, SETTINGS.beta), lambda value: setattr(SETTINGS, "beta", value)


def a_module_imported_inside():
    def model(x):
        from settings_of_the_test import beta

        scaled(x, beta)

    return model, lambda value: setattr(SETTINGS, "beta", value)


class Config:
    beta = 1.0

    @property
    def weight(self):
        return self.beta


def an_attribute_of_a_class():
    Config.beta = 1.0
    return lambda x: scaled(x, Config.beta), lambda value: setattr(Config, "beta", value)


def an_attribute_that_hides_that_of_a_class():
    Config.beta = 1.0
    config = Config()
    return lambda x: scaled(x, config.weight), lambda value: setattr(config, "beta", value)


@dataclasses.dataclass(slots=True)
class Slots:
    beta: float = 1.0


def a_dataclass_with_slots():
    config = Slots()
    return lambda x: scaled(x, config.beta), lambda value: setattr(config, "beta", value)


def a_namespace_by_getattr():
    config = types.SimpleNamespace(train=types.SimpleNamespace(beta=1.0))

    def change(value):
        config.train.beta = value

    return lambda x: scaled(x, getattr(config.train, "be" + "ta")), change


class Schedule:
    def __init__(self):
        self._values = [1.0]

    def __getitem__(self, index):
        return self._values[index]

    def __call__(self):
        return self[-1]


def an_object_that_is_called():
    schedule = Schedule()
    return lambda x: scaled(x, schedule()), schedule._values.append


def a_default():
    def model(x, beta=1.0):
        scaled(x, beta)

    return model, lambda value: setattr(model, "__defaults__", (value,))


def a_keyword_s_default():
    def model(x, *, beta=[1.0]):  # noqa: B006
        scaled(x, beta[0])

    return model, lambda value: model.__kwdefaults__["beta"].insert(0, value)


def a_partial_function():
    config = {"beta": 1.0}
    return functools.partial(lambda config, x: scaled(x, config["beta"]), config), (
        lambda value: config.update(beta=value)
    )


class Bound:
    def __init__(self):
        self.config = Config()

    def model(self, x):
        scaled(x, self.of_config())

    def of_config(self):
        return self.config.beta


def an_object_of_a_method_s_self():
    Config.beta = 1.0
    bound = Bound()
    return bound.model, lambda value: setattr(bound.config, "beta", value)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        scaled(x, self.inner(x))


class Inner(nn.Module):
    def forward(self, x):
        return BETA


def a_global_of_a_submodule():
    set_global(1.0)
    return Net(), set_global


def an_attribute_of_a_function():
    def model(x):
        scaled(x, model.beta)

    model.beta = 1.0
    return model, lambda value: setattr(model, "beta", value)


def an_array_that_is_written_to():
    beta = np.ones(3)

    def change(value):
        beta[1] = value

    return lambda x: scaled(x, float(beta[1])), change


def a_tensor_that_is_replaced():
    beta = torch.ones((), dtype=torch.float64)

    def change(value):
        nonlocal beta
        beta = torch.tensor(value, dtype=torch.float64)

    return lambda x: scaled(x, beta), change


def a_handler_around_the_model():
    def model(x):
        scaled(x, 1.0)

    handler = poutine.handlers.ScaleMessenger(1.0)

    return handler(model), lambda value: setattr(handler, "scale", value)


def a_function_that_is_replaced():
    table = {"beta": lambda: 1.0}
    return lambda x: scaled(x, table["beta"]()), (
        lambda value: table.__setitem__("beta", lambda: value)
    )


KINDS = {
    make.__name__: make
    for make in (
        a_variable_of_a_closure,
        a_dict_in_a_closure,
        a_global,
        a_global_of_a_helper_s_helper,
        a_module_for_settings,
        a_module_imported_inside,
        an_attribute_of_a_class,
        an_attribute_that_hides_that_of_a_class,
        a_dataclass_with_slots,
        a_namespace_by_getattr,
        an_object_that_is_called,
        a_default,
        a_keyword_s_default,
        a_partial_function,
        an_object_of_a_method_s_self,
        a_global_of_a_submodule,
        an_attribute_of_a_function,
        an_array_that_is_written_to,
        a_tensor_that_is_replaced,
        a_handler_around_the_model,
        a_function_that_is_replaced,
    )
}


FAST = ("a_dict_in_a_closure", "a_global_of_a_helper_s_helper", "a_namespace_by_getattr")
FAST += ("an_object_of_a_method_s_self", "a_module_for_settings")


@pytest.mark.parametrize("kind", some(KINDS, FAST))
def test_the_next_step_knows(kind):
    """To the last bit, at every step; all steps but the first two of each value are replayed."""
    changes = []

    def make():
        SETTINGS.beta = 1.0
        model, change = kind()
        changes.append(change)
        return model, guide

    def before(step, run):
        if step in (4, 7):
            changes[-1](1.0 - 0.1 * step)

    run = replayed(make, [(data(),)] * 10, before=before)
    e, r = ["eager"], ["replayed"]
    assert run.modes == e + r * 3 + e + r * 2 + e + r * 2


def test_an_attribute_of_the_loss():
    def before(step, run):
        run.loss.num_particles = 1 if step < 4 else 3

    run = replayed(functions, [(data(),)] * 8, loss=pv.ELBO, before=before)
    assert run.modes == ["eager", *["replayed"] * 3] * 2


def test_a_step_that_changes_what_it_reads_runs_eagerly(caplog):
    """In a graph nothing would count. As many times as eager steps do, also while it is traced."""
    found = []

    def make():
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.steps = 0

            def forward(self, x):
                self.steps += 1
                scaled(x, 1.0 if self.steps < 5 else 0.1)

        found.append(Counting())
        return found[-1], guide

    run = replayed(make, [(data(),)] * 8)
    assert run.modes == ["eager"] * 8
    assert [model.steps for model in found] == [8, 8]
    (message,) = warned(caplog)
    assert "(Counting.steps); make it a buffer" in message


def test_a_value_that_differs_at_each_step_is_named(caplog):
    """There is an end to tracing."""
    beta = 1.0

    def make():
        nonlocal beta
        beta = 1.0
        return (lambda x: scaled(x, beta)), guide

    def before(step, run):
        nonlocal beta
        beta = 0.99**step

    with caplog.at_level("WARNING"):
        replayed(make, [(data(),)] * 60, before=before)
    (message,) = warned(caplog)
    assert "('beta' in the closure of " in message


def test_what_is_looked_at_has_an_end():
    """Names that no code reads are not watched; containers of themselves are looked at once."""
    config = types.SimpleNamespace(beta=1.0, loop=[])
    config.loop.append(config.loop)

    class Trainer:
        def __init__(self):
            self.step, self.config = 0, config

        def model(self):
            return self.config.beta

    labels = [label for label, _ in Captured([Trainer().model]).places()]
    assert "Trainer.config" in labels
    assert "SimpleNamespace.beta" in labels
    assert "Trainer.step" not in labels


def test_what_a_step_leaves_behind_makes_no_graph_stale():
    """A module that keeps its last draws, and minibatches of two sizes by turns."""

    def make():
        class Keeping(nn.Module):
            def __init__(self):
                super().__init__()
                self.last, self.all = None, []

            def forward(self, x):
                scaled(x, 1.0)
                self.last = x + 1
                self.all.append(self.last)

        return Keeping(), guide

    run = replayed(make, [(data(4 + 2 * (i % 2), seed=i),) for i in range(24)])
    assert run.modes == ["eager"] * 2 + ["replayed"] * 22


# --- checks by identity: of items, cells and attributes, and what is missing ---


def places(count):
    """Mappings with a key each, a cell and an object; and what lies in them."""
    values = [[i] for i in range(count)]  # equal to one another's copies, and other objects
    holders = [{f"key {i}": value} for i, value in enumerate(values)]
    entries = [Place(holder, f"key {i}") for i, holder in enumerate(holders)]
    cell, slot = types.CellType([-1]), types.SimpleNamespace(name=[-2])
    attributes = [Place(cell, "cell_contents", False), Place(slot, "name", False)]
    check = identity_check([*entries, *attributes])
    return check, [*values, cell.cell_contents, slot.name], holders, cell, slot


def test_all_places_are_looked_at():
    """More than Python nests in one expression."""
    check, expected, holders, cell, slot = places(130)
    assert check(expected)
    for i in (0, 49, 50, 129):
        kept = holders[i][f"key {i}"]
        holders[i][f"key {i}"] = list(kept)
        assert not check(expected)
        holders[i][f"key {i}"] = kept
    assert check(expected)
    cell.cell_contents = [-1]
    assert not check(expected)
    cell.cell_contents = expected[-2]
    slot.name = [-2]
    assert not check(expected)


def test_what_is_gone_is_another_object():
    for gone in ("entry", "cell", "attribute"):
        check, expected, holders, cell, slot = places(2)
        if gone == "entry":
            del holders[1]["key 1"]
        elif gone == "cell":
            del cell.cell_contents
        else:
            del slot.name
        assert not check(expected)


def test_keys_may_be_objects():
    key, value = object(), object()
    check = identity_check([Place({key: value}, key)])
    assert check([value])
    assert not check([object()])


def test_nothing_to_look_at():
    assert identity_check([])([])
