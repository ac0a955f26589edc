"""The result of impute: draws, means and sds of missing values, a summary, a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from pyro_vae.diagnostics.pareto_k import doubts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Imputation"]


@dataclass(frozen=True)
class Imputation:
    """The result of :func:`impute`.

    Attributes:
        dataset: of each site with missing values, here ``x``, over the data: ``x``, its draws
            (dims draw, datum, ...), seen values in place; ``x_observed``, which values were seen;
            ``x_mean`` and ``x_sd`` of each missing value given what is seen, and
            ``x_mean_se``, the Monte Carlo standard error of that mean (of a seen value: itself, 0
            and 0). ``pareto_k`` and ``ess`` of each datum's importance weights. Without the
            dimension datum where the batch is treated as one.
        sites: the names of these sites.
        num_particles: K, particles for each datum.
    """

    dataset: xr.Dataset
    sites: tuple[str, ...]
    num_particles: int

    def plot(
        self,
        *,
        site: str | None = None,
        shape: tuple[int, int] | None = None,
        truth: ArrayLike | None = None,
        num_columns: int = 10,
        num_draws: int = 3,
        unit: str = "intensity",
    ) -> Figure:
        """Draw images: what is seen, its mean imputation, draws, and the truth; a column per datum.

        Needs the extra ``plots``.

        Args:
            site: which site; may be left out where there is one.
            shape: (height, width); may be left out for images that are square or [N, H, W].
            truth: the whole images, [N, H * W] or [N, H, W], if they are known.
            num_columns: how many data, from the first.
            num_draws: how many draws of each.
            unit: what the grey scale measures.

        Returns:
            The figure.

        Raises:
            ValueError: for a site that is not there, or images of another shape.
        """
        from pyro_vae.plots.imputation import plot_imputation

        if site is None and len(self.sites) > 1:
            raise ValueError(f"site=None: the sites {list(self.sites)} were imputed; name one")
        name = self.sites[0] if site is None else site
        if name not in self.sites:
            raise ValueError(f"site={site!r}: the imputed sites are {list(self.sites)}")
        draws = self.dataset[name].values[:num_draws]
        mean = self.dataset[f"{name}_mean"].values
        if "datum" not in self.dataset.dims:
            raise ValueError("the batch was treated as one datum: there are no rows to draw")
        if shape is None:
            shape = _image_shape(mean.shape[1:])
        rows = len(mean)
        return plot_imputation(
            mean.reshape(rows, -1),
            draws.reshape(len(draws), rows, -1),
            self.dataset[f"{name}_observed"].values.reshape(rows, -1),
            shape,
            truth=None if truth is None else np.asarray(truth).reshape(rows, -1),
            num_columns=num_columns,
            unit=unit,
        )

    @property
    def doubt(self) -> str:
        """For how many data weights, and so means and errors, are not to be trusted, in words."""
        data = self.dataset
        return doubts(data["pareto_k"].values, data["ess"].values, self.num_particles)

    def __repr__(self) -> str:
        data = self.dataset
        k_hat = np.atleast_1d(data["pareto_k"].values)
        lines = []
        for name in self.sites:
            missing = ~data[f"{name}_observed"].values
            sd, error = (data[f"{name}_{what}"].values[missing] for what in ("sd", "mean_se"))
            per_datum = missing.reshape(len(k_hat), -1).any(1)
            lines.append(
                f"{name}: {missing.sum()} of {missing.size} values missing, in {per_datum.sum()} "
                f"of {len(k_hat)} data; median sd {np.median(sd):.3g}, median standard error of "
                f"the mean {np.median(error):.2g}"
            )
        return "\n".join(
            [
                *lines,
                f"{data.sizes['draw']} draws; weights of {self.num_particles} particles: median "
                f"ess {np.median(data['ess'].values):.0f}, worst k-hat {k_hat.max():.2f}"
                + (f"; {self.doubt}" if self.doubt else ""),
            ]
        )


def _image_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a datum's shape, if it is plain; a single channel is."""
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) == 2:
        return shape[0], shape[1]
    side = math.isqrt(math.prod(shape))
    if len(shape) != 1 or side**2 != shape[0]:
        raise ValueError(
            f"shape=None: a datum has shape {list(shape)}, which is no square image; give shape"
        )
    return side, side
