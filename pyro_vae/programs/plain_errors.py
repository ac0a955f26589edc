"""Errors of models and guides as they were raised, without the table that Pyro adds to them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from pyro import poutine

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.types import Program

_TABLE = re.compile(r"\n *Trace Shapes:")  # indented as far as the longest name of a site is long


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


def trace_of(program: Program, batch: Batch) -> Any:
    """Run a program on a batch under Pyro's trace, and return the trace."""
    with plain_errors():
        return poutine.trace(program, graph_type="flat").get_trace(*batch.args, **batch.kwargs)
