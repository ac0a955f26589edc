"""How do draws become log weights? Modes of running particles, plans, runs, estimators."""

from pyro_vae.particles.log_weights import LogWeights

__all__ = ["LogWeights"]
