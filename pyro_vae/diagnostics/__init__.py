"""Is it right? Pareto k-hat of importance weights."""

from pyro_vae.diagnostics.pareto_k import pareto_k

__all__ = ["pareto_k"]
