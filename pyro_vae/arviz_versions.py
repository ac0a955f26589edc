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
from numpy.typing import ArrayLike

# An arviz.InferenceData or an xarray.DataTree: no one annotation is right under both versions.
Container = Any

_SAMPLE_GROUPS = (
    *("posterior", "posterior_predictive", "prior", "prior_predictive"),
    *("log_likelihood", "sample_stats"),
)
_DATA_GROUPS = ("observed_data", "constant_data")


def dims_of_draws(draws: Mapping[str, np.ndarray], lead: Sequence[str]) -> dict[str, list[str]]:
    """Return names of the dimensions of draws after chain and draw, for :func:`container`.

    Args:
        draws: the arrays [chain, draw, ...] of each variable.
        lead: the names of their first dimensions after these; the rest get ArviZ's default names.
    """
    return {
        name: [*lead, *(f"{name}_dim_{i}" for i in range(value.ndim - 2 - len(lead)))]
        for name, value in draws.items()
    }


def container(
    groups: Mapping[str, Mapping[str, ArrayLike]],
    *,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Container:
    """Build ArviZ's own container from arrays.

    Args:
        groups: the arrays of each group, by variable name. The groups ``posterior``,
            ``posterior_predictive``, ``prior``, ``prior_predictive``, ``log_likelihood`` and
            ``sample_stats`` hold arrays of shape [chain, draw, ...], ``observed_data`` and
            ``constant_data`` arrays without these two dimensions.
        coords: the values along a dimension, by its name.
        dims: the names of a variable's dimensions after chain and draw. One entry serves the
            variable in every group; in ``log_likelihood``, where event dimensions are summed
            out, the first names count. Unnamed dimensions get ArviZ's default names.
        attrs: attributes of the whole container: strings, numbers or lists of them.

    Returns:
        An ``arviz.InferenceData`` under ArviZ 0.x, an ``xarray.DataTree`` under ArviZ 1.x.

    Raises:
        ValueError: for a group that ArviZ does not know, an array without chain and draw, a
            number of names that is not the array's number of dimensions, or lengths that
            disagree between arrays or with ``coords``.
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
    import arviz as az

    def as_arrays(values: Mapping[str, ArrayLike] | None) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in (values or {}).items()}

    arrays: dict[str, Any] = {group: as_arrays(variables) for group, variables in groups.items()}
    listed = {name: list(of_one) for name, of_one in (dims or {}).items()}
    names: dict[str, Any] = {"coords": as_arrays(coords), "dims": listed}
    attrs = dict(attrs or {})
    _check(arrays, **names)
    for name, value in attrs.items():
        if np.asarray(value).dtype.kind not in "iufU":
            raise TypeError(
                f"attribute {name!r}: wanted a string, a number or a list of them, found {value!r}"
            )
    if int(az.__version__.split(".")[0]) < 1:
        return az.from_dict(**arrays, **names, attrs=attrs)
    return az.from_dict(arrays, **names, attrs={"/": attrs})


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
    engine = _netcdf_engine()
    # A temporary folder rather than a temporary file: the library creates the file itself, with
    # the permissions that the user's umask gives. Same folder, hence same file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        unfinished = Path(folder) / path.name
        tree.to_netcdf(str(unfinished), engine=engine)
        os.replace(unfinished, path)
    return path


def _netcdf_engine() -> str:
    """Return the name of an installed library that writes netCDF; raise where there is none."""
    # h5netcdf comes without h5py, but cannot write without it.
    for engine, needed in {"h5netcdf": ("h5netcdf", "h5py"), "netcdf4": ("netCDF4",)}.items():
        if all(map(importlib.util.find_spec, needed)):
            return engine
    raise ImportError('writing netCDF needs h5netcdf and h5py: pip install "h5netcdf[h5py]"')


def _check(
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    coords: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
) -> None:
    """Refuse what ArviZ would take and fill with nan, rename or misalign."""
    lengths = {dim: (len(values), "coords") for dim, values in coords.items()}
    for group, variables in arrays.items():
        if group not in _SAMPLE_GROUPS + _DATA_GROUPS:
            groups = ", ".join(_SAMPLE_GROUPS + _DATA_GROUPS)
            raise ValueError(f"group {group!r}: wanted one of {groups}")
        draws: tuple[str, tuple[int, ...]] | None = None
        for name, array in variables.items():
            where, shape = f"group {group!r}, variable {name!r}", array.shape
            if group in _SAMPLE_GROUPS:
                draws = draws or (name, shape[:2])
                _check_draws(where, shape, *draws)
                shape = shape[2:]
            if name in dims:
                few = dims[name][: len(shape)] if group == "log_likelihood" else dims[name]
                _check_dims(where, few, shape, lengths)


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
