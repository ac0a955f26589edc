"""The recorder of numbers: what it calls equal, and that one version equals itself."""

from __future__ import annotations

import numpy as np
import pytest
from record_numbers import difference, record, report
from recorded_items import ITEMS

ONE = np.array([1.0, -2.0, 0.0])


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (ONE, ONE.copy(), "bit"),
        (np.array([1.0, np.nan, np.inf]), np.array([1.0, np.nan, np.inf]), "bit"),
        (np.asarray("one"), np.asarray("one"), "bit"),
        (ONE, ONE * (1 + 1e-14), "rounding"),
        (ONE, np.array([1.0, -2.0, -0.0]), "rounding"),
        (ONE, ONE + 1e-13, "rounding"),
        (1e-17 * ONE, -1e-17 * ONE, "rounding"),
        (ONE.astype("f"), ONE.astype("f") * np.float32(1 + 1e-6), "rounding"),
        (ONE, ONE * (1 + 1e-10), "differs"),
        (ONE, ONE.astype("f"), "differs"),
        (ONE, ONE[:2], "differs"),
        (ONE, np.array([1.0, -2.0, np.nan]), "differs"),
        (np.array([np.inf]), np.array([-np.inf]), "differs"),
        (np.array([True, False]), np.array([True, True]), "differs"),
        (np.asarray("one"), np.asarray("two"), "differs"),
        (np.asarray("none"), ONE, "differs"),
    ],
)
def test_what_is_equal(before, after, kind):
    assert difference(before, after).kind == kind


def test_a_report_counts_items(capsys):
    before = {
        "a//x": ONE,
        "a//seconds": np.asarray(1.0),
        "b//x": ONE,
        "c//x": ONE,
        "count/fit//model": ONE,
    }
    assert report(before, before)
    assert "equal to the last bit: 3 items" in capsys.readouterr().out
    assert not report(before, {"a//x": ONE, "b//x": ONE + 1, "c//raised": np.asarray("no")})
    out = capsys.readouterr().out
    assert "equal to the last bit: 1 items" in out
    assert "differ:                1 items" in out
    assert "missing:               1 items" in out


@pytest.mark.slow
def test_two_recordings_of_one_version_are_equal_to_the_last_bit(capsys):
    names = (
        "loss/linear, amortized, plain",
        "loss/zoo, mixture VAE",
        "evaluation/zoo, Bernoulli VAE",
        "arviz/zoo, item response",
        "compare/zoo, Bernoulli VAE",
        "fit/validation, replay",
        "em/importance",
    )
    items = {name: ITEMS[name] for name in names}
    before, after = record(items, {}), record(items, {})
    assert report(before, after)
    assert "equal to the last bit: 7 items" in capsys.readouterr().out
    raised = [key for key in before if key.split("/")[-1] == "raised"]
    assert all("free_bits" in str(before[key]) for key in raised)
