"""Cells of an AnnData as the arguments of a model: a matrix, and columns of obs by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

_SHOWN = 5  # cells, categories and names that a message lists


class Cells(dict[str, Any]):
    """The arguments of a model by name, as :func:`cells` returns them.

    Attributes:
        categories: of each argument that holds codes, what they stand for, in order.
    """

    def __init__(self, arguments: Mapping[str, Any], categories: Mapping[str, list[Any]]) -> None:
        super().__init__(arguments)
        self.categories = dict(categories)

    def __repr__(self) -> str:
        shown = []
        for name, value in self.items():
            what = f"{type(value).__name__} {value.dtype} {list(value.shape)}"
            if name in self.categories:
                what = f"codes of {len(self.categories[name])} categories"
            shown.append(f"{name}: {what}")
        return f"Cells({', '.join(shown)})"


def cells(
    data: Any,
    *,
    layer: str | None = None,
    obs: Mapping[str, str] | None = None,
    argument: str = "x",
    like: Cells | None = None,
) -> Cells:
    """Return the cells of an AnnData as a batch: ``model(x=..., **columns)``.

    The matrix stays what it is (an array, a sparse matrix, or one in a file where the AnnData is
    backed), and pyro_vae.fit and what evaluates a pair read its rows as they need them, dense.

    Args:
        data: an AnnData; or the path of one in an .h5ad file or a Zarr folder, of which obs is
            read, and nothing else (needs the extra ``cells``). An AnnData that was opened with
            ``backed="r"`` has its layers in memory.
        layer: the name of a layer; X by default.
        obs: from the model's arguments to columns of obs. A column of numbers becomes an array of
            them; one of categories, words or booleans becomes codes from 0 (int64, [N]), in the
            order of the categories, or sorted.
        argument: the model's argument for the matrix.
        like: other cells, of training for one, whose codes are to be used.

    Returns:
        A mapping from arguments to arrays, with the attribute ``categories``.

    Raises:
        ValueError: for a layer or column that is not there, values that are missing, and
            categories that ``like`` does not have; for a view of a backed AnnData.
        TypeError: for what is no AnnData, and for columns of dates and other things.
        ImportError: for a path, if anndata is not installed.

    Example:
        >>> import numpy as np, pandas as pd
        >>> from types import SimpleNamespace
        >>> obs = pd.DataFrame({"donor": ["b", "a", "b"]})
        >>> adata = SimpleNamespace(X=np.ones((3, 2)), layers={}, obs=obs)  # or an AnnData
        >>> found = cells(adata, obs={"batch": "donor"})
        >>> found["batch"], found.categories
        (array([1, 0, 1]), {'batch': ['a', 'b']})
    """
    if isinstance(data, (str, os.PathLike)):
        data = _opened(data)
    if getattr(data, "is_view", False) and getattr(data, "isbacked", False):
        raise ValueError(
            "the AnnData is a view of one that is backed by a file, of which a part is no array; "
            "pass view.to_memory(), or all of it"
        )
    if not all(hasattr(data, name) for name in ("X", "layers", "obs")):
        raise TypeError(f"an AnnData or the path of one is needed, found a {type(data).__name__}")
    if layer is not None and layer not in data.layers:
        raise ValueError(f"layer={layer!r}: the AnnData has {_names(data.layers)}")
    matrix = data.X if layer is None else data.layers[layer]
    if matrix is None:
        raise ValueError(f"the AnnData has no X; name one of its layers: {_names(data.layers)}")
    found, categories = {argument: matrix}, {}
    for name, column in (obs or {}).items():
        if name == argument:
            raise ValueError(f"obs: {name!r} is the argument of the matrix; name it by argument=")
        if column not in data.obs:
            raise ValueError(f"obs={{{name!r}: {column!r}}}: obs has {_names(data.obs)}")
        known = None if like is None else like.categories.get(name)
        values, of = _column(name, data.obs[column], known)
        found[name] = values
        if of is not None:
            categories[name] = of
    return Cells(found, categories)


def _opened(path: str | os.PathLike[str]) -> Any:
    """Return what is in a file, opened: matrices of which nothing is read yet, and obs."""
    try:
        from anndata import io
    except ImportError as error:
        raise ImportError('reading .h5ad needs anndata: pip install "pyro-vae[cells]"') from error
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    try:
        if os.path.isdir(path):
            import zarr

            file: Any = zarr.open_group(os.fspath(path), mode="r")
        else:
            import h5py

            file = h5py.File(path, "r")  # open as long as its matrices are in use
    except (OSError, ValueError) as error:  # GroupNotFoundError of Zarr too
        what = "is no AnnData: neither an .h5ad file nor a Zarr folder"
        raise ValueError(f"{os.fspath(path)} {what} ({error})") from error
    if "obs" not in file:
        raise ValueError(f"{os.fspath(path)} is no AnnData: it has no obs")

    def matrix(at: Any) -> Any:
        # A sparse matrix is a group of arrays.
        return at if hasattr(at, "shape") else io.sparse_dataset(at)

    names = list(file["layers"].keys()) if "layers" in file else []
    layers = {name: matrix(file["layers"][name]) for name in names}
    x = matrix(file["X"]) if "X" in file else None
    return SimpleNamespace(X=x, layers=layers, obs=io.read_elem(file["obs"]))


def _column(
    name: str, column: pd.Series, known: list[Any] | None
) -> tuple[np.ndarray, list[Any] | None]:
    """Return a column's numbers, or codes with what they stand for."""
    what = f"column {column.name!r} of obs, for {name!r},"
    missing = column.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"{what} has no value for {_cells(column, missing)}; leave these cells out, or give "
            "them a category of their own"
        )
    if pd.api.types.is_bool_dtype(column) and known is None:
        return column.to_numpy(np.int64), [False, True]
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        # NumPy's dtype, of pandas' own (Int64) too.
        dtype: Any = getattr(column.dtype, "numpy_dtype", column.dtype)
        return column.to_numpy(dtype), None
    if not isinstance(column.dtype, pd.CategoricalDtype):
        if not column.map(lambda value: isinstance(value, (str, bool))).all():
            raise TypeError(f"{what} is of {column.dtype}: numbers, words or categories are needed")
        column = column.astype("category")
    of = known if known is not None else column.cat.categories.tolist()
    codes = pd.Index(of, dtype=object).get_indexer(column.astype(object)).astype(np.int64)
    if (codes < 0).any():
        new = sorted(map(str, set(column[codes < 0])))
        raise ValueError(
            f"{what} has categories that like= does not: {', '.join(new[:_SHOWN])}, of "
            f"{_cells(column, codes < 0)}"
        )
    return codes, of


def _cells(column: pd.Series, which: np.ndarray) -> str:
    names = [str(name) for name in column.index[which][:_SHOWN]]
    more = ", ..." if which.sum() > _SHOWN else ""
    return f"{which.sum()} of {len(which)} cells ({', '.join(names)}{more})"


def _names(things: Any) -> str:
    return ", ".join(map(repr, list(things)[:20])) or "none"
