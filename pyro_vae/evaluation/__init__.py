"""How large is log p(x), which guide loses what, and can it be mended? Bounds to calibration."""

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

__all__ = [
    "Bound",
    "Calibration",
    "Comparison",
    "Coverage",
    "DrawsCheck",
    "ModelComparison",
    "Outliers",
    "Repair",
    "Sandwich",
    "ais",
    "bdmc",
    "check_draws",
    "compare",
    "compare_models",
    "coverage",
    "elbo",
    "iwae_bound",
    "log_weights",
    "outliers",
    "repair",
    "sbc",
]
