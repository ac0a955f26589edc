"""Draws of a guide, of the model given them and of the prior, in ArviZ's groups: arrays alone."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from torch import Tensor

from pyro_vae.export.deterministic import DeterministicSite, DeterministicValues
from pyro_vae.particles.evaluator import Chunk, Evaluator
from pyro_vae.particles.prepare import by_block
from pyro_vae.programs.site_arrays import absent, observed_values
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.types import Values

__all__ = ["RESAMPLING", "Groups", "draw_groups", "hide_absent", "observed_data", "resample_groups"]

logger = logging.getLogger(__name__)

# Arrays of each group, by the name of their variable: draws first, then the datum.
Groups: TypeAlias = dict[str, dict[str, np.ndarray]]

# First in the key of a random stream: what it is for (0 to 2 are the Evaluator's own).
_PREDICTIVE, _PRIOR, RESAMPLING, _SUMMED_OUT = 3, 4, 5, 6


def draw_groups(
    evaluator: Evaluator, num_draws: int, *, predictive: bool
) -> tuple[Groups, list[DeterministicSite]]:
    """Draw from a guide and its model, and return the groups and what is deterministic in them.

    Args:
        evaluator: of the pair on its batch.
        num_draws: S, for each datum.
        predictive: whether to draw observed sites as well.

    Returns:
        Arrays [S, N, ...]; without N where the batch is one datum, or a deterministic site has no
        value for each datum.
    """
    deterministic: DeterministicValues | None = None
    blocks: list[list[dict[str, dict[str, Tensor]]]] = []
    for chunks in by_block(evaluator.chunks(num_draws)):
        block = []
        for chunk in chunks:
            key = (_SUMMED_OUT, chunk.rows.start, chunk.particles.start)
            summed_out = evaluator.draw_summed_out(chunk.rows, chunk.values, key)
            values = {**chunk.values, **summed_out}
            if deterministic is None:
                deterministic = DeterministicValues(evaluator, chunk.rows, values)
            groups = _groups_of(evaluator, chunk, values, predictive)
            groups["posterior"] |= deterministic(chunk.rows, values)
            block.append(groups)
        blocks.append(block)
    sites = [] if deterministic is None else list(deterministic.sites.values())
    return _joined(blocks, {site.name for site in sites if not site.per_datum}), sites


def _groups_of(
    evaluator: Evaluator, chunk: Chunk, values: Values, predictive: bool
) -> dict[str, dict[str, Tensor]]:
    """Return the groups of a chunk of draws.

    Args:
        evaluator: that drew it.
        chunk: the draws.
        values: those of its latents, summed-out ones too.
        predictive: whether to draw observed sites as well.
    """
    structure, rows, weights = evaluator.structure, chunk.rows, chunk.weights
    key = (rows.start, chunk.particles.start)
    size = weights.num_particles
    sites = {name: value for name, value in values.items() if name in structure.sites}
    latent, observed = _by_kind(
        structure, evaluator.predict(rows, size, None, (_PRIOR, *key), observed=predictive)
    )
    groups = {
        "posterior": evaluator.by_datum(sites),
        "log_likelihood": evaluator.site_log_likelihood(rows, values),
        "sample_stats": {
            "log_p": weights.log_joint,
            "log_q": weights.log_guide,
            "log_weight": weights.total,
        },
        "prior": latent,
    }
    if predictive:
        drawn = evaluator.predict(rows, size, values, (_PREDICTIVE, *key))
        groups["posterior_predictive"] = _by_kind(structure, drawn)[1]
        groups["prior_predictive"] = observed
    if structure.data_plate is None:
        stats = groups["sample_stats"]
        groups["sample_stats"] = {name: value[:, 0] for name, value in stats.items()}
    return groups


def _by_kind(structure: Structure, drawn: Values) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return draws of latent sites, and of observed ones."""
    observed = {site.name for site in structure.observed}
    return (
        {name: value for name, value in drawn.items() if name not in observed},
        {name: value for name, value in drawn.items() if name in observed},
    )


def _joined(
    blocks: Sequence[Sequence[Mapping[str, Mapping[str, Tensor]]]], shared: Collection[str]
) -> Groups:
    """Join chunks of draws along the first dimension, and blocks of data along the second.

    Args:
        blocks: the groups of each chunk of each block.
        shared: variables of which each block says the same.
    """
    groups: Groups = {}
    for group, variables in blocks[0][0].items():
        groups[group] = {}
        for name in variables:
            parts = [
                np.concatenate([chunk[group][name].detach().cpu().numpy() for chunk in block])
                for block in blocks
            ]
            one = len(parts) == 1 or name in shared
            groups[group][name] = parts[0] if one else np.concatenate(parts, axis=1)
    return groups


def resample_groups(groups: Groups, index: np.ndarray, shared: Collection[str]) -> None:
    """Replace the draws of each datum by some of them, in place; log weights are dropped.

    Args:
        groups: of :func:`draw_groups`.
        index: which draws, [S, N].
        shared: variables of the posterior without a value for each datum. They are dropped, with
            a warning, unless they are the same for every draw.
    """
    whole = groups["sample_stats"].pop("log_weight").ndim == 1  # one datum, no datum dimension
    if not whole:
        posterior = groups["posterior"]
        for name in shared:
            if (posterior[name] == posterior[name][:1]).all():
                continue
            del posterior[name]
            logger.warning(
                "to_arviz: the deterministic site %r is of no datum, and draws are resampled "
                "datum by datum: it is left out",
                name,
            )
    for group in ("posterior", "log_likelihood", "sample_stats", "posterior_predictive"):
        for name, value in groups.get(group, {}).items():
            if whole:
                groups[group][name] = value[index[:, 0]]
            elif name not in shared:
                groups[group][name] = value[index, np.arange(index.shape[1])]


def observed_data(structure: Structure) -> dict[str, np.ndarray]:
    """Return the observed values of each site, [N, ...], NaN where one is missing."""
    return {site.name: observed_values(site, structure) for site in structure.observed}


def hide_absent(groups: Groups, structure: Structure) -> None:
    """Write NaN, in place, where masks say that a site has no value: padding, for example."""
    for name, site in structure.sites.items():
        nowhere = absent(site, structure)
        if nowhere is None:
            continue
        for group in ("posterior", "posterior_predictive", "prior", "prior_predictive"):
            if name in groups.get(group, {}):
                value = groups[group][name]
                dtype = np.result_type(value.dtype, np.float32)
                groups[group][name] = np.where(nowhere, np.nan, value).astype(dtype)
        if name in groups["observed_data"]:
            groups["observed_data"][name] = np.where(nowhere, np.nan, groups["observed_data"][name])
