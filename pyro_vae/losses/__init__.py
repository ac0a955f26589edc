"""Where is the ELBO? The losses, their closed-form KL, and what they do with each site."""

from pyro_vae.losses.base import explain
from pyro_vae.losses.elbo import ELBO
from pyro_vae.losses.iwae import IWAE
from pyro_vae.losses.wake_sleep import WakeSleep

__all__ = ["ELBO", "IWAE", "WakeSleep", "explain"]
