"""Is it right? Pareto k-hat, rates, active units, the aggregate posterior."""

from pyro_vae.diagnostics.active_units import ActiveUnits, active_units
from pyro_vae.diagnostics.aggregate_posterior import AggregatePosterior, aggregate_posterior
from pyro_vae.diagnostics.pareto_k import pareto_k
from pyro_vae.diagnostics.rate_distortion import RateDistortion, rate_distortion

__all__ = [
    "ActiveUnits",
    "AggregatePosterior",
    "RateDistortion",
    "active_units",
    "aggregate_posterior",
    "pareto_k",
    "rate_distortion",
]
