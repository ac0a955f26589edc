"""A container of ArviZ written block by block of data, to a netCDF file or a Zarr folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import xarray as xr

from pyro_vae.arviz_versions import GROUPS, check_attrs, netcdf_engine

Format: TypeAlias = Literal["netcdf", "zarr"]

_PIECE = 2**24  # bytes of an array that the file keeps together


def format_of(path: str | os.PathLike[str]) -> Format:
    """Return what a file of this name is to be: Zarr where it ends in .zarr, else netCDF.

    Raises:
        ValueError: for an empty name.
        FileNotFoundError: if its folder does not exist.
        IsADirectoryError: for netCDF, if a folder has its name.
        FileExistsError: for Zarr, if a folder has its name that is no such container.
        ImportError: if no library that writes it is installed.
    """
    path = Path(path)
    if not path.name:
        raise ValueError(f"file={str(path)!r}: a name is needed")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.suffix != ".zarr":
        if path.is_dir():
            raise IsADirectoryError(f"cannot write {path}: a folder has that name")
        netcdf_engine("h5netcdf")  # the one that writes a part of a variable
        return "netcdf"
    if importlib.util.find_spec("zarr") is None:
        raise ImportError('writing Zarr needs zarr: pip install "pyro-vae[zarr]"')
    if path.is_dir() and any(path.iterdir()) and not any((path / g).is_dir() for g in GROUPS):
        raise FileExistsError(
            f"cannot write {path}: a folder has that name which is no container of ArviZ's (other "
            "data, say), and would be lost; remove it, or take another name"
        )
    return "zarr"


@contextlib.contextmanager
def streamed(
    path: str | os.PathLike[str], labels: np.ndarray | None, dim: str = "datum"
) -> Iterator[StreamedFile]:
    """Yield a file that takes blocks of data, and has its name once all of it is written.

    Whatever stops the writing leaves what was there before under this name as it was.

    Args:
        path: of a netCDF file, or of a Zarr folder if it ends in ``.zarr``.
        labels: of all data along ``dim``, [N]; None where no variable has that dimension.
        dim: the dimension of the data.
    """
    kind, path = format_of(path), Path(path)
    # Same folder, hence same file system. A file's permissions are those that the umask gives.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        unfinished, old = Path(folder) / path.name, Path(folder) / "old"
        yield StreamedFile(unfinished, kind, labels, dim)
        if kind == "zarr" and path.exists():  # a folder does not take the place of another one
            try:
                os.replace(path, old)
                os.replace(unfinished, path)
            except BaseException:
                if old.exists() and not path.exists():
                    os.replace(old, path)
                raise
        else:
            os.replace(unfinished, path)
        if old.is_dir():
            shutil.rmtree(old)


class StreamedFile:
    """A file that :func:`streamed` yields.

    Args:
        path: where it is written.
        kind: netCDF or Zarr.
        labels: of all data.
        dim: their dimension.
    """

    def __init__(self, path: Path, kind: Format, labels: np.ndarray | None, dim: str) -> None:
        self._path, self._kind, self._labels, self._dim = path, kind, labels, dim
        self._groups: set[str] = set()

    def add(self, rows: slice, groups: Mapping[str, xr.Dataset]) -> None:
        """Write the groups of a block of data, all variables numbers; blocks come in order.

        A variable without the dimension of the data is that of the first block.
        """
        if rows.start == 0:
            self._groups = set(groups)
            for group, data in groups.items():
                self._write(xr.Dataset(coords=self._coords_of(data)), group)
        with self._opened() as file:
            for group, data in groups.items():
                for name, variable in data.data_vars.items():
                    values = variable.values
                    if values.dtype == bool and self._kind == "netcdf":
                        values = values.astype(np.int8)  # with an attribute: xarray's own way
                    if rows.start == 0:
                        self._create(file[group], str(name), variable, values)
                    if self._dim in variable.dims:
                        axis = variable.dims.index(self._dim)
                        file[group][str(name)][(slice(None),) * axis + (rows,)] = values
                    elif rows.start == 0:
                        file[group][str(name)][...] = values

    def finish(self, groups: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> None:
        """Write whole groups, and the attributes of the container and its posterior."""
        check_attrs(attrs)
        for group, data in groups.items():
            self._write(data, group)
        self._write(xr.Dataset(attrs=attrs), None)
        if "posterior" in self._groups:
            self._write(xr.Dataset(attrs=attrs), "posterior")

    def _coords_of(self, data: xr.Dataset) -> dict[Any, Any]:
        found: dict[Any, Any] = {name: data.coords[name] for name in data.coords}
        if self._dim in found and self._labels is not None:
            found[self._dim] = (self._dim, self._labels)
        return found

    def _write(self, data: xr.Dataset, group: str | None) -> None:
        """Add a dataset to a group that has none of its variables."""
        path = str(self._path)
        if self._kind == "netcdf":
            data.to_netcdf(path, mode="a", group=group, engine="h5netcdf")
        else:
            # Strings of any length: those of a fixed one are not in the format's specification.
            words = {n: v.astype(object) for n, v in data.variables.items() if v.dtype.kind == "U"}
            data = data.assign({n: v for n, v in words.items() if n not in data.coords})
            data = data.assign_coords({n: v for n, v in words.items() if n in data.coords})
            data.to_zarr(path, mode="a", group=group, consolidated=False)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        if self._kind == "netcdf":
            import h5netcdf

            with h5netcdf.File(self._path, "a") as file:
                yield file
        else:
            import zarr

            yield zarr.open_group(str(self._path), mode="a")

    def _create(self, group: Any, name: str, variable: xr.DataArray, values: np.ndarray) -> None:
        """Create a variable of the size that it has for all data."""
        dims = variable.dims
        # A piece of draws; of what has none, a block of the data.
        chunks = _chunks(values) if "chain" in dims else tuple(max(1, n) for n in values.shape)
        if self._kind == "netcdf":  # whose dimensions have their sizes
            group.create_variable(name, dims, values.dtype, chunks=chunks)
            if variable.dtype == bool:
                group[name].attrs["dtype"] = "bool"
            return
        size = {} if self._labels is None else {self._dim: len(self._labels)}
        shape = tuple(size.get(str(dim), n) for dim, n in zip(dims, values.shape, strict=True))
        group.create_array(
            name, shape=shape, dtype=values.dtype, chunks=chunks, dimension_names=dims
        )


def _chunks(values: np.ndarray) -> tuple[int, ...]:
    """Return the shape of what is kept together: some draws of a chain, of a block of data."""
    shape = [max(1, size) for size in values.shape]
    shape[0] = 1  # a chain
    of_draw = int(np.prod(shape[2:])) * values.dtype.itemsize
    shape[1] = max(1, min(shape[1], _PIECE // max(1, of_draw)))
    return tuple(shape)
