"""Whole numbers among the arguments: particles, draws, steps."""

from __future__ import annotations

import operator
from typing import Any


def as_count(name: str, value: Any, least: int = 1) -> int:
    """Return a number as an int, 1e3 as 1000.

    Args:
        name: of the argument.
        value: what was passed for it.
        least: the smallest that makes sense.

    Raises:
        ValueError: for what is no whole number of at least ``least``.

    Example:
        >>> as_count("num_particles", 1e3)
        1000
    """
    try:
        number = operator.index(value)
    except TypeError:
        try:
            whole = float(value).is_integer() and not isinstance(value, str)
        except (TypeError, ValueError, OverflowError):
            whole = False
        number = int(value) if whole else least - 1
    if number < least or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: a whole number of at least {least} is needed")
    return number
