"""Hooks on the gradients of parameters: run by Python at each step, whatever made the gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["aside", "call", "counted", "hooked", "mark"]

# Where PyTorch keeps those of Tensor.register_hook, and of register_post_accumulate_grad_hook.
_KEPT = ("_backward_hooks", "_post_accumulate_grad_hooks")


def mark() -> int:
    """Return a number that is another one after any hook of PyTorch's was added."""
    number: int = RemovableHandle.next_id
    return number


def hooked(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return those of some parameters that have hooks."""
    return [p for p in parameters if any(getattr(p, name, None) for name in _KEPT)]


def call(parameters: Sequence[Tensor]) -> None:
    """Do with the gradients that parameters have what their hooks ask for."""
    for parameter in parameters:
        if parameter.grad is None:
            continue
        before, after = (list((getattr(parameter, name, None) or {}).values()) for name in _KEPT)
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
    kept = [getattr(p, name, None) for p in hooked(parameters) for name in _KEPT]
    full = [(hooks, dict(hooks)) for hooks in kept if hooks]
    for hooks, _ in full:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in full:
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
