"""The only file that knows which ArviZ is installed.

ArviZ 0.x keeps groups in its own ``InferenceData``, ArviZ 1.x in xarray's ``DataTree``; they
differ in how a container is built and written and in where Pareto smoothing lives and what sign
it expects. The functions here hide that, and nothing else: they take NumPy arrays and know
neither Pyro nor PyTorch. ArviZ itself is imported inside them, because it costs seconds.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

# An arviz.InferenceData or an xarray.DataTree: no one annotation is right under both versions.
Container = Any

_SAMPLE_GROUPS = (
    *("posterior", "posterior_predictive", "prior", "prior_predictive", "unconstrained_posterior"),
    *("log_likelihood", "log_prior", "sample_stats"),
)
DATA_GROUPS = ("observed_data", "constant_data")
GROUPS = (*_SAMPLE_GROUPS, *DATA_GROUPS)
# A number for each event: of a variable's dimensions those of its events are summed out.
_OF_EVENTS = ("log_likelihood", "log_prior")


def container(
    groups: Mapping[str, Mapping[str, ArrayLike]],
    *,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Container:
    """Build ArviZ's own container from arrays.

    Args:
        groups: the arrays of each group, by variable name. ``observed_data`` and
            ``constant_data`` hold arrays of any shape, the others arrays [chain, draw, ...]:
            ``posterior``, ``posterior_predictive``, ``prior``, ``prior_predictive``,
            ``unconstrained_posterior``, ``log_likelihood``, ``log_prior`` and ``sample_stats``.
        coords: the values along a dimension, by its name.
        dims: the names of a variable's dimensions after chain and draw. One entry serves the
            variable in every group, but for one named ``<group>/<variable>``; in
            ``log_likelihood`` and ``log_prior``, where event dimensions are summed out, the first
            names count. Unnamed dimensions get ArviZ's default names.
        attrs: attributes of the whole container, and of its posterior: strings, numbers or lists
            of them.

    Returns:
        An ``arviz.InferenceData`` under ArviZ 0.x, an ``xarray.DataTree`` under ArviZ 1.x.

    Raises:
        ValueError: for a group that ArviZ does not know, an array without chain and draw, a
            number of names that is not the array's number of dimensions, a name given to two
            dimensions of an array or to a variable as well, or lengths that disagree between
            arrays or with ``coords``.
        TypeError: for an attribute that netCDF cannot hold, such as None or a bool.

    Example:
        >>> import numpy as np
        >>> tree = container(
        ...     {"posterior": {"z": np.zeros((1, 100, 3, 2))}},
        ...     dims={"z": ["datum", "z_dim"]},
        ... )
        >>> dict(tree["posterior"]["z"].sizes)
        {'chain': 1, 'draw': 100, 'datum': 3, 'z_dim': 2}
    """
    found = datasets(groups, coords=coords, dims=dims)
    attrs = dict(attrs or {})
    check_attrs(attrs)
    if "posterior" in found:
        found["posterior"].attrs.update(attrs)
    if _is_0():
        import arviz as az

        keywords: dict[str, Any] = {"attrs": attrs, **found}
        return az.InferenceData(**keywords)
    tree = xr.DataTree.from_dict(found)
    tree.attrs = attrs
    return tree


def datasets(
    groups: Mapping[str, Mapping[str, ArrayLike]],
    *,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, xr.Dataset]:
    """Return the groups of :func:`container`, whose arguments these are, as xarray's datasets."""
    arrays = {
        group: {name: np.asarray(value) for name, value in variables.items()}
        for group, variables in groups.items()
    }
    labels = {name: np.asarray(value) for name, value in (coords or {}).items()}
    named = {
        group: {name: _dims_of(group, name, array, dims or {}) for name, array in some.items()}
        for group, some in arrays.items()
    }
    _check(arrays, labels, named)
    found = {}
    for group, variables in arrays.items():
        data = {name: (named[group][name], array) for name, array in variables.items()}
        lengths = {
            dim: length
            for dims_of, array in data.values()
            for dim, length in zip(dims_of, array.shape, strict=True)
        }
        along = {dim: labels.get(dim, np.arange(length)) for dim, length in lengths.items()}
        found[group] = xr.Dataset(data, along)
    return found


def check_attrs(attrs: Mapping[str, Any]) -> None:
    """Raise TypeError for an attribute that netCDF cannot hold."""
    for name, value in attrs.items():
        if np.asarray(value).dtype.kind not in "iufU":
            raise TypeError(
                f"attribute {name!r}: wanted a string, a number or a list of them, found {value!r}"
            )


def _is_0() -> bool:
    """Return whether ArviZ 0.x is installed."""
    import arviz as az

    return int(az.__version__.split(".")[0]) < 1


def _dims_of(
    group: str, name: str, array: np.ndarray, dims: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return the names of all dimensions of a variable."""
    lead = ["chain", "draw"] if group in _SAMPLE_GROUPS else []
    own = dims.get(f"{group}/{name}", dims.get(name))
    if own is None:
        own = [f"{name}_dim_{i}" for i in range(array.ndim - len(lead))]
    elif group in _OF_EVENTS:
        own = own[: array.ndim - len(lead)]
    return [*lead, *own]


def write(tree: Container, path: str | os.PathLike[str]) -> Path:
    """Write a container to a netCDF file that ``arviz.from_netcdf`` reads.

    The file appears whole or not at all: whoever interrupts the writing keeps the old one.

    Args:
        tree: what :func:`container` returned.
        path: the file to write, in a folder that exists. An older file is replaced.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ImportError: if no library that writes netCDF is installed.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    engine = netcdf_engine("h5netcdf", "netcdf4")
    # A temporary folder rather than a temporary file: the library creates the file itself, with
    # the permissions that the user's umask gives. Same folder, hence same file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        unfinished = Path(folder) / path.name
        tree.to_netcdf(str(unfinished), engine=engine)
        os.replace(unfinished, path)
    return path


def read(path: str | os.PathLike[str]) -> Container:
    """Return the container of a netCDF file or a Zarr folder, whose arrays are read when used."""
    import arviz as az

    if not os.path.isdir(path):
        return az.from_netcdf(str(path))
    # Not arviz.from_zarr: that of 0.x refuses today's zarr.
    tree = xr.open_datatree(str(path), engine="zarr", consolidated=False)
    return az.InferenceData.from_datatree(tree) if _is_0() else tree


def netcdf_engine(*engines: str) -> str:
    """Return the first of some engines whose libraries are installed; ImportError for none."""
    # h5netcdf comes without h5py, but cannot write without it.
    libraries = {"h5netcdf": ("h5netcdf", "h5py"), "netcdf4": ("netCDF4",)}
    for engine in engines:
        if all(map(importlib.util.find_spec, libraries[engine])):
            return engine
    raise ImportError('writing netCDF needs h5netcdf and h5py: pip install "h5netcdf[h5py]"')


def _check(
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    coords: Mapping[str, np.ndarray],
    dims: Mapping[str, Mapping[str, Sequence[str]]],
) -> None:
    """Refuse what xarray would refuse in its own words, and groups that ArviZ does not know."""
    lengths = {dim: (len(values), "coords") for dim, values in coords.items()}
    for group, variables in arrays.items():
        if group not in _SAMPLE_GROUPS + DATA_GROUPS:
            groups = ", ".join(_SAMPLE_GROUPS + DATA_GROUPS)
            raise ValueError(f"group {group!r}: wanted one of {groups}")
        draws: tuple[str, tuple[int, ...]] | None = None
        axes = {dim for own in dims[group].values() for dim in own}
        if both := sorted(axes.intersection(variables)):
            raise ValueError(
                f"group {group!r}: {both} are names of variables and of dimensions: rename the "
                "sites, or the dimensions by dims"
            )
        for name, array in variables.items():
            where, shape = f"group {group!r}, variable {name!r}", array.shape
            own = dims[group][name]
            if len(set(own)) < len(own):
                raise ValueError(f"{where}: wanted dimensions of different names, found {own}")
            if group in _SAMPLE_GROUPS:
                draws = draws or (name, shape[:2])
                _check_draws(where, shape, *draws)
                shape, own = shape[2:], own[2:]
            _check_dims(where, own, shape, lengths)


def _check_draws(where: str, shape: tuple[int, ...], first: str, wanted: tuple[int, ...]) -> None:
    """Raise ValueError for draws of another shape than the group's first variable has."""
    if len(shape) < 2:
        raise ValueError(f"{where}: wanted shape [chain, draw, ...], found {list(shape)}")
    if shape[:2] != wanted:
        found = list(shape[:2])
        raise ValueError(
            f"{where}: wanted [chain, draw] = {list(wanted)} as in {first!r}, found {found}"
        )


def _check_dims(
    where: str, names: Sequence[str], shape: tuple[int, ...], lengths: dict[str, tuple[int, str]]
) -> None:
    """Raise ValueError for dimensions of another number or length; note the new ones' lengths."""
    if len(names) != len(shape):
        wanted_dims, found = f"{len(names)} dimensions {list(names)}", f"{len(shape)} of shape"
        raise ValueError(f"{where}: wanted {wanted_dims}, found {found} {list(shape)}")
    for dim, length in zip(names, shape, strict=True):
        wanted, source = lengths.setdefault(dim, (length, where))
        if length != wanted:
            raise ValueError(
                f"{where}: wanted length {wanted} along {dim!r} as in {source}, found {length}"
            )
