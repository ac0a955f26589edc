"""Figures of models compared: where dots and bars are, what is said beside them."""

from __future__ import annotations

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")

from pyro_vae.plots.models import plot_model_differences  # noqa: E402


@pytest.fixture
def table():
    return {
        "log_evidence": np.array([-10.0, -9.0, -np.inf]),
        "difference": np.array([-1.0, 0.0, -np.inf]),
        "difference_se": np.array([0.1, 0.0, 0.0]),
        "difference_se_new": np.array([0.4, 0.0, np.nan]),
        "untrusted": np.array([3, 0, 1]),
        "verdict": np.array(["worse", "best", "unclear"]),
    }


def test_draws_each_finite_difference_with_both_errors(table):
    ax = plot_model_differences(table, ["a", "b", "c"], "b", num_data=50)
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    wide, narrow = (bars.lines[2][0].get_segments() for bars in ax.containers)
    np.testing.assert_allclose(wide[0][:, 0], [-1.8, -0.2])
    np.testing.assert_allclose(narrow[0][:, 0], [-1.2, -0.8])
    full, hollow = (line for line in ax.lines if line.get_marker() == "o")
    assert (full.get_xdata().tolist(), full.get_ydata().tolist()) == ([0.0], [1])
    assert (hollow.get_xdata().tolist(), hollow.get_markerfacecolor()) == ([-1.0], "white")
    said = [text.get_text() for text in ax.texts]
    assert said == ["worse", "best", "unclear"]
    assert "50 held-out data: 'b' at −9.00 nats per datum" in ax.get_title("left")
    matplotlib.pyplot.close("all")
