"""What ArviZ 0.x and 1.x call by different names, for tests that run on both."""

from __future__ import annotations

import warnings
from typing import Any

import arviz as az
import numpy as np
import xarray as xr

IS_1 = int(az.__version__.split(".")[0]) >= 1


def loo(tree: Any, **options: Any) -> Any:
    """``az.loo``, pointwise; k-hat above 0.7 is for its result to say."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter")
        return az.loo(tree, pointwise=True, **options)


def elpd(found: Any) -> float:
    """The sum over data of what :func:`loo` found."""
    return float(found.elpd if IS_1 else found.elpd_loo)


def elpd_of_data(found: Any) -> np.ndarray:
    """What it found of each datum."""
    return np.asarray(found.elpd_i if IS_1 else found.loo_i)


def psense(tree: Any, of: str, names: list[str] | None = None) -> xr.Dataset:
    """Power-scaling sensitivity to "prior" or "likelihood", by some variables of that group."""
    if IS_1:
        return az.psense(tree, group=of, group_var_names=names)
    return az.psens(tree, component=of, component_var_names=names)


def plot_trace(tree: Any, var_names: list[str]) -> Any:
    """``az.plot_trace`` with Matplotlib, a row for each number."""
    own = {"backend": "matplotlib"} if IS_1 else {"compact": False}
    return az.plot_trace(tree, var_names=var_names, **own)


def groups(tree: Any) -> dict[str, xr.Dataset]:
    """The groups of a container."""
    if IS_1:
        return {name: child.to_dataset() for name, child in tree.children.items()}
    return {name: tree[name] for name in tree.groups()}
