"""What approximates the posterior of a datum? Variational families: Gaussians, flows, points.

A family turns parameters into a distribution over one datum's unconstrained latents; each works in
:class:`pyro_vae.AmortizedGuide` and in :class:`pyro_vae.LocalGuide`.
"""

from pyro_vae.families.base import FactorizedFamily, Family
from pyro_vae.families.delta import Delta
from pyro_vae.families.flow import Flow
from pyro_vae.families.gaussian import FullRankNormal, LowRankNormal, Normal

__all__ = [
    "Delta",
    "FactorizedFamily",
    "Family",
    "Flow",
    "FullRankNormal",
    "LowRankNormal",
    "Normal",
]
