"""A file written in blocks of data holds what the container in memory does, or is not there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

import pyro_vae as pv
from pyro_vae.arviz_versions import read
from pyro_vae.export.streaming import streamed
from tests.arviz_calls import groups

KINDS = [
    "posterior.nc",
    pytest.param(
        "posterior.zarr",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("zarr") is None, reason="the extra zarr is not installed"
        ),
    ),
]
COUNT = 300  # two blocks


def model(x, mask):
    """Masked, discrete, constrained latents; deterministic sites of bools, and of no datum."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3))
        s = pyro.sample("s", dist.LogNormal(torch.zeros(len(x)), 1.0))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(len(x), 3)))
        with pyro.poutine.mask(mask=mask):
            y = pyro.sample("y", dist.Normal(torch.zeros(len(x)), s))
        pyro.deterministic("large", s > 1)
        pyro.deterministic("two", torch.tensor(2.0))
        pyro.sample("x", dist.Normal(c.float() + p[..., 0] + y * mask, s), obs=x)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    batch = torch.randn(COUNT), torch.arange(COUNT) % 3 != 0
    return model, pv.LocalGuide(model, num_data=COUNT, example=batch), *batch


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("resample", [None, "psis"])
def test_a_file_holds_what_memory_would(pair, name, resample, tmp_path):
    labels = [f"cell {i}" for i in range(COUNT)]
    options = {"num_draws": 20, "seed": 0, "resample": resample, "dims": {"p": ["part"]}}
    options["coords"] = {"datum": labels, "part": ["a", "b", "c"]}
    memory = pv.to_arviz(*pair, **options)
    found = pv.to_arviz(*pair, file=tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert dict(found.attrs) == dict(memory.attrs)
    whole = groups(memory)
    assert set(groups(found)) == set(whole) >= {"unconstrained_posterior", "log_prior"}
    for group, data in groups(found).items():
        assert set(data.variables) == set(whole[group].variables)
        for variable, values in data.variables.items():
            wanted = whole[group].variables[variable]
            assert values.dims == wanted.dims
            assert values.dtype.kind == wanted.dtype.kind or values.dtype.kind in "OT"
            np.testing.assert_array_equal(values.values, wanted.values)
    assert found["posterior"]["large"].dtype == bool
    assert dict(groups(found)["posterior"].attrs) == dict(whole["posterior"].attrs)
    assert groups(read(tmp_path / name))["posterior"].sizes["datum"] == COUNT


@pytest.mark.parametrize("name", KINDS)
def test_what_fails_leaves_the_old_file(name, tmp_path, pair):
    options = {"num_draws": 2, "seed": 0, "predictive": False, "file": tmp_path / name}
    pv.to_arviz(*pair, **options)
    with pytest.raises(ValueError, match="dims names"):
        pv.to_arviz(*pair, dims={"nowhere": []}, **options)
    zeros = {"z": (("chain", "draw"), np.zeros((1, 2)))}
    data = {"posterior": xr.Dataset(zeros, {"chain": [0], "draw": [0, 1]})}
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / name, data)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert read(tmp_path / name)["posterior"]["s"].shape == (1, 2, COUNT)
    with streamed(tmp_path / name, None) as file:  # and a new one takes its place
        file.add(slice(0, 1), data)
        file.finish({}, {"note": "new"})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert set(groups(read(tmp_path / name))["posterior"].data_vars) == {"z"}
    assert read(tmp_path / name).attrs["note"] == "new"


def interrupted(path, data):
    with streamed(path, None) as file:
        file.add(slice(0, 1), data)
        raise KeyboardInterrupt


def test_memory_holds_a_block(pair, tmp_path, monkeypatch):
    """No array that is handed to the file has more data than a block."""
    from pyro_vae.export.streaming import StreamedFile

    seen, add = [], StreamedFile.add

    def noting(self, rows, given):
        seen.append((rows, {d.sizes.get("datum", 0) for d in given.values()}))
        add(self, rows, given)

    monkeypatch.setattr(StreamedFile, "add", noting)
    pv.to_arviz(*pair, num_draws=2, seed=0, file=str(tmp_path / "posterior.nc"))
    assert [rows for rows, _ in seen] == [slice(0, 150), slice(150, 300)]
    assert [sizes for _, sizes in seen] == [{150}, {150}]


def test_chains_of_one_datum_are_written(tmp_path):
    def pooled(x):
        mu = pyro.sample("mu", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("datum", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    guide = pv.LocalGuide(pooled, num_data=1, example=x, data_plate=False)
    settings = {"num_draws": 20, "num_warmup": 20, "seed": 0, "progress": False}
    samples = pv.sample_posterior(pooled, guide, x, data_plate=False, **settings)
    tree = samples.to_arviz(file=tmp_path / "chains.nc")
    assert tree["posterior"]["mu"].shape == (4, 20)
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "datum")
    assert tree["constant_data"]["rhat"].dims == ("batch",)  # a plate has the name datum
    np.testing.assert_array_equal(tree["posterior"]["mu"], samples.draws["mu"])


def test_what_is_missing_is_said(tmp_path, pair, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        pv.to_arviz(*pair, num_draws=2, file=tmp_path / "nowhere" / "posterior.nc")
    (tmp_path / "folder.nc").mkdir()
    with pytest.raises(IsADirectoryError, match="a folder has that name"):
        pv.to_arviz(*pair, num_draws=2, predictive=False, file=tmp_path / "folder.nc")
    with pytest.raises(ValueError, match="a name is needed"):
        pv.to_arviz(*pair, num_draws=2, file="")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'pip install "pyro-vae\[zarr\]"'):
        pv.to_arviz(*pair, num_draws=2, file=tmp_path / "posterior.zarr")
    with pytest.raises(ImportError, match=r'pip install "h5netcdf\[h5py\]"'):
        pv.to_arviz(*pair, num_draws=2, file=Path(tmp_path / "posterior.nc"))


def test_what_cannot_be_written_is_refused_before_drawing(tmp_path):
    drawn = []

    def scaled(x):
        with pyro.plate("rows/all", len(x)):
            z = pyro.sample("a/z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows/all", len(x)):
            drawn.append(pyro.sample("a/z", dist.Normal(x / 2, 0.7)).shape)

    with pytest.raises(ValueError, match=r"'a/z', 'rows/all' cannot be written.*rename"):
        pv.to_arviz(scaled, guide, torch.zeros(3), num_draws=4321, file=tmp_path / "a.nc")
    assert sum(shape.numel() for shape in drawn) < 4321 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_rename_that_fails_leaves_the_old_folder(fails, tmp_path, pair, monkeypatch):
    """The first puts the old one aside, the second the new one in its place."""
    pytest.importorskip("zarr")
    path = tmp_path / "posterior.zarr"
    options = {"num_draws": 2, "seed": 0, "predictive": False, "file": path}
    pv.to_arviz(*pair, **options)
    calls, replace = [], os.replace

    def failing(source, target):
        ours = Path(target).name in ("old", path.name)  # Zarr renames files of its own
        calls.extend([target] * ours)
        if ours and len(calls) == fails:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr("pyro_vae.export.streaming.os.replace", failing)
    if fails < 3:
        with pytest.raises(OSError, match="no space left"):
            pv.to_arviz(*pair, **{**options, "num_draws": 3})
    else:
        pv.to_arviz(*pair, **{**options, "num_draws": 3})
    monkeypatch.undo()
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert read(path)["posterior"].sizes["draw"] == (3 if fails == 3 else 2)


def test_a_folder_of_other_data_is_not_overwritten(tmp_path, pair):
    """That of an array that is trained on, for one."""
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "counts.zarr"
    zarr.create_array(str(path), shape=(3,), dtype="i4")[:] = [1, 2, 3]
    with pytest.raises(FileExistsError, match="no container of ArviZ's"):
        pv.to_arviz(*pair, num_draws=2, predictive=False, file=path)
    assert zarr.open_array(str(path))[2] == 3
    empty = tmp_path / "empty.zarr"
    empty.mkdir()
    assert pv.to_arviz(*pair, num_draws=2, predictive=False, file=empty)["posterior"].sizes["draw"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path, pair):
    (tmp_path / "posterior.nc").write_text("old")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            pv.to_arviz(*pair, num_draws=2, predictive=False, file=tmp_path / "posterior.nc")
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "posterior.nc").read_text() == "old"
