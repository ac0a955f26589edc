"""Hooks on the gradients of parameters: run by Python at each step, whatever made the gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

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
    kept = [hooks for p in parameters for hooks in gradient_hooks_of(p) if hooks]
    contents = [dict(hooks) for hooks in kept]
    for hooks in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in zip(kept, contents, strict=True):
            hooks.update(content)


@contextlib.contextmanager
def counted(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Count how often a hook on each parameter would run inside the context."""
    counts = [0] * len(parameters)

    def counting(index: int) -> Callable[[Tensor], None]:
        def count(gradient: Tensor) -> None:
            counts[index] += 1

        return count

    handles = [p.register_hook(counting(i)) for i, p in enumerate(parameters)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
