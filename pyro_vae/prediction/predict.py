r"""What a fitted model predicts: means, standard deviations and draws of any site.

.. math::
    p(\tilde x | x) = \int p(\tilde x | z)\, p(z | x)\, dz
    \approx \sum_k \bar w_k\, p(\tilde x | z_k), \quad z_k \sim q(z | x)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_vae.diagnostics.pareto_k import SmoothedWeights
from pyro_vae.diagnostics.verdict import Weights
from pyro_vae.export.deterministic import DeterministicSite, DeterministicValues
from pyro_vae.export.draws import Resampling
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.global_latents import given_text
from pyro_vae.particles.run import Run
from pyro_vae.particles.weighted_moments import WeightedMoments
from pyro_vae.prediction.dataset import ENDS, WEIGHTS, named
from pyro_vae.prediction.expectations import error_of_shares, expected_of, is_categorical, one_hot
from pyro_vae.prediction.pairs import Prepared, prepared
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.observed import check_drawable
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.sites import absent, names_of
from pyro_vae.programs.types import DataPlate, GivenValues, Program, Values

__all__ = ["predict", "reconstruct"]

_NUMBERS = 2**22  # of all sites that are predicted at once


def predict(
    model: Program,
    guide: Program,
    *batch: Any,
    sites: Iterable[str] | None = None,
    num_draws: int = 1000,
    keep_draws: int = 100,
    resample: Resampling | None = None,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    given: GivenValues | None = None,
    data_plate: DataPlate = None,
    seed: int | None = None,
) -> xr.Dataset:
    r"""Return the posterior predictive distribution of sites, for data at hand or new ones.

    .. math:: p(\tilde x | x) = \int p(\tilde x | z)\, p(z | x)\, dz

    Latents are drawn from the guide, all else that the model samples from the model given these:
    an observed site is drawn anew, whatever its value, missing values too. A latent is the guide's
    draw, a pyro.deterministic site its value given all that is drawn.

    The mean of a site that is drawn anew is the average of the means of its distribution given each
    draw of what it depends on, where the distribution has one: it has less noise than an average of
    draws, and tells rare events. Global latents that the guide proposes are drawn with all others.

    An outcome that is not known yet may be passed as None where the model has ``obs=`` of it, or as
    NaN under :class:`pyro_vae.MissingData`: what is drawn in its place then conditions nothing.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        *batch: their arguments: data, with the covariates that the model takes.
        sites: names of observed, latent or deterministic sites; the observed ones by default.
        num_draws: K, draws of each datum that means and standard deviations are over.
        keep_draws: how many of them are returned, at most; 0 for none, and memory holds none then.
        resample: None for draws of the guide; "psis" to weigh them by Pareto-smoothed importance
            weights, which brings them closer to the posterior.
        coords: dimension name to labels; "datum" labels the data.
        dims: site name to the names of its dimensions after (draw, datum).
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        data_plate: as in :func:`pyro_vae.log_weights`; False for data that are predicted jointly.
        seed: of the draws; None takes one from the global random state.

    Returns:
        An xarray.Dataset. Of each site x: ``x_mean`` [datum, ...] with its Monte Carlo standard
        error ``x_mean_se``, ``x_sd``, and ``x``, draws [draw, datum, ...]. Of categories instead of
        the first three ``x_probability`` [datum, ..., x_class] with ``x_probability_se``; a mean of
        counts, or of 0 and 1, is an expected count, or a probability. NaN where a mask leaves a
        value out. ``pareto_k`` and ``ess`` of the importance weights [datum], and the attribute
        ``doubt``, say how far the guide is from the posterior.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses, a site that is not there, a
            likelihood that cannot be drawn from, counts < 1, another ``resample``, and "psis" with
            an outcome that is None.

    References:
        Gelman, Meng & Stern (1996). Posterior predictive assessment of model fitness via realized
        discrepancies. Statistica Sinica 6.
        Vehtari, Simpson, Gelman, Yao and Gabry (2024). Pareto smoothed importance sampling.
        Journal of Machine Learning Research 25(72).

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> found = pv.predict(model, guide, torch.tensor([-2.0, 1.0, 2.0]), seed=0)
        >>> found["x_mean"].round(1).values.tolist(), found["x"].dims  # sd: 1.5**0.5 by algebra
        ([-1.0, 0.5, 1.0], ('draw', 'datum'))
    """
    return _Prediction(
        who="predict",
        ready=prepared(model, guide, batch, given, data_plate, seed),
        num_draws=as_count("num_draws", num_draws),
        keep_draws=as_count("keep_draws", keep_draws, 0),
        resample=resample,
        means_only=False,
    ).dataset(sites, coords, dims)


def reconstruct(
    model: Program,
    guide: Program,
    *batch: Any,
    num_draws: int = 1000,
    keep_draws: int = 100,
    resample: Resampling | None = None,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    given: GivenValues | None = None,
    data_plate: DataPlate = None,
    seed: int | None = None,
) -> xr.Dataset:
    r"""Return what the latents say that data are, without the noise of observation.

    .. math:: E[\tilde x | x] = \int E[\tilde x | z]\, p(z | x)\, dz

    The mean of each observed site's distribution, given draws of the latents: what a decoder makes
    of them. The mean is that of :func:`predict`; standard deviations and draws are those of
    :math:`E[\tilde x | z]` alone, over the posterior of z.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        *batch: their arguments.
        num_draws: K, draws of each datum's latents.
        keep_draws: how many draws are returned, at most; 0 for none.
        resample: as in :func:`predict`, and so are the following.
        coords: likewise.
        dims: likewise.
        given: likewise.
        data_plate: likewise.
        seed: likewise.

    Returns:
        An xarray.Dataset like that of :func:`predict`: ``x_mean``, ``x_mean_se``, ``x_sd``, ``x``;
        of categories ``x_probability`` and ``x_probability_se``, and ``x``, draws of these.

    Raises:
        ValueError: for what :func:`predict` refuses, and for a site whose distribution does not say
            its mean.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> model = pv.zoo.ProbabilisticPCA(5, 2)
        >>> x = model.simulate(3, seed=0)
        >>> guide = pv.AmortizedGuide(model, model.make_encoder([8]), example=x)
        >>> sorted(pv.reconstruct(model, guide, x, num_draws=50, keep_draws=0, seed=0))
        ['ess', 'pareto_k', 'x_mean', 'x_mean_se', 'x_sd']
    """
    return _Prediction(
        who="reconstruct",
        ready=prepared(model, guide, batch, given, data_plate, seed),
        num_draws=as_count("num_draws", num_draws),
        keep_draws=as_count("keep_draws", keep_draws, 0),
        resample=resample,
        means_only=True,
    ).dataset(None, coords, dims)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Draws of a block of data that are returned, filled in as particles come.

    Attributes:
        index: particles that they are of, [S, n].
        values: by site, ``[S, n, ...]``.
    """

    index: Tensor
    values: dict[str, Tensor]

    def take(self, name: str, drawn: Tensor, start: int) -> None:
        """Keep what is wanted of the draws [k, n, ...] of the particles from one on."""
        here = (self.index >= start) & (self.index < start + len(drawn))
        place, datum = torch.nonzero(here, as_tuple=True)
        drawn = drawn.float() if drawn.dtype == torch.bfloat16 else drawn  # which NumPy has not
        if name not in self.values:
            self.values[name] = drawn.new_zeros(*self.index.shape, *drawn.shape[2:])
        self.values[name][place, datum] = drawn[self.index[place, datum] - start, datum]


@dataclass
class _Prediction:
    """Predictions of a pair; see :func:`predict`.

    Attributes:
        who: asks, for messages.
        ready: the pair.
        num_draws: K.
        keep_draws: S.
        resample: None or "psis".
        means_only: whether observed sites are what they are expected to be, and not drawn.
        fixed: the values of deterministic sites, once a block was looked at.
    """

    who: str
    ready: Prepared
    num_draws: int
    keep_draws: int
    resample: Resampling | None
    means_only: bool
    fixed: DeterministicValues | None = None

    def dataset(
        self,
        sites: Iterable[str] | None,
        coords: Mapping[str, ArrayLike] | None,
        dims: Mapping[str, Sequence[str]] | None,
    ) -> xr.Dataset:
        """Return the predictions."""
        self._check()
        evaluator, self.keep_draws = self.evaluator, min(self.keep_draws, self.num_draws)
        names = self.ready.observed if sites is None else self._checked(sites)
        predicted = functools.partial(self._block, names=names)
        found = evaluator.over_blocks(predicted, self.num_draws, self.ready.chunk_size)
        blocks, raw, (shapes, *_) = zip(*found, strict=True)
        weights = None if self.ready.unknown else Weights.joined(raw)
        dataset = named(self.ready, blocks, shapes, names, coords, dims)
        if weights is not None:
            lead = [] if evaluator.structure.data_dim is None else ["datum"]
            for name in WEIGHTS:
                value = getattr(weights, name)
                dataset[name] = (lead, value if lead else value[0])
        return dataset.assign_attrs(
            num_draws=self.num_draws,
            resampled=self.resample or "no",
            given=given_text(self.ready.given),
            doubt="" if weights is None else weights.doubt,
        )

    @property
    def evaluator(self) -> Evaluator:
        """Of the pair."""
        return self.ready.evaluator

    def _check(self) -> None:
        if self.resample not in (None, "psis"):
            raise ValueError(f"resample={self.resample!r}: None or 'psis' is needed")
        if self.ready.unknown and self.resample is not None:
            raise ValueError(
                f"resample='psis' weighs draws by the data, and {list(self.ready.unknown)} has "
                "none; take resample=None, or NaN under pyro_vae.MissingData"
            )
        check_drawable(self.evaluator.structure, self.evaluator.batch.device)

    def _checked(self, sites: Iterable[str]) -> list[str]:
        names = [sites] if isinstance(sites, str) else list(dict.fromkeys(sites))
        factors = {*names_of(self.evaluator.structure.observed)} - {*self.ready.observed}
        known = [name for name in self.evaluator.structure.sites if name not in factors]
        known += self.ready.deterministic
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"sites={names}: the model has no {unknown}, only {known}")
        if not names:
            raise ValueError(f"sites=[]: name some of {known}")
        return names

    def _block(
        self, chunks: Iterator[Chunk], names: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], Weights, dict[str, DeterministicSite]]:
        """Return what is predicted of a block of data, with the datum in front, and its weights.

        And the shapes of deterministic sites.
        """
        if self.resample is not None:  # weights of all of them come first
            chunks = iter(held := list(chunks))
            total = torch.cat([chunk.weights.total for chunk in held])
            smoothed = SmoothedWeights.of(total.T.double().numpy(force=True))
        kept: _Kept | None = None
        rows, weights, totals = slice(0, 0), np.empty(0), list[Tensor]()
        moments: dict[str, WeightedMoments] = {}
        for chunk in chunks:
            rows, size = chunk.rows, chunk.weights.total.shape[1]
            totals.append(chunk.weights.total.cpu())
            if kept is None:
                if self.resample is None:
                    weights = np.full((size, self.num_draws), 1 / self.num_draws)
                    index = np.arange(self.keep_draws)[:, np.newaxis].repeat(size, 1)
                else:
                    key = [self.evaluator.seed, Purpose.PREDICTED_CHOICE, rows.start]
                    weights = smoothed.weights
                    index = smoothed.draw(max(1, self.keep_draws), key)[: self.keep_draws]
                kept = _Kept(torch.as_tensor(index), {})
            for start, some in self._pieces(chunk):
                predicted = self._sites(rows, start, some, names)
                for name, (drawn, mean, variance) in predicted.items():
                    kept.take(name, drawn.cpu(), start)
                    moments.setdefault(name, WeightedMoments(weights)).update(mean, variance)
        found = self._results(moments, kept)
        self._hide(rows, found)
        shapes = {} if self.fixed is None else self.fixed.sites
        return found, Weights.of(torch.cat(totals).T.double().numpy()), shapes

    def _pieces(self, chunk: Chunk) -> Iterator[tuple[int, Values]]:
        """Yield draws of all latents of a chunk, as many as can be predicted at once."""
        evaluator, rows = self.evaluator, chunk.rows
        values = chunk.values
        key = Purpose.PREDICTED_SUMMED_OUT, rows.start, chunk.particles.start
        values = {**values, **evaluator.draw_summed_out(rows, values, key)}
        count = chunk.particles.stop - chunk.particles.start
        numbers = sum(site.value.numel() for site in evaluator.structure.observed)
        share = chunk.weights.total.shape[1] / evaluator.num_data
        step = max(1, int(_NUMBERS / max(1.0, numbers * share)))
        for start in range(0, count, step):
            some = {name: value[start : start + step] for name, value in values.items()}
            yield chunk.particles.start + start, some

    def _sites(
        self, rows: slice, start: int, values: Values, names: Sequence[str]
    ) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
        """Return draws, what is averaged of them, and the variance about that, ``[k, n, ...]``."""
        evaluator, found = self.evaluator, dict[str, tuple[Tensor, Tensor, Tensor | None]]()
        sites, seen = evaluator.structure.sites, names_of(evaluator.structure.observed)
        count = len(next(iter(values.values()))) if values else self.num_draws
        everything: Values = values
        if any(name in seen or name not in sites for name in names):
            key = Purpose.PREDICTED_DRAWS, rows.start, start
            run = evaluator.predictive_run(rows, count, values, key)
            everything = {**values, **run.values()}
            found |= {n: self._observed(run, n, everything[n]) for n in names if n in seen}
        own = evaluator.by_datum({n: values[n] for n in names if n in sites and n not in seen})
        own = {name: self._with_data(value) for name, value in own.items()}
        for name, value in {**own, **self._deterministic(rows, everything, names)}.items():
            classes = name in sites and is_categorical(sites[name].fn)
            found[name] = value, one_hot(value, sites[name].fn) if classes else value, None
        return found

    def _deterministic(self, rows: slice, values: Values, names: Sequence[str]) -> Values:
        """Return the values of deterministic sites given all others, observed ones drawn too."""
        wanted = set(names) & set(self.ready.deterministic)
        if not wanted:
            return {}
        if self.fixed is None:
            free = self.evaluator.unobserved()
            free.splittable = self.evaluator.splittable  # which densities of what is observed tell
            self.fixed = DeterministicValues(free, rows, values)
        size = rows.stop - rows.start
        found = {n: v for n, v in self.fixed(rows, values).items() if n in wanted}
        for name, value in found.items():
            if self.fixed.sites[name].data_axis is None:  # the same for all data
                found[name] = value.unsqueeze(1).expand(-1, size, *value.shape[1:])
        return found

    def _observed(self, run: Run, name: str, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the same of an observed site of a run."""
        evaluator = self.evaluator
        site, expected = evaluator.structure.sites[name], expected_of(run, name)
        (value,) = evaluator.by_datum({name: drawn}).values()
        value = self._with_data(value.expand(run.num_particles, *value.shape[1:]))
        if expected is None:
            if self.means_only:
                raise ValueError(
                    f"reconstruct: the {site.distribution} distribution of the observed site "
                    f"{name!r} does not say its mean; pyro_vae.predict averages draws of it"
                )
            return value, value, None
        if is_categorical(site.fn):  # a dimension of classes more than the site has
            classes = expected.mean.movedim(-1, 0)
            parts = [evaluator.by_datum({name: each})[name] for each in classes]
            mean = self._with_data(torch.stack(parts, -1))
            return (mean if self.means_only else value), mean, None
        mean = self._with_data(evaluator.by_datum({name: expected.mean})[name])
        variance = expected.variance
        if variance is None and not self.means_only:
            return value, value, None  # whose spread is not known otherwise
        if self.means_only or variance is None:
            return mean, mean, None
        return value, mean, self._with_data(evaluator.by_datum({name: variance})[name])

    def _with_data(self, value: Tensor) -> Tensor:
        """Return a value with a dimension of data, of size one where all is one datum."""
        return value.unsqueeze(1) if self.evaluator.structure.data_dim is None else value

    def _results(
        self, moments: Mapping[str, WeightedMoments], kept: _Kept | None
    ) -> dict[str, np.ndarray]:
        sites, found = self.evaluator.structure.sites, dict[str, np.ndarray]()
        for name, each in moments.items():
            results = each.results()
            if name in sites and is_categorical(sites[name].fn):
                found[f"{name}_probability"] = results["mean"]
                share, error = results["mean"], results["mean_se"]
                if sites[name].kind != "observed":  # drawn, where others are expected values
                    error = error_of_shares(share, error, self.num_draws)
                found[f"{name}_probability_se"] = error
            else:
                found |= {f"{name}_{what}": value for what, value in results.items()}
            if kept is not None and self.keep_draws:
                found[name] = kept.values[name].numpy().swapaxes(0, 1)
        return found

    def _hide(self, rows: slice, found: dict[str, np.ndarray]) -> None:
        """Write NaN where masks say that a site has no value; in place."""
        structure = self.evaluator.structure_of(rows)
        for site in structure.sites.values():
            if (where := absent(site, structure)) is None:
                continue
            if structure.data_dim is None:
                where = where[np.newaxis]
            elif len(where) > rows.stop - rows.start:
                where = where[rows]
            for end in ENDS:
                name = site.name + end
                if name in found:
                    hidden = where if end else where[:, np.newaxis]
                    extra = found[name].ndim - hidden.ndim
                    hidden = hidden.reshape(*hidden.shape, *[1] * extra)
                    found[name] = np.where(hidden, np.nan, found[name])
