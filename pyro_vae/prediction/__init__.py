"""What does a fitted model say of data? Predictions, reconstructions, data of its own."""

from pyro_vae.prediction.generate import generate
from pyro_vae.prediction.predict import predict, reconstruct

__all__ = ["generate", "predict", "reconstruct"]
