"""Ranks of simulated latents as a dataset: tests of uniformity, bands, and how they fail."""

from __future__ import annotations

import functools

import numpy as np
import torch
import xarray as xr

from pyro_vae.diagnostics.uniformity import Flags, Ranks, UniformRanks, holm
from pyro_vae.evaluation.simulations import Settings

_NO_SPREAD = 1e-9  # of ranks that are all the same
_SURE = 3.0  # standard errors by which a shift or a spread is off, to be named


def rank_dataset(
    ranks: Ranks, names: list[str], dim: str, settings: Settings, there: Flags
) -> xr.Dataset:
    """Return ranks [S, Q] with tests of their uniformity.

    Args:
        ranks: from 0 to L.
        names: of the quantities, Q.
        dim: what a quantity is called.
        settings: with the number of draws and the error rate of the whole family of tests.
        there: which ranks count, [S, Q].
    """
    num_draws, error_rate = settings.num_draws, settings.error_rate
    null = functools.lru_cache(lambda count: UniformRanks(count, num_draws))
    counts = there.sum(0).astype(int)
    kept = [ranks[there[:, q], q] for q in range(len(names))]
    nulls = [null(int(count)) for count in counts]
    points = nulls[0].points
    p_values = np.array([u.p_value(r) for u, r in zip(nulls, kept, strict=True)])
    band = functools.lru_cache(lambda count: null(count).band(error_rate / len(names)))
    shares = points / (num_draws + 1)
    ecdf = np.stack([u.counts(r) / len(r) for u, r in zip(nulls, kept, strict=True)])
    ends = np.stack([np.stack(band(int(n))) / n for n in counts], 1) - shares
    moments = np.array([_moments(r, num_draws) for r in kept])
    columns = ("shift", "shift_se", "spread", "spread_se")
    chi_squared = [u.chi_squared_p_value(r) for u, r in zip(nulls, kept, strict=True)]
    return xr.Dataset(
        {
            "ranks": (("simulation", dim), np.where(there, ranks, -1)),
            "num_ranks": (dim, counts),
            "p_value": (dim, p_values),
            "adjusted_p_value": (dim, holm(p_values)),
            "chi_squared_p_value": (dim, chi_squared),
            **{name: (dim, moments[:, k]) for k, name in enumerate(columns)},
            "ecdf_difference": ((dim, "level"), ecdf - shares),
            "band_lower": ((dim, "level"), ends[0]),
            "band_upper": ((dim, "level"), ends[1]),
        },
        coords={dim: names, "simulation": np.arange(len(ranks)), "level": shares},
        attrs={
            "num_simulations": len(ranks),
            "num_draws": num_draws,
            "error_rate": error_rate,
            "resampled": settings.resample or "no",
        },
    )


def settings_text(dataset: xr.Dataset) -> str:
    """Return what was simulated and drawn, in words."""
    said = dataset.attrs
    given = f"; given {said['given']}" if said["given"] else ""
    of = " (resampled)" if said["resampled"] != "no" else ""
    many = f"{said['num_simulations']} simulations, {said['num_draws']} draws{of}"
    return f"{many} of the guide each{given}"


def _moments(ranks: Ranks, num_draws: int) -> tuple[float, float, float, float]:
    """Return mean and standard deviation of the normal scores of ranks, each with its error.

    Where draws and what is ranked are both normal, these are the distance and the ratio of their
    standard deviations, in units of the draws'. Errors are those of influences over simulations.
    """
    all_scores = torch.special.ndtri(
        (torch.arange(num_draws + 1.0).double() + 0.5) / (num_draws + 1)
    )
    table = all_scores.numpy()
    scores, root = table[ranks], len(ranks) ** 0.5
    shift, deviation = scores.mean(), scores.std()
    spread = deviation / table.std()
    influence = (
        np.square((scores - shift) / deviation) - 1 if deviation > _NO_SPREAD else np.zeros(1)
    )
    error = 0.5 * spread * influence.std() / root
    return float(shift), float(deviation / root), float(spread), float(error)


def way_off(row: xr.Dataset) -> str:
    """Return in which way the ranks of a latent's number are not uniform, in words."""
    shift, spread = float(row["shift"]), float(row["spread"]) - 1
    shift_error, spread_error = float(row["shift_se"]), float(row["spread_se"])
    words = []
    # Ranks that are all the same have no spread, whatever the width of the draws.
    if abs(spread) > _SURE * spread_error and spread > _NO_SPREAD - 1:
        words.append("too narrow" if spread > 0 else "too wide")
    if abs(shift) > _SURE * shift_error:
        words.append("too low" if shift > 0 else "too high")
    return "draws are " + " and ".join(words) if words else "draws have another shape"
