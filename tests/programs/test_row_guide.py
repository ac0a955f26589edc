"""Guides with a row per datum: found through handlers, their rows repeated with the batch."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from pyro import poutine

from pyro_vae.programs.guide_kinds import RowGuide, repeated_rows, row_guide


class Table(RowGuide):
    """Notes the rows that each run uses."""

    num_data = 5
    given = {}  # noqa: RUF012 - of the interface
    is_start = False
    given_rows = None

    def __init__(self):
        self.used, self._rows = [], torch.arange(5)

    def __call__(self, x):
        self.used.append(self._rows.tolist())

    @property
    def current_rows(self):
        return self._rows

    @contextlib.contextmanager
    def rows_as_given(self, index):
        before, self._rows = self._rows, index
        yield
        self._rows = before

    def check_data(self, batch):
        pass

    def remember(self, batch, given=None):
        pass


def test_it_is_found_inside_handlers():
    guide = Table()
    assert row_guide(guide) is guide
    assert row_guide(poutine.block(poutine.scale(guide, scale=2.0))) is guide
    assert row_guide(functools.partial) is None
    assert row_guide(lambda x: None) is None


def test_rows_are_repeated_inside_the_run_alone():
    guide = Table()
    with guide.rows_as_given(torch.tensor([3, 1])):
        repeated_rows(guide, 2)(torch.zeros(4))
        guide(torch.zeros(2))
    assert guide.used == [[3, 1, 3, 1], [3, 1]]


def test_other_programs_stay_as_they_are():
    def program(x):
        pass

    assert repeated_rows(program, 3) is program


def test_a_guide_must_say_all_of_it():
    with pytest.raises(TypeError, match="abstract"):
        RowGuide()
