"""Each private name of Pyro that the package uses is there, and does what it is used for."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine.runtime
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_vae.programs.pyro_internals import (
    STORE_PARAMETERS,
    StoreContents,
    enumerate_dim,
    enumeration_apart,
    enumeration_ids,
    forget_parameter,
    handlers_at_work,
    is_called,
    is_deterministic,
    mask_inside,
    name_of,
    of_length,
    pyro_parameters,
    rename,
    store_parameters,
    unconstrained,
)


class Scaled(PyroModule):
    def __init__(self):
        super().__init__()
        self.inner = PyroModule[nn.Linear](1, 1)
        self.scale = PyroParam(torch.tensor(2.0), constraint=dist.constraints.positive)
        self.seen = False

    def forward(self):
        self.seen = is_called(self)
        return self.scale


@pytest.fixture(autouse=True)
def store():
    pyro.clear_param_store()
    yield pyro.get_param_store()
    pyro.clear_param_store()


def enumerated_trace():
    def model():
        with pyro.plate("data", 3):
            c = pyro.sample("c", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(c.float(), 1.0), obs=torch.zeros(3))
        pyro.deterministic("d", torch.zeros(()))

    return poutine.trace(poutine.enum(model, first_available_dim=-2)).get_trace()


def test_handlers_at_work_sees_a_handler():
    assert not handlers_at_work(), "pyro.poutine.runtime._PYRO_STACK is not empty without handlers"
    with poutine.block():
        assert handlers_at_work(), "pyro.poutine.runtime._PYRO_STACK no longer holds the handlers"


def test_a_deterministic_statement_says_so():
    nodes = enumerated_trace().nodes
    assert is_deterministic(nodes["d"]), 'pyro.deterministic no longer sets infer["_deterministic"]'
    assert not is_deterministic(nodes["x"])


def test_an_enumerated_site_says_its_dimension():
    nodes = enumerated_trace().nodes
    assert enumerate_dim(nodes["c"]) == -2, 'enum no longer sets infer["_enumerate_dim"]'
    assert enumerate_dim(nodes["x"]) is None
    ids = enumeration_ids(nodes["x"])
    assert set(ids) == {-2}, 'enum no longer sets infer["_dim_to_id"]'
    assert ids == enumeration_ids(nodes["c"])


def test_an_enumeration_leaves_the_allocator_as_it_was():
    allocator = pyro.poutine.runtime._ENUM_ALLOCATOR
    before = dict(vars(allocator))
    with enumeration_apart():
        allocator.set_first_available_dim(-7)
        assert vars(allocator) != before, "_ENUM_ALLOCATOR no longer keeps its state in attributes"
    assert vars(allocator) == before


def test_a_masked_distribution_has_its_mask():
    mask = torch.tensor([True, False])
    assert mask_inside(dist.Normal(torch.zeros(2), 1.0).mask(mask)) is mask


def test_a_hidden_markov_model_takes_a_length():
    free = dist.GaussianHMM(
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
    )
    assert free.duration is None
    assert of_length(free, 5).sample().shape == (5, 1), "HiddenMarkovModel._duration is gone"


def test_the_store_gets_its_contents_back(store):
    kept = pyro.param("kept", torch.ones(2))
    before = StoreContents()
    pyro.param("new", torch.tensor(2.0), constraint=dist.constraints.positive)
    made = before.made_since()
    assert set(made) == {"new"}, "ParamStoreDict._params no longer maps names to tensors"
    before.restore()
    assert set(store.keys()) == {"kept"}
    assert store["kept"] is kept
    StoreContents.add("new", *made["new"])
    assert store["new"] == 2.0, "ParamStoreDict._constraints is no longer what the store goes by"
    assert store.param_name(made["new"][0]) == "new"


def test_what_has_left_the_store_is_not_put_back(store):
    pyro.param("gone", torch.ones(2))
    before = StoreContents()
    del store["gone"]
    before.restore()
    assert not list(store.keys())


def test_the_stores_own_dictionary_changes_in_place(store):
    held = store_parameters()
    assert getattr(store, STORE_PARAMETERS) is held
    pyro.param("a", torch.ones(2))
    assert "a" in held
    pyro.clear_param_store()
    assert getattr(store, STORE_PARAMETERS) is not held or not held


def test_a_forgotten_name_leaves_the_tensors_other_name(store):
    tensor = nn.Parameter(torch.ones(2))
    pyro.param("one", tensor)
    pyro.param("other", tensor)
    forget_parameter("one", tensor)
    assert list(store.keys()) == ["other"]
    assert store.param_name(tensor) == "other", "ParamStoreDict._param_to_name is gone"


def test_a_pyro_module_is_renamed_with_what_it_contains():
    module = Scaled()
    rename(module, "mine")
    assert name_of(module) == "mine", "PyroModule._pyro_set_supermodule no longer renames"
    assert name_of(module.inner) == "mine.inner"
    assert pyro_parameters(module) == ("scale",), "PyroModule._pyro_params is gone"
    assert pyro_parameters(nn.Linear(1, 1)) == ()


def test_a_pyro_module_knows_whether_it_is_called():
    module = Scaled()
    assert not is_called(module)
    module()
    assert module.seen, "PyroModule._pyro_context.active is gone"


def test_values_on_the_reals_have_the_name_that_autoguides_and_modules_give_them():
    def model():
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    guide = pyro.infer.autoguide.AutoNormal(model)
    assert unconstrained("z") in poutine.trace(guide).get_trace().nodes
    assert unconstrained("scale") in dict(Scaled().named_parameters())
