"""Which data can I try? The digits that ship with the package, and loaders for local files."""

from pyro_vae.datasets.cells import Cells, cells
from pyro_vae.datasets.images import ImageData, StochasticBinarization, digits, load

__all__ = ["Cells", "ImageData", "StochasticBinarization", "cells", "digits", "load"]
