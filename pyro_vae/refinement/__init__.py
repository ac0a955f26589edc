"""What is the best guide of a family for each datum? All rows of a table optimised at once.

`blocks` score tables; `climbing` runs a cycle; `ascent` runs cycles until rows have converged and
checks them; `modes` and `starts` give places to begin; `search` takes the best of several.

Two optimizers move rows. The ELBO of a family with a density is a mean over fresh draws: Adam
climbs it, with a falling rate and an averaged path (`climbing.py`). log p(x, z), of points and in
the search for modes, has no noise: L-BFGS climbs it to rounding (`lbfgs.py`).
"""

from pyro_vae.refinement.refine import refine

__all__ = ["refine"]
