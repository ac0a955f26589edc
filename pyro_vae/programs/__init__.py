"""What are a model and a guide? Batches, sites and plates, traces, discrete latents summed out.

Everything that runs a user's model or guide to find something out, or to score it, starts here.
"""

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.describe import describe
from pyro_vae.programs.on_demand import take
from pyro_vae.programs.structure import DataPlateError

__all__ = ["Batch", "DataPlateError", "describe", "take"]
