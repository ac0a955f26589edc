"""How large is log p(x), and which guide loses what? Bounds, log weights, comparisons."""

from pyro_vae.evaluation.ais import ais
from pyro_vae.evaluation.bounds import Bound, elbo, iwae_bound, log_weights
from pyro_vae.evaluation.compare import compare
from pyro_vae.evaluation.comparison import Comparison

__all__ = ["Bound", "Comparison", "ais", "compare", "elbo", "iwae_bound", "log_weights"]
