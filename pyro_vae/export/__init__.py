"""How do I get to ArviZ? Draws and log weights in its containers, of versions 0.x and 1.x."""

from pyro_vae.export.arviz import to_arviz

__all__ = ["to_arviz"]
