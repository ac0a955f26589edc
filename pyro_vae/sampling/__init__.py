"""What the exact posterior is: Hamiltonian Monte Carlo for all data at once, and the evidence.

Chains leave a density over a datum's unconstrained coordinates invariant, from a base that can be
drawn from (power 0) to the posterior (power 1). :func:`pyro_vae.sample_posterior` stays at the
posterior; annealed importance sampling goes from one to the other and weighs the way.
"""

from pyro_vae.sampling.chains import sample_posterior
from pyro_vae.sampling.samples import PosteriorSamples

__all__ = ["PosteriorSamples", "sample_posterior"]
