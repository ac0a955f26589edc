"""What approximates the posterior of a datum? Families: Gaussians, flows, steps, points.

A family turns parameters into a distribution over one datum's unconstrained latents; each works in
:class:`pyro_vae.AmortizedGuide` and in :class:`pyro_vae.LocalGuide`.

To add one, write one class, a frozen dataclass with the options as fields:

- of independent coordinates: a :class:`FactorizedFamily` with ``params_per_coordinate``,
  ``marginal`` and ``from_moments``; ``quantile`` where the marginal has no ``icdf``;
- else a :class:`Family` with ``params_shape``, ``initial``, ``conditional`` and ``from_noise``.

``units`` (``coordinate_units``) and ``from_gaussian`` have defaults; they make
:func:`pyro_vae.refine` faster. A class of the user's own needs no more; one of the package stands
in a file of this folder, in the names below, and in ``FAMILIES`` of ``tests/laws``.
"""

from pyro_vae.families.annealed import Annealed
from pyro_vae.families.base import FactorizedFamily, Family
from pyro_vae.families.flow import Flow
from pyro_vae.families.gaussian import Delta, FullRankNormal, LowRankNormal, Normal

__all__ = [
    "Annealed",
    "Delta",
    "FactorizedFamily",
    "Family",
    "Flow",
    "FullRankNormal",
    "LowRankNormal",
    "Normal",
]
