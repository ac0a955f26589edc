"""Does my own class keep the laws? Checks of a family, a guide, a loss; needs no pytest."""

from pyro_vae.testing.families import check_family
from pyro_vae.testing.guides import check_guide
from pyro_vae.testing.laws import Checked, LawError
from pyro_vae.testing.losses import check_loss

__all__ = ["Checked", "LawError", "check_family", "check_guide", "check_loss"]
