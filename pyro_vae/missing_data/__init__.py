"""My data have holes: models of the observed part, encoders that see it, imputations."""

from pyro_vae.missing_data.encoder import MissingEncoder
from pyro_vae.missing_data.impute import Imputation, impute
from pyro_vae.missing_data.model import MissingData

__all__ = ["Imputation", "MissingData", "MissingEncoder", "impute"]
