"""Scores of validation data, which stay comparable while training goes on."""

from __future__ import annotations

import math

import torch

from pyro_vae.programs import state
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.traces import non_finite_sites
from pyro_vae.training.data_source import common_rows
from pyro_vae.training.joint_loss import Example
from pyro_vae.training.minibatches import mean_elbo
from pyro_vae.training.not_finite import NonFiniteLossError
from pyro_vae.training.steps import TrainingSteps
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
        self._joint = joint = steps.joint(steps.loss.loss)
        self._traced = TracedLoss(
            *steps.pair,
            joint or steps.loss.loss,
            compile=how,
            modes=False,
            owners=(steps.loss,),
            setting=lambda: None if joint is None else joint.share,
        )
        self._prepared = joint is None
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
            if not self._prepared:
                self._prepare()
            for part in data.parts(self._batch):
                elbos.append(data.elbo(self._loss(part, start), part.size))
                start += part.size or 0
        return mean_elbo(elbos)

    def _prepare(self) -> None:
        """Learn how processes share validation data."""
        data, joint = self._steps.data, self._joint
        self._prepared = True
        if joint is not None and not data.whole and self._batch.size is not None:
            few = self._batch.rows(slice(0, data.num_tried))
            batch, share = common_rows(few, self._batch.size, joint.processes)
            joint.prepare(*self._steps.pair, Example(batch, share, data.rows), ())

    def _loss(self, batch: Batch, start: int) -> float:
        """Return the loss of a part of the data that begins at row ``start``."""
        loss, own, joint = math.nan, batch, self._joint
        if joint is not None and not self._steps.data.whole:
            joint.use(joint.processes.share(batch.size or 1))
            own = batch.rows(joint.share.rows)
        with state.Look() as look:
            loss = float(self._traced(*own.args, **own.kwargs))
        error = look.error
        if joint is not None:
            total, error = joint.total(loss, error, ())
            loss = float(total)
        if error is None and math.isfinite(loss):
            return loss
        sites_of = self._sites_by_row(batch)
        if error is not None and not sites_of:
            error.add_note("in validation_data")
            raise error
        rows = ", ".join(str(start + row) for row in list(sites_of)[:5])
        sites = sorted(set().union(*sites_of.values()))
        text = (
            f"validation_data: after step {self._steps.taken} the loss is not finite, in rows "
            f"{rows} ({len(sites_of)} of the {batch.size} looked at) at sites {', '.join(sites)}. "
            "Rescale or leave out these rows, or bound the scale or logit there"
        )
        raise NonFiniteLossError(text, self._steps.taken, sites) from error

    def _sites_by_row(self, batch: Batch) -> dict[int, list[str]]:
        """Return the sites that are not finite at each row where there are any."""
        found = {}
        for row in range(batch.size or 0):
            with state.Look():
                alone = batch.rows(slice(row, row + 1))
                found[row] = non_finite_sites(self._steps.model, self._steps.guide, alone)
        return {row: sites for row, sites in found.items() if sites}
