"""What runs of a model show of it: all that a guide is made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.looks import run_model
from pyro_vae.programs.model_looks import ModelLooks
from pyro_vae.programs.state import Look
from pyro_vae.programs.types import DataPlate, Program

__all__ = ["ModelLook"]

_STABILITY_RUNS = 5
_PARENT_RUNS, _DRAWS_OF_EACH = 50, 20  # of the model, and of a latent given its parents in each


class ModelLook:
    """A model as its runs on one batch showed it, with one data plate.

    Args:
        looks: what runs of the model on the batch have shown.
        data_plate: the name of the data plate; None to find it, False for one datum.
    """

    def __init__(self, looks: ModelLooks, data_plate: DataPlate) -> None:
        self.looks, self.data_plate = looks, data_plate
        self.structure = looks.structure(data_plate)
        self.model, self.batch = looks.model, looks.batch

    @classmethod
    def at(cls, model: Program, example: Any, data_plate: DataPlate) -> ModelLook:
        """Return a look at a model on an example batch."""
        return cls(ModelLooks(model, as_batch(example)), data_plate)

    def on(self, batch: Batch) -> ModelLook:
        """Return a look at the model on some of its rows: of them only the sites are seen anew."""
        return ModelLook(self.looks.on(batch), self.data_plate)

    def check_stable(self) -> None:
        """Raise ValueError if another draw of the latents gives the model other sites or shapes."""
        self.looks.check_stable(self.structure, _STABILITY_RUNS)

    @property
    def is_subsampled(self) -> bool:
        """Whether the data plate keeps its full size in batches of another size."""
        plate = self.structure.data_plate
        return plate is not None and self.looks.is_subsampled(plate)

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
