"""The state that models and guides run in: modes of their modules, and the random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pyro.poutine.messenger import unwrap
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = [
    "call_network",
    "called_modules",
    "evaluation",
    "module_of",
    "preserved_rng",
    "unwrapped",
]


def module_of(fn: Any) -> nn.Module | None:
    """Return the nn.Module that a model or guide is, or is a method of; None for others."""
    owner = getattr(fn, "__self__", fn)
    return owner if isinstance(owner, nn.Module) else None


def unwrapped(fn: Any) -> Any:
    """Return the model or guide inside Pyro's handlers."""
    inner = unwrap(fn)  # of a handler that was called on it
    while hasattr(inner, "__wrapped__"):  # of poutine's functions
        inner = unwrap(inner.__wrapped__)
    return inner


@contextlib.contextmanager
def evaluation(*fns: Any) -> Iterator[None]:
    """Put the nn.Modules of models and guides in eval mode; restore each submodule after.

    Plain functions close over modules that cannot be seen: each is put in eval mode as it
    is called, and restored likewise.
    """
    training = [
        submodule
        for module in map(module_of, fns)
        if module is not None
        for submodule in module.modules()
        if submodule.training
    ]
    for submodule in training:
        submodule.training = False

    def switch(module: nn.Module, inputs: Any) -> None:
        if module.training:
            module.training = False
            training.append(module)

    hook = register_module_forward_pre_hook(switch)
    try:
        yield
    finally:
        hook.remove()
        for submodule in training:
            submodule.training = True


@contextlib.contextmanager
def called_modules() -> Iterator[dict[int, nn.Module]]:
    """Collect the nn.Modules that are called inside the context, by identity."""
    found: dict[int, nn.Module] = {}
    hook = register_module_forward_pre_hook(
        lambda module, inputs: found.__setitem__(id(module), module)
    )
    try:
        yield found
    finally:
        hook.remove()


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Leave the random state as it was found: looking must not change what is drawn next."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def call_network(network: Any, args: Any, kwargs: Any) -> Any:
    """Call a network on a batch; an nn.Sequential, which has no keywords, on its one tensor."""
    if type(network).forward is nn.Sequential.forward and not args and len(kwargs) == 1:
        return network(*kwargs.values())
    return network(*args, **kwargs)
