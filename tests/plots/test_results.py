"""What the figures show: the drawn lengths, heights, limits and words, against the results."""

import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import xarray as xr

matplotlib.use("Agg")

from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.container import BarContainer

from pyro_vae import plots

N = 64


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def fit_result(elbo, validation=None):
    epochs = len(elbo)
    history = {
        "epoch": list(range(1, epochs + 1)),
        "step": list(range(10, 10 * epochs + 1, 10)),
        "elbo": list(elbo),
        "elbo_std_error": [0.5] * epochs,
    }
    if validation is not None:
        history["validation_elbo"] = list(validation)
        history["validation_elbo_std_error"] = [0.25] * epochs
    return SimpleNamespace(history=history)


def comparison_dataset(seed=0, guides=("amortized", "mean-field")):
    rng = np.random.default_rng(seed)
    size = (len(guides), N)
    approximation = rng.gamma(2.0, 0.3, size=size)
    amortization = rng.gamma(1.0, 0.5, size=size)
    amortization[1:] = 0.0
    evidence = -25.0 + rng.normal(size=N)
    both = ("guide", "datum")
    return xr.Dataset(
        {
            "elbo": (both, evidence - approximation - amortization),
            "elbo_se": (both, np.full(size, 0.03)),
            "approximation_gap": (both, approximation),
            "approximation_gap_se": (both, rng.uniform(0.05, 0.1, size=size)),
            "amortization_gap": (both, amortization),
            "amortization_gap_se": (both, np.where(amortization > 0.0, 0.2, 0.0)),
            "log_evidence": ("datum", evidence),
            "log_evidence_se": ("datum", np.full(N, 0.04)),
            "pareto_k": (both, rng.uniform(0.0, 0.6, size=size)),
        },
        coords={"guide": list(guides), "datum": np.arange(N)},
        attrs={"pareto_k_threshold": 0.7},
    )


def bars_at(ax, row):
    """Return (start, end, colour) of the bars of one row of plot_gaps, from the left."""
    bars = [bar for bar in ax.patches if bar.get_y() < row < bar.get_y() + bar.get_height()]
    return [
        (bar.get_x(), bar.get_x() + bar.get_width(), colors.to_hex(bar.get_facecolor()))
        for bar in bars
    ]


def legend_words(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def words(ax):
    return [text.get_text() for text in ax.texts]


def assert_legend_is_above_the_data(ax):
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1 - 1.0


# plot_history


def test_history_draws_both_curves_and_marks_the_best():
    epochs = np.arange(1, 41)
    elbo = -20.0 - 5.0 / epochs
    validation = -21.0 - 0.001 * (epochs - 30.0) ** 2
    ax = plots.plot_history(fit_result(elbo, validation))
    training, held_out, best = ax.get_lines()
    np.testing.assert_array_equal(training.get_xydata(), np.c_[epochs, elbo])
    np.testing.assert_array_equal(held_out.get_xydata(), np.c_[epochs, validation])
    np.testing.assert_array_equal(best.get_xydata(), [[30, -21.0]])
    assert "best validation: −21.00 nats, epoch 30" in legend_words(ax)
    assert ax.get_ylabel() == "ELBO [nats per datum]"
    band = ax.collections[1].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(-21.0 + 0.25)
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    assert_legend_is_above_the_data(ax)


def test_first_epochs_do_not_flatten_the_others():
    epochs = np.arange(1, 101)
    elbo = -25.0 - 2.0 * np.exp(-epochs / 20) - np.where(epochs < 5, 1000.0, 0.0)
    ax = plots.plot_history(fit_result(elbo))
    low, high = ax.get_ylim()
    assert -32.0 < low < elbo[4:].min()
    assert elbo.max() < high < -24.0
    assert ax.get_xlabel() == (
        f"epoch (the ELBO axis is cut; its lowest value is −{-elbo[0]:.2f} nats)"
    )


def test_a_short_history_is_not_cut():
    ax = plots.plot_history(fit_result([-30.0, -26.0, -25.0]))
    low, high = ax.get_ylim()
    assert low < -30.0
    assert high > -25.0
    assert ax.get_xlabel() == "epoch"


@pytest.mark.parametrize("validation", [None, [np.nan] * 3])
def test_history_without_validation(validation):
    ax = plots.plot_history(fit_result([-30.0, -26.0, -25.0], validation))
    assert legend_words(ax) == ["training"]


def test_history_skips_epochs_without_validation():
    ax = plots.plot_history(fit_result([-30.0, -26.0, -25.0], [np.nan, -27.0, np.nan]))
    np.testing.assert_array_equal(ax.get_lines()[1].get_xydata(), [[2, -27.0]])
    np.testing.assert_array_equal(ax.get_lines()[2].get_xydata(), [[2, -27.0]])


def test_empty_history():
    with pytest.raises(ValueError, match="the fit has no finished epoch"):
        plots.plot_history(fit_result([]))


# plot_gaps


def test_gap_bars_are_as_long_as_the_gaps():
    dataset = comparison_dataset()
    ax = plots.plot_gaps(dataset)
    approximation = dataset["approximation_gap"].mean("datum").values
    amortization = dataset["amortization_gap"].mean("datum").values
    for row, guide in enumerate(["amortized", "mean-field"]):
        first, second = bars_at(ax, 1.0 + row)
        assert first[:2] == pytest.approx((0.0, approximation[row]))
        assert second[:2] == pytest.approx(
            (approximation[row], approximation[row] + amortization[row])
        )
        assert first[2] != second[2]
        assert ax.get_yticklabels()[row].get_text() == guide
    # The whole bar is what the ELBO lacks.
    lost = float((dataset["log_evidence"] - dataset["elbo"]).mean("datum").values[0])
    assert bars_at(ax, 1.0)[-1][1] == pytest.approx(lost)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # first guide on top
    assert legend_words(ax) == ["approximation gap (family)", "amortization gap (encoder)"]
    assert "nats" in ax.get_xlabel()
    assert_legend_is_above_the_data(ax)


def test_gap_error_bars_and_numbers_are_the_standard_errors_of_the_means():
    dataset = comparison_dataset()
    ax = plots.plot_gaps(dataset)
    error = np.sqrt((dataset["approximation_gap_se"].values[0] ** 2).sum()) / N
    mean = dataset["approximation_gap"].values[0].mean()
    bars = [bars for bars in ax.containers if isinstance(bars, BarContainer)]
    ((start, _), (end, _)) = bars[0].errorbar.lines[2][0].get_segments()[0]
    assert (start, end) == pytest.approx((mean - error, mean + error))
    amortization = dataset["amortization_gap"].values[0].mean()
    assert error == pytest.approx(0.0095, abs=0.0015)  # shown to its first digit
    digits = 3 if error < 0.01 else 2
    assert f"{mean:.{digits}f} ± {error:.{digits}f} + {amortization:.2f} ± 0.03" in words(ax)
    evidence = dataset["log_evidence"].values.mean()
    assert f"log p(x) = −{-evidence:.3f} ± 0.005 nats" in words(ax)


def test_gap_numbers_stay_inside_the_figure():
    ax = plots.plot_gaps({"train": comparison_dataset(0), "test": comparison_dataset(1)})
    ax.figure.canvas.draw()
    for text in ax.texts:
        assert text.get_window_extent().x1 <= ax.figure.bbox.x1


def test_gaps_of_several_datasets_are_grouped():
    datasets = {"train": comparison_dataset(0), "test": comparison_dataset(1)}
    ax = plots.plot_gaps(datasets)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["amortized", "mean-field"] * 2
    train, test = [text for text in words(ax) if "log p(x)" in text]
    assert train.startswith("train: log p(x) = ")
    assert test.startswith("test: log p(x) = ")
    rows = ax.get_yticks()
    assert rows[2] - rows[1] > rows[1] - rows[0]
    wanted = float(datasets["test"]["approximation_gap"].values[0].mean())
    assert bars_at(ax, rows[2])[0][1] == pytest.approx(wanted)


def test_a_gap_that_is_not_split_has_one_grey_bar():
    dataset = comparison_dataset()
    dataset["amortization_gap"][0] = np.nan
    ax = plots.plot_gaps(dataset)
    ((start, end, color),) = bars_at(ax, 1.0)
    lost = float((dataset["log_evidence"] - dataset["elbo"]).mean("datum").values[0])
    assert (start, end) == pytest.approx((0.0, lost))
    red, green, blue = colors.to_rgb(color)
    assert red == green == blue
    assert legend_words(ax)[-1] == "gap, not split"
    assert f"{lost:.3f} ± {np.hypot(0.03, 0.04) / N**0.5:.3f}" in words(ax)


def test_gaps_below_zero_are_drawn_as_they_are():
    dataset = comparison_dataset()
    dataset["approximation_gap"] -= 2.0
    ax = plots.plot_gaps(dataset)
    mean = float(dataset["approximation_gap"].values[0].mean())
    assert mean < 0.0
    assert bars_at(ax, 1.0)[0][:2] == pytest.approx((0.0, mean))
    assert ax.get_xlim()[0] < mean


@pytest.mark.parametrize(
    "plot", [plots.plot_gaps, plots.plot_gap_distribution, plots.plot_pareto_k]
)
def test_no_datasets(plot):
    with pytest.raises(ValueError, match="nothing to plot: no dataset"):
        plot({})


# plot_gap_distribution


def test_gap_distribution_is_the_empirical_one():
    datasets = {"train": comparison_dataset(0), "test": comparison_dataset(1)}
    ax = plots.plot_gap_distribution(datasets)
    lines = ax.get_lines()
    assert len(lines) == 4
    gap = np.sort(
        datasets["test"]["log_evidence"] - datasets["test"]["elbo"].sel(guide="mean-field")
    )
    np.testing.assert_array_equal(lines[3].get_xdata(), gap)
    np.testing.assert_allclose(lines[3].get_ydata(), np.arange(1, N + 1) / N)
    # Colour is the guide, style the dataset.
    assert lines[0].get_color() == lines[2].get_color() != lines[1].get_color()
    assert lines[0].get_linestyle() == lines[1].get_linestyle() != lines[2].get_linestyle()
    assert legend_words(ax) == ["amortized", "mean-field", "train", "test"]
    assert "nats" in ax.get_xlabel()
    assert_legend_is_above_the_data(ax)


def test_gap_distribution_of_one_dataset_names_the_guides_only():
    ax = plots.plot_gap_distribution(comparison_dataset())
    assert legend_words(ax) == ["amortized", "mean-field"]


def test_infinite_gaps_are_below_no_value():
    dataset = comparison_dataset()
    dataset["elbo"][0, :16] = -np.inf
    dataset["amortization_gap"][0, :16] = np.inf
    first = plots.plot_gap_distribution(dataset).get_lines()[0]
    assert first.get_ydata()[-1] == (N - 16) / N
    ax = plots.plot_gaps(dataset)
    ax.figure.canvas.draw()
    assert len(ax.patches) == 2  # of the other guide
    assert ["∞" in text.get_text() or "inf" in text.get_text() for text in ax.texts].count(
        True
    ) == 1


# plot_pareto_k


def test_pareto_k_histogram():
    dataset = comparison_dataset()
    k = np.full(N, 0.31)
    k[:8] = 0.91
    k[8:12] = np.inf
    k[12:14] = -3.0
    dataset["pareto_k"][0] = k
    dataset["pareto_k"][1, :4] = np.nan
    ax = plots.plot_pareto_k(dataset)
    drawn = [
        (bar.get_x(), -bar.get_height(), bar.get_facecolor())
        for bar in ax.patches
        if bar.get_y() < 1.5 and bar.get_height() != 0.0
    ]
    starts = [start for start, _, _ in drawn]
    heights = np.array([height for _, height, _ in drawn])
    assert starts == pytest.approx([-0.5, 0.3, 0.9, 1.45])
    np.testing.assert_allclose(heights / heights.sum(), np.array([2, 50, 8, 4]) / N)
    below, above = colors.to_rgba("#0072B2"), colors.to_rgba("#D55E00")
    assert [color for _, _, color in drawn] == [below, below, above, above]
    (threshold,) = ax.get_lines()
    assert set(threshold.get_xdata()) == {0.7}
    assert f"{12 / N:.1%} above" in words(ax)
    assert f"0.0% above\n4 of {N} unknown" in words(ax)
    assert "above 0.70: a heavy tail" in legend_words(ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["amortized", "mean-field"]
    assert_legend_is_above_the_data(ax)


def test_pareto_k_with_thresholds_of_several_numbers_of_particles():
    few = comparison_dataset().assign_attrs(pareto_k_threshold=0.5)
    many = comparison_dataset()
    for dataset in (few, many):
        dataset["pareto_k"][:] = 0.61
    ax = plots.plot_pareto_k({"few": few, "many": many})
    drawn = [colors.to_hex(bar.get_facecolor()) for bar in ax.patches if bar.get_height()]
    assert drawn == ["#d55e00"] * 2 + ["#0072b2"] * 2
    assert [line.get_xdata()[0] for line in ax.get_lines()] == [0.5, 0.7]
    assert "above 0.50 or 0.70: a heavy tail" in legend_words(ax)


def test_pareto_k_unknown_everywhere():
    dataset = comparison_dataset()
    dataset["pareto_k"][:] = np.nan
    ax = plots.plot_pareto_k({"train": dataset})
    assert f"none known\n{N} of {N} unknown" in words(ax)
    assert f"train: {N} data" in words(ax)


# plot_reconstructions


def test_reconstructions_are_laid_out_on_one_scale():
    rng = np.random.default_rng(0)
    data, reconstructions = rng.uniform(0.0, 16.0, size=(2, 20, 12))
    samples = rng.uniform(0.0, 20.0, size=(5, 12))
    ax = plots.plot_reconstructions(
        data, reconstructions, samples, (3, 4), num_columns=6, unit="intensity (0 to 16)"
    )
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["data", "reconstructions", "prior samples"]
    assert ax.figure.axes[1].get_ylabel() == "intensity (0 to 16)"
    every = np.concatenate([data[:6], reconstructions[:6], samples])
    assert ax.images[0].get_clim() == (every.min(), every.max())
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    assert shown.shape == (3 * 4 - 1, 6 * 5 - 1)
    np.testing.assert_array_equal(shown[4:7, 5:9], reconstructions[1].reshape(3, 4))
    assert np.isnan(shown[:, 4]).all() and np.isnan(shown[3]).all()
    # Fewer samples than columns leave their places blank.
    assert np.isnan(shown[8:, 25:]).all() and np.isfinite(shown[:3, 25:]).all()


def test_reconstructions_without_prior_samples():
    ax = plots.plot_reconstructions(np.zeros((3, 4)), np.ones((3, 4)), None, (2, 2))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["data", "reconstructions"]


def test_reconstructions_refuse_other_shapes():
    images = np.zeros((3, 4))
    with pytest.raises(ValueError, match=r"prior samples: wanted shape \[n, 4\] for images of 2 x"):
        plots.plot_reconstructions(images, images, np.zeros((3, 2, 2)), (2, 2))
    with pytest.raises(ValueError, match="3 data, but 2 reconstructions"):
        plots.plot_reconstructions(images, images[:2], None, (2, 2))


# plot_latents


def test_two_latents_are_drawn_as_they_are():
    means = np.random.default_rng(0).normal(size=(30, 2))
    labels = np.repeat([3, 7, 9], 10)
    ax = plots.plot_latents(means, labels)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 1", "latent 2")
    for dots, label in zip(ax.collections, [3, 7, 9], strict=True):
        np.testing.assert_array_equal(dots.get_offsets(), means[labels == label])
    assert legend_words(ax) == ["3", "7", "9"]
    assert len({tuple(dots.get_facecolor()[0]) for dots in ax.collections}) == 3
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1 - 1.0


def test_more_latents_are_drawn_on_their_principal_components():
    rng = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    scale = np.array([3.0, 2.0, 0.5, 0.1, 0.1])
    scores = rng.normal(size=(400, 5)) * scale
    ax = plots.plot_latents(scores @ rotation.T + 7.0)
    points = np.asarray(ax.collections[0].get_offsets())
    assert ax.get_legend() is None
    np.testing.assert_allclose(points.mean(axis=0), 0.0, atol=1e-10)
    np.testing.assert_allclose(np.cov(points.T)[0, 1], 0.0, atol=1e-10)
    # The rotation is found again, up to the sign and to what 400 draws leave open.
    for component in range(2):
        correlation = np.corrcoef(points[:, component], scores[:, component])[0, 1]
        assert abs(correlation) > 0.98
    variances = np.linalg.eigvalsh(np.cov(scores.T))[::-1]
    for name, variance in zip((ax.get_xlabel(), ax.get_ylabel()), variances[:2], strict=True):
        assert "of 5 latents" in name
        assert f"({variance / variances.sum():.0%} of the variance)" in name


def test_many_classes_have_a_colour_each():
    means = np.random.default_rng(2).normal(size=(50, 2))
    ax = plots.plot_latents(means, np.arange(50) % 25)
    assert len({tuple(dots.get_facecolor()[0]) for dots in ax.collections}) == 25


def test_latents_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"means: wanted shape \[N, L\] .* found \[9, 1\]"):
        plots.plot_latents(np.zeros((9, 1)))
    with pytest.raises(ValueError, match=r"labels: wanted shape \[9\], found \[8\]"):
        plots.plot_latents(np.zeros((9, 2)), np.zeros(8))


# All of them


@pytest.mark.parametrize(
    ("plot", "given"),
    [
        (plots.plot_history, fit_result([-3.0, -2.0])),
        (plots.plot_gaps, comparison_dataset()),
        (plots.plot_gap_distribution, comparison_dataset()),
        (plots.plot_pareto_k, comparison_dataset()),
        (plots.plot_latents, np.eye(3)),
    ],
)
def test_draws_on_the_axes_given(plot, given):
    figure, ax = plt.subplots()
    assert plot(given, ax=ax) is ax
    assert ax.has_data()
    assert plt.get_fignums() == [figure.number]


def test_missing_matplotlib_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(
        ImportError, match=r'^figures need matplotlib: pip install "pyro-vae\[plots'
    ):
        plots.plot_gaps(comparison_dataset())
