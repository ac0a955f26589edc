r"""Missing values drawn given the seen ones, by importance resampling.

.. math::
    p(x_\mathrm{mis} | x_\mathrm{seen})
    = \int p(x_\mathrm{mis} | z)\, p(z | x_\mathrm{seen})\, dz
    \approx \sum_k \bar w_k\, p(x_\mathrm{mis} | z_k), \quad
    \bar w_k \propto \frac{p(x_\mathrm{seen} | z_k)\, p(z_k)}{q(z_k | x_\mathrm{seen})}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_vae.diagnostics.pareto_k import SmoothedWeights
from pyro_vae.diagnostics.verdict import Weights
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.estimators import LogWeights
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.particles.global_latents import given_text
from pyro_vae.particles.weighted_moments import WeightedMoments
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.observed import check_drawable
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.sites import Site, Structure, absent, array_of, inner_dims, names_of
from pyro_vae.programs.types import DataPlate, GivenValues, Program, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OF_WEIGHTS = ("pareto_k", "ess", "tail_share")


@dataclass(frozen=True)
class Imputation:
    """The result of :func:`impute`.

    Attributes:
        dataset: of each site with missing values, here ``x``, over the data: ``x``, its draws
            (dims draw, datum, ...), seen values in place; ``x_observed``, which values were seen;
            ``x_mean`` and ``x_sd`` of each missing value given what is seen, and
            ``x_mean_se``, the Monte Carlo standard error of that mean (of a seen value: itself, 0
            and 0). ``pareto_k``, ``ess`` and ``tail_share`` of each datum's importance weights
            (:mod:`pyro_vae.diagnostics.verdict`). Without the dimension datum where the batch is
            treated as one.
        sites: the names of these sites.
        num_particles: K, particles for each datum.
    """

    dataset: xr.Dataset
    sites: tuple[str, ...]
    num_particles: int

    def plot(
        self,
        *,
        site: str | None = None,
        shape: tuple[int, int] | None = None,
        truth: ArrayLike | None = None,
        num_columns: int = 10,
        num_draws: int = 3,
        unit: str = "intensity",
        ax: Axes | None = None,
    ) -> Axes:
        """Draw images: what is seen, its mean imputation, draws, and the truth; a column per datum.

        Needs the extra ``plots``.

        Args:
            site: which site; may be left out where there is one.
            shape: (height, width); may be left out for images that are square or [N, H, W].
            truth: the whole images, [N, H * W] or [N, H, W], if they are known.
            num_columns: how many data, from the first.
            num_draws: how many draws of each.
            unit: what the grey scale measures.
            ax: where to draw; new axes if None.

        Returns:
            The axes.

        Raises:
            ValueError: for a site that is not there, or images of another shape.
        """
        from pyro_vae.plots.images import plot_imputation

        if site is None and len(self.sites) > 1:
            raise ValueError(f"site=None: the sites {list(self.sites)} were imputed; name one")
        name = self.sites[0] if site is None else site
        if name not in self.sites:
            raise ValueError(f"site={site!r}: the imputed sites are {list(self.sites)}")
        if "datum" not in self.dataset.dims:
            raise ValueError("the batch was treated as one datum: there are no rows to draw")
        draws = self.dataset[name].values[:num_draws]
        mean, seen = (self.dataset[f"{name}_{what}"].values for what in ("mean", "observed"))
        shape = _image_shape(mean.shape[1:]) if shape is None else shape
        rows = len(mean)
        return plot_imputation(
            mean.reshape(rows, -1),
            draws.reshape(len(draws), rows, -1),
            seen.reshape(rows, -1),
            shape,
            truth=None if truth is None else np.asarray(truth).reshape(rows, -1),
            num_columns=num_columns,
            unit=unit,
            ax=ax,
        )

    @property
    def doubt(self) -> str:
        """For how many data weights, and so means and errors, are not to be trusted, in words."""
        columns = (np.atleast_1d(self.dataset[name].values) for name in _OF_WEIGHTS)
        return Weights(self.num_particles, *columns).doubt

    def __repr__(self) -> str:
        data = self.dataset
        k_hat = np.atleast_1d(data["pareto_k"].values)
        lines = []
        for name in self.sites:
            missing = ~data[f"{name}_observed"].values
            sd, error = (data[f"{name}_{what}"].values[missing] for what in ("sd", "mean_se"))
            per_datum = missing.reshape(len(k_hat), -1).any(1)
            lines.append(
                f"{name}: {missing.sum()} of {missing.size} values missing, in {per_datum.sum()} "
                f"of {len(k_hat)} data; median sd {np.median(sd):.3g}, median standard error of "
                f"the mean {np.median(error):.2g}"
            )
        lines.append(
            f"{data.sizes['draw']} draws; weights of {self.num_particles} particles: median ess "
            f"{np.median(data['ess'].values):.0f}, worst k-hat {k_hat.max():.2f}"
        )
        return "\n".join(lines) + (f"; {self.doubt}" if self.doubt else "")


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

    They are as good as the importance weights: where these have a heavy tail that carries weight,
    or few are effective (:mod:`pyro_vae.diagnostics.verdict`), the guide misses a part of the
    posterior, and standard errors are too small. ``doubt`` says so, and for how many data.

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
    evaluator, fixed = prepare(model, guide, batch, given, data_plate, seed)
    structure = evaluator.structure
    sites = _with_missing(structure)
    check_drawable(structure, evaluator.batch.device)
    names = tuple(names_of(sites))

    def imputed(chunks: Iterable[Chunk]) -> dict[str, np.ndarray]:
        return _impute_block(evaluator, list(chunks), names, num_draws)

    blocks = list(evaluator.over_blocks(imputed, num_particles))
    dataset = _dataset(structure, sites, blocks).assign_attrs(given=given_text(fixed))
    return Imputation(dataset, names, num_particles)


def _with_missing(structure: Structure) -> list[Site]:
    """Return the sites to impute; ValueError where there are none, or no latent tells of them."""
    if not (structure.local_latents or structure.global_latents):
        raise ValueError(
            "impute: the model has no latent site, so what is missing does not depend on what was "
            "seen but through the likelihood: draw from it (pyro.infer.Predictive)"
        )
    observed = structure.observed
    sites = [site for site in observed if site.missing is not None and bool(site.missing.any())]
    if not sites:
        raise ValueError(
            "impute: no observed value is missing. A missing value is NaN in the data, or False in "
            f"a mask, of a model in pyro_vae.MissingData; observed sites are {names_of(observed)}"
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
    index = smoothed.draw(num_draws, [evaluator.seed, Purpose.IMPUTED_CHOICE, rows.start])
    chosen = _choose(latents, torch.as_tensor(index).to(total.device), evaluator.structure)
    drawn = list(_predicted(evaluator, rows, chosen, Purpose.IMPUTED_DRAWS))
    moments = {name: WeightedMoments(smoothed.weights) for name in names}
    for piece in _predicted(evaluator, rows, latents, Purpose.IMPUTED_MOMENTS):
        for name in names:
            moments[name].update(piece[name])
    found = {name: getattr(smoothed.raw, name) for name in _OF_WEIGHTS}
    for name in names:
        found[name] = torch.cat([values[name] for values in drawn]).cpu().numpy().swapaxes(0, 1)
        found |= {f"{name}_{what}": value for what, value in moments[name].results().items()}
    return found


def _latents(evaluator: Evaluator, chunks: Sequence[Chunk]) -> dict[str, Tensor]:
    """Return the latents of a block's particles, summed-out ones drawn from their posterior."""
    parts: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        values = chunk.values
        key = Purpose.IMPUTED_SUMMED_OUT, chunk.rows.start, chunk.particles.start
        for name, value in {**values, **evaluator.draw_summed_out(chunk.rows, values, key)}.items():
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
        is_one = evaluator.structure.data_dim is None
        yield {name: value.unsqueeze(1) if is_one else value for name, value in drawn.items()}


def _choose(latents: Values, index: Tensor, structure: Structure) -> dict[str, Tensor]:
    """Take particles index [S, N] of each datum from ``[K, *plates, *event]``."""
    chosen = {}
    for name, value in latents.items():
        shape = [len(index), *[1] * (value.ndim - 1)]
        if structure.data_dim is not None:
            shape[structure.data_dim - len(structure.sites[name].event_shape)] = -1
        chosen[name] = torch.take_along_dim(value, index.reshape(shape), 0)
    return chosen


def _dataset(
    structure: Structure, sites: Sequence[Site], blocks: Sequence[Mapping[str, np.ndarray]]
) -> xr.Dataset:
    """Join blocks of data, and put the seen values in their places."""
    lead = [] if structure.data_plate is None else ["datum"]
    found = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    found = found if lead else {name: value[0] for name, value in found.items()}
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
    variables |= {name: (lead, found[name]) for name in _OF_WEIGHTS}
    dataset = xr.Dataset(variables)
    return dataset.assign_coords({dim: np.arange(dataset.sizes[dim]) for dim in ("draw", *lead)})


def _image_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a datum's shape, if it is plain; a single channel is."""
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) == 2:
        return shape[0], shape[1]
    side = math.isqrt(math.prod(shape))
    if len(shape) != 1 or side**2 != shape[0]:
        raise ValueError(
            f"shape=None: a datum has shape {list(shape)}, which is no square image; give shape"
        )
    return side, side
