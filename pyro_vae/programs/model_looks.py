"""What is known of a model on a batch: each run that finds something out is made once."""

from __future__ import annotations

import functools
from typing import Any

from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.looks import ModelRun, check_sequential, check_stable
from pyro_vae.programs.sites import Plate, Structure
from pyro_vae.programs.structure import is_subsampled, look, structure_of
from pyro_vae.programs.types import DataPlate, Program

__all__ = ["ModelLooks"]


class ModelLooks:
    """A model and a batch, with what runs under the prior have shown.

    A structure for another data plate, or judged more strictly, takes no further run; nor does
    stability in as many runs as were made before.

    Args:
        model: a Pyro model.
        batch: its arguments.
    """

    def __init__(self, model: Program, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self._stable_runs = 0
        self._subsampled: dict[str, bool] = {}

    @classmethod
    def of(cls, model: Program, example: Any) -> ModelLooks:
        """Return what is known of a model: an example that is a ModelLooks of it, or a new one."""
        if isinstance(example, ModelLooks) and example.model is model:
            return example
        return cls(model, as_batch(example))

    def on(self, batch: Batch) -> ModelLooks:
        """Return what is known of the model on some of the rows: all but its sites there."""
        other = ModelLooks(self.model, batch)
        other._stable_runs, other._subsampled = self._stable_runs, self._subsampled
        return other

    @functools.cached_property
    def run(self) -> ModelRun:
        """One run under the prior; the global random state stays as it was."""
        return look(self.model, self.batch)

    def structure(
        self, data_plate: DataPlate = None, *, strict: bool = False, latents_needed: bool = True
    ) -> Structure:
        """Return the structure of the model; arguments and errors as :func:`inspect`."""
        return structure_of(
            self.run,
            self.model,
            self.batch,
            data_plate,
            strict=strict,
            latents_needed=latents_needed,
        )

    def check_stable(self, structure: Structure, runs: int) -> None:
        """Raise ValueError where sites, or their shapes, are others in one of some further runs."""
        check_sequential(structure)
        check_stable(self.model, self.batch, structure, range(self._stable_runs + 1, runs + 1))
        self._stable_runs = max(runs, self._stable_runs)

    def is_subsampled(self, plate: Plate) -> bool:
        """Return whether the data plate keeps its full size when the batch is of another size."""
        if plate.name not in self._subsampled:
            self._subsampled[plate.name] = is_subsampled(self.model, self.batch, plate)
        return self._subsampled[plate.name]

    def know_run(self, run: ModelRun, other: ModelRun | None) -> None:
        """Take a run under a guide's draws for that under the prior, and for one of stability.

        Args:
            run: on this batch.
            other: under the prior, on another batch, if there was one. Where sites or shapes
                differ, further runs say whether the model is stable.
        """
        self.run = run
        self._stable_runs = int(other is not None and run.is_like(other))

    def know_subsampled(self, plate: Plate, subsampled: bool) -> None:
        """Remember what a run on other rows has shown of :meth:`is_subsampled`."""
        self._subsampled[plate.name] = subsampled
