"""What does it all say? One page of tables, figures and findings in plain words."""

from pyro_vae.report.findings import Finding

__all__ = ["Finding"]
