"""What a user is told: counts refused, warnings once, errors of models as they were raised."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pyro import poutine

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.types import Program, Trace

# What was said of each owner; cleared, everything is said once more.
said: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()
_NUMBER = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?")
_TABLE = re.compile(r"\n *Trace Shapes:")  # indented as far as the longest name of a site is long


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
    number = least - 1
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        exact = isinstance(value, int) and not isinstance(value, bool)
        whole = exact or (not isinstance(value, str | bool) and float(value).is_integer())
        number = int(value) if whole else number
    if number < least:
        raise ValueError(f"{name}={value!r}: a whole number of at least {least} is needed")
    return number


def as_number(name: str, value: Any) -> float:
    """Return a number as a float.

    Raises:
        ValueError: for what is none, such as text or a bool.

    Example:
        >>> as_number("clip_norm", 2)
        2.0
    """
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        if not isinstance(value, (str, bytes, bool)):
            return float(value)
    raise ValueError(f"{name}={value!r}: a number is needed")


def as_path(name: str, value: Any) -> Path:
    """Return a path.

    Raises:
        TypeError: for what is none, such as the arguments of a call in another order.

    Example:
        >>> as_path("checkpoint", 3)
        Traceback (most recent call last):
        TypeError: checkpoint: the path of a file is needed, found a value of type int
    """
    if not isinstance(value, str | os.PathLike):
        what = f"the path of a file is needed, found a value of type {type(value).__name__}"
        raise TypeError(f"{name}: {what}")
    return Path(value)


def as_seed(seed: Any) -> int:
    """Return a seed as an int; None takes one from the global random state.

    Raises:
        ValueError: for what is no whole number of at least 0.
    """
    return int(torch.randint(2**62, ()).item()) if seed is None else as_count("seed", seed, 0)


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
    texts: set[Any] = set()
    with contextlib.suppress(TypeError):  # of a kind that cannot be referred to weakly
        texts = said.setdefault(first, texts)
    if key not in texts:
        texts.add(key)
        logger.warning(message, *args)


def text_of(error: BaseException) -> str:
    """Return what an error says, without Pyro's table of all sites and their shapes."""
    return _TABLE.split(str(error), maxsplit=1)[0].rstrip()


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise again what is raised inside, without Pyro's table.

    poutine.trace makes an error of its own of each ValueError and RuntimeError, with rows for every
    site so far: hundreds of lines, and the notes and attributes of the original are lost.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        original = _original(error)
        if original is error:
            raise
        raise original from original.__cause__


def _original(error: Exception) -> Exception:
    while _TABLE.search(str(error)):
        cause, text = error.__cause__, text_of(error)
        if isinstance(cause, Exception) and text_of(cause) == text:
            error = cause
        else:  # Pyro says more than the original does: which site it is
            plain = ValueError(text) if isinstance(error, ValueError) else RuntimeError(text)
            plain.__cause__ = cause
            return plain.with_traceback(error.__traceback__)
    return error


def trace_of(program: Program, batch: Batch) -> Trace:
    """Run a program on a batch under Pyro's trace, and return the trace."""
    tracer: Any = poutine.trace(program, graph_type="flat")
    with plain_errors():
        return tracer.get_trace(*batch.args, **batch.kwargs)
