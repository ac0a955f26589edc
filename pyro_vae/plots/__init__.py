"""How do I get to figures? Figures of results; Matplotlib is imported when they are drawn."""

from pyro_vae.plots.imputation import plot_imputation
from pyro_vae.plots.results import (
    plot_gap_distribution,
    plot_gaps,
    plot_history,
    plot_latents,
    plot_pareto_k,
    plot_reconstructions,
)

__all__ = [
    "plot_gap_distribution",
    "plot_gaps",
    "plot_history",
    "plot_imputation",
    "plot_latents",
    "plot_pareto_k",
    "plot_reconstructions",
]
