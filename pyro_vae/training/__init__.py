"""How is it trained? fit, CompiledSVI, EM, minibatches, optimizers, checkpoints."""

from pyro_vae.training.convergence import Converged
from pyro_vae.training.em import EMResult, NonFiniteHalfStepError, em
from pyro_vae.training.fit import fit
from pyro_vae.training.fit_many import ManyFits, fit_many
from pyro_vae.training.fit_result import Epoch, FitResult
from pyro_vae.training.not_finite import NonFiniteLossError
from pyro_vae.training.svi import CompiledSVI

__all__ = [
    "CompiledSVI",
    "Converged",
    "EMResult",
    "Epoch",
    "FitResult",
    "ManyFits",
    "NonFiniteHalfStepError",
    "NonFiniteLossError",
    "em",
    "fit",
    "fit_many",
]
