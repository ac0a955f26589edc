"""Guides with a row of parameters per datum: which rows a run on some of the data uses."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.state import unwrapped
from pyro_vae.programs.types import Program

__all__ = ["RowGuide", "repeated_rows", "row_guide"]


class RowGuide(ABC):
    """A guide whose parameters are a table with a row per datum, such as LocalGuide's.

    Attributes:
        converged: whether each row is at its optimum, [num_data].
    """

    converged: Tensor

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the latent sites of a batch, as a Pyro guide."""

    @property
    @abstractmethod
    def num_data(self) -> int:
        """Rows of the table."""

    @property
    @abstractmethod
    def given_rows(self) -> Tensor | None:
        """The rows named for the present batch, [n]; None where it holds all data."""

    @property
    @abstractmethod
    def current_rows(self) -> Tensor:
        """The rows of the present batch: :attr:`given_rows`, else all, [n]."""

    @abstractmethod
    def rows_as_given(self, index: Tensor) -> contextlib.AbstractContextManager[None]:
        """Use these rows inside the context, unchecked: rows [n] that were checked before."""

    @property
    @abstractmethod
    def given(self) -> Mapping[str, Tensor]:
        """The values of global latent sites that the rows were fitted at."""

    @property
    @abstractmethod
    def is_start(self) -> bool:
        """Whether the rows are only a start for other rows, and may meet any data."""

    @abstractmethod
    def check_data(self, batch: Batch) -> None:
        """Raise ValueError where the present rows were fitted to other data than these."""

    @abstractmethod
    def remember(self, batch: Batch | None, given: Mapping[str, Tensor] | None = None) -> None:
        """Remember what the rows were fitted to.

        Args:
            batch: a datum for each row; None forgets.
            given: the values of global latent sites.
        """


def row_guide(program: Program) -> RowGuide | None:
    """Return the guide inside Pyro's handlers if it has a row per datum, else None."""
    inner = unwrapped(program)
    return inner if isinstance(inner, RowGuide) else None


def repeated_rows(program: Program, times: int) -> Program:
    """Return a program for a batch that is repeated: the rows of its guide are repeated alike."""
    guide = row_guide(program)
    if guide is None:
        return program

    @functools.wraps(program, assigned=(), updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with guide.rows_as_given(guide.current_rows.repeat(times)):
            return program(*args, **kwargs)

    return run
