"""Amortized variational inference in Pyro that a scientist can trust."""

from importlib.metadata import version

from pyro_vae import families, nets
from pyro_vae.bounds import elbo, iwae_bound
from pyro_vae.compare import Comparison, compare
from pyro_vae.description import describe
from pyro_vae.diagnostics import explain, pareto_k
from pyro_vae.fit import Epoch, NonFiniteLossError, fit
from pyro_vae.guides import AmortizedGuide, LocalGuide
from pyro_vae.inference_data import to_arviz
from pyro_vae.logweights import log_weights
from pyro_vae.objectives import ELBO
from pyro_vae.refine import refine
from pyro_vae.results import Bound, FitResult, LogWeights
from pyro_vae.sites import DataPlateError

from pyro_vae import datasets, zoo  # isort: skip - the edge, above all the rest

__version__ = version("pyro-vae")

__all__ = [
    "ELBO",
    "AmortizedGuide",
    "Bound",
    "Comparison",
    "DataPlateError",
    "Epoch",
    "FitResult",
    "LocalGuide",
    "LogWeights",
    "NonFiniteLossError",
    "compare",
    "datasets",
    "describe",
    "elbo",
    "explain",
    "families",
    "fit",
    "iwae_bound",
    "log_weights",
    "nets",
    "pareto_k",
    "refine",
    "to_arviz",
    "zoo",
]
