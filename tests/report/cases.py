"""Datasets of results with numbers that a test chooses."""

from __future__ import annotations

import numpy as np
import xarray as xr

NUM_DATA = 40


def comparison_dataset(
    *,
    family: float = 0.02,
    encoder: float = 0.02,
    error: float = 0.01,
    untrusted: int = 0,
    unconverged: int = 0,
    heavy: int = 0,
    name: str = "amortized",
) -> xr.Dataset:
    """A guide and the refined one of its family, with gaps in nats and errors of each datum."""
    datum = np.arange(NUM_DATA)
    spread = np.linspace(0.5, 1.5, NUM_DATA)
    evidence = -10.0 - datum / 10
    approximation = np.stack([family * spread] * 2)
    amortization = np.stack([encoder * spread, np.zeros(NUM_DATA)])
    both = ("guide", "datum")
    k_hat = np.full((2, NUM_DATA), 0.3)
    k_hat[:, :heavy] = 0.9
    ess = np.full((2, NUM_DATA), 3000.0)
    ess[:, :heavy] = 10.0
    good = np.full((2, NUM_DATA), True)
    good[:, :heavy] = False
    columns = {
        "approximation_gap": approximation,
        "amortization_gap": amortization,
        "elbo": evidence - approximation - amortization,
        "iwae_bound": np.stack([evidence] * 2),
    }
    data = {key: (both, value) for key, value in columns.items()}
    errors = np.full((2, NUM_DATA), error)
    for key in columns:
        data[f"{key}_se"] = (both, errors * (np.array([[1.0], [0.0]]) if "amort" in key else 1.0))
        data[f"{key}_skewness"] = (both, np.zeros((2, NUM_DATA)))
    converged = np.full((2, NUM_DATA), True)
    converged[:, :unconverged] = False
    data |= {
        "log_evidence": ("datum", evidence),
        "log_evidence_se": ("datum", errors[0]),
        "log_evidence_skewness": ("datum", np.zeros(NUM_DATA)),
        "log_evidence_good": ("datum", datum >= untrusted),
        "evidence_from": ("datum", np.full(NUM_DATA, "IWAE-5000 through 'mean-field'", object)),
        "pareto_k": (both, k_hat),
        "ess": (both, ess),
        "good": (both, good),
        "converged": (both, converged),
    }
    return xr.Dataset(
        data,
        {
            "guide": [name, "mean-field"],
            "datum": datum,
            "reference": ("guide", ["mean-field", "mean-field"]),
        },
        {
            "evidence": "iwae",
            "given": "",
            "num_particles": 5000,
            "pareto_k_threshold": 0.7,
            "log_evidence_from": "IWAE-5000 through 'mean-field'",
            "units": "nats",
        },
    )


def repair_dataset(
    *, ended: tuple[int, ...] = (4, 3, 2), bad: int = 1, audited: int = 0, wrong: int = 0
) -> xr.Dataset:
    """Data that ended on the rungs, in order; the last ones without a good verdict."""
    names = np.array(["importance", "refined", "full rank"])
    rung = np.repeat(np.arange(3), ended)
    size = rung.size
    tried = np.arange(3)[:, np.newaxis] <= rung
    good = np.arange(size) < size - bad
    evidence = np.where(tried, -5.0, np.nan)
    look = np.arange(size)
    return xr.Dataset(
        {
            "rung": ("datum", names[rung]),
            "good": ("datum", good),
            "log_evidence": ("datum", np.full(size, -5.0)),
            "log_evidence_se": ("datum", np.full(size, 0.1)),
            "pareto_k": ("datum", np.full(size, 0.4)),
            "ess": ("datum", np.full(size, 500.0)),
            "rhat": ("datum", np.full(size, np.nan)),
            "audited": ("datum", look < audited),
            "contradicted": ("datum", look < wrong),
            "log_evidence_of_rung": (("rung_name", "datum"), evidence),
            "log_evidence_of_rung_se": (("rung_name", "datum"), np.where(tried, 0.1, np.nan)),
            "tried": (("rung_name", "datum"), tried),
            "cost": ("datum", np.full(size, 0.1)),
            "seconds": ("rung_name", np.array([1.0, 2.0, 3.0])),
        },
        {"rung_name": names, "datum": look},
    )


def sandwich_dataset(*, width: float = 0.05, untrusted: int = 0) -> xr.Dataset:
    """Bounds of five data."""
    middle = np.linspace(-9.0, -7.0, 5)
    columns = {"lower": middle - width / 2, "upper": middle + width / 2}
    columns["width"] = np.full(5, width)
    columns |= {f"{name}_se": np.full(5, 0.01) for name in tuple(columns)}
    return xr.Dataset(
        {
            **{name: ("datum", value) for name, value in columns.items()},
            "untrusted": ("datum", np.arange(5) < untrusted),
            "mixed": ("datum", np.full(5, True)),
        },
        {"datum": np.arange(5)},
        {
            **{"name": "BDMC-100", "simulated": 0, "num_chains": 16, "given": "", "units": "nats"},
            **{f"{name}_mean_se": 0.01 / 5**0.5 for name in ("lower", "upper", "width")},
        },
    )


def calibration_dataset(
    *,
    shift: float = 0.0,
    spread: float = 1.0,
    logs: tuple[float, float] = (0.0, 0.0),
    doubt: str = "",
) -> xr.Dataset:
    """Ranks of z[0], z[1], which are off alike, and of two log densities, shifted each."""
    names = ["z[0]", "z[1]", "log p(x, z)", "log p(x | z)"]
    shifts = np.array([shift, shift, *logs])
    spreads = np.array([spread, spread, 1.0, 1.0])
    off = (shifts != 0) | (spreads != 1)
    p_values = np.where(off, [1e-9, 1e-8, 1e-7, 1e-6], 0.4)
    level = np.array([0.25, 0.5, 0.75])
    curves = np.where(off, 0.3, 0.0)[:, np.newaxis] * np.ones(3)
    return xr.Dataset(
        {
            "ranks": (("simulation", "quantity"), np.zeros((50, 4), int)),
            "num_ranks": ("quantity", np.full(4, 50)),
            "p_value": ("quantity", p_values),
            "adjusted_p_value": ("quantity", np.minimum(1.0, 4 * p_values)),
            "chi_squared_p_value": ("quantity", p_values),
            "shift": ("quantity", shifts),
            "shift_se": ("quantity", np.full(4, 0.02)),
            "spread": ("quantity", spreads),
            "spread_se": ("quantity", np.full(4, 0.03)),
            "ecdf_difference": (("quantity", "level"), curves),
            "band_lower": (("quantity", "level"), np.full((4, 3), -0.1)),
            "band_upper": (("quantity", "level"), np.full((4, 3), 0.1)),
        },
        {
            **{"quantity": names, "level": level, "simulation": np.arange(50)},
            "site_of": ("quantity", ["z", "z", "", ""]),
        },
        {**_SIMULATED, "doubt": doubt},
    )


def coverage_dataset(*, off: float = 0.0) -> xr.Dataset:
    """Coverage of both regions, that of densities by so much more than the level."""
    level = np.array([0.5, 0.8, 0.95])
    covered = np.stack([level + off, level])
    p_values = np.array([0.3 if not off else 1e-8, 0.6])
    both = ("region", "level")
    return xr.Dataset(
        {
            "ranks": (("simulation", "region"), np.zeros((50, 2), int)),
            "p_value": ("region", p_values),
            "adjusted_p_value": ("region", p_values * [2, 1]),
            "chi_squared_p_value": ("region", p_values),
            "expected_coverage": (both, covered),
            "expected_coverage_se": (both, np.full((2, 3), 0.01)),
            "band_lower": (both, covered - 0.1),
            "band_upper": (both, covered + 0.1),
        },
        {"region": ["density", "TARP"], "level": level, "simulation": np.arange(50)},
        {**_SIMULATED, "doubt": ""},
    )


_SIMULATED = {
    **{"num_simulations": 50, "num_draws": 99, "error_rate": 0.01, "resampled": "no"},
    "given": "",
}


def models_dataset(
    differences: dict[str, float], *, num_data: int = 100, untrusted: dict[str, int] | None = None
) -> xr.Dataset:
    """Models whose log p(x) are so far above -5, each with a spread of 0.1 over the data."""
    names, rng = list(differences), np.random.default_rng(0)
    noise = rng.normal(size=(len(names), num_data)) * 0.1
    noise -= noise.mean(1, keepdims=True) * (num_data > 1)
    values = -5.0 + np.array(list(differences.values()))[:, np.newaxis] + noise
    good = np.ones(values.shape, bool)
    for name, count in (untrusted or {}).items():
        good[names.index(name), :count] = False
    return xr.Dataset(
        {
            "log_evidence": (("model", "datum"), values),
            "log_evidence_se": (("model", "datum"), np.full(values.shape, 0.01)),
            "good": (("model", "datum"), good),
            "source": (("model", "datum"), np.full(values.shape, "importance", object)),
        },
        {"model": names, "datum": np.arange(num_data), "given": ("model", [""] * len(names))},
    )


def outliers_dataset(
    *, found: int = 0, num_data: int = 100, exact: bool = True, adjusted: float = 0.8
) -> xr.Dataset:
    """Data of which the last ones are outliers, by log p(x)."""
    datum = np.arange(num_data)
    outlier = datum >= num_data - found
    p_value = np.where(outlier, 0.01, 0.5)
    of_score = np.stack([p_value, np.full(num_data, 0.3)], 1)
    return xr.Dataset(
        {
            "p_value": ("datum", p_value),
            "adjusted_p_value": ("datum", np.where(outlier, adjusted, 1.0)),
            "outlier": ("datum", outlier),
            "p_value_of": (("datum", "score"), of_score),
            "log_evidence": ("datum", np.where(outlier, -50.0, -5.0)),
            "predictive": ("datum", np.zeros(num_data)),
            "posterior_predictive_p": ("datum", np.full(num_data, 0.5)),
            "log_evidence_se": ("datum", np.full(num_data, 0.01)),
            "log_evidence_good": ("datum", datum > 0),
            "calibration_log_evidence": ("calibration", np.linspace(-6.0, -4.0, 200)),
            "calibration_predictive": ("calibration", np.linspace(-1.0, 1.0, 200)),
        },
        {"datum": datum, "score": ["log_evidence", "predictive"]},
        {"level": 0.05, "exact": int(exact), "num_particles": 100, "given": ""},
    )
