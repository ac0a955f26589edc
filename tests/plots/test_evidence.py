"""The figure of both bounds: heights, order, errors and words, against the numbers."""

import matplotlib
import numpy as np
import pytest
import xarray as xr

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from pyro_vae import plots

LOWER = np.array([-3.0, -10.0, -5.0, -7.0])
UPPER = LOWER + np.array([0.4, 0.1, 0.3, 0.2])
ORDER = [1, 3, 2, 0]  # by width


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def dataset(lower=LOWER, upper=UPPER, untrusted=(False, False, True, False)):
    columns = {"lower": lower, "upper": upper, "untrusted": np.array(untrusted)}
    columns |= {f"{name}_se": np.full(len(lower), 0.05) for name in ("lower", "upper")}
    return xr.Dataset({name: ("datum", value) for name, value in columns.items()})


def points(ax, color):
    """Heights of the points of a colour, by their place."""
    found = {}
    for line in ax.lines:
        if line.get_marker() == "o" and to_rgba(line.get_color()) == to_rgba(color):
            found |= dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    return [found[place] for place in sorted(found)]


def test_bounds_stand_around_their_middle_in_order_of_width():
    ax = plots.plot_evidence(dataset())
    half = (UPPER - LOWER)[ORDER] / 2
    assert points(ax, "#D55E00") == pytest.approx(half)
    assert points(ax, "#0072B2") == pytest.approx(-half)
    assert ax.get_ylabel() == "nats from the middle of the bounds"
    assert ax.get_title(loc="left") == "log p(x) from both sides: 0.250 nats apart on average"


def test_bounds_stand_around_the_exact_value_where_it_is_known():
    exact = LOWER + 0.05
    ax = plots.plot_evidence(dataset(), exact)
    assert points(ax, "#0072B2") == pytest.approx([-0.05] * 4)
    assert points(ax, "#D55E00") == pytest.approx((UPPER - exact)[ORDER])
    assert "exact" in ax.get_ylabel()


def test_errors_are_one_standard_error():
    ax = plots.plot_evidence(dataset())
    bars = [path.vertices for each in ax.collections[1:] for path in each.get_paths()]
    assert len(bars) == 8
    assert all(bar[:, 1].max() - bar[:, 1].min() == pytest.approx(0.1) for bar in bars)


def test_bounds_that_are_not_to_be_trusted_are_hollow():
    ax = plots.plot_evidence(dataset())
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    places = {place for line in hollow for place in line.get_xdata()}
    assert places == {2}
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == ["upper bound", "lower bound", "not to be trusted (1 data)"]
    sure = plots.plot_evidence(dataset(untrusted=[False] * 4))
    assert len(sure.get_legend().get_texts()) == 2


def test_a_few_wide_ones_bend_the_axis():
    assert plots.plot_evidence(dataset()).get_yscale() == "linear"
    upper = np.concatenate([UPPER[:3], [LOWER[3] + 50]])
    assert plots.plot_evidence(dataset(upper=upper)).get_yscale() == "symlog"


def test_infinite_bounds_are_left_out_and_counted():
    upper = np.concatenate([UPPER[:3], [np.inf]])
    ax = plots.plot_evidence(dataset(upper=upper))
    assert len(points(ax, "#D55E00")) == 3
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "1 data without a finite bound are left out" in words


# --- of a comparison


def comparison(ais=(np.nan, -1.0, np.nan), ais_good=(False, True, False)):
    bounds = np.array([[-2.0, -7.0, -3.0], [-1.5, -1.2, -2.9]])
    both = ("guide", "datum")
    columns = {
        "iwae_bound": (both, bounds),
        "iwae_bound_se": (both, np.full((2, 3), 0.05)),
        "good": (both, np.array([[True, False, True], [True, True, True]])),
        "log_evidence": ("datum", np.array([-1.5, -1.0, -2.9])),
    }
    if ais is not None:
        columns |= {"ais": ("datum", np.array(ais)), "ais_se": ("datum", np.full(3, 0.05))}
        columns["ais_good"] = ("datum", np.array(ais_good))
    coords = {"guide": ["one", "other"], "datum": np.arange(3)}
    return xr.Dataset(columns, coords, {"num_particles": 50})


def test_bounds_of_a_comparison_stand_below_log_p():
    """In order of how far they are apart: 0.1, 0.5 and 6."""
    ax = plots.plot_evidence(comparison())
    assert points(ax, "#0072B2") == pytest.approx([-0.1, -0.5, -6.0])
    assert points(ax, "#D55E00") == pytest.approx([0.0, 0.0, -0.2])
    assert points(ax, "#009E73") == pytest.approx([0.0])  # of the last one alone
    assert ax.get_ylabel() == "nats from log p(x) of the comparison"
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == [
        *("IWAE-50 through 'one'", "IWAE-50 through 'other'", "annealed chains"),
        "not to be trusted (1 data)",
    ]
    assert ax.get_title(loc="left") == "Lower bounds on log p(x): 2.200 nats apart on average"


def test_chains_that_are_not_to_be_trusted_are_hollow():
    """Of the first datum, beside a bad guide of the second."""
    ax = plots.plot_evidence(comparison((-1.0, np.nan, np.nan), [False] * 3))
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words[-1] == "not to be trusted (2 data)"


def test_a_comparison_without_chains():
    ax = plots.plot_evidence(comparison(ais=None))
    assert points(ax, "#009E73") == []
    assert len(ax.get_legend().get_texts()) == 3


def test_it_draws_on_axes_that_are_given():
    _, ax = plt.subplots()
    assert plots.plot_evidence(dataset(), ax=ax) is ax


def test_other_data_are_refused():
    with pytest.raises(ValueError, match="no lower and upper, .* and no iwae_bound"):
        plots.plot_evidence(xr.Dataset())
    with pytest.raises(ValueError, match=r"exact: wanted shape \[4\], found \[3\]"):
        plots.plot_evidence(dataset(), np.zeros(3))
