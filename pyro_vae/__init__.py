"""Amortized variational inference in Pyro that a scientist can trust."""

from importlib.metadata import version

from pyro_vae import datasets, families, nets, schedules, testing, zoo
from pyro_vae.diagnostics.active_units import ActiveUnits, active_units
from pyro_vae.diagnostics.aggregate_posterior import AggregatePosterior, aggregate_posterior
from pyro_vae.diagnostics.pareto_k import pareto_k
from pyro_vae.diagnostics.rate_distortion import RateDistortion, rate_distortion
from pyro_vae.evaluation.ais import ais
from pyro_vae.evaluation.bdmc import Sandwich, bdmc
from pyro_vae.evaluation.bounds import Bound, elbo, iwae_bound, log_weights
from pyro_vae.evaluation.calibration import Calibration, sbc
from pyro_vae.evaluation.compare import compare
from pyro_vae.evaluation.comparison import Comparison
from pyro_vae.evaluation.coverage import Coverage, coverage
from pyro_vae.evaluation.draws_check import DrawsCheck, check_draws
from pyro_vae.evaluation.model_choice import compare_models
from pyro_vae.evaluation.model_comparison import ModelComparison
from pyro_vae.evaluation.outliers import Outliers, outliers
from pyro_vae.evaluation.repair import Repair, repair
from pyro_vae.export.arviz import to_arviz
from pyro_vae.guides.amortized import AmortizedGuide
from pyro_vae.guides.exact import ExactGuide
from pyro_vae.guides.local import LocalGuide
from pyro_vae.losses.base import explain
from pyro_vae.losses.elbo import ELBO
from pyro_vae.losses.iwae import IWAE
from pyro_vae.losses.wake_sleep import WakeSleep
from pyro_vae.missing_data.encoder import MissingEncoder
from pyro_vae.missing_data.impute import Imputation, impute
from pyro_vae.missing_data.model import MissingData
from pyro_vae.particles.estimators import LogWeights
from pyro_vae.prediction.generate import generate
from pyro_vae.prediction.predict import predict, reconstruct
from pyro_vae.programs.describe import describe
from pyro_vae.programs.on_demand import take
from pyro_vae.programs.processes import alone
from pyro_vae.programs.structure import DataPlateError
from pyro_vae.refinement.refine import refine
from pyro_vae.sampling.chains import sample_posterior
from pyro_vae.sampling.samples import PosteriorSamples
from pyro_vae.training import callbacks
from pyro_vae.training.convergence import Converged
from pyro_vae.training.em import EMResult, NonFiniteHalfStepError, em
from pyro_vae.training.fit import fit
from pyro_vae.training.fit_many import ManyFits, fit_many
from pyro_vae.training.fit_result import Epoch, FitResult
from pyro_vae.training.not_finite import NonFiniteLossError
from pyro_vae.training.saved_pair import load, save
from pyro_vae.training.svi import CompiledSVI

__version__ = version("pyro-vae")

__all__ = [
    "ELBO",
    "IWAE",
    "ActiveUnits",
    "AggregatePosterior",
    "AmortizedGuide",
    "Bound",
    "Calibration",
    "Comparison",
    "CompiledSVI",
    "Converged",
    "Coverage",
    "DataPlateError",
    "DrawsCheck",
    "EMResult",
    "Epoch",
    "ExactGuide",
    "FitResult",
    "Imputation",
    "LocalGuide",
    "LogWeights",
    "ManyFits",
    "MissingData",
    "MissingEncoder",
    "ModelComparison",
    "NonFiniteHalfStepError",
    "NonFiniteLossError",
    "Outliers",
    "PosteriorSamples",
    "RateDistortion",
    "Repair",
    "Sandwich",
    "WakeSleep",
    "active_units",
    "aggregate_posterior",
    "ais",
    "alone",
    "bdmc",
    "callbacks",
    "check_draws",
    "compare",
    "compare_models",
    "coverage",
    "datasets",
    "describe",
    "elbo",
    "em",
    "explain",
    "families",
    "fit",
    "fit_many",
    "generate",
    "impute",
    "iwae_bound",
    "load",
    "log_weights",
    "nets",
    "outliers",
    "pareto_k",
    "predict",
    "rate_distortion",
    "reconstruct",
    "refine",
    "repair",
    "sample_posterior",
    "save",
    "sbc",
    "schedules",
    "take",
    "testing",
    "to_arviz",
    "zoo",
]
