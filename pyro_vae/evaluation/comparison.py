"""The result of compare: gaps per datum with paired errors, a table, a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from pyro_vae.diagnostics.pareto_k import PARETO_K_THRESHOLD, heavy_tailed
from pyro_vae.particles.estimators import mean_std_error
from pyro_vae.programs.handlers import drop_references
from pyro_vae.programs.state import module_of, unwrapped
from pyro_vae.programs.types import Program

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ESTIMATES = ("elbo", "log_evidence", "approximation_gap", "amortization_gap")
_PARTS = ("", "_se", "_skewness")
_HEADER: tuple[str, ...] = (
    *("guide", "ELBO", "log p(x)", "approximation gap", "amortization gap"),
    *("worst k-hat", "share k-hat > 0.7"),
)


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        dataset: dims (guide, datum). Of each guide and datum, in nats: elbo, iwae_bound,
            approximation_gap, amortization_gap, each with its standard error ``<name>_se``
            (value ± 1.96 of them covers with probability 0.95) and ``<name>_skewness``, that of
            the particles' effects on it, from which errors of means over data are made;
            pareto_k, ess, converged (of the guide's reference). Of each datum:
            log_evidence, likewise, with log_evidence_pareto_k and log_evidence_ess, those of the
            weights it was made from. Coordinate ``reference`` names the refined guide that each
            guide's gaps are measured against. The attribute
            ``log_evidence_from`` says which estimate log_evidence is, ``given`` which global
            latents are fixed.
        guides: name to guide, the refined ones too.
    """

    dataset: xr.Dataset
    guides: Mapping[str, Program]

    def summary(self) -> pd.DataFrame:
        """Return a row per guide: means over the data with Monte Carlo standard errors.

        In nats per datum. ``pareto_k_bad`` is the share of data with k-hat above 0.7,
        ``not_converged`` the number of data whose refined guide has not converged.
        """
        data, columns = self.dataset, {}
        for name in _ESTIMATES:
            every = (data[f"{name}{end}"].broadcast_like(data["elbo"]) for end in _PARTS)
            mean, errors, skews = (each.transpose("guide", "datum").values for each in every)
            pairs, num_particles = zip(errors, skews, strict=True), data.attrs["num_particles"]
            columns[name] = mean.mean(1)
            columns[f"{name}_se"] = np.array([mean_of_errors(*p, num_particles) for p in pairs])
        columns["pareto_k_max"] = data["pareto_k"].max("datum").values
        columns["pareto_k_bad"] = (data["pareto_k"] > PARETO_K_THRESHOLD).mean("datum").values
        columns["ess_median"] = data["ess"].median("datum").values
        columns["not_converged"] = (~data["converged"]).sum("datum").values
        return pd.DataFrame(columns, index=pd.Index(data["guide"].values, name="guide"))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the gaps of each guide as bars; needs the extra ``plots``."""
        from pyro_vae.plots.results import plot_gaps

        return plot_gaps(self.dataset, ax=ax)

    def __getstate__(self) -> dict[str, Any]:
        for guide in self.guides.values():
            if (module := module_of(unwrapped(guide))) is not None:
                drop_references(module)
        return dict(vars(self))

    def __repr__(self) -> str:
        return format_table({"": self})


def format_table(comparisons: Mapping[str, Comparison]) -> str:
    """Return the gap table of several comparisons (train, test) as text, with notes below.

    Args:
        comparisons: a label of the data, possibly empty, to a comparison.
    """
    rows, notes = [_HEADER], []
    for label, comparison in comparisons.items():
        data = comparison.dataset
        for guide, row in comparison.summary().iterrows():
            pairs = ((row[name], row[f"{name}_se"]) for name in _ESTIMATES)
            numbers = ("-" if math.isnan(v) else f"{v:.3f} ± {error:.3f}" for v, error in pairs)
            worst, bad = f"{row['pareto_k_max']:.2f}", f"{row['pareto_k_bad']:.1%}"
            rows.append((f"{label} {guide}".strip(), *numbers, worst, bad))
            if row["not_converged"] and data["reference"].sel(guide=guide) == guide:
                notes.append(
                    f"{label} {guide}: {int(row['not_converged'])} of {data.sizes['datum']} data "
                    "have not converged; their approximation gap is too large and their "
                    "amortization gap too small"
                )
        notes.append(f"{label} {_evidence_text(data)}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *lines = (
        " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
    rule = "-+-".join("-" * width for width in widths)
    return "\n".join([head, rule, *lines, *map(str.strip, notes)])


def _evidence_text(data: xr.Dataset) -> str:
    """Return where log p(x) is from, and how far it is to be trusted, for the table."""
    given = f"; given {data.attrs['given']}" if data.attrs["given"] else ""
    k_hat, ess = data["log_evidence_pareto_k"].values, data["log_evidence_ess"].values
    heavy = heavy_tailed(k_hat, ess, data.attrs["log_evidence_num_particles"]).mean()
    doubt = (
        f"; a lower bound, and for {heavy:.1%} of the data (k-hat > {PARETO_K_THRESHOLD}) one "
        "whose standard error is not to be trusted"
    )
    return (
        f"log p(x): {data.attrs['log_evidence_from']}, {data.sizes['datum']} data{given}; nats "
        f"per datum ± Monte Carlo standard error{doubt if heavy else ''}"
    )


def mean_of_errors(errors: np.ndarray, skew: np.ndarray, num_particles: int) -> float:
    """Return the standard error of a mean over data, from calibrated errors and skewnesses [N]."""
    return float(mean_std_error(torch.tensor(errors), torch.tensor(skew), num_particles))
