"""Sizes of pieces: equal where they can be, and round."""

from __future__ import annotations

import pytest

import pyro_vae as pv
from pyro_vae.particles.blocks import equal_step, round_down
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from tests.models import encoder, factor_analysis


@pytest.mark.parametrize(
    ("num_data", "sizes"), [(256, {256}), (500, {250}), (10_000, {250}), (771, {193, 192})]
)
def test_blocks_of_data_are_equal(num_data, sizes):
    """So that they share a graph; the last may be a little smaller."""
    model = factor_analysis()
    x = model.data(num_data)
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    blocks = Evaluator(model, guide, as_batch(x)).data_blocks()
    assert [b.start for b in blocks[1:]] == [b.stop for b in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, num_data)
    assert {b.stop - b.start for b in blocks} == sizes


@pytest.mark.parametrize(
    ("count", "most", "step"), [(50, 21, 10), (50, 50, 50), (50, 80, 50), (13, 5, 5), (7, 1, 1)]
)
def test_pieces_are_equal_where_they_can_be(count, most, step):
    assert equal_step(count, most) == step


@pytest.mark.parametrize(
    ("number", "rounded"), [(1, 1), (4, 2), (9, 5), (65, 50), (128, 100), (16384, 10000)]
)
def test_draws_come_in_round_numbers(number, rounded):
    assert round_down(number) == rounded
