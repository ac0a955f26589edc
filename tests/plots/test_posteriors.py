"""Figures of posteriors: drawn shares, words and contours against the numbers they are of."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import xarray as xr

matplotlib.use("Agg")

from matplotlib import colors
from matplotlib import pyplot as plt

from pyro_vae import plots

RUNGS = ["importance", "refined", "chains"]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def repaired(rungs=("importance",) * 5 + ("refined",) * 3 + ("chains",) * 2):
    """Ten data, the last one without a good verdict."""
    at = np.array([RUNGS.index(rung) for rung in rungs])
    tried = at >= np.arange(len(RUNGS))[:, np.newaxis]
    return xr.Dataset(
        {
            "rung": ("datum", np.array(rungs)),
            "good": ("datum", np.arange(10) < 9),
            "tried": (("rung_name", "datum"), tried),
            "seconds": ("rung_name", [1.0, 20.0, 300.0]),
        },
        coords={"rung_name": RUNGS, "datum": np.arange(10)},
    )


def bars(ax):
    """Return (row, start, length, colour) of every bar."""
    return [
        (
            round(bar.get_y() + bar.get_height() / 2),
            round(bar.get_x(), 9),
            round(bar.get_width(), 9),
            colors.to_hex(bar.get_facecolor()),
        )
        for bar in ax.patches
    ]


def test_shares_of_the_rungs():
    ax = plots.plot_rungs(repaired())
    pale, blue, vermilion = "#dddddd", "#0072b2", "#d55e00"
    assert bars(ax) == [
        *((0, 0.0, 1.0, pale), (0, 0.0, 0.5, blue), (0, 0.5, 0.0, vermilion)),
        *((1, 0.0, 0.5, pale), (1, 0.0, 0.3, blue), (1, 0.3, 0.0, vermilion)),
        *((2, 0.0, 0.2, pale), (2, 0.0, 0.1, blue), (2, 0.1, 0.1, vermilion)),
    ]
    assert [text.get_text() for text in ax.get_yticklabels()] == RUNGS
    words = [text.get_text() for text in ax.texts]
    assert words == ["5 of 10 good, 1.0 s", "3 of 5 good, 20.0 s", "1 of 2 good, 300.0 s"]
    assert ax.get_title(loc="left") == "Repair: 90% of the data have a good verdict"
    low, high = ax.get_ylim()
    assert low > high  # the first rung is on top


def test_a_rung_that_nothing_reaches():
    dataset = repaired(("importance",) * 10)
    dataset["good"] = ("datum", np.ones(10, bool))
    ax = plots.plot_rungs(dataset)
    assert [text.get_text() for text in ax.texts][1:] == ["none left", "none left"]


def test_another_dataset_is_refused():
    with pytest.raises(ValueError, match="the dataset has no good and no seconds"):
        plots.plot_rungs(repaired().drop_vars(["good", "seconds"]))


def test_widths_of_a_guide():
    dataset = xr.Dataset(
        {
            **{f"{name}_se": ("datum", [0.01, 0.02]) for name in ("narrowest", "widest")},
            "narrowest": ("datum", [0.5, 0.95]),
            "widest": ("datum", [1.02, 1.05]),
            "good": ("datum", [False, True]),
        },
        attrs={"width": 0.1},
    )
    ax = plots.plot_widths(dataset)
    marks = [list(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) == 2]
    assert marks[:2] == [[0.5, 0.95], [1.02, 1.05]]
    assert ax.get_title(loc="left") == "Draws of the guide are good for 50% of the data"


def test_contours_hold_half_and_nine_tenths():
    """Of a correlated Gaussian: the ellipses of 50% and 90%, from the chi-squared of two."""
    rng = np.random.default_rng(0)
    covariance = np.array([[1.0, 0.9], [0.9, 1.0]])
    root = np.linalg.cholesky(covariance)
    draws = rng.normal(size=(2000, 2)) @ root.T
    ax = plots.plot_posterior_pair(draws, {"guide": draws}, ("latent 1", "latent 4"), "Datum 3")
    (dots, contours) = ax.collections[:2]
    np.testing.assert_array_equal(dots.get_offsets(), draws)
    paths = contours.get_paths()
    assert len(paths) == 2  # the lower level, 90% of the draws, is first
    for path, share in zip(paths, (0.9, 0.5), strict=True):
        radius = np.linalg.norm(path.vertices @ np.linalg.inv(root).T, axis=1)
        assert np.median(radius) == pytest.approx(np.sqrt(-2 * np.log(1 - share)), rel=0.1)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 1", "latent 4")
    assert ax.get_title(loc="left") == "Datum 3"
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["draws of chains", "guide (50%, 90%)"]


def test_every_guide_is_inside_the_axes():
    rng = np.random.default_rng(1)
    chains, far = rng.normal(size=(300, 2)), rng.normal([30.0, 0.0], 1.0, (300, 2))
    ax = plots.plot_posterior_pair(chains, {"far": far}, ("a", "b"))
    assert ax.get_xlim()[0] < -2 and ax.get_xlim()[1] > 32


@pytest.mark.parametrize(
    "draws", [np.zeros((10, 3)), np.zeros((2, 2)), np.full((10, 2), np.nan), np.zeros(10)]
)
def test_draws_of_another_shape_are_refused(draws):
    with pytest.raises(ValueError, match="guide: finite draws of shape"):
        plots.plot_posterior_pair(np.zeros((10, 2)), {"guide": draws}, ("a", "b"))


def test_two_modes_have_contours_of_their_own():
    """Modes eight widths apart: Scott's bandwidth, 1.2 of these, keeps them apart."""
    rng = np.random.default_rng(2)
    draws = rng.normal(size=(2000, 2))
    draws[:1000, 0] += 8.0
    ax = plots.plot_posterior_pair(draws, {"guide": draws}, ("a", "b"))
    contours = ax.collections[1].get_paths()
    assert [int(np.sum(path.codes == path.MOVETO)) for path in contours] == [2, 2]
