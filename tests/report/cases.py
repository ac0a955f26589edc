"""Datasets of comparisons and repairs with numbers that a test chooses."""

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
