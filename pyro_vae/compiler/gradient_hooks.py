"""Hooks on the gradients of parameters: run by Python at each step, whatever made the gradients."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

from torch import Tensor

from pyro_vae.torch_internals import gradient_hooks_of


def hooked(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return those of some parameters that have hooks."""
    return [p for p in parameters if any(gradient_hooks_of(p))]


def call(parameters: Sequence[Tensor]) -> None:
    """Call the hooks of parameters that have a gradient, and keep what they return for one."""
    for parameter in parameters:
        if parameter.grad is None:
            continue
        before, after = (list(hooks.values()) for hooks in gradient_hooks_of(parameter))
        if parameter.grad.is_inference():  # which no hook could write to
            parameter.grad = parameter.grad.clone()
        for hook in before:
            changed = hook(parameter.grad)
            if changed is not None:
                parameter.grad = changed.detach()
        for hook in after:
            hook(parameter)


@contextlib.contextmanager
def aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Have no hooks run inside the context."""
    kept = [(hooks, dict(hooks)) for p in parameters for hooks in gradient_hooks_of(p)]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in kept:
            hooks.update(content)


@contextlib.contextmanager
def counted(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Count how often a hook on each parameter would run inside the context."""
    counts = [0] * len(parameters)

    def count(index: int, gradient: Tensor) -> None:
        counts[index] += 1

    with contextlib.ExitStack() as stack:
        for i, parameter in enumerate(parameters):
            stack.enter_context(parameter.register_hook(functools.partial(count, i)))
        yield counts
