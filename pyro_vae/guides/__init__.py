"""Where do a family's parameters come from? An encoder, a table; and the exact posterior."""

from pyro_vae.guides.amortized import AmortizedGuide
from pyro_vae.guides.exact import ExactGuide
from pyro_vae.guides.local import LocalGuide

__all__ = ["AmortizedGuide", "ExactGuide", "LocalGuide"]
