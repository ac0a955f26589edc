"""Guides with a row of parameters per datum: which rows a run on some of the data uses."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Protocol, cast

from torch import Tensor

from pyro_vae.programs.state import unwrapped
from pyro_vae.programs.types import Program

__all__ = ["RowGuide", "repeated_rows", "row_guide"]


class RowGuide(Protocol):
    """A guide whose parameters are a table with a row per datum, as LocalGuide's."""

    @property
    def current_rows(self) -> Tensor:
        """The rows that the batch holds now, [n]."""
        ...

    def rows_as_given(self, index: Tensor) -> contextlib.AbstractContextManager[None]:
        """Use these rows of the table inside the context; they are not checked again."""
        ...


def row_guide(program: Program) -> RowGuide | None:
    """Return the guide inside Pyro's handlers if it has a row per datum, else None."""
    inner = unwrapped(program)
    # Of the class: a property would compute the rows.
    return cast(RowGuide, inner) if hasattr(type(inner), "rows_as_given") else None


def repeated_rows(program: Program, times: int) -> Program:
    """Return a program that runs on its batch repeated, with the rows of its guide repeated."""
    guide = row_guide(program)
    if guide is None:
        return program

    @functools.wraps(program, assigned=(), updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with guide.rows_as_given(guide.current_rows.repeat(times)):
            return program(*args, **kwargs)

    return run
