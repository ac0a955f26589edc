"""What is the best guide of a family for each datum? All rows of a table optimised at once.

`blocks` score tables; `climbing` runs a cycle; `starts` gives places to begin; `search` runs cycles
from them until rows have converged, checks these, and takes the best.

Two optimizers move rows. The ELBO of a family with a density is a mean over fresh draws: Adam
climbs it, with a falling rate and an averaged path (`climbing.py`). log p(x, z), of points and in
the search for modes, has no noise: L-BFGS climbs it to rounding (`lbfgs.py`).
"""

from pyro_vae.refinement.refine import refine

__all__ = ["refine"]
