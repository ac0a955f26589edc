"""Reference models, each an ordinary Pyro model, with an encoder for it.

Every model is an nn.Module to call as a Pyro model; ``make_encoder`` returns a new encoder
whose features suit :class:`pyro_vae.AmortizedGuide`, and ``simulate`` draws a batch from
the model itself.
"""

from pyro_vae.zoo.images import VAE

__all__ = ["VAE"]
