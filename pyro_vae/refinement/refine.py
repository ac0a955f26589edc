"""Per-datum optimisation of a local guide: the best that a family can do for these data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_vae.families.base import Family
from pyro_vae.guides.base import of_family
from pyro_vae.guides.local import LocalGuide
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.on_demand import OnDemand, on_demand
from pyro_vae.programs.processes import processes
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import Compile, DataPlate, Program
from pyro_vae.refinement.blocks import Blocks
from pyro_vae.refinement.climbing import Climber
from pyro_vae.refinement.search import Ascent, ascend, promise, search
from pyro_vae.refinement.starts import answer_of, starts_of

logger = logging.getLogger(__name__)

TOLERANCE = 0.02  # nats per datum, by default


def refine(
    model: Program,
    guide: Program,
    *batch: Any,
    family: Family | None = None,
    given: Mapping[str, Any] | None = None,
    max_steps: int = 4000,
    tolerance: float = TOLERANCE,
    data_plate: DataPlate = None,
    seed: int | None = None,
    compile: Compile = "auto",
    progress: bool = True,
) -> LocalGuide:
    r"""Fit a guide with a row of parameters per datum to this batch.

    Maximises each datum's ELBO over the family's parameters, all data at once, from
    the guide's own answer. The model's parameters stay as they are. Gradients stick
    the landing (Roeder, Wu & Duvenaud 2017): where the family holds the posterior
    their noise vanishes at the optimum. Draws come in
    mirrored pairs and orthogonal directions, which leaves little noise where a
    posterior is nearly Gaussian.

    The optimiser works in cycles, each with a learning rate that falls to nothing.
    After each, a datum's gain in ELBO is measured on random numbers common to before
    and after. A cycle that gains nothing is undone, so that a row never ends below its start, as
    far as the measurement can tell.

    ``converged`` is a promise: the row's ELBO is within ``tolerance`` of the best of the
    family. A row has converged when

    - a cycle that could have gained it something did not, two standard errors included (one
      that lost is followed by another of shorter steps);
    - its ELBO has hardly a slope left;
    - hardly any of its ELBO lies in tails that no draw reaches. Where it does, the expectations
      are taken over draws that reach there, and weighted (of at most 16 coordinates a datum);
    - no other start ends higher. Each row begins where its ELBO is highest: at the guide's
      own answer (or, where the guide is of another family, at median and width of its draws), at
      the prior, or at a Gaussian with location and curvature of a mode of log p(x, z). The others
      are tried where a row is in doubt, or where they lie apart and nearly as high.

    Of the certificates given for 23 models whose optimum is known, fewer than 1% are false
    (``python tests/certificates.py``). What no start leads to stays unseen.

    Global latents are held at the values given, else at the median of the guide's
    ``global_guide``.

    A family of points (families.Delta) has no noise: log p(x, z) is maximised by L-BFGS,
    each datum by itself, and the gain of a cycle is exact.

    Args:
        model: a Pyro model.
        guide: a Pyro guide to start from: amortized, local, or hand-written.
        *batch: their arguments.
        family: the variational family; the guide's own by default, else Normal().
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        max_steps: steps of a datum at most, from one start.
        tolerance: of the ELBO, in nats per datum.
        data_plate: the name of the plate of the data, where it is not plain.
        seed: of the draws; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`: "auto" records a step, and compiles it where
            there is enough to do for that to save time.
        progress: whether to show a bar, with the time that is left if all steps are taken; it
            appears after a second.

    Returns:
        A LocalGuide with a row per datum of the batch, and ``converged`` [N]. It remembers the
        batch, and the values of global latents, that its rows were fitted to.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses; max_steps < 1; a
            tolerance that is not positive.
    """
    max_steps = checked_steps(max_steps, tolerance)  # before anything is drawn
    with contextlib.ExitStack() as stack:
        if isinstance(guide, LocalGuide):  # rows of other data may be a start too
            stack.enter_context(guide.for_any_data())
            given = {**guide.given, **(given or {})}
        data = (on_demand(*batch),)
        evaluator, fixed = prepare(model, guide, data, given, data_plate, seed)
        local = refine_scored(
            evaluator, family, data_plate, max_steps, tolerance, compile, progress=progress
        )
    local.remember(evaluator.batch, fixed)
    return local


def checked_steps(max_steps: int, tolerance: float) -> int:
    """Return the steps, or raise ValueError for limits that are not positive."""
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}: a positive number of nats is needed")
    return as_count("max_steps", max_steps)


def refine_scored(
    evaluator: Evaluator,
    family: Family | None,
    data_plate: DataPlate,
    max_steps: int,
    tolerance: float,
    compile: Compile = "auto",
    *,
    progress: bool,
) -> LocalGuide:
    """Do what :func:`refine` does from the guide of an evaluator, on its batch; limits checked."""
    if isinstance(evaluator.batch, OnDemand):
        return _refine_in_parts(
            evaluator,
            evaluator.batch,
            family,
            data_plate,
            max_steps,
            tolerance,
            compile,
            progress=progress,
        )
    guide = evaluator.pair.user_guide
    if family is None and of_family(guide):
        family = guide.family
    # Before the looks are used: this shows, too, whether the model's plate is subsampled.
    evaluator.pair.part_agrees(evaluator.structure.data_plate)
    model, looks = evaluator.pair.model, evaluator.pair.looks
    local = LocalGuide(
        model, num_data=evaluator.num_data, example=looks, family=family, data_plate=data_plate
    )
    own = answer_of(local, guide, evaluator)
    local = local.to(own)
    blocks, here = Blocks(looks, evaluator, local, data_plate, compile), processes()
    shown = progress and here.is_first
    with tqdm(total=max_steps, desc="refine", unit="step", disable=not shown, delay=1.0) as bar:
        climber = Climber(blocks, tolerance, bar)
        best = search(climber, starts_of(climber, own, local.table.detach()), max_steps)
    with torch.no_grad():
        local.table.copy_(best.table)
        local.converged.copy_(best.converged)
    if (open_rows := int((~best.converged).sum())) and here.is_first:
        told = "refine: %d of %d data have not converged to within %g nats in %d steps"
        logger.warning(told, open_rows, evaluator.num_data, tolerance, max_steps)
    return local


def _refine_in_parts(
    whole: Evaluator,
    batch: OnDemand,
    family: Family | None,
    data_plate: DataPlate,
    max_steps: int,
    tolerance: float,
    compile: Compile,
    *,
    progress: bool,
) -> LocalGuide:
    """Do what :func:`refine_scored` does, with some thousands of the data in memory at a time."""
    tables, converged = [], []
    for rows in batch.parts():
        with whole.of_part(rows) as evaluator:
            local = refine_scored(
                evaluator, family, data_plate, max_steps, tolerance, compile, progress=progress
            )
        tables.append(local.table.detach())
        converged.append(local.converged)
    local = local.with_table(torch.cat(tables))
    local.converged.copy_(torch.cat(converged))
    return local


def promised_gain(model: Program, guide: LocalGuide, batch: Batch) -> tuple[float, float]:
    """Return what is left to gain for a guide whose one row is for all data, by its ELBO's slope.

    In nats, with its standard error: about what it is below the optimum where that is near.
    """
    evaluator, _ = prepare(model, guide, (batch,), None, False, 0)
    blocks = Blocks(evaluator.pair.looks, evaluator, guide, False, False)
    climber = Climber(blocks, TOLERANCE, tqdm(disable=True))
    table = guide.table.detach()
    (block,) = blocks.at(torch.arange(1, device=table.device))
    gain, error = promise(climber, block, table)
    return float(gain), float(error)


def refine_table(
    model: Program,
    evaluator: Evaluator,
    guide: LocalGuide,
    data_plate: DataPlate,
    max_steps: int,
    tolerance: float,
) -> Ascent:
    """Do what :func:`refine` does from one start: the rows of a guide, which stays as it is.

    The evaluator is of the model on the batch, with any guide; its seed is that of the draws.
    """
    # Anew: the prior may have other parameters than when the evaluator was made.
    blocks = Blocks(ModelLooks(model, evaluator.batch), evaluator, guide, data_plate, "auto")
    start = guide.table.detach().clone()
    todo = torch.ones(start.shape[0], dtype=torch.bool, device=start.device)
    return ascend(Climber(blocks, tolerance, tqdm(disable=True)), start, todo, max_steps)
