"""Guides with a row per datum, repeated with the batch; guides joint over the data are refused."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.programs.guide_kinds import RowGuide, on_rows, repeated_rows, row_guide
from tests.models import factor_analysis


class Table(RowGuide):
    """Notes the rows that each run uses."""

    def __init__(self):
        super().__init__()
        self._make_rows(torch.zeros(5, 1), is_whole=False)
        self.used = []

    def forward(self, x):
        self.used.append(self.current_rows.tolist())


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


def test_rows_of_rows_are_those_of_the_table():
    guide = Table()
    with on_rows(guide, torch.tensor([4, 2, 3])):
        with on_rows(guide, torch.tensor([2, 0])):
            guide(torch.zeros(2))
        with on_rows(guide, None):
            guide(torch.zeros(3))
    assert guide.used == [[3, 4], [4, 2, 3]]
    with on_rows(lambda x: None, torch.tensor([1])):
        pass


def test_rows_are_given_back_when_the_context_is_left():
    guide = Table()
    with guide.rows(slice(0, 2)), guide.rows_as_given(torch.tensor([4])):
        guide(torch.zeros(1))
    guide(torch.zeros(5))
    assert guide.used == [[4], [0, 1, 2, 3, 4]] and guide.given_rows is None


def test_guides_joint_over_the_data_are_refused():
    """AutoDiagonalNormal's one site is the whole batch's: no bound of a datum is in it."""
    model = factor_analysis()
    x = model.data(5)
    for auto in (
        pyro.infer.autoguide.AutoDiagonalNormal,
        pyro.infer.autoguide.AutoMultivariateNormal,
    ):
        with pytest.raises(
            ValueError, match=r"'_AutoD?i?a?.*_latent' has batch shape \[\].* 5 data"
        ):
            pv.log_weights(model, auto(model), x, num_particles=2)

    def no_plate(x):
        pyro.sample("z", dist.Normal(x.new_zeros(5, 3), 1.0).to_event(2))

    with pytest.raises(ValueError, match=r"'z' has batch shape \[\]"):
        pv.log_weights(model, no_plate, x, num_particles=2)
