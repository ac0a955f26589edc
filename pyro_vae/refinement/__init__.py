"""What is the best guide of a family for each datum? All rows of a table optimised at once.

From the bottom up: `noise` and `blocks` make draws and score them; `climbing` runs cycles;
`certificate` checks a row; `ascent` runs cycles until rows have converged; `modes` and `starts` say
where to begin; `search` takes the best of several starts; `refine` makes the guide.

Two optimizers move rows. The ELBO of a family with a density is an expectation over fresh draws, so
Adam climbs it, with a falling rate and an averaged path (`climbing.py`). Without noise, log p(x, z)
of a family of points and of the search for modes is minimised by L-BFGS (`lbfgs.py`), which needs
exact gradients and ends at rounding.
"""

from pyro_vae.refinement.refine import refine

__all__ = ["refine"]
