"""The only file that knows which ArviZ is installed.

ArviZ 0.x keeps groups in its own ``InferenceData``, ArviZ 1.x in xarray's ``DataTree``; they
differ in how a container is built and written and in where Pareto smoothing lives and what sign
it expects. The functions here hide that, and nothing else: they take NumPy arrays and know
neither Pyro nor PyTorch. ArviZ itself is imported inside them, because it costs seconds.
"""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["container", "pareto_k_of_largest", "psis", "tail_length", "write"]

# An arviz.InferenceData or an xarray.DataTree: no one annotation is right under both versions.
Container = Any

_SAMPLE_GROUPS = (
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "log_likelihood",
    "sample_stats",
)
_DATA_GROUPS = ("observed_data", "constant_data")

# Weights in the smallest tail that both versions fit: ArviZ 0.x wants five, and ArviZ 1.x wants
# the lower quartile above the minimum, which in its reckoning takes six.
_SMALLEST_TAIL = 6

# An efficiency of draws for which ArviZ takes a fifth of the weights as tail, however many there
# are: it takes 3 sqrt(K / efficiency) where those are fewer.
_FIFTH = 1e-12


def container(
    groups: Mapping[str, Mapping[str, ArrayLike]],
    *,
    coords: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
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

    arrays: dict[str, Any] = {
        group: {name: np.asarray(values) for name, values in variables.items()}
        for group, variables in groups.items()
    }
    names: dict[str, Any] = {
        "coords": {dim: np.asarray(values) for dim, values in (coords or {}).items()},
        "dims": {name: list(of_one) for name, of_one in (dims or {}).items()},
    }
    attrs = dict(attrs or {})
    _check(arrays, **names)
    _check_attrs(attrs)
    if _is_before_1():
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


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Smooth importance weights by Pareto-smoothed importance sampling, ArviZ's own.

    A generalized Pareto distribution is fitted to the :math:`M = \min(K/5, 3\sqrt{K})` largest
    of the K weights, and they are replaced by its quantiles. Its shape :math:`\hat k` says
    whether the weights can be trusted: above 0.7 estimates made with them are not reliable.

    Where there is no tail to fit, the weights are normalized and not smoothed, and:

    - :math:`\hat k = 0` if the M largest weights are equal to rounding (as all are when the
      guide is the exact posterior): nothing is heavy, though the fit is undefined;
    - :math:`\hat k = \infty` if they differ, but the smallest quarter of them is zero or one
      and the same value, as when a handful of particles carries all the weight;
    - :math:`\hat k` is nan if K < 30, so that M < 6, and the weights are not all equal.

    Args:
        log_weights: [N, K], K log weights of each of N data, in nats, not normalized. -inf is a
            weight of zero. Pass float32 weights as they are: what counts as equal to rounding
            follows from the dtype.

    Returns:
        The smoothed log weights [N, K], float64, normalized so that logsumexp over K is zero,
        and :math:`\hat k` [N].

    Raises:
        ValueError: if the shape is not [N, K], or a row holds nan or inf or only -inf.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024). Pareto smoothed importance sampling.
        Journal of Machine Learning Research 25(72).

    Example:
        >>> import numpy as np
        >>> smoothed, pareto_k = psis(np.full((2, 100), -3.0))
        >>> pareto_k
        array([0., 0.])
        >>> np.exp(smoothed).sum(axis=1).round(12)
        array([1., 1.])
    """
    given = np.asarray(log_weights)
    if given.ndim != 2 or given.shape[1] == 0:
        raise ValueError(f"log_weights: wanted shape [N, K] with K > 0, found {list(given.shape)}")
    return _psis(given, _tail_size(given.shape[1]))


def tail_length(num_particles: int) -> int:
    """Return how many of K log weights, the largest ones, tell their k-hat.

    All of them where they are so few that there is none to tell.
    """
    if _tail_size(num_particles) < _SMALLEST_TAIL:
        return num_particles
    return math.ceil(_exact_tail_size(num_particles)) + 1  # and the largest that is not of it


def pareto_k_of_largest(largest: np.ndarray, num_particles: int) -> np.ndarray:
    """Return the k-hat of log weights of which the largest are at hand: that of :func:`psis`.

    Args:
        largest: [N, tail_length(K)], the largest log weights of each datum in any order.
        num_particles: K.

    Returns:
        [N].

    Raises:
        ValueError: for another number of them, and for what :func:`psis` refuses.
    """
    size = tail_length(num_particles)
    if largest.ndim != 2 or largest.shape[1] != size:
        raise ValueError(
            f"largest: wanted shape [N, {size}] for K = {num_particles}, found "
            f"{list(largest.shape)}"
        )
    if size == num_particles:
        return psis(largest)[1]
    exact = _exact_tail_size(num_particles)
    tail = math.ceil(exact) if _is_before_1() else math.floor(exact)
    top = -np.sort(-largest, axis=1)[:, : tail + 1]
    # Of the rest only the number counts: as many stand-ins, none above the tail, as make the tail
    # a fifth of all, which is the most that ArviZ fits.
    stand_ins = np.repeat(top[:, -1:], 5 * tail - top.shape[1], axis=1)
    weights = np.concatenate([top, stand_ins], axis=1)
    return _psis(weights, _tail_size(num_particles), efficiency=_FIFTH)[1]


def _exact_tail_size(num_particles: int) -> float:
    return min(num_particles / 5, 3 * num_particles**0.5)


def _tail_size(num_particles: int) -> int:
    return int(_exact_tail_size(num_particles))


def _psis(
    given: np.ndarray, tail_size: int, efficiency: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Smooth weights, a row each.

    Args:
        given: [N, K], log weights.
        tail_size: of the largest, which must be worth a fit.
        efficiency: of the draws, as ArviZ takes it.
    """
    weights = given.astype(np.float64)
    _refuse_rows(np.isnan(weights).any(axis=1), "nan")
    _refuse_rows(np.isposinf(weights).any(axis=1), "inf")
    _refuse_rows(np.isneginf(weights).all(axis=1), "only -inf: every weight is zero")

    smoothed = weights - np.logaddexp.reduce(weights, axis=1, keepdims=True)
    if tail_size < _SMALLEST_TAIL:
        flat = _top_is_flat(weights, weights.shape[1], given.dtype)
        return smoothed, np.where(flat, 0.0, np.nan)
    flat = _top_is_flat(weights, tail_size, given.dtype)
    pareto_k = np.where(flat, 0.0, np.inf)
    fit = ~flat & _tail_can_be_fitted(weights, tail_size)
    if fit.any():
        # Overflow inside a fit is how ArviZ finds that there is none; the outcome is looked at
        # here, so nothing is hidden.
        with np.errstate(all="ignore"):
            tried, shape = _arviz_psislw(weights[fit], efficiency)
        succeeded = np.isfinite(shape) & ~np.isnan(tried).any(axis=1)
        rows = np.flatnonzero(fit)[succeeded]
        smoothed[rows], pareto_k[rows] = tried[succeeded], shape[succeeded]
    return smoothed, pareto_k


def _is_before_1() -> bool:
    import arviz as az

    return int(az.__version__.split(".")[0]) < 1


def _arviz_psislw(log_weights: np.ndarray, efficiency: float) -> tuple[np.ndarray, np.ndarray]:
    if _is_before_1():
        import arviz as az

        return az.psislw(log_weights, reff=efficiency)
    from arviz_stats.base import array_stats

    # Written for leave-one-out weights, 1/p(x|z), it takes log p(x|z) and turns the sign itself.
    return array_stats.psislw(-log_weights, r_eff=efficiency, axis=-1)


def _top_is_flat(weights: np.ndarray, size: int, dtype: np.dtype) -> np.ndarray:
    """Say for each row whether its `size` largest log weights are equal to rounding."""
    top = np.partition(weights, -size, axis=1)[:, -size:]
    largest = top.max(axis=1)
    # A log weight is a sum of many terms: its rounding error is some tens of units in the last
    # place. In float64 anything below 1e-8 is as good as equal.
    eps = np.finfo(dtype).eps if np.issubdtype(dtype, np.floating) else 0.0
    tolerance = max(1e-8, 64 * float(eps)) * np.maximum(1.0, np.abs(largest))
    return largest - top.min(axis=1) <= tolerance


def _tail_can_be_fitted(weights: np.ndarray, size: int) -> np.ndarray:
    """Say for each row whether the lower quartile of its tail is above the least of the tail.

    ArviZ 1.x finds no fit where it is not; ArviZ 0.x fits the weights that are left, be they
    five of hundreds. The same k-hat under both is better.
    """
    relative = np.sort(np.exp(weights - weights.max(axis=1, keepdims=True)), axis=1)
    tail = relative[:, -size:]
    return tail[:, int(size / 4 + 0.5) - 1] - tail[:, 0] > np.finfo(np.float64).tiny


def _refuse_rows(bad: ArrayLike, what: str) -> None:
    rows = np.flatnonzero(bad)
    if rows.size:
        shown = ", ".join(map(str, rows[:10])) + (", ..." if rows.size > 10 else "")
        raise ValueError(
            f"log_weights: {rows.size} of {np.size(bad)} rows hold {what}: rows {shown}"
        )


def _netcdf_engine() -> str:
    def installed(module: str) -> bool:
        return importlib.util.find_spec(module) is not None

    # h5netcdf comes without h5py, but cannot write without it.
    if installed("h5netcdf") and installed("h5py"):
        return "h5netcdf"
    if installed("netCDF4"):
        return "netcdf4"
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
            raise ValueError(
                f"group {group!r}: wanted one of {', '.join(_SAMPLE_GROUPS + _DATA_GROUPS)}"
            )
        draws: tuple[str, tuple[int, ...]] | None = None
        for name, array in variables.items():
            where = f"group {group!r}, variable {name!r}"
            shape = array.shape
            if group in _SAMPLE_GROUPS:
                if array.ndim < 2:
                    raise ValueError(
                        f"{where}: wanted shape [chain, draw, ...], found {list(shape)}"
                    )
                draws = draws or (name, shape[:2])
                if shape[:2] != draws[1]:
                    raise ValueError(
                        f"{where}: wanted [chain, draw] = {list(draws[1])} as in {draws[0]!r}, "
                        f"found {list(shape[:2])}"
                    )
                shape = shape[2:]
            if name not in dims:
                continue
            names = dims[name]
            if group == "log_likelihood":
                names = names[: len(shape)]
            if len(names) != len(shape):
                raise ValueError(
                    f"{where}: wanted {len(names)} dimensions {list(names)}, "
                    f"found {len(shape)} of shape {list(shape)}"
                )
            for dim, length in zip(names, shape, strict=True):
                wanted, source = lengths.setdefault(dim, (length, where))
                if length != wanted:
                    raise ValueError(
                        f"{where}: wanted length {wanted} along {dim!r} as in {source}, "
                        f"found {length}"
                    )


def _check_attrs(attrs: Mapping[str, Any]) -> None:
    for name, value in attrs.items():
        if np.asarray(value).dtype.kind not in "iufU":
            raise TypeError(
                f"attribute {name!r}: wanted a string, a number or a list of them, found {value!r}"
            )
