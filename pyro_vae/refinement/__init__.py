"""What is the best guide of a family for each datum? All rows of a table optimised at once."""

from pyro_vae.refinement.refine import refine

__all__ = ["refine"]
