"""The bridge under whichever ArviZ is installed, 0.x or 1.x.

Needs NumPy, ArviZ and pytest: the module is loaded by its path, so that neither PyTorch nor Pyro
has to be there.
"""

import importlib.util
import sys
from pathlib import Path

import arviz as az
import numpy as np
import pytest
import xarray as xr

PACKAGE = Path(__file__).parents[2] / "pyro_vae"
N, DRAWS, PRIOR_DRAWS, Z, X = 5, 200, 50, 2, 3


def load(path):
    spec = importlib.util.spec_from_file_location(f"{path.stem}_by_path", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bridge = load(PACKAGE / "export" / "arviz_versions.py")
pareto = load(PACKAGE / "diagnostics" / "psis.py")
IS_1 = int(az.__version__.split(".")[0]) >= 1


@pytest.fixture
def groups():
    rng = np.random.default_rng(0)
    return {
        "posterior": {"z": rng.normal(size=(1, DRAWS, N, Z))},
        "posterior_predictive": {"x": rng.normal(size=(1, DRAWS, N, X))},
        "prior": {"z": rng.normal(size=(1, PRIOR_DRAWS, N, Z))},
        "prior_predictive": {"x": rng.normal(size=(1, PRIOR_DRAWS, N, X))},
        # A narrow spread: az.loo has nothing to warn of.
        "log_likelihood": {"x": -3.0 + 0.1 * rng.normal(size=(1, DRAWS, N))},
        "sample_stats": {"log_weight": rng.normal(size=(1, DRAWS, N))},
        "observed_data": {"x": rng.normal(size=(N, X))},
        "constant_data": {"scale": rng.uniform(size=X)},
    }


@pytest.fixture
def names():
    return {
        "coords": {"datum": np.arange(10, 10 + N), "z_dim": ["a", "b"]},
        "dims": {"z": ["datum", "z_dim"], "x": ["datum", "x_dim"], "log_weight": ["datum"]},
    }


@pytest.fixture
def tree(groups, names):
    return bridge.container(groups, **names, attrs={"seed": 3, "guide": "amortized"})


@pytest.fixture
def read(tree, tmp_path):
    return az.from_netcdf(bridge.write(tree, tmp_path / "posterior.nc"))


# The container and the file


def test_container_is_arviz_own(tree):
    assert isinstance(tree, xr.DataTree if IS_1 else az.InferenceData)


def test_file_holds_what_was_given(read, groups, names):
    for group, variables in groups.items():
        for name, array in variables.items():
            np.testing.assert_array_equal(read[group][name].values, array)
    assert read.attrs["seed"] == 3
    assert read.attrs["guide"] == "amortized"
    assert read["posterior"]["z"].dims == ("chain", "draw", "datum", "z_dim")
    assert read["log_likelihood"]["x"].dims == ("chain", "draw", "datum")
    assert read["posterior_predictive"]["x"].dims == ("chain", "draw", "datum", "x_dim")
    assert read["observed_data"]["x"].dims == ("datum", "x_dim")
    assert read["sample_stats"]["log_weight"].dims == ("chain", "draw", "datum")
    assert read["constant_data"]["scale"].dims == ("scale_dim_0",)
    for dim, values in names["coords"].items():
        np.testing.assert_array_equal(read["posterior"][dim].values, values)


def test_unnamed_dimensions_get_arviz_names(groups):
    tree = bridge.container(groups)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "z_dim_0", "z_dim_1")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "x_dim_0")


def test_arviz_works_on_the_file(read, groups):
    summary = az.summary(read, var_names=["z"], round_to="none")
    assert len(summary) == N * Z
    wanted = groups["posterior"]["z"].mean(axis=(0, 1)).ravel()
    np.testing.assert_allclose(summary["mean"].astype(float), wanted, atol=1e-12)

    # With weights 1/p(x|z) nearly flat, leaving a datum out hardly changes log p(x): the
    # estimate is the log of the harmonic mean of the likelihood up to the smoothing.
    log_likelihood = groups["log_likelihood"]["x"][0]
    wanted = (np.log(DRAWS) - np.logaddexp.reduce(-log_likelihood, axis=0)).sum()
    loo = az.loo(read)
    assert float(loo.elpd if IS_1 else loo.elpd_loo) == pytest.approx(wanted, abs=0.01)


# ArviZ 0.23 under Matplotlib 3.11.
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
def test_plot_trace_draws_every_latent(read):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    try:
        az.plot_trace(read, var_names=["z"], **({"backend": "matplotlib"} if IS_1 else {}))
        lines = [line for axes in plt.gcf().axes for line in axes.get_lines()]
        assert sum(len(line.get_xdata()) == DRAWS for line in lines) == N * Z
    finally:
        plt.close("all")


def test_write_replaces_the_old_file_and_leaves_nothing_else(tree, tmp_path):
    path = tmp_path / "posterior.nc"
    path.write_text("old")
    assert bridge.write(tree, str(path)) == path
    assert list(tmp_path.iterdir()) == [path]
    assert az.from_netcdf(path)["posterior"]["z"].shape == (1, DRAWS, N, Z)


def test_interrupted_write_keeps_the_old_file(tmp_path):
    class Interrupted:
        def to_netcdf(self, path, **_):
            Path(path).write_text("half")
            raise KeyboardInterrupt

    path = tmp_path / "posterior.nc"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        bridge.write(Interrupted(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_says_what_is_missing(tree, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        bridge.write(tree, tmp_path / "nowhere" / "posterior.nc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'pip install "h5netcdf\[h5py\]"'):
        bridge.write(tree, tmp_path / "posterior.nc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"posteriors": {"z": np.zeros((1, 9))}}, r"group 'posteriors': wanted one of posterior, "),
        (
            {"posterior": {"z": np.zeros(9)}},
            r"group 'posterior', variable 'z': wanted shape \[chain, draw, ...\], found \[9\]",
        ),
        (
            {"posterior": {"y": np.zeros((1, 9)), "w": np.zeros((1, 8))}},
            r"group 'posterior', variable 'w': wanted \[chain, draw\] = \[1, 9\] as in 'y', "
            r"found \[1, 8\]",
        ),
        (
            {"posterior": {"z": np.zeros((1, 9, N))}},
            r"group 'posterior', variable 'z': wanted 2 dimensions \['datum', 'z_dim'\], "
            r"found 1 of shape \[5\]",
        ),
        (
            {"posterior": {"z": np.zeros((1, 9, N + 1, Z))}},
            r"group 'posterior', variable 'z': wanted length 5 along 'datum' as in coords, found 6",
        ),
        (
            {"observed_data": {"x": np.zeros((N, X + 1))}},
            r"group 'observed_data', variable 'x': wanted length 3 along 'x_dim' as in "
            r"group 'posterior_predictive', variable 'x', found 4",
        ),
    ],
)
def test_container_refuses(groups, names, change, message):
    with pytest.raises(ValueError, match=message):
        bridge.container({**groups, **change}, **names)


@pytest.mark.parametrize("value", [None, True, {"a": 1}])
def test_container_refuses_attributes_that_no_file_holds(groups, value):
    with pytest.raises(TypeError, match="attribute 'seed': wanted a string, a number or a list"):
        bridge.container(groups, attrs={"seed": value})


# Pareto smoothing


def arviz_psis(log_weights):
    """ArviZ's own, by the way that its users take."""
    if not IS_1:
        return az.psislw(log_weights)
    # The accessor smooths the inverse of what it is given.
    smoothed, k = xr.DataArray(-log_weights, dims=("datum", "draw")).azstats.psislw(dim="draw")
    return smoothed.values, k.values


def test_psis_is_arviz():
    log_weights = 2.0 * np.random.default_rng(1).normal(size=(4, 1000)) - 90.0
    given = log_weights.copy()
    smoothed, k = pareto.psis(log_weights)
    wanted_smoothed, wanted_k = arviz_psis(log_weights.copy())
    np.testing.assert_allclose(smoothed, wanted_smoothed, rtol=0, atol=1e-12)
    np.testing.assert_allclose(k, wanted_k, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(log_weights, given)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_psis_finds_the_tail_of_pareto_weights(shape):
    # Excesses of a Pareto variable of index 1/shape are generalized Pareto of that very shape.
    # ArviZ shrinks its estimate from M tail draws toward 0.5 with the weight of 10 draws.
    rows, num_particles = 40, 5000
    tail = int(3 * num_particles**0.5)
    uniform = np.random.default_rng(2).uniform(size=(rows, num_particles))
    _, k = pareto.psis(-shape * np.log(uniform) - 90.0)
    wanted = (tail * shape + 10 * 0.5) / (tail + 10)
    std_error = k.std(ddof=1) / rows**0.5
    assert std_error < 0.02
    assert k.mean() == pytest.approx(wanted, abs=4 * std_error)
    # The other end of the same weights is bounded: the sign is the right one.
    _, k = pareto.psis(shape * np.log(uniform) - 90.0)
    assert (k < 0.5 * shape).all()


def test_smoothing_changes_the_tail_only():
    num_particles = 1000
    tail = int(3 * num_particles**0.5) + 1  # one more in ArviZ 0.x, which rounds up
    log_weights = np.random.default_rng(3).normal(size=(3, num_particles))
    smoothed, _ = pareto.psis(log_weights)
    np.testing.assert_allclose(np.exp(smoothed).sum(axis=1), 1.0, rtol=1e-12)
    order = np.argsort(log_weights, axis=1)
    shift = np.take_along_axis(smoothed - log_weights, order, axis=1)
    np.testing.assert_allclose(np.ptp(shift[:, :-tail], axis=1), 0.0, atol=1e-12)
    assert (np.ptp(shift[:, -tail:], axis=1) > 1e-3).all()
    # Quantiles keep the order, and none is above the largest raw weight.
    assert (np.diff(np.take_along_axis(smoothed, order, axis=1), axis=1) >= 0).all()
    assert (shift[:, -1] <= shift[:, 0] + 1e-12).all()


@pytest.mark.parametrize("num_particles", [1, 10, 1000])
def test_equal_weights_have_no_tail(num_particles):
    noise = np.random.default_rng(4).normal(size=(1, num_particles))
    level = np.array([[-700.0], [0.0], [3.0]])
    smoothed, k = pareto.psis(level + 1e-10 * noise)
    np.testing.assert_array_equal(k, 0.0)
    np.testing.assert_allclose(smoothed, -np.log(num_particles), rtol=0, atol=1e-8)


def test_equal_to_rounding_means_less_in_float32():
    # Some units in the last place of -700 in float32, which is 6e-5.
    log_weights = -700.0 + 3e-4 * np.random.default_rng(4).normal(size=(1, 1000))
    assert np.ptp(log_weights.astype(np.float32)) > 1e-3
    np.testing.assert_array_equal(pareto.psis(log_weights.astype(np.float32))[1], 0.0)
    _, k = pareto.psis(log_weights)
    assert np.isfinite(k).all()
    assert (k != 0.0).all()


def test_a_tail_of_equal_weights_is_not_heavy():
    log_weights = np.repeat([0.0, 5.0], [800, 200])[None]
    smoothed, k = pareto.psis(log_weights)
    np.testing.assert_array_equal(k, 0.0)
    np.testing.assert_allclose(smoothed, log_weights - np.log(800 + 200 * np.exp(5.0)), atol=1e-12)


@pytest.mark.parametrize("background", [-np.inf, -1e4, -50.0])
def test_a_handful_that_carries_all_the_weight_is_infinitely_heavy(background):
    log_weights = np.full((1, 1000), background)
    log_weights[0, :10] = np.random.default_rng(5).normal(size=10)
    smoothed, k = pareto.psis(log_weights)
    np.testing.assert_array_equal(k, np.inf)
    np.testing.assert_allclose(
        np.exp(smoothed), np.exp(log_weights) / np.exp(log_weights).sum(), rtol=1e-12
    )


def test_a_fit_that_fails_inside_arviz_is_no_number(monkeypatch):
    def fail(log_weights, efficiency):
        return np.full_like(log_weights, np.nan), np.full(len(log_weights), np.nan)

    monkeypatch.setattr(pareto, "_arviz_psislw", fail)
    log_weights = np.random.default_rng(9).normal(size=(2, 100))
    smoothed, k = pareto.psis(log_weights)
    np.testing.assert_array_equal(k, np.inf)
    np.testing.assert_allclose(np.ptp(smoothed - log_weights, axis=1), 0.0, atol=1e-12)


def test_weights_of_zero_below_the_tail_do_not_matter():
    log_weights = np.random.default_rng(6).normal(size=(1, 1000))
    zeroed = np.where(log_weights < 0.0, -np.inf, log_weights)
    np.testing.assert_allclose(pareto.psis(zeroed)[1], pareto.psis(log_weights)[1], rtol=1e-12)
    assert (np.exp(pareto.psis(zeroed)[0])[log_weights < 0.0] == 0.0).all()


def test_a_failed_row_does_not_touch_its_neighbours():
    good = np.random.default_rng(7).normal(size=(1, 1000))
    few = np.full((1, 1000), -np.inf)
    few[0, 0] = 0.0
    smoothed, k = pareto.psis(np.concatenate([few, good, np.zeros((1, 1000))]))
    assert k[0] == np.inf
    assert k[2] == 0.0
    np.testing.assert_array_equal(k[1:2], pareto.psis(good)[1])
    np.testing.assert_array_equal(smoothed[1:2], pareto.psis(good)[0])


@pytest.mark.parametrize("num_particles", [10, 29, 30, 57, 225, 226, 1003, 5000])
def test_the_largest_weights_tell_their_k_hat(num_particles):
    """In any order: equal ones, and those of a light tail, of a heavy one, and of zeros below."""
    scale = np.array([0.0, 0.1, 3.0, 8.0])[:, np.newaxis]
    log_weights = scale * np.random.default_rng(2).normal(size=(4, num_particles)) - 700
    log_weights[2, : num_particles // 2] = -np.inf
    size = pareto.tail_length(num_particles)
    assert size == num_particles if num_particles < 30 else size < num_particles / 4 + 1
    largest = np.sort(log_weights, axis=1)[:, -size:]
    found = pareto.pareto_k_of_largest(largest, num_particles)
    np.testing.assert_array_equal(found, pareto.psis(log_weights)[1])
    with pytest.raises(ValueError, match=rf"wanted shape \[N, {size}\] for K = {num_particles}"):
        pareto.pareto_k_of_largest(largest[:, 1:], num_particles)


def test_too_few_particles_for_a_tail():
    log_weights = np.random.default_rng(8).normal(size=(2, 30))
    assert np.isfinite(pareto.psis(log_weights)[1]).all()
    smoothed, k = pareto.psis(log_weights[:, :29])
    assert np.isnan(k).all()
    plain = np.exp(log_weights[:, :29])
    np.testing.assert_allclose(np.exp(smoothed), plain / plain.sum(axis=1, keepdims=True))


def test_no_data():
    smoothed, k = pareto.psis(np.zeros((0, 100)))
    assert smoothed.shape == (0, 100)
    assert k.shape == (0,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "log_weights: 2 of 4 rows hold nan: rows 1, 3"),
        (np.inf, "log_weights: 2 of 4 rows hold inf: rows 1, 3"),
    ],
)
def test_psis_refuses_rows(value, message):
    log_weights = np.zeros((4, 50))
    log_weights[[1, 3], 7] = value
    with pytest.raises(ValueError, match=message):
        pareto.psis(log_weights)


def test_psis_refuses_rows_without_weight():
    log_weights = np.zeros((4, 50))
    log_weights[2] = -np.inf
    with pytest.raises(ValueError, match=r"1 of 4 rows hold only -inf.*: rows 2"):
        pareto.psis(log_weights)


@pytest.mark.parametrize("shape", [(50,), (2, 3, 50), (2, 0)])
def test_psis_refuses_shapes(shape):
    with pytest.raises(ValueError, match=r"log_weights: wanted shape \[N, K\] with K > 0, found "):
        pareto.psis(np.zeros(shape))


# The module itself


def test_module_needs_no_torch_and_imports_arviz_late(monkeypatch):
    for name in ("torch", "pyro", "pyro_vae", "arviz"):
        monkeypatch.setitem(sys.modules, name, None)  # makes an import of it fail
    load(PACKAGE / "export" / "arviz_versions.py")
    load(PACKAGE / "diagnostics" / "psis.py")
