"""Guides that declare what they sample, so that no run is needed to find it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from pyro_vae.programs.types import Program

__all__ = ["DeclaredGuide"]


class DeclaredGuide(ABC):
    """A guide that declares its sites: AmortizedGuide and LocalGuide.

    Attributes:
        global_guide: the part that samples the sites outside the data plate; None without one.
    """

    global_guide: Program | None

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the latent sites of a batch, as a Pyro guide."""

    @property
    @abstractmethod
    def site_names(self) -> tuple[str, ...]:
        """The sites that the guide samples by itself, those of its global part aside."""

    @property
    @abstractmethod
    def is_dependent(self) -> bool:
        """Whether a site's proposal may depend on the draws of sites before it."""

    @abstractmethod
    def local_part(self) -> DeclaredGuide:
        """Return this guide without its global part, the parameters shared."""
