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

PACKAGE = Path(__file__).parents[1] / "pyro_vae"
N, DRAWS, PRIOR_DRAWS, Z, X = 5, 200, 50, 2, 3


def load(path):
    spec = importlib.util.spec_from_file_location(f"{path.stem}_by_path", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bridge = load(PACKAGE / "arviz_versions.py")
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


def test_a_group_may_name_its_own_dimensions(tmp_path):
    """Coordinates of a simplex are one fewer; densities have no event dimensions."""
    draws = {"p": np.random.default_rng(0).dirichlet(np.ones(3), (2, 9, N))}
    tree = bridge.container(
        {
            "posterior": draws,
            "unconstrained_posterior": {"p": np.zeros((2, 9, N, 2))},
            "log_prior": {"p": np.zeros((2, 9, N))},
        },
        dims={"p": ["datum", "part"], "unconstrained_posterior/p": ["datum", "coordinate"]},
        attrs={"note": "of chains"},
    )
    for found in (tree, bridge.read(bridge.write(tree, tmp_path / "chains.nc"))):
        assert found["posterior"]["p"].dims[2:] == ("datum", "part")
        assert found["unconstrained_posterior"]["p"].dims[2:] == ("datum", "coordinate")
        assert found["log_prior"]["p"].dims == ("chain", "draw", "datum")
        assert found.attrs["note"] == found["posterior"].attrs["note"] == "of chains"
        assert len(az.summary(found, var_names=["p"])) == 3 * N


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
        (
            {"posterior": {"draw": np.zeros((1, 9)), "y": np.zeros((1, 9))}},
            r"group 'posterior': \['draw'\] are names of variables and of dimensions: rename",
        ),
    ],
)
def test_container_refuses(groups, names, change, message):
    with pytest.raises(ValueError, match=message):
        bridge.container({**groups, **change}, **names)


@pytest.mark.parametrize("own", [["k", "k"], ["draw", "k"]])
def test_a_dimension_is_named_once(own):
    """xarray would warn, and then go wrong without a word."""
    matrix = {"posterior": {"matrix": np.zeros((1, 9, 2, 2))}}
    with pytest.raises(ValueError, match=r"variable 'matrix': wanted dimensions of different name"):
        bridge.container(matrix, dims={"matrix": own})


@pytest.mark.parametrize("value", [None, True, {"a": 1}])
def test_container_refuses_attributes_that_no_file_holds(groups, value):
    with pytest.raises(TypeError, match="attribute 'seed': wanted a string, a number or a list"):
        bridge.container(groups, attrs={"seed": value})


# The module itself


def test_module_needs_no_torch_and_imports_arviz_late(monkeypatch):
    for name in ("torch", "pyro", "pyro_vae", "arviz"):
        monkeypatch.setitem(sys.modules, name, None)  # makes an import of it fail
    load(PACKAGE / "arviz_versions.py")
    load(PACKAGE / "diagnostics" / "psis.py")
