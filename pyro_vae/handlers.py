"""Pyro primitives of our own: an effect handler, and registration without shared names."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

__all__ = ["LatentScale", "name_apart", "register", "scale_parts", "unobserve"]

_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_counter = itertools.count()


def register(module: nn.Module) -> None:
    """Register a module's parameters with Pyro, as pyro.module does, under a name of its own.

    Pyro keeps parameters by name in one store, where two modules of one name share
    them. Each object gets a name that no other ever has, copies included.

    The names leave the store with the object, for nothing else could find them.

    Args:
        module: called from within a model or guide; its parameters become param sites.
    """
    pyro.module(_name_of(module), module)


def name_apart(module: PyroModule) -> None:
    """Give a PyroModule, a guide of Pyro's for one, a name in Pyro's store that no other has.

    By itself every AutoNormal is named "AutoNormal", and two of one model share parameters.

    Args:
        module: its parameters keep their values. One that has a name of ours keeps it; a copy
            has none yet.
    """
    if module in _names:
        return
    module._pyro_context.used = False  # else Pyro refuses to rename what it contains
    module._pyro_set_supermodule(_name_of(module), module._pyro_context)


def _name_of(module: nn.Module) -> str:
    name = _names.get(module)
    if name is None:
        name = _names[module] = f"{type(module).__name__}-{next(_counter)}"
        weakref.finalize(module, _forget, name).atexit = False
    return name


def _forget(name: str) -> None:
    store = pyro.get_param_store()
    for param_name, value in list(store.named_parameters()):
        if param_name.startswith((f"{name}$$$", f"{name}.")):
            # The store knows one name of each parameter, which may be another module's that lives.
            known = store.param_name(value)
            store._param_to_name[value] = param_name
            del store[param_name]
            if known not in (None, param_name):
                store._param_to_name[value] = known


class _Unobserve(Messenger):
    """Draws observed sites anew; deterministic sites and factors stay what they are."""

    def _pyro_sample(self, msg: Any) -> None:
        fixed = msg["infer"].get("_deterministic") or isinstance(msg["fn"], dist.Unit)
        if msg["is_observed"] and not fixed:
            msg["is_observed"] = False
            msg["value"] = None
            msg["done"] = False


def unobserve(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model that draws what it would observe.

    pyro.poutine.uncondition would draw the Deltas of pyro.deterministic anew as well,
    expanded to the plates.
    """
    return _Unobserve()(fn)


class LatentScale(Messenger):
    """Scales the log density of every latent site; of model and guide alike, it scales the KL.

    Args:
        factor: the scale; may be changed between runs. A 0-d tensor stays an input of a
            graph that is traced from a run, where a float would become a constant of it.
    """

    def __init__(self, factor: float | Tensor = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            # Told, for a discrete latent that is summed out has no KL to scale, and scales are
            # told apart by what made them: the number in a tensor stays unread.
            told = {"_latent_scale": self.factor, "_unscaled": msg["scale"]}
            msg["infer"] = {**msg["infer"], **told}
            msg["scale"] = msg["scale"] * self.factor


def scale_parts(node: Any) -> tuple[Any, Tensor | None]:
    """Return a node's scale without the factor of a :class:`LatentScale`, and that factor.

    The factor is None where there is none, or where it is a plain number: part of the scale.
    """
    infer = node.get("infer") or {}
    factor = infer.get("_latent_scale")
    return (infer["_unscaled"], factor) if isinstance(factor, Tensor) else (node["scale"], None)
