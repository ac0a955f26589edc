"""What tests of calibration say, in plain words: ranks, and the coverage of credible regions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import xarray as xr

from pyro_vae.markup import plus_minus
from pyro_vae.report.findings import Finding, by_severity

__all__ = ["of_calibration", "of_coverage"]

_SHOWN = 5  # quantities that are named
_LEVEL = 0.8  # of the credible regions that are spoken of
_NARROW, _WIDE = "too narrow", "too wide"
_AS_PRIOR = "draws fit the data worse than the simulated latents"


def of_calibration(dataset: xr.Dataset, table: pd.DataFrame) -> list[Finding]:
    """Return what a test of ranks says, the worst first.

    Args:
        dataset: that of a :class:`~pyro_vae.Calibration`.
        table: its summary.
    """
    rate = float(dataset.attrs["error_rate"])
    off = table[table["finding"] != ""]
    found = list(_of_doubt(dataset))
    if off.empty:
        smallest = float(table["adjusted_p_value"].min())
        found.append(
            Finding(
                "calibration",
                "good",
                f"Over {dataset.attrs['num_simulations']} data that the model made, ranks of all "
                f"{len(table)} quantities may be uniform, as those of the posterior are: nothing "
                "speaks against the guide",
                {"smallest adjusted_p_value": smallest, "error_rate": rate},
            )
        )
        return by_severity(found)
    sites = dict(zip(*_sites(dataset), strict=True))
    latent = off[[bool(sites[name]) for name in off.index]]
    logs = off.drop(index=latent.index)
    for words, rows in latent.groupby("finding", sort=False):
        found.append(_of_rejected(str(words), rows, len(table), rate, _advice(str(words))))
    as_prior = logs["finding"] == _AS_PRIOR if latent.empty else np.zeros(len(logs), bool)
    if as_prior.any():
        p_value = float(logs.loc[as_prior, "adjusted_p_value"].min())
        found.append(
            Finding(
                "calibration",
                "bad",
                "Each latent alone may be right on average over the data, and yet draws fit their "
                "own datum worse than the simulated latents do: the guide tells data apart too "
                "little, as one does that returns the prior",
                {"adjusted_p_value of log p(x | z)": p_value, "error_rate": rate},
                "Longer training, or an encoder that sees all of the datum.",
            )
        )
    advice = _advice("") if latent.empty and not as_prior.any() else ""
    for words, rows in logs[~as_prior].groupby("finding", sort=False):
        found.append(_of_rejected(str(words), rows, len(table), rate, advice))
    return by_severity(found)


def _sites(dataset: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    return dataset["quantity"].values, dataset["site_of"].values


def _of_rejected(words: str, rows: pd.DataFrame, count: int, rate: float, advice: str) -> Finding:
    """Return what is wrong with the quantities of one finding."""
    names = ", ".join(map(str, rows.index[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
    first = rows.iloc[0]
    parts = []
    if _NARROW in words or _WIDE in words:
        parts.append(
            f"simulated latents are spread {plus_minus(first['spread'], first['spread_se'])} times "
            "as wide as draws"
        )
    if "too low" in words or "too high" in words:
        parts.append(
            f"they lie {plus_minus(first['shift'], first['shift_se'])} standard deviations of the "
            "draws above these"
        )
    more = f" (of the first, {', and '.join(parts)})" if parts else ""
    return Finding(
        "calibration",
        "bad",
        f"By {names} ({len(rows)} of {count} quantities) {words}{more}",
        {
            "smallest adjusted_p_value": float(rows["adjusted_p_value"].min()),
            "error_rate": rate,
            "shift of the first": float(first["shift"]),
            "spread of the first": float(first["spread"]),
        },
        advice,
    )


def _advice(words: str) -> str:
    if _NARROW in words:
        return (
            "A richer family where latents are correlated (pv.families.FullRankNormal, Flow), or a "
            "larger encoder; resample='psis' says whether importance weights mend it, and "
            "pv.compare what it costs."
        )
    return "A larger encoder or longer training; pv.compare says whether encoder or family."


def of_coverage(dataset: xr.Dataset, table: pd.DataFrame) -> list[Finding]:
    """Return what credible regions hold, the worst first.

    Args:
        dataset: that of a :class:`~pyro_vae.Coverage`.
        table: its summary.
    """
    found = list(_of_doubt(dataset))
    one = dataset.sel(level=_LEVEL, method="nearest")
    level = float(one["level"])
    for region, words in table["finding"].items():
        here = one.sel(region=region)
        share, error = (float(here[f"expected_coverage{end}"]) for end in ("", "_se"))
        numbers = {
            f"expected_coverage at {level:.2g}": share,
            "adjusted_p_value": float(here["adjusted_p_value"]),
            "error_rate": float(dataset.attrs["error_rate"]),
        }
        what = "regions of highest density" if region == "density" else "balls (TARP)"
        amount = f"those of level {level:.2g} hold {plus_minus(share, error)} of them"
        if not words:
            text = f"Credible {what} may hold the simulated latents as often as they say: {amount}"
            found.append(Finding("coverage", "good", text, numbers))
            continue
        said = str(words)
        found.append(
            Finding(
                "coverage",
                "bad",
                f"{said[0].upper()}{said[1:]}; {amount}",
                numbers,
                "pv.sbc says which latents; pv.compare whether the encoder or the family.",
            )
        )
    return by_severity(found)


def _of_doubt(dataset: xr.Dataset) -> Iterator[Finding]:
    """Yield what there is to doubt of draws that were resampled."""
    if doubt := str(dataset.attrs["doubt"]):
        yield Finding("draws", "warning", doubt[0].upper() + doubt[1:].rstrip("."))
