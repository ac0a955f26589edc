"""The figure of imputed images: what it shows, on which scale."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from pyro_vae.plots.images import plot_imputation


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    truth = generator.uniform(0, 16, (5, 12))
    observed = np.arange(12) >= 6
    mean = np.where(observed, truth, 7.0)
    return truth, np.tile(observed, (5, 1)), mean, np.stack([mean, mean + ~observed])


def test_the_figure_has_a_row_for_each_kind_of_image(images):
    truth, observed, mean, draws = images
    figure = plot_imputation(mean, draws, observed, (3, 4), truth=truth, num_columns=4)
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels == ["seen", "mean", "draw 1", "draw 2", "truth", "intensity"]
    seen = figure.axes[0].images
    shown = np.ma.filled(np.ma.masked_invalid(seen[1].get_array()), np.nan)
    # Images are 4 pixels wide with gaps of one; the upper half is marked, the gaps are not.
    assert shown.shape == (3, 4 * 5 - 1)
    marked = np.isfinite(shown)
    np.testing.assert_array_equal(marked[:, :4], ~observed[0].reshape(3, 4))
    assert not marked[:, 4].any()
    np.testing.assert_array_equal(
        figure.axes[4].images[0].get_array()[:, 5:9], truth[1].reshape(3, 4)
    )
    low, high = truth[:4].min(), truth[:4].max()
    assert {ax.images[0].get_clim() for ax in figure.axes[:5]} == {(low, high)}
    plt.close(figure)


@pytest.mark.parametrize(
    ("shift", "extend"),
    [(0.0, "neither"), (-99.0, "min"), (99.0, "max"), ([[[99.0]], [[-99.0]]], "both")],
)
def test_the_scale_says_where_draws_exceed_it(images, shift, extend):
    truth, observed, mean, _ = images
    figure = plot_imputation(mean, np.stack([mean, mean]) + shift, observed, (3, 4), truth=truth)
    assert figure.axes[-2].images[0].colorbar.extend == extend
    plt.close(figure)


def test_an_array_of_another_shape_is_refused(images):
    truth, observed, mean, draws = images
    with pytest.raises(ValueError, match=r"mean: wanted shape \[5, 16\] for 5 images of 4 x 4"):
        plot_imputation(mean, draws, observed, (4, 4))
    with pytest.raises(ValueError, match=r"truth: wanted shape \[5, 12\] .* found \[3, 12\]"):
        plot_imputation(mean, draws, observed, (3, 4), truth=truth[:3])
