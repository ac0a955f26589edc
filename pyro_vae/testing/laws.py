"""Laws by name: which hold, which are broken and how, and which were expected to be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

__all__ = ["Checked", "LawError"]

Laws = Mapping[str, Callable[[], None]]


class LawError(AssertionError):
    """A law is broken; says which, what was found, and what was expected."""


@dataclass(frozen=True)
class Checked:
    """Which laws hold.

    Attributes:
        kept: names of the laws that hold.
        expected: name to what was found, of laws that were expected to be broken, and are.
    """

    kept: tuple[str, ...]
    expected: Mapping[str, str]

    def __repr__(self) -> str:
        lines = [f"{len(self.kept)} laws hold: {', '.join(self.kept)}"]
        return "\n".join([*lines, *(f"broken as expected: {n}" for n in self.expected)])


def check(what: object, laws: Laws, expected_failures: Mapping[str, str] | None = None) -> Checked:
    """Run laws, each from one seed and with a parameter store of its own.

    Args:
        what: the object, for messages.
        laws: name to a function that raises where the law is broken.
        expected_failures: name of a law to why it cannot hold.

    Raises:
        LawError: with every law that is broken unexpectedly, and every one that holds though it was
            expected not to.
        ValueError: for an expected failure of no law.
    """
    expected = dict(expected_failures or {})
    if unknown := set(expected) - set(laws):
        raise ValueError(f"expected_failures: no law is named {sorted(unknown)}; {sorted(laws)}")
    broken = {}
    for name, law in laws.items():
        with _apart():
            try:
                law()
            except Exception as error:  # noqa: BLE001 - whatever the class raises breaks its law
                told = str(error).strip() or "no message"
                broken[name] = told if isinstance(error, LawError) else _raised(error, told)
    wrong = [f"- {name}: {found}" for name, found in broken.items() if name not in expected]
    wrong += [
        f"- {name}: holds, though it was expected not to ({why})"
        for name, why in expected.items()
        if name not in broken
    ]
    if wrong:
        head = f"{len(wrong)} of {len(laws)} laws do not hold for {what!r}:"
        raise LawError("\n".join([head, *wrong]))
    kept = tuple(name for name in laws if name not in broken)
    return Checked(kept, broken)


def _raised(error: Exception, told: str) -> str:
    return f"raised {type(error).__name__}: {told}"


@contextmanager
def _apart() -> Iterator[None]:
    """Give a law a seed and a parameter store of its own, and leave the user's as they were."""
    store = pyro.get_param_store()
    with torch.random.fork_rng(), store.scope(), warnings.catch_warnings():
        torch.manual_seed(0)
        yield


def require(holds: bool | Tensor, found: str) -> None:
    """Raise LawError with what was found where a condition does not hold."""
    if not bool(holds):
        raise LawError(found)


def close(found: Tensor, wanted: Tensor, what: str, **tolerances: Any) -> None:
    """Raise LawError where tensors differ by more than rounding, or than the tolerances."""
    try:
        torch.testing.assert_close(found, wanted, **tolerances)
    except AssertionError as error:
        raise LawError(f"{what}: {error}") from None
