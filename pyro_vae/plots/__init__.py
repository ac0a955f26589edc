"""How do I get to figures? Figures of results; Matplotlib is imported when they are drawn.

Each function draws on one Matplotlib ``Axes``, that it is given or new ones, and returns it;
``ax.figure`` is the figure.
"""

from pyro_vae.plots.calibration import plot_coverage, plot_ranks
from pyro_vae.plots.diagnostics import (
    plot_aggregate_posterior,
    plot_bounds,
    plot_pareto_k_against_gap,
    plot_rate_distortion,
)
from pyro_vae.plots.evidence import plot_evidence
from pyro_vae.plots.images import plot_imputation, plot_reconstructions, plot_traversals
from pyro_vae.plots.models import plot_model_differences
from pyro_vae.plots.outliers import plot_outliers
from pyro_vae.plots.posteriors import plot_posterior_pair, plot_rungs, plot_widths
from pyro_vae.plots.results import (
    plot_gap_distribution,
    plot_gaps,
    plot_history,
    plot_latents,
    plot_pareto_k,
)

__all__ = [
    "plot_aggregate_posterior",
    "plot_bounds",
    "plot_coverage",
    "plot_evidence",
    "plot_gap_distribution",
    "plot_gaps",
    "plot_history",
    "plot_imputation",
    "plot_latents",
    "plot_model_differences",
    "plot_outliers",
    "plot_pareto_k",
    "plot_pareto_k_against_gap",
    "plot_posterior_pair",
    "plot_ranks",
    "plot_rate_distortion",
    "plot_reconstructions",
    "plot_rungs",
    "plot_traversals",
    "plot_widths",
]
