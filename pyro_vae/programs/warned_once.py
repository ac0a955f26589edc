"""Warnings that are said once for a model and a guide, however often there is reason to."""

from __future__ import annotations

import logging
import re
import weakref
from typing import Any

_said: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()
_NUMBER = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?")


def warn_once(logger: logging.Logger, owners: tuple[Any, ...], message: str, *args: Any) -> None:
    """Log a warning, unless it was logged of the same owners before.

    A loss that is made anew in each step of a loop, or a bound of each epoch, has the same thing to
    say a hundred times. Two texts that differ in their numbers alone are one.

    Args:
        logger: of the file that warns.
        owners: whom it is about, a model and a guide without handlers. What is said of them is
            forgotten with the first.
        message: as in logging.
        *args: as in logging.
    """
    first, *others = (getattr(owner, "__self__", owner) for owner in owners)
    key = (logger.name, _NUMBER.sub("#", message % args), *map(id, others))
    try:
        said = _said.setdefault(first, set())
    except TypeError:  # of a kind that cannot be referred to weakly
        said = set()
    if key not in said:
        said.add(key)
        logger.warning(message, *args)


def forget() -> None:
    """Say everything once more."""
    _said.clear()
