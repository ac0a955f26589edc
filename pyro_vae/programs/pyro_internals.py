"""All private names of Pyro that the package uses, each behind a function that says what for.

``tests/programs/test_pyro_internals.py`` has a test for each name, which says what is gone when a
version of Pyro changes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.distributions.hmm import HiddenMarkovModel
from pyro.nn import PyroModule
from pyro.poutine.runtime import _ENUM_ALLOCATOR
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from pyro_vae.programs.types import Distribution, Node


def handlers_at_work() -> bool:
    """Return whether any of Pyro's handlers is active (``_PYRO_STACK``)."""
    return bool(poutine.runtime._PYRO_STACK)


def unconstrained(name: str) -> str:
    """Return what Pyro calls the value on the reals of a site or a parameter of this name.

    Autoguides sample it beside the point that they propose, and a PyroModule keeps it as the
    parameter.
    """
    return f"{name}_unconstrained"


# --- what Pyro notes at a sample statement


def is_deterministic(node: Node) -> bool:
    """Return whether a site is a pyro.deterministic statement (``infer["_deterministic"]``)."""
    return bool(node["infer"].get("_deterministic"))


def enumerate_dim(node: Node) -> int | None:
    """Return the dimension that an enumerated site's values lie in, negative; None for others."""
    return node["infer"].get("_enumerate_dim")


def enumeration_ids(node: Node) -> Mapping[int, int]:
    """Return, for a site's dimensions left of the plates, which enumerated site each is of."""
    return node["infer"].get("_dim_to_id", {})


@contextlib.contextmanager
def enumeration_apart() -> Iterator[None]:
    """Give back Pyro's one allocator of enumeration dimensions as it was (``_ENUM_ALLOCATOR``).

    An enumeration around the context, as of a guide that asks its model for a posterior, goes on.
    """
    saved = dict(vars(_ENUM_ALLOCATOR))
    try:
        yield
    finally:
        vars(_ENUM_ALLOCATOR).clear()
        vars(_ENUM_ALLOCATOR).update(saved)


# --- distributions


def mask_inside(fn: Distribution) -> Any:
    """Return the mask of the first MaskedDistribution in a distribution (``_mask``), or None."""
    while not isinstance(fn, MaskedDistribution):
        if not hasattr(fn, "base_dist"):
            return None
        fn = fn.base_dist
    return fn._mask


def of_length(fn: Distribution, length: int) -> Distribution:
    """Set the length of sequences of a distribution (``_duration``, ``_event_shape``); return it.

    Of a copy of a HiddenMarkovModel, or of a distribution around one.
    """
    if isinstance(fn, HiddenMarkovModel):
        fn._duration = length
    fn._event_shape = torch.Size((length, *fn.event_shape[1:]))
    return fn


# --- the parameter store


class StoreContents:
    """What Pyro's parameter store held when this was made.

    Name to unconstrained tensor (``_params``), that to its name (``_param_to_name``), and name to
    constraint (``_constraints``).
    """

    def __init__(self) -> None:
        store = pyro.get_param_store()
        self._params, self._constraints = dict(store._params), dict(store._constraints)
        self._names = dict(store._param_to_name)

    def made_since(self) -> dict[str, tuple[Tensor, Constraint]]:
        """Return the tensors and constraints of names that are new, or have another tensor."""
        store = pyro.get_param_store()
        new = {n: p for n, p in store._params.items() if self._params.get(n) is not p}
        return {name: (value, store._constraints[name]) for name, value in new.items()}

    def restore(self) -> None:
        """Give the store these contents back, but what has left it since, with its module.

        In place: another dictionary is how the store is seen to have been cleared.
        """
        store = pyro.get_param_store()
        gone = self._params.keys() - store._params.keys()
        for held, before in (
            (store._params, {n: p for n, p in self._params.items() if n not in gone}),
            (store._param_to_name, {p: n for p, n in self._names.items() if n not in gone}),
            (store._constraints, {n: c for n, c in self._constraints.items() if n not in gone}),
        ):
            contents: dict[Any, Any] = held
            contents.clear()
            contents.update(before)

    @staticmethod
    def add(name: str, value: Tensor, constraint: Constraint) -> None:
        """Put an unconstrained tensor into the store."""
        store = pyro.get_param_store()
        store._params[name], store._param_to_name[value] = value, name
        store._constraints[name] = constraint


STORE_PARAMETERS = "_params"  # the store's attribute that holds what store_parameters() returns


def store_parameters() -> dict[str, Tensor]:
    """Return the store's own dictionary of unconstrained tensors, which it changes in place."""
    return pyro.get_param_store()._params


def forget_parameter(name: str, value: Tensor) -> None:
    """Take a name out of the store; a tensor that has another name too keeps that one."""
    store = pyro.get_param_store()
    known = store.param_name(value)
    store._param_to_name[value] = name
    del store[name]
    if known not in (None, name):
        store._param_to_name[value] = known


# --- PyroModule


def name_of(module: PyroModule) -> str:
    """Return the name that a PyroModule's parameters begin with in the store (``_pyro_name``)."""
    return module._pyro_name


def rename(module: PyroModule, name: str) -> None:
    """Give a PyroModule, and all that it contains, another name (``_pyro_set_supermodule``)."""
    module._pyro_context.used = False  # else Pyro refuses to rename what it contains
    module._pyro_set_supermodule(name, module._pyro_context)


def is_called(module: PyroModule) -> bool:
    """Return whether a PyroModule's call is under way (``_pyro_context``)."""
    return bool(module._pyro_context.active)


def pyro_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own PyroParams (``_pyro_params``); none for an nn.Module."""
    return tuple(module._pyro_params) if isinstance(module, PyroModule) else ()
