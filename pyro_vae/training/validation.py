"""Scores of validation data, which stay comparable while training goes on."""

from __future__ import annotations

import math

import torch

from pyro_vae.programs import state
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.traces import non_finite_sites
from pyro_vae.training.minibatches import mean_elbo
from pyro_vae.training.steps import NonFiniteLossError, TrainingSteps
from pyro_vae.training.traced_loss import TracedLoss


class Validation:
    """Scores validation data by the loss of training, without the schedule's factor.

    Args:
        steps: of training.
        batch: the validation data.
        seed: of the random numbers, the same at each call.
    """

    def __init__(self, steps: TrainingSteps, batch: Batch, seed: int | None) -> None:
        self._steps, self._batch, self._seed = steps, batch, 0 if seed is None else seed
        # Validation is too little of a run for a second compilation to pay.
        how = "replay" if steps.compile == "auto" else steps.compile
        self._traced = TracedLoss(
            *steps.pair, steps.loss.loss, compile=how, modes=False, owners=(steps.loss,)
        )
        if total := steps.expected:
            epochs = math.ceil(total / (steps.data.steps_per_epoch or total))
            self._traced.steps = epochs * sum(1 for _ in steps.data.parts(batch))

    def score(self) -> tuple[float, float]:
        """Return the ELBO and its standard error over minibatches, in nats per datum.

        Raises:
            NonFiniteLossError: where it is not finite, naming rows and sites.
        """
        data, elbos, start = self._steps.data, [], 0
        self._steps.set_factor(1.0)
        running = state.evaluation(self._steps.model, self._steps.guide)
        with torch.no_grad(), running, state.seeded(self._batch.device, self._seed):
            for part in data.parts(self._batch):
                elbos.append(data.elbo(self._loss(part, start), part.size))
                start += part.size or 0
        return mean_elbo(elbos)

    def _loss(self, batch: Batch, start: int) -> float:
        """Return the loss of a part of the data that begins at row ``start``."""
        with state.Look() as look:
            loss = float(self._traced(*batch.args, **batch.kwargs))
            if math.isfinite(loss):
                return loss
        sites_of = self._sites_by_row(batch)
        if look.error is not None and not sites_of:
            look.error.add_note("in validation_data")
            raise look.error
        rows = ", ".join(str(start + row) for row in list(sites_of)[:5])
        sites = sorted(set().union(*sites_of.values()))
        text = (
            f"validation_data: after step {self._steps.taken} the loss is not finite, in rows "
            f"{rows} ({len(sites_of)} of the {batch.size} looked at) at sites {', '.join(sites)}. "
            "Rescale or leave out these rows, or bound the scale or logit there"
        )
        raise NonFiniteLossError(text, self._steps.taken, sites) from look.error

    def _sites_by_row(self, batch: Batch) -> dict[int, list[str]]:
        """Return the sites that are not finite at each row where there are any."""
        found = {}
        for row in range(batch.size or 0):
            with state.Look():
                alone = batch.rows(slice(row, row + 1))
                found[row] = non_finite_sites(self._steps.model, self._steps.guide, alone)
        return {row: sites for row, sites in found.items() if sites}
