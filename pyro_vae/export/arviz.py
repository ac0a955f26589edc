"""Posterior draws and what belongs with them, in ArviZ's own container."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pyro
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_vae.arviz_versions import Container, container
from pyro_vae.diagnostics.pareto_k import SmoothedWeights
from pyro_vae.export.deterministic import DeterministicSite, DeterministicValues
from pyro_vae.particles.evaluator import Chunk, Evaluator, prepare
from pyro_vae.particles.global_latents import given_text
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.observed import check_drawable
from pyro_vae.programs.sites import Structure, absent, inner_dims, observed_values
from pyro_vae.programs.types import DataPlate, GivenValues, Program, Values

logger = logging.getLogger(__name__)

# How draws of the guide are brought closer to the posterior: Pareto-smoothed importance sampling.
Resampling: TypeAlias = Literal["psis"]

_DATUM = "datum"
_WITHOUT_DRAWS = ("observed_data", "constant_data")
# Arrays of each group, by the name of their variable: draws first, then the datum.
Groups: TypeAlias = dict[str, dict[str, np.ndarray]]

# First in the key of a random stream, one for each purpose (0 to 2 are the Evaluator's own).
_PREDICTIVE, _PRIOR, _RESAMPLING, _SUMMED_OUT = 3, 4, 5, 6


def to_arviz(
    model: Program,
    guide: Program,
    *batch: Any,
    num_draws: int = 1000,
    resample: Resampling | None = None,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    data_plate: DataPlate = None,
    predictive: bool = True,
    given: GivenValues | None = None,
    seed: int | None = None,
) -> Container:
    """Return draws of the guide in ArviZ's container, one chain.

    InferenceData on ArviZ 0.x, an xarray DataTree on 1.x. The groups: posterior
    (local latents, and the model's pyro.deterministic sites), log_likelihood (each observed
    site, a number per datum, as ``az.loo`` takes it), sample_stats (log_p = log p(x, z), log_q,
    log_weight, per datum), observed_data, prior, constant_data (pareto_k and ess of each datum's
    importance weights), and with ``predictive`` posterior_predictive and prior_predictive.
    Without, no observed site is drawn, and a latent's prior is that given the observed sites
    before it.

    Discrete latents that the guide leaves out are summed out of log_p and log_weight, and
    drawn from their exact posterior, given each draw of the others, for the posterior;
    posterior_predictive and log_likelihood go on from these draws.

    Values that a mask of the model leaves out (steps past the end of a sequence) are NaN.

    Leaving a datum out leaves nothing to say of its own latents, so ``az.loo`` of a model
    with local latents reports k-hat above 0.7, and rightly.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        *batch: their arguments.
        num_draws: draws for each datum.
        resample: None for draws of the guide; "psis" to resample them, datum by datum,
            with Pareto-smoothed importance weights, which brings them closer to the
            posterior (sample_stats then has no log_weight). Weights that are not to be trusted
            (:mod:`pyro_vae.diagnostics.verdict`) do not bring them there: a warning and the
            attribute ``doubt`` say for how many data and why.
        coords: dimension name to labels; "datum" labels the data.
        dims: variable name to the names of its dimensions after (chain, draw, datum).
        data_plate: as in :func:`pyro_vae.log_weights`.
        predictive: whether to draw new data as well.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.

    Returns:
        ArviZ's container. Arrays have dimensions (chain, draw, datum, ...); with
        data_plate=False there is no datum dimension, and log_likelihood has the plates
        of each observed site.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses, num_draws < 1,
            another ``resample``, coords and dims that do not fit, and, with ``predictive``, a
            likelihood that cannot be drawn from.
    """
    num_draws = as_count("num_draws", num_draws)
    if resample not in (None, "psis"):
        raise ValueError(f"resample={resample!r}: None or 'psis' is needed")
    evaluator, fixed = prepare(model, guide, batch, given, data_plate, seed)
    structure = evaluator.structure
    if predictive:
        check_drawable(structure, evaluator.batch.device)
    groups, deterministic = _draw_groups(evaluator, num_draws, predictive=predictive)
    log_weight = groups["sample_stats"]["log_weight"]
    smoothed = SmoothedWeights.of(np.atleast_2d(log_weight.T))
    look = smoothed.look
    if resample is None and evaluator.outside:
        logger.warning(
            "to_arviz: %d of the %d draws of the guide, over all data, have no density under the "
            "model, through %s: they are no draws of a posterior. Take resample='psis'",
            int(np.isneginf(log_weight).sum()),
            log_weight.size,
            ", ".join(evaluator.outside),
        )
    elif resample is not None:
        index = smoothed.draw(num_draws, [evaluator.seed, _RESAMPLING])
        _resample(groups, index, [site.name for site in deterministic if site.data_axis is None])
        if look.doubt:
            logger.warning("to_arviz: resampled draws, %s", look.doubt)
    groups["constant_data"] = {"pareto_k": look.pareto_k, "ess": look.ess}
    groups["observed_data"] = {s.name: observed_values(s, structure) for s in structure.observed}
    _hide_absent(groups, structure)
    names, labels = _names(structure, groups, deterministic, coords, dims)
    for group, variables in groups.items():
        if group not in _WITHOUT_DRAWS:
            groups[group] = {name: value[np.newaxis] for name, value in variables.items()}
    attrs = {
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "resampled": resample or "no",
        "doubt": look.doubt,
        "given": given_text(fixed),
    }
    return container(groups, coords=labels, dims=names, attrs=attrs)


def _draw_groups(
    evaluator: Evaluator, num_draws: int, *, predictive: bool
) -> tuple[Groups, list[DeterministicSite]]:
    """Return draws of a guide, its model and the prior, and the deterministic sites among them.

    As [S, N, ...]; without N where the batch is one datum, or a deterministic site has no value
    for each datum.
    """
    deterministic: DeterministicValues | None = None
    blocks: list[list[dict[str, dict[str, Tensor]]]] = []
    for chunks in evaluator.blocks(num_draws):
        block = []
        for chunk in chunks:
            key = (_SUMMED_OUT, chunk.rows.start, chunk.particles.start)
            values = {**chunk.values, **evaluator.draw_summed_out(chunk.rows, chunk.values, key)}
            if deterministic is None:
                deterministic = DeterministicValues(evaluator, chunk.rows, values)
            groups = _groups_of(evaluator, chunk, values, predictive)
            groups["posterior"] |= deterministic(chunk.rows, values)
            block.append(groups)
        blocks.append(block)
    sites = [] if deterministic is None else list(deterministic.sites.values())
    return _joined(blocks, {site.name for site in sites if site.data_axis is None}), sites


def _groups_of(
    evaluator: Evaluator, chunk: Chunk, values: Values, predictive: bool
) -> dict[str, dict[str, Tensor]]:
    """Return the groups of a chunk of draws, given the values of all its latents."""
    structure, rows, weights = evaluator.structure, chunk.rows, chunk.weights
    key, size = (rows.start, chunk.particles.start), weights.num_particles

    def of_kind(drawn: Values, observed: bool) -> dict[str, Tensor]:
        seen = {site.name for site in structure.observed}
        return {name: value for name, value in drawn.items() if (name in seen) == observed}

    prior = evaluator.predict(rows, size, None, (_PRIOR, *key), observed=predictive)
    stats = {"log_p": weights.log_joint, "log_q": weights.log_guide, "log_weight": weights.total}
    if structure.data_plate is None:
        stats = {name: value[:, 0] for name, value in stats.items()}
    groups = {
        "posterior": evaluator.by_datum({n: v for n, v in values.items() if n in structure.sites}),
        "log_likelihood": evaluator.site_log_likelihood(rows, values),
        "sample_stats": stats,
        "prior": of_kind(prior, observed=False),
    }
    if predictive:
        drawn = evaluator.predict(rows, size, values, (_PREDICTIVE, *key))
        groups["posterior_predictive"] = of_kind(drawn, observed=True)
        groups["prior_predictive"] = of_kind(prior, observed=True)
    return groups


def _joined(
    blocks: Sequence[Sequence[Mapping[str, Mapping[str, Tensor]]]], shared: Collection[str]
) -> Groups:
    """Join chunks of draws along the first dimension, and blocks of data along the second.

    Variables that are shared are the same in each block.
    """

    def joined(group: str, name: str) -> np.ndarray:
        pieces = ([chunk[group][name].detach().cpu() for chunk in block] for block in blocks)
        parts = [torch.cat(piece) for piece in pieces]
        return (parts[0] if name in shared or len(parts) == 1 else torch.cat(parts, 1)).numpy()

    variables = blocks[0][0].items()
    return {group: {name: joined(group, name) for name in names} for group, names in variables}


def _resample(groups: Groups, index: np.ndarray, shared: Collection[str]) -> None:
    """Replace the draws of each datum by some of them, [S, N], in place; drop log weights.

    Shared variables, without a value for each datum, are dropped with a warning unless they are
    the same for every draw.
    """
    whole = groups["sample_stats"].pop("log_weight").ndim == 1  # one datum, no datum dimension
    posterior = groups["posterior"]
    for name in () if whole else shared:
        if not (posterior[name] == posterior[name][:1]).all():
            del posterior[name]
            logger.warning(
                "to_arviz: the deterministic site %r is of no datum, and draws are resampled "
                "datum by datum: it is left out",
                name,
            )
    chosen = (index[:, 0],) if whole else (index, np.arange(index.shape[1]))
    for group in ("posterior", "log_likelihood", "sample_stats", "posterior_predictive"):
        for name, value in groups.get(group, {}).items():
            if whole or name not in shared:
                groups[group][name] = value[chosen]


def _hide_absent(groups: Groups, structure: Structure) -> None:
    """Write NaN, in place, where masks say that a site has no value: padding, for example."""
    drawn = ("posterior", "posterior_predictive", "prior", "prior_predictive")
    for name, site in structure.sites.items():
        nowhere = absent(site, structure)
        for group in (*drawn, "observed_data"):
            if nowhere is not None and (value := groups.get(group, {}).get(name)) is not None:
                hidden = np.where(nowhere, np.nan, value)
                dtype = np.result_type(value.dtype, np.float32) if group in drawn else hidden.dtype
                groups[group][name] = hidden.astype(dtype)


def _names(
    structure: Structure,
    groups: Groups,
    deterministic: Sequence[DeterministicSite],
    coords: Mapping[str, ArrayLike] | None,
    dims: Mapping[str, Sequence[str]] | None,
) -> tuple[dict[str, list[str]], dict[str, ArrayLike]]:
    """Return the dimension names of every variable, and the labels of the dimensions."""
    lead = [] if structure.data_plate is None else [_DATUM]
    labels = {**{name: np.arange(structure.num_data) for name in lead}, **(coords or {})}
    leads = dict.fromkeys(structure.sites, lead)
    leads |= {site.name: [] if site.data_axis is None else lead for site in deterministic}
    tails = {name: inner_dims(site, structure) for name, site in structure.sites.items()}
    tails |= {site.name: list(site.dims) for site in deterministic}
    if unknown := set(dims or {}) - set(tails):
        raise ValueError(
            f"dims names {sorted(unknown)}, which are not sites of the model: {sorted(tails)}"
        )
    for name, given in (dims or {}).items():
        if len(given) != len(tails[name]):
            raise ValueError(
                f"dims[{name!r}]={list(given)}: {len(tails[name])} names are needed, for the "
                f"dimensions after {', '.join(['chain', 'draw', *leads[name]])}"
            )
        tails[name] = list(given)
    names = dict.fromkeys(groups["sample_stats"], lead)
    names |= {name: [_DATUM] for name in groups["constant_data"]}  # one, where there is one
    return {**names, **{name: leads[name] + tail for name, tail in tails.items()}}, labels
