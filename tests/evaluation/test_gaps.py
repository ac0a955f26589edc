"""Which lower bound is taken for log p(x)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyro_vae.evaluation.gaps import tightest


@pytest.mark.parametrize(
    ("means", "errors", "chosen"),
    [
        ([-10.0, -9.0, -9.01], [0.01, 0.3, 0.02], 2),  # a lucky heavy tail does not win
        ([-9.0, -9.7, -9.01], [0.0, 0.001, 0.02], 0),  # an exact guide does
        ([-9.7, -9.0], [0.001, 0.02], 1),  # a missed mode is precise, and low
        ([-9.0, -9.5], [math.nan, math.nan], 0),  # a single particle tells no error
    ],
)
def test_the_tightest_bound(means, errors, chosen):
    assert tightest(np.array(means), np.array(errors), None) == chosen


@pytest.mark.parametrize(
    ("means", "errors", "chosen"),
    [
        ([-1.0, -1.0, -1.0], [0.1, 0.3, 0.19], 2),  # the mixture, whose tail is the lightest
        ([-1.0, -1.0, -1.0], [0.1, 0.3, 0.21], 0),  # too coarse
        ([-1.0, -1.0, -9.0], [0.1, 0.3, 0.1], 0),  # not tight
        ([-1.0, -1.0, -1.0], [0.0, 0.3, 0.1], 0),  # beside an exact posterior
    ],
)
def test_the_mixture_is_taken_where_it_is_about_as_close(means, errors, chosen):
    assert tightest(np.array(means), np.array(errors), 2) == chosen
