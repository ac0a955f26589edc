r"""Missing values drawn given the seen ones, by importance resampling.

.. math::
    p(x_\mathrm{mis} | x_\mathrm{seen})
    = \int p(x_\mathrm{mis} | z)\, p(z | x_\mathrm{seen})\, dz
    \approx \sum_k \bar w_k\, p(x_\mathrm{mis} | z_k), \quad
    \bar w_k \propto \frac{p(x_\mathrm{seen} | z_k)\, p(z_k)}{q(z_k | x_\mathrm{seen})}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.diagnostics.smoothed_weights import SmoothedWeights
from pyro_vae.missing_data.imputation import Imputation
from pyro_vae.missing_data.moments import WeightedMoments
from pyro_vae.particles.evaluator import Chunk, Evaluator
from pyro_vae.particles.global_latents import given_text
from pyro_vae.particles.log_weights import LogWeights
from pyro_vae.particles.prepare import by_block, prepare
from pyro_vae.programs.counts import as_count
from pyro_vae.programs.observed import check_drawable
from pyro_vae.programs.site_arrays import absent, array_of, inner_dims
from pyro_vae.programs.sites import Site, Structure, names_of
from pyro_vae.programs.types import DataPlate, GivenValues, Program, Values

__all__ = ["impute"]

# First in the key of a random stream: what it is for (0 to 2 are the Evaluator's own).
_MOMENTS, _DRAWS, _RESAMPLING, _SUMMED_OUT = 3, 4, 5, 6


def impute(
    model: Program,
    guide: Program,
    *batch: Any,
    num_draws: int = 100,
    num_particles: int = 1000,
    given: GivenValues | None = None,
    data_plate: DataPlate = None,
    seed: int | None = None,
) -> Imputation:
    r"""Draw the missing values of a batch given the seen ones.

    Particles of the guide are weighted by the model of what is seen, the weights are
    Pareto-smoothed, and latents are drawn from them, with replacement, datum by datum; then the
    missing values from the likelihood given these latents (sampling importance resampling). The
    means, sds and standard errors are made of one predictive draw for each particle, with its
    weight; so they are closer than averages over the draws.

    They are as good as the importance weights: where a datum's ``pareto_k`` is above 0.7, the
    guide misses a part of the posterior, and standard errors are too small.

    Args:
        model: a Pyro model, in :class:`pyro_vae.MissingData`.
        guide: a Pyro guide.
        *batch: their arguments.
        num_draws: S, draws of each missing value.
        num_particles: K, particles of the guide for each datum.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        data_plate: as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.

    Returns:
        An Imputation.

    Raises:
        ValueError: where nothing is missing, for num_draws < 1, a likelihood that cannot be
            drawn from, and for what :func:`pyro_vae.log_weights` refuses.

    References:
        Rubin (1988). Using the SIR algorithm to simulate posterior distributions. Bayesian
        Statistics 3.
        Mattei & Frellsen (2019). MIWAE: deep generative modelling and imputation of incomplete
        data sets. ICML.
        Vehtari, Simpson, Gelman, Yao and Gabry (2024). Pareto smoothed importance sampling.
        Journal of Machine Learning Research 25(72).

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0)).unsqueeze(-1)
        ...         likelihood = dist.Normal(z.expand(*z.shape[:-1], 2), 0.1)
        ...         pyro.sample("x", likelihood.to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x[:, 0], 0.1))
        >>> x = torch.tensor([[1.0, float("nan")], [-2.0, float("nan")]])
        >>> imputed = pv.impute(pv.MissingData(model), guide, x, seed=0)
        >>> imputed.dataset["x"].sizes["draw"], imputed.dataset["x_mean"].round(1).values.tolist()
        (100, [[1.0, 1.0], [-2.0, -2.0]])
    """
    num_draws = as_count("num_draws", num_draws)
    num_particles = as_count("num_particles", num_particles)
    evaluator, fixed = prepare(model, guide, batch, given=given, data_plate=data_plate, seed=seed)
    structure = evaluator.structure
    sites = _with_missing(structure)
    check_drawable(structure, evaluator.batch.device)
    names = tuple(names_of(sites))
    blocks = [
        _impute_block(evaluator, list(chunks), names, num_draws)
        for chunks in by_block(evaluator.chunks(num_particles))
    ]
    dataset = _dataset(structure, sites, blocks).assign_attrs(given=given_text(fixed))
    return Imputation(dataset, names, num_particles)


def _with_missing(structure: Structure) -> list[Site]:
    """Return the sites to impute.

    Raises:
        ValueError: where there are none, or no latent site tells of them.
    """
    if not (structure.local_latents or structure.global_latents):
        raise ValueError(
            "impute: the model has no latent site, so what is missing does not depend on what was "
            "seen but through the likelihood: draw from it (pyro.infer.Predictive)"
        )
    sites = [
        site for site in structure.observed if site.missing is not None and bool(site.missing.any())
    ]
    if not sites:
        raise ValueError(
            "impute: no observed value is missing. A missing value is NaN in the data, or False "
            "in a mask, of a model in pyro_vae.MissingData; the observed sites are "
            f"{names_of(structure.observed)}"
        )
    return sites


def _impute_block(
    evaluator: Evaluator, chunks: Sequence[Chunk], names: Sequence[str], num_draws: int
) -> dict[str, np.ndarray]:
    """Return draws, means, sds and standard errors of one block of data, by variable name.

    With a dimension of data in front, of size one where the batch is one datum.
    """
    rows = chunks[0].rows
    latents = _latents(evaluator, chunks)
    total = LogWeights.concatenate([chunk.weights for chunk in chunks], 0).total
    smoothed = SmoothedWeights.of(total.T.cpu().numpy())
    index = smoothed.draw(num_draws, [evaluator.seed, _RESAMPLING, rows.start])
    chosen = _choose(latents, torch.as_tensor(index).to(total.device), evaluator.structure)
    drawn = list(_predicted(evaluator, rows, chosen, _DRAWS))
    moments = {name: WeightedMoments(smoothed.weights) for name in names}
    for piece in _predicted(evaluator, rows, latents, _MOMENTS):
        for name in names:
            moments[name].update(piece[name])
    found = {"pareto_k": smoothed.pareto_k, "ess": smoothed.ess}
    for name in names:
        found[name] = torch.cat([values[name] for values in drawn]).cpu().numpy().swapaxes(0, 1)
        found |= {f"{name}_{what}": value for what, value in moments[name].results().items()}
    return found


def _latents(evaluator: Evaluator, chunks: Sequence[Chunk]) -> dict[str, Tensor]:
    """Return the latents of a block's particles, summed-out ones drawn from their posterior."""
    parts: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        key = (_SUMMED_OUT, chunk.rows.start, chunk.particles.start)
        summed = evaluator.draw_summed_out(chunk.rows, chunk.values, key)
        for name, value in {**chunk.values, **summed}.items():
            if name in evaluator.structure.sites:  # not the guide's auxiliary ones
                parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


def _predicted(
    evaluator: Evaluator, rows: slice, latents: Values, purpose: int
) -> Iterator[dict[str, Tensor]]:
    """Draw the observed sites given latents, piece by piece: ``[k, N, *inner, *event]``."""
    num_draws = next(iter(latents.values())).shape[0]
    step = max(1, evaluator.chunk_pairs // (rows.stop - rows.start))
    for start in range(0, num_draws, step):
        some = {name: value[start : start + step] for name, value in latents.items()}
        size = min(step, num_draws - start)
        drawn = evaluator.predict(rows, size, some, (purpose, rows.start, start))
        one_datum = evaluator.structure.data_dim is None
        yield {name: v.unsqueeze(1) if one_datum else v for name, v in drawn.items()}


def _choose(latents: Values, index: Tensor, structure: Structure) -> dict[str, Tensor]:
    """Take particles index [S, N] of each datum from ``[K, *plates, *event]``."""
    if structure.data_dim is None:
        return {name: value[index[:, 0]] for name, value in latents.items()}
    data = torch.arange(index.shape[1], device=index.device)
    chosen = {}
    for name, value in latents.items():
        axis = value.ndim - len(structure.sites[name].event_shape) + structure.data_dim
        chosen[name] = value.movedim(axis, 1)[index, data].movedim(1, axis)
    return chosen


def _dataset(
    structure: Structure, sites: Sequence[Site], blocks: Sequence[Mapping[str, np.ndarray]]
) -> xr.Dataset:
    """Join blocks of data, and put the seen values in their places."""
    found = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    lead = [] if structure.data_plate is None else ["datum"]
    if not lead:
        found = {name: value[0] for name, value in found.items()}
    variables: dict[str, tuple[Sequence[str], np.ndarray]] = {}
    for site in sites:
        name, dims = site.name, lead + inner_dims(site, structure)
        missing = array_of(torch.as_tensor(site.missing), site, structure)
        value = array_of(site.value, site, structure)
        if (nowhere := absent(site, structure)) is not None:
            value = np.where(nowhere, np.nan, value)  # padding, or of another site
        draws = found[name].swapaxes(0, 1) if lead else found[name]
        variables[name] = (["draw", *dims], np.where(missing, draws, value))
        variables[f"{name}_observed"] = (dims, ~missing)
        for what, seen in (("mean", value), ("mean_se", 0.0), ("sd", 0.0)):
            variables[f"{name}_{what}"] = (dims, np.where(missing, found[f"{name}_{what}"], seen))
    variables |= {name: (lead, found[name]) for name in ("pareto_k", "ess")}
    dataset = xr.Dataset(variables)
    return dataset.assign_coords({dim: np.arange(dataset.sizes[dim]) for dim in ("draw", *lead)})
