"""Pyro primitives of our own: an effect handler, and registration without shared names."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import logging
import math
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.hmm import HiddenMarkovModel
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.programs.nodes import is_subsample
from pyro_vae.programs.pyro_internals import (
    forget_parameter,
    is_called,
    is_deterministic,
    name_of,
    of_length,
    pyro_parameters,
    rename,
    store_parameters,
    unconstrained,
)
from pyro_vae.programs.types import Distribution, Node
from pyro_vae.recording import same_expression
from pyro_vae.torch_internals import parameters_of, version_of

logger = logging.getLogger(__name__)

_SAME_SCALE = 1e-6  # relative

_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_counter = itertools.count()
# PyroModules whose names the store has for others that live no more, and what it has.
_unowned: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


def register(module: nn.Module) -> None:
    """Register a module's parameters with Pyro, as pyro.module does, under a name of its own.

    Pyro keeps parameters by name in one store, where two modules of one name share them. Each
    object gets a name that no other ever has, copies included; it leaves the store with the object.

    Args:
        module: called from within a model or guide; its parameters become param sites.
    """
    pyro.module(_name_of(module), module)


class Registered(nn.Module):
    """A module that registers its parameters with Pyro, and can be pickled all the same."""

    def __getstate__(self) -> object:
        drop_references(self)
        return getattr(super(), "__getstate__", self.__dict__.copy)()


def drop_references(module: nn.Module) -> None:
    """Take off the weak reference of each parameter to itself, which pickle cannot take.

    The next param statement leaves it anew.
    """
    for parameter in module.parameters():
        vars(parameter).pop("unconstrained", None)


def name_apart(module: PyroModule) -> None:
    """Give a PyroModule, a guide of Pyro's for one, a name in Pyro's store that no other has.

    By itself every AutoNormal is named "AutoNormal", and two of one model share parameters. These
    keep their values. A module that has a name of ours keeps it; a copy has none yet.
    """
    if module not in _names:
        rename(module, _name_of(module))


def keep_apart(module: nn.Module) -> None:
    """Give a PyroModule a name of its own where another one that lives has its name's parameters.

    Reading a constrained parameter of a PyroModule puts that of Pyro's store in its place, by
    name. Two models of one class in one process (a cell that is run twice, a grid search) would
    have one parameter, and training one would move the other. Where the other is gone, the store's
    values are taken up, as Pyro says, for they may be loaded from a file.

    Args:
        module: a model or a guide; anything but a PyroModule is left alone.
    """
    local = pyro.settings.get("module_local_params")
    if local or not isinstance(module, PyroModule) or module in _names or is_called(module):
        return
    taken = _taken(module, store_parameters())
    looked_for = frozenset(map(id, taken.values()))
    if not taken or _unowned.get(module) == looked_for:
        return
    gc.collect()  # what is in a circle, and unreachable, does not live
    mine = set(map(id, module.modules()))
    others = (o for o in gc.get_objects() if issubclass(type(o), PyroModule) and id(o) not in mine)
    if looked_for.isdisjoint(id(p) for other in others for p in parameters_of(other).values()):
        _unowned[module] = looked_for
        return
    before = name_of(module)
    name_apart(module)
    renamed = f"{name_of(module)}.* from now on instead of {before + '.' if before else ''}*"
    logger.warning(
        "the names %s in Pyro's parameter store are those of another %s that lives: this one is "
        "kept apart, its parameters are named %s. Instead call pyro.clear_param_store() when the "
        "other has served, or pyro.settings.set(module_local_params=True) before they are made",
        sorted(taken)[:5],
        type(module).__name__,
        renamed,
    )


def _taken(module: PyroModule, store: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the store has in place of a module's constrained parameters, by name."""
    own: Mapping[str, Tensor | None] = constrained_parameters(module)
    if isinstance(module, AutoGuide) and module.prototype_trace is None:  # it has none yet
        own = dict.fromkeys(name for name in store if name.startswith(f"{name_of(module)}."))
    return {n: store[n] for n, value in own.items() if n in store and store[n] is not value}


def constrained_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the (unconstrained) PyroParams of a PyroModule, by their names in Pyro's store."""
    return {
        ".".join(filter(None, (name_of(part), name))): parameters_of(part)[unconstrained(name)]
        for part in module.modules()
        if isinstance(part, PyroModule)
        for name in pyro_parameters(part)
    }


def _name_of(module: nn.Module) -> str:
    if module not in _names:
        _names[module] = f"{type(module).__name__}-{next(_counter)}"
        weakref.finalize(module, _forget, _names[module]).atexit = False
    return _names[module]


def _forget(name: str) -> None:
    for param_name, value in list(pyro.get_param_store().named_parameters()):
        if param_name.startswith((f"{name}$$$", f"{name}.")):
            forget_parameter(param_name, value)


class ParamStatements(Messenger):
    """Collects the param statements of what runs inside, and the tensors that they train.

    Under a name, Pyro's store keeps the first tensor that it was given. A module that comes with
    the name of another (a notebook's cell that is run twice; a network in the model and one in the
    guide) goes on with its own parameters, but Pyro's SVI moves those in the store, and leaves
    the module's where they are. The ones in use are the module's.

    Args:
        checked: whether to raise ValueError where the first value of a statement has another shape
            than what the store had by its name before.
    """

    def __init__(self, *, checked: bool = False) -> None:
        super().__init__()
        self._before = frozenset(pyro.get_param_store().keys()) if checked else frozenset()
        # Model and guide may each have a module of one name; the last of a name that is stored
        # counts, for a PyroModule puts an nn.Parameter in the place of a first tensor.
        self._found: dict[tuple[str, int], tuple[str, Tensor, Tensor | None, object]] = {}

    def _pyro_post_param(self, msg: Node) -> None:
        value, name = msg["value"], msg["name"]
        first = msg["args"][1] if len(msg["args"]) > 1 else None
        stored = value.unconstrained() if hasattr(value, "unconstrained") else value
        own = first if isinstance(first, nn.Parameter) and first is not stored else None
        if name in self._before and "$$$" not in name and first is not None:
            _check_shape(name, first, pyro.get_param_store()[name])
        gradient = None if own is None else _mark(stored.grad)
        self._found[name, id(own)] = (name, stored, own, gradient)

    def tensors(self, modules: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the (unconstrained) tensor of each statement.

        A parameter of the modules in use is not the first value of a statement of the user's own,
        but what the statement is about.
        """
        held = {id(p) for module in modules for p in parameters_of(module).values()}
        for name, stored, own, gradient in self._found.values():
            in_use = own is not None and ("$$$" in name or id(own) in held)
            if own is not None and in_use:
                yield name, own
            # Which pyro.module(update_module_params=True) may have put in the place of the other.
            replaced = id(stored) in held and id(own) not in held
            if not in_use or replaced or _mark(stored.grad) != gradient:
                yield name, stored

    @property
    def clash(self) -> bool:
        """Whether a module goes on with parameters that are not those of the store."""
        return any(own is not None for _, _, own, _ in self._found.values())


def _mark(gradient: Tensor | None) -> object:
    """Return what tells whether a gradient was added to."""
    if gradient is None or gradient.is_inference():
        return id(gradient)
    return id(gradient), version_of(gradient)


def _check_shape(name: str, first: object, stored: Tensor) -> None:
    """Raise ValueError where a stored value has another shape than a statement's first one."""
    if callable(first):
        devices = [stored.device] if stored.is_cuda else []
        # What it is made of may be there at the very first run alone.
        with torch.random.fork_rng(devices=devices), contextlib.suppress(Exception):
            first = first()
    if isinstance(first, Tensor) and stored.shape != first.shape:
        raise ValueError(
            f"pyro.param({name!r}): Pyro's parameter store has a value of shape "
            f"{tuple(stored.shape)} by this name, the statement's first value has shape "
            f"{tuple(first.shape)}. Call pyro.clear_param_store() first, or give it another name"
        )


class Unobserve(Messenger):
    """Draws observed sites anew; deterministic sites and factors stay what they are.

    pyro.poutine.uncondition would draw the Deltas of pyro.deterministic anew as well, expanded to
    the plates.
    """

    def _pyro_sample(self, msg: Node) -> None:
        if not msg["is_observed"] or is_deterministic(msg) or isinstance(msg["fn"], dist.Unit):
            return
        value = msg["value"]
        fn = as_long_as(msg["fn"], value)
        # A plate without a size has not expanded its likelihood to all its data.
        unsized = any(frame.vectorized and frame.size == -1 for frame in msg["cond_indep_stack"])
        if unsized and isinstance(value, Tensor):
            shape = value.shape[: value.ndim - fn.event_dim]
            fn = fn.expand(torch.broadcast_shapes(fn.batch_shape, shape))
        msg.update(fn=fn, is_observed=False, value=None, done=False)


def as_long_as(fn: Distribution, value: Tensor) -> Distribution:
    """Return a likelihood of sequences of any length as one of a value's, which can be drawn from.

    Pyro's hidden Markov models with the same parameters at all times have no length of their own.
    """
    base = getattr(fn, "base_dist", None)
    inner = None if base is None else as_long_as(base, value)
    if inner is base and not (isinstance(fn, HiddenMarkovModel) and fn.duration is None):
        return fn
    fn = copy.copy(fn)
    if base is not None:
        fn.base_dist = inner
    return of_length(fn, value.shape[value.ndim - fn.event_dim])


class LatentScale(Messenger):
    """Scales the log density of every latent site; of model and guide alike, it scales the KL.

    Args:
        factor: the scale; may be changed between runs. A 0-d tensor stays an input of a
            graph that is traced from a run, where a float would become a constant of it.
    """

    def __init__(self, factor: float | Tensor = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def _pyro_sample(self, msg: Node) -> None:
        if not msg["is_observed"] and not is_subsample(msg):
            # Told, for a discrete latent that is summed out has no KL to scale, and scales are
            # told apart by what made them: the number in a tensor stays unread.
            noted = {"_latent_scale": self.factor, "_unscaled": msg["scale"]}
            msg.update(infer={**msg["infer"], **noted}, scale=msg["scale"] * self.factor)


class FullSize(Messenger):
    """Makes a plate of the size of a minibatch one of all the data, of which that is a subsample.

    As if the model had ``pyro.plate(name, num_data, subsample=x)`` in the place of
    ``pyro.plate(name, len(x))``: what is in the plate is scaled by ``num_data / len(x)``. A plate
    that has another full size is left alone.

    Args:
        dim: the plate's batch dimension, negative.
        num_data: all the data.
        local: latent sites of the plate, for a guide that samples them outside of it.
        others: the model's other plates; a plate of another name in this one's dimension is
            a guide's own for the data.
    """

    def __init__(
        self, dim: int, num_data: int, local: Collection[str], others: Collection[str]
    ) -> None:
        super().__init__()
        self.dim, self.num_data, self.local, self.others = dim, num_data, local, others

    def _pyro_sample(self, msg: Node) -> None:
        if is_subsample(msg):
            return
        stack, fn, value = msg["cond_indep_stack"], msg["fn"], msg["value"]
        found = [f for f in stack if f.dim == self.dim and f.name not in self.others]
        frame = found[0] if found else None
        if frame is None and msg["name"] in self.local and len(fn.batch_shape) >= -self.dim:
            msg["scale"] = msg["scale"] * (self.num_data / fn.batch_shape[self.dim])
        elif frame is not None and frame.full_size == frame.size:
            size = frame.size
            if size == -1:  # a plate without a size has that of what is in it
                of_value = (
                    value.shape[: value.ndim - fn.event_dim] if torch.is_tensor(value) else ()
                )
                shapes = (fn.batch_shape, of_value)
                size = max(shape[self.dim] for shape in shapes if len(shape) >= -self.dim)
            full = frame._replace(size=size, full_size=self.num_data)
            msg["cond_indep_stack"] = tuple(full if f is frame else f for f in stack)
            msg["scale"] = msg["scale"] * (self.num_data / size)


def same_scale(a: Any, b: Any) -> bool:
    """Return whether two scales are one, to rounding.

    A plate multiplies by its full size and divides by its size, so that two sites under one scale
    and different plates may differ in the last bit.
    """
    tensors = [isinstance(scale, Tensor) for scale in (a, b)]
    if a is b or (all(tensors) and same_expression(a, b)):
        return True
    if not any(tensors):
        return math.isclose(a, b, rel_tol=_SAME_SCALE)
    return bool(torch.as_tensor(abs(a - b) <= _SAME_SCALE * abs(a)).all())


def scale_parts(node: Node) -> tuple[float | Tensor, Tensor | None]:
    """Return a node's scale without the factor of a :class:`LatentScale`, and that factor.

    The factor is None where there is none, or where it is a plain number: part of the scale.
    """
    infer = node.get("infer") or {}
    factor = infer.get("_latent_scale")
    return (infer["_unscaled"], factor) if isinstance(factor, Tensor) else (node["scale"], None)
