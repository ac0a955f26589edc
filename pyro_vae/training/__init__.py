"""How is it trained? fit, CompiledSVI, EM, minibatches, optimizers, checkpoints."""

from pyro_vae.training.em import EMResult, NonFiniteHalfStepError, em
from pyro_vae.training.fit import fit
from pyro_vae.training.fit_result import Epoch, FitResult
from pyro_vae.training.not_finite import NonFiniteLossError
from pyro_vae.training.svi import CompiledSVI

__all__ = [
    "CompiledSVI",
    "EMResult",
    "Epoch",
    "FitResult",
    "NonFiniteHalfStepError",
    "NonFiniteLossError",
    "em",
    "fit",
]
