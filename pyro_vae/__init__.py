"""Amortized variational inference in Pyro that a scientist can trust."""

from importlib.metadata import version

from pyro_vae import families, nets, schedules
from pyro_vae.bounds import elbo, iwae_bound
from pyro_vae.compare import Comparison, compare
from pyro_vae.description import describe
from pyro_vae.diagnostics import explain, pareto_k
from pyro_vae.em import NonFiniteHalfStepError, em
from pyro_vae.exact import ExactGuide
from pyro_vae.fit import Epoch, fit
from pyro_vae.guides import AmortizedGuide, LocalGuide
from pyro_vae.importance import IWAE, WakeSleep
from pyro_vae.impute import Imputation, impute
from pyro_vae.inference_data import to_arviz
from pyro_vae.logweights import log_weights
from pyro_vae.missing import MissingData, MissingEncoder
from pyro_vae.objectives import ELBO
from pyro_vae.refine import refine
from pyro_vae.results import Bound, EMResult, FitResult, LogWeights
from pyro_vae.sites import DataPlateError
from pyro_vae.svi import CompiledSVI
from pyro_vae.training_step import NonFiniteLossError

from pyro_vae import datasets, zoo  # isort: skip - the edge, above all the rest

__version__ = version("pyro-vae")

__all__ = [
    "ELBO",
    "IWAE",
    "AmortizedGuide",
    "Bound",
    "Comparison",
    "CompiledSVI",
    "DataPlateError",
    "EMResult",
    "Epoch",
    "ExactGuide",
    "FitResult",
    "Imputation",
    "LocalGuide",
    "LogWeights",
    "MissingData",
    "MissingEncoder",
    "NonFiniteHalfStepError",
    "NonFiniteLossError",
    "WakeSleep",
    "compare",
    "datasets",
    "describe",
    "elbo",
    "em",
    "explain",
    "families",
    "fit",
    "impute",
    "iwae_bound",
    "log_weights",
    "nets",
    "pareto_k",
    "refine",
    "schedules",
    "to_arviz",
    "zoo",
]
