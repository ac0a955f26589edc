"""How do draws become log weights? Modes of running particles, plans, runs, estimators."""

from pyro_vae.particles.estimators import LogWeights

__all__ = ["LogWeights"]
