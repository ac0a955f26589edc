"""The figure of imputed images: what it shows, on which scale."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from pyro_vae.plots.images import plot_imputation, plot_traversals


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    truth = generator.uniform(0, 16, (5, 12))
    observed = np.arange(12) >= 6
    mean = np.where(observed, truth, 7.0)
    return truth, np.tile(observed, (5, 1)), mean, np.stack([mean, mean + ~observed])


def names(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def shown(picture):
    return np.ma.filled(np.ma.masked_invalid(picture.get_array()), np.nan)


def test_the_figure_has_a_row_for_each_kind_of_image(images):
    truth, observed, mean, draws = images
    ax = plot_imputation(mean, draws, observed, (3, 4), truth=truth, num_columns=4)
    assert names(ax) == ["seen", "mean", "draw 1", "draw 2", "truth"]
    assert [each.get_ylabel() for each in ax.figure.axes[1:]] == ["intensity"]
    picture, marks = ax.images
    # Images are 3 by 4 pixels with gaps of one; the upper half of those seen is marked.
    assert shown(picture).shape == shown(marks).shape == (5 * 4 - 1, 4 * 5 - 1)
    marked = np.isfinite(shown(marks))
    np.testing.assert_array_equal(marked[:3, :4], ~observed[0].reshape(3, 4))
    assert not marked[3:].any() and not marked[:, 4].any()
    np.testing.assert_array_equal(shown(picture)[16:19, 5:9], truth[1].reshape(3, 4))
    assert np.isnan(shown(picture)[3]).all()
    assert ax.get_yticks().tolist() == [1.0, 5.0, 9.0, 13.0, 17.0]
    assert picture.get_clim() == (truth[:4].min(), truth[:4].max())
    plt.close(ax.figure)


def test_a_traversal_moves_one_latent_at_a_time():
    def decode(z):
        return z @ np.arange(12.0).reshape(3, 4)

    center = np.array([0.5, -1.0, 2.0])
    ax = plot_traversals(decode, center, (2, 2), latents=[0, 2], values=[-1.0, 0.0, 1.0])
    assert names(ax) == ["latent 1", "latent 3"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["−1", "0", "1"]
    found = shown(ax.images[0])
    assert found.shape == (2 * 3 - 1, 3 * 3 - 1)
    wanted = decode(np.array([[0.5, -1.0, 1.0]]))[0].reshape(2, 2)
    np.testing.assert_allclose(found[3:, 6:], wanted)
    plt.close(ax.figure)
    with pytest.raises(ValueError, match=r"latents=\[3\]: numbers from 0 to 2"):
        plot_traversals(decode, center, (2, 2), latents=[3])
    with pytest.raises(ValueError, match=r"decode: wanted shape \[9, 9\] .* found \[9, 4\]"):
        plot_traversals(decode, center, (3, 3))


@pytest.mark.parametrize(
    ("shift", "extend"),
    [(0.0, "neither"), (-99.0, "min"), (99.0, "max"), ([[[99.0]], [[-99.0]]], "both")],
)
def test_the_scale_says_where_draws_exceed_it(images, shift, extend):
    truth, observed, mean, _ = images
    ax = plot_imputation(mean, np.stack([mean, mean]) + shift, observed, (3, 4), truth=truth)
    assert ax.images[0].colorbar.extend == extend
    plt.close(ax.figure)


def test_an_array_of_another_shape_is_refused(images):
    truth, observed, mean, draws = images
    with pytest.raises(ValueError, match=r"mean: wanted shape \[5, 16\] for 5 images of 4 x 4"):
        plot_imputation(mean, draws, observed, (4, 4))
    with pytest.raises(ValueError, match=r"truth: wanted shape \[5, 12\] .* found \[3, 12\]"):
        plot_imputation(mean, draws, observed, (3, 4), truth=truth[:3])
