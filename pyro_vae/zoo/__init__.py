"""Reference models, each an ordinary Pyro model, with an encoder for it.

Every model is an nn.Module to call as a Pyro model; ``make_encoder`` returns a new encoder
whose features suit :class:`pyro_vae.AmortizedGuide`, and ``simulate`` draws a batch from
the model itself.
"""

from pyro_vae.zoo import likelihoods
from pyro_vae.zoo.images import VAE, ConditionalVAE, ConvVAE, MixtureVAE, TwoLayerVAE
from pyro_vae.zoo.linear import FactorAnalysis, ProbabilisticPCA
from pyro_vae.zoo.sequences import DeepMarkovModel
from pyro_vae.zoo.tables import EyeColour, ItemResponse, SingleCellCounts, TopicModel

__all__ = [
    "VAE",
    "ConditionalVAE",
    "ConvVAE",
    "DeepMarkovModel",
    "EyeColour",
    "FactorAnalysis",
    "ItemResponse",
    "MixtureVAE",
    "ProbabilisticPCA",
    "SingleCellCounts",
    "TopicModel",
    "TwoLayerVAE",
    "likelihoods",
]
