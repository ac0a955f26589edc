"""Posterior draws and what belongs with them, in ArviZ's own container."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_vae.diagnostics.pareto_k import doubts
from pyro_vae.diagnostics.smoothed_weights import SmoothedWeights
from pyro_vae.export import arviz_versions as arviz_bridge
from pyro_vae.export.deterministic import DeterministicSite, DeterministicValues
from pyro_vae.particles.global_latents import given_text
from pyro_vae.particles.prepare import prepare
from pyro_vae.programs.counts import as_count
from pyro_vae.programs.observed import check_drawable
from pyro_vae.programs.sites import Site, Structure, inner_dims, leading_datum
from pyro_vae.programs.types import DataPlate, GivenValues, Program

__all__ = ["to_arviz"]

logger = logging.getLogger(__name__)

_DATUM = "datum"
_WITHOUT_DRAWS = ("observed_data", "constant_data")


def to_arviz(
    model: Program,
    guide: Program,
    *batch: Any,
    num_draws: int = 1000,
    resample: str | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    data_plate: DataPlate = None,
    predictive: bool = True,
    given: GivenValues | None = None,
    seed: int | None = None,
) -> Any:
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
            posterior (sample_stats then has no log_weight). Where k-hat is above 0.7 it does not
            bring them there: a warning and the attribute ``doubt`` say for how many data.
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
    scorer, fixed = prepare(model, guide, batch, given=given, data_plate=data_plate, seed=seed)
    structure = scorer.structure
    if predictive:
        check_drawable(structure, scorer.batch.device)
    deterministic: DeterministicValues | None = None
    blocks: dict[int, dict[str, list[dict[str, Tensor]]]] = {}
    for chunk in scorer.chunks(num_draws):
        block = blocks.setdefault(chunk.rows.start, {})
        key = (chunk.rows.start, chunk.particles.start)
        size = chunk.weights.num_particles
        summed = scorer.draw_summed_out(chunk.rows, chunk.values, (6, *key))
        values = {**chunk.values, **summed}
        if deterministic is None:
            deterministic = DeterministicValues(scorer, chunk.rows, values)
        found = {
            "posterior": scorer.by_datum({n: v for n, v in values.items() if n in structure.sites}),
            "log_likelihood": scorer.site_log_likelihood(chunk.rows, values),
            "sample_stats": {
                "log_p": chunk.weights.log_joint,
                "log_q": chunk.weights.log_guide,
                "log_weight": chunk.weights.total,
            },
        }
        found["posterior"] |= deterministic(chunk.rows, values)
        prior = scorer.predict(chunk.rows, size, None, (4, *key), observed=predictive)
        found["prior"] = {n: v for n, v in prior.items() if not _is_observed(structure, n)}
        if predictive:
            drawn = scorer.predict(chunk.rows, size, values, (3, *key))
            found["posterior_predictive"] = {
                n: v for n, v in drawn.items() if _is_observed(structure, n)
            }
            found["prior_predictive"] = {
                n: v for n, v in prior.items() if _is_observed(structure, n)
            }
        for group, variables in found.items():
            block.setdefault(group, []).append(variables)
    sites = {} if deterministic is None else deterministic.sites
    groups = _join(list(blocks.values()), {n for n, s in sites.items() if s.data_axis is None})
    if data_plate is False:
        groups["sample_stats"] = {
            name: value[:, 0] for name, value in groups["sample_stats"].items()
        }
    log_weight = groups["sample_stats"]["log_weight"]
    smoothed = SmoothedWeights.of(np.atleast_2d(log_weight.T))
    if resample == "psis":
        index = smoothed.draw(num_draws, [scorer.seed, 5])
        _resample(groups, index, [n for n, s in sites.items() if s.data_axis is None])
    groups["constant_data"] = {
        "pareto_k": smoothed.pareto_k,
        "ess": smoothed.ess,
    }
    doubt = doubts(smoothed.pareto_k, smoothed.ess, num_draws)
    if resample == "psis" and doubt:
        logger.warning("to_arviz: resampled draws, %s", doubt)
    if resample is None and scorer.outside:
        logger.warning(
            "to_arviz: %d of the %d draws of the guide, over all data, have no density under the "
            "model, through %s: they are no draws of a posterior. Take resample='psis'",
            int(np.isneginf(log_weight).sum()),
            log_weight.size,
            ", ".join(scorer.outside),
        )
    groups["observed_data"] = {
        site.name: leading_datum(_with_missing(site), site, structure).detach().cpu().numpy()
        for site in structure.observed
    }
    _leave_out(groups, structure)
    arrays = {
        group: {
            name: value if group in _WITHOUT_DRAWS else value[np.newaxis]
            for name, value in variables.items()
        }
        for group, variables in groups.items()
    }
    names, labels = _names(structure, groups, list(sites.values()), coords, dims)
    return arviz_bridge.container(
        arrays,
        coords=labels,
        dims=names,
        attrs={
            "inference_library": "pyro",
            "inference_library_version": pyro.__version__,
            "resampled": resample or "no",
            "doubt": doubt,
            "given": given_text(fixed),
        },
    )


def _leave_out(groups: dict[str, dict[str, np.ndarray]], structure: Structure) -> None:
    """Write NaN where the model's masks say that there is no value: padding, for example."""
    for site in structure.sites.values():
        out = site.left_out
        if site.missing is not None:
            out = out & ~site.missing  # a missing value is there, and drawn
        if not bool(out.any()):
            continue
        absent = leading_datum(out, site, structure).cpu().numpy()
        for group in ("posterior", "posterior_predictive", "prior", "prior_predictive"):
            if site.name in groups.get(group, {}):
                value = groups[group][site.name]
                groups[group][site.name] = np.where(absent, np.nan, value).astype(
                    np.result_type(value.dtype, np.float32)
                )
        if site.name in groups["observed_data"]:
            observed = groups["observed_data"][site.name]
            groups["observed_data"][site.name] = np.where(absent, np.nan, observed)


def _join(
    blocks: list[dict[str, list[dict[str, Tensor]]]], without_data: Collection[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Join chunks of draws along the first dimension, and blocks of data along the second.

    Args:
        blocks: a group's chunks, by its name, of each block.
        without_data: variables of which each block says the same.
    """
    groups: dict[str, dict[str, np.ndarray]] = {}
    for group in blocks[0]:
        groups[group] = {}
        for name in blocks[0][group][0]:
            parts = [
                np.concatenate([chunk[name].detach().cpu().numpy() for chunk in block[group]])
                for block in blocks
            ]
            one = len(parts) == 1 or name in without_data
            groups[group][name] = parts[0] if one else np.concatenate(parts, axis=1)
    return groups


def _resample(
    groups: dict[str, dict[str, np.ndarray]], index: np.ndarray, without_data: Collection[str]
) -> None:
    """Replace the draws of each datum by some of them, by number [S, N].

    Args:
        groups: replaced in place.
        index: the numbers.
        without_data: variables of the posterior that are of no datum's draws, and left out.
    """
    whole = groups["sample_stats"].pop("log_weight").ndim == 1  # one datum, no datum dimension
    if not whole:
        posterior = groups["posterior"]
        for name in without_data:
            if (posterior[name] == posterior[name][:1]).all():  # the same whatever is drawn
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
            elif name not in without_data:
                groups[group][name] = value[index, np.arange(index.shape[1])]


def _with_missing(site: Site) -> Tensor:
    """Return a site's observed value in its likelihood's shape, NaN where it is missing."""
    value = site.value if site.missing is None else site.value.masked_fill(site.missing, np.nan)
    shape = torch.broadcast_shapes(value.shape, (*site.batch_shape, *site.event_shape))
    return value.broadcast_to(shape)


def _is_observed(structure: Structure, name: str) -> bool:
    return structure.sites[name].kind == "observed"


def _names(
    structure: Structure,
    groups: Mapping[str, Mapping[str, np.ndarray]],
    deterministic: Sequence[DeterministicSite],
    coords: Mapping[str, Any] | None,
    dims: Mapping[str, Sequence[str]] | None,
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return the dimension names of every variable, and the labels of the dimensions."""
    labels = dict(coords or {})
    lead = [] if structure.data_plate is None else [_DATUM]
    if lead:
        labels.setdefault(_DATUM, np.arange(structure.num_data))
    given = dict(dims or {})
    tails = {name: (lead, inner_dims(site, structure)) for name, site in structure.sites.items()}
    for site in deterministic:
        tails[site.name] = ([] if site.data_axis is None else lead, list(site.dims))
    if unknown := set(given) - set(tails):
        raise ValueError(
            f"dims names {sorted(unknown)}, which are not sites of the model: {sorted(tails)}"
        )
    names: dict[str, list[str]] = {
        **{name: list(lead) for name in groups["sample_stats"]},
        **{name: [_DATUM] for name in groups["constant_data"]},  # one, where there is one
    }
    for name, (first, tail) in tails.items():
        if name in given:
            if len(given[name]) != len(tail):
                raise ValueError(
                    f"dims[{name!r}]={list(given[name])}: {len(tail)} names are needed, for the "
                    f"dimensions after {', '.join(['chain', 'draw', *first])}"
                )
            tail = list(given[name])
        names[name] = first + tail
    return names, labels
