"""Cells of an AnnData: layers and columns by name, dense or sparse, in memory or in a file."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from pyro_vae.datasets import cells
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.on_demand import OnDemand, on_demand

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("anndata") is None, reason="the extra cells is not installed"
)

X = np.random.default_rng(0).poisson(0.7, (40, 5)).astype("float32")
DONORS = ["b", "a", "c", "a"] * 10


def made(matrix=X, **columns):
    import anndata

    names = [f"cell {i}" for i in range(40)]
    obs = pd.DataFrame({"donor": DONORS, **columns}, index=pd.Index(names, dtype=object))
    return anndata.AnnData(matrix, obs=obs, layers={"double": 2 * matrix})


def written(adata, path):
    import anndata

    adata.obs = adata.obs.astype({"donor": "category"})
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    return path


@pytest.mark.parametrize("sparse", [False, True])
def test_matrix_and_columns(sparse):
    matrix = scipy.sparse.csr_matrix(X) if sparse else X
    size = np.arange(40.0)
    order = pd.Categorical(DONORS, categories=["c", "b", "a", "unused"])
    adata = made(matrix, size=size, ordered=order, good=np.arange(40) % 2 == 0)
    columns = {"batch": "donor", "size": "size", "rank": "ordered", "flag": "good"}
    found = cells(adata, obs=columns, layer="double", argument="counts")
    assert list(found) == ["counts", "batch", "size", "rank", "flag"]
    assert found.categories == {
        "batch": ["a", "b", "c"],
        "rank": ["c", "b", "a", "unused"],
        "flag": [False, True],
    }
    assert "batch: codes of 3 categories" in repr(found)
    batch = on_demand(found)
    assert isinstance(batch, OnDemand) == sparse
    index = torch.tensor([7, 3])
    part = batch.rows(index)
    assert torch.equal(part.kwargs["counts"], torch.from_numpy(2 * X)[index])
    assert part.kwargs["batch"].tolist() == [0, 0]
    assert part.kwargs["rank"].tolist() == [2, 2]
    assert part.kwargs["flag"].tolist() == [0, 0]
    assert part.kwargs["size"].tolist() == [7.0, 3.0]
    # Without names, its X.
    assert torch.equal(on_demand(adata).rows(index).args[0], torch.from_numpy(X)[index])
    assert torch.equal(as_batch(adata).args[0], torch.from_numpy(X))


@pytest.mark.parametrize("kind", ["x.h5ad", "x.zarr"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_file_is_opened_and_not_read(sparse, kind, tmp_path):
    path = written(made(scipy.sparse.csr_matrix(X) if sparse else X), tmp_path / kind)
    for layer, factor in ((None, 1), ("double", 2)):
        found = cells(path, obs={"batch": "donor"}, layer=layer)
        batch = on_demand(found)
        assert isinstance(batch, OnDemand)
        assert torch.equal(batch.rows(slice(9, 30)).kwargs["x"], torch.from_numpy(factor * X[9:30]))
        index = torch.tensor([30, 2, 3, 2])
        assert torch.equal(batch.rows(index).kwargs["x"], torch.from_numpy(factor * X)[index])
    found = cells(str(path), obs={"batch": "donor"})
    assert found["batch"].tolist() == cells(made(), obs={"batch": "donor"})["batch"].tolist()
    import anndata

    if kind == "x.h5ad":  # as AnnData opens it
        backed = on_demand(anndata.read_h5ad(path, backed="r"))
        assert isinstance(backed, OnDemand)
        assert torch.equal(backed.rows(slice(9, 30)).args[0], torch.from_numpy(X[9:30]))
    view = SimpleNamespace(is_view=True, isbacked=True, X=X, layers={}, obs=made().obs)
    with pytest.raises(ValueError, match=r"view of one that is backed.*to_memory"):
        cells(view)


def test_codes_of_other_cells():
    train = cells(made(), obs={"batch": "donor"})
    other = made()[[2, 1]]
    assert cells(other, obs={"batch": "donor"})["batch"].tolist() == [1, 0]
    assert cells(other, obs={"batch": "donor"}, like=train)["batch"].tolist() == [2, 0]
    new = made()
    new.obs["donor"] = ["z", *DONORS[1:]]
    with pytest.raises(ValueError, match=r"'donor' .* like= does not: z, of 1 of 40 cells"):
        cells(new, obs={"batch": "donor"}, like=train)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"layer": "counts"}, ValueError, "layer='counts': the AnnData has 'double'"),
        ({"obs": {"b": "donors"}}, ValueError, "obs has 'donor', 'hole', 'lost', 'when'"),
        ({"obs": {"x": "donor"}}, ValueError, "'x' is the argument of the matrix"),
        ({"obs": {"b": "hole"}}, ValueError, r"'hole' .* 1 of 40 cells \(cell 1\)"),
        ({"obs": {"b": "lost"}}, ValueError, r"'lost' .* 40 cells \(cell 0, .*, \.\.\.\)"),
        ({"obs": {"b": "when"}}, TypeError, "'when' .*datetime.*numbers, words or categories"),
    ],
)
def test_refusals(options, error, told):
    hole = np.ones(40)
    hole[1] = np.nan
    lost = pd.Categorical([None] * 7 + DONORS[7:])
    adata = made(hole=hole, lost=lost, when=pd.to_datetime(["2026-01-01"] * 40))
    with pytest.raises(error, match=told):
        cells(adata, **options)


def test_what_is_no_anndata(monkeypatch, tmp_path):
    with pytest.raises(TypeError, match="an AnnData or the path of one is needed, found a ndarray"):
        cells(X)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        cells(tmp_path / "x.h5ad")
    (tmp_path / "poem.h5ad").write_text("a poem")
    for path in (tmp_path / "poem.h5ad", tmp_path):
        with pytest.raises(ValueError, match=r"is no AnnData: neither an .h5ad file nor a Zarr"):
            cells(path)
    import anndata

    empty = anndata.AnnData(obs=made().obs)
    with pytest.raises(ValueError, match="no X; name one of its layers: none"):
        cells(empty)
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(ImportError, match=r'pip install "pyro-vae\[cells\]"'):
        cells(tmp_path / "x.h5ad")


@pytest.mark.filterwarnings("ignore")  # of an option of pandas that anndata sets
def test_views_of_a_sparse_matrix_in_a_file_are_refused(tmp_path):
    import anndata

    path = written(made(scipy.sparse.csr_matrix(X)), tmp_path / "cells.h5ad")
    view = anndata.read_h5ad(path, backed="r")[[2, 0]]
    for function in (cells, on_demand):
        with pytest.raises(ValueError, match=r"view of .* backed by a file.*to_memory"):
            function(view)
