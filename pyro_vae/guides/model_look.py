"""What runs of a model show of it: all that a guide is made from."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.looks import check_stable, run_model
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import Look
from pyro_vae.programs.structure import inspect, is_subsampled
from pyro_vae.programs.types import DataPlate, Program

__all__ = ["ModelLook"]

_STABILITY_RUNS = 5
_PARENT_RUNS, _DRAWS_OF_EACH = 50, 20  # of the model, and of a latent given its parents in each


class ModelLook:
    """A model as its runs on one batch showed it; each run is made once, when it is asked for.

    Args:
        model: a Pyro model.
        batch: its arguments.
        structure: what one run on the batch showed.
    """

    def __init__(self, model: Program, batch: Batch, structure: Structure) -> None:
        self.model, self.batch, self.structure = model, batch, structure
        self._is_stable = False

    @classmethod
    def at(cls, model: Program, example: Any, data_plate: DataPlate) -> ModelLook:
        """Return a look at a model on an example batch."""
        batch = as_batch(example)
        return cls(model, batch, inspect(model, batch, data_plate=data_plate))

    def check_stable(self) -> None:
        """Raise ValueError if another draw of the latents gives the model other sites or shapes."""
        if not self._is_stable:
            check_stable(self.model, self.batch, self.structure, runs=_STABILITY_RUNS)
            self._is_stable = True

    @functools.cached_property
    def is_subsampled(self) -> bool:
        """Whether the data plate keeps its full size in batches of another size."""
        plate = self.structure.data_plate
        return plate is not None and is_subsampled(self.model, self.batch, plate)

    @property
    def shown(self) -> Batch:
        """The rows of the batch that a run takes: fewer where the model draws its own minibatch."""
        plate = self.structure.data_plate
        if plate is None or not plate.drawn:
            return self.batch
        return self.batch.rows(slice(0, plate.size))

    def refuse_globals(self, advice: str) -> None:
        """Raise ValueError, with advice, for latent sites outside the data plate."""
        plate = self.structure.data_plate
        if plate is not None and self.structure.global_latents:
            names = [site.name for site in self.structure.global_latents]
            raise ValueError(
                f"the latent sites {names} lie outside the data plate {plate.name!r}: "
                f"they are global. {advice}, or condition the model on a value"
            )

    def draws_of_other_parents(self, name: str) -> Tensor | None:
        """Return draws of a latent from its prior, its parents drawn anew for some of them.

        None where the model takes no other draw of the parents.
        """
        found = []
        for seed in range(1, _PARENT_RUNS + 1):
            with Look() as look:
                sites = run_model(self.model, self.batch, seed=seed).sites
            if look.error is None:  # a draw that the model cannot take says nothing
                found.append(sites[name].fn.sample((_DRAWS_OF_EACH,)))
        return torch.cat(found) if found else None
