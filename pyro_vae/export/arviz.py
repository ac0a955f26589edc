"""Posterior draws and what belongs with them, in ArviZ's own container."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pyro
from numpy.typing import ArrayLike

from pyro_vae.arviz_versions import Container, container, datasets, read
from pyro_vae.export.covariates import covariates, of_rows
from pyro_vae.export.draws import Draws, Groups, GuideDraws, Resampling
from pyro_vae.export.groups import GroupMaker, joined
from pyro_vae.export.marginal import Integrals, Marginal, MarginalBound
from pyro_vae.export.streaming import format_of, streamed
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.particles.global_latents import Given, given_text
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.observed import check_drawable
from pyro_vae.programs.on_demand import OnDemand, on_demand
from pyro_vae.programs.processes import Processes, processes
from pyro_vae.programs.types import DataPlate, GivenValues, Program

# Of each observed site given all latents, or of each datum given the global ones.
LogLikelihood: TypeAlias = Literal["pointwise", "marginal"]

_DATUM = "datum"
_POINTWISE = "log p(x | all latents) of each observed site"


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
    log_likelihood: LogLikelihood = "pointwise",
    num_particles: int = 100,
    local_guide: Program | None = None,
    bound: MarginalBound | None = None,
    given: GivenValues | None = None,
    file: str | os.PathLike[str] | None = None,
    seed: int | None = None,
) -> Container:
    r"""Return draws of the guide in ArviZ's container, one chain.

    InferenceData on ArviZ 0.x, an xarray DataTree on 1.x, with the groups

    - posterior: latents, and the model's pyro.deterministic sites;
    - unconstrained_posterior: the unconstrained coordinates of latents on a constrained support;
    - log_likelihood: of each observed site, a number per datum, as ``az.loo`` takes it; and
      log_prior: of each latent, given those before it, as ``az.psense`` takes it;
    - sample_stats: log_p = log p(x, z), log_q, log_weight, per datum;
    - prior, and with ``predictive`` posterior_predictive and prior_predictive. Without, no
      observed site is drawn, and a latent's prior is that given the observed sites before it;
    - observed_data; constant_data: pareto_k and ess of each datum's importance weights, and the
      model's arguments that are not observed (covariates, offsets, masks), by their names.

    Draws are independent of one another: ``az.summary`` gives an R-hat of 1, or nan of one chain,
    and an effective sample size of about their number for any guide, good or bad; the attribute
    ``note`` says so. How well the guide fits, k-hat says, and :func:`pyro_vae.compare`;
    :func:`pyro_vae.sample_posterior` has chains.

    Discrete latents that the guide leaves out are summed out of log_p and log_weight, and
    drawn from their exact posterior, given each draw of the others, for the posterior;
    posterior_predictive, log_likelihood and log_prior go on from these draws.

    Values that a mask of the model leaves out (steps past the end of a sequence) are NaN, and add 0
    to log_likelihood and log_prior: ``az.loo`` counts a datum without any as foretold for certain.

    Leaving a datum out leaves nothing to say of its own latents, so ``az.loo`` of the pointwise
    log likelihood of a model with local latents reports k-hat above 0.7, and rightly. Where there
    are global latents g too, ``log_likelihood="marginal"`` stores, as one variable ``marginal``,

    .. math:: \log p(x_n | g_s) \approx
        \log \frac{1}{K} \sum_k \frac{p(x_n, z_{kn} | g_s)}{q(z_{kn} | x_n, g_s)}

    of each draw of these and each datum, its own latents integrated out: ``az.loo`` then estimates
    what a model that was fitted without the datum says of it. The draws must be of the joint
    posterior (``resample="psis"``, or those of chains). constant_data has ``marginal_se``, the
    root mean square over draws of the standard error of each datum, and the attribute
    ``marginal_loo_bias`` about how much lower they make the sum over data of ``az.loo``, in nats.

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
        dims: variable name to the names of its dimensions after (chain, draw, datum); of an
            argument after datum.
        data_plate: as in :func:`pyro_vae.log_weights`; with ``log_likelihood="marginal"``, which
            treats the batch as one datum, the name of the plate of the data, if it is not plain.
        predictive: whether to draw new data as well.
        log_likelihood: "pointwise", log p(x | all latents) of each observed site; or "marginal".
        num_particles: K, for "marginal".
        local_guide: a guide of the latents of each datum given the global ones, for "marginal";
            by default the guide itself. One is needed where that has no density of one datum's
            latents alone, such as a Gaussian of all latents jointly.
        bound: what bounds log p(x_n | g_s) for "marginal", in the place of K particles of that
            guide: a function of (model, guide, batch) and the keywords ``given``, ``data_plate``
            and ``seed``, such as :func:`pyro_vae.ais` with settings of its own,
            ``functools.partial(pv.ais, num_chains=8, num_steps=50, progress=False)``. Annealed
            chains serve where the guide is far from the posterior, and take a run for each draw.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        file: where to write the container, block by block of at most 256 data, so that memory
            holds the draws of a block alone: a netCDF file, or a Zarr folder if the name ends in
            ``.zarr`` (the extra ``zarr``). It takes the place of an older one once it is whole. A
            model that takes no fewer data than all is one block.
        seed: of the draws; None takes one from the global random state.

    Returns:
        ArviZ's container; with ``file`` opened from it, arrays being read when they are used.
        Arrays have dimensions (chain, draw, datum, ...); with data_plate=False there is no datum
        dimension, and log_likelihood and log_prior have the plates of each site.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses, num_draws < 1,
            another ``resample``, coords and dims that do not fit, with ``file`` names that have
            a "/", with ``predictive`` a likelihood that cannot be drawn from, and
            ``log_likelihood="marginal"`` of a model without global latents, or without local ones.
        FileNotFoundError: if the folder of ``file`` does not exist.
        ImportError: if no library that writes it is installed.

    References:
        Vehtari, Gelman & Gabry (2017). Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC. Statistics and Computing 27.
        Merkle, Furr & Rabe-Hesketh (2019). Bayesian comparison of latent variable models:
        conditional versus marginal likelihoods. Psychometrika 84.
        Kallioinen, Paananen, Bürkner & Vehtari (2024). Detecting and diagnosing prior and
        likelihood sensitivity with power-scaling. Statistics and Computing 34.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def posterior(x):
        ...     mu = pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 2), (2 / (len(x) + 2))**0.5))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal((x + mu) / 2, 0.5**0.5))
        >>> options = {"log_likelihood": "marginal", "num_draws": 4, "num_particles": 3, "seed": 0}
        >>> tree = pv.to_arviz(model, posterior, torch.tensor([0.0, 2.0]), **options)
        >>> tree["log_likelihood"]["marginal"].dims, tree["posterior"]["z"].dims
        (('chain', 'draw', 'data'), ('chain', 'draw', 'data'))
        >>> bool(tree["constant_data"]["marginal_se"].max() < 1e-6)  # an exact guide of z
        True
    """
    num_draws = as_count("num_draws", num_draws)
    if resample not in (None, "psis"):
        raise ValueError(f"resample={resample!r}: None or 'psis' is needed")
    joint = log_likelihood == "marginal"  # whose plate data_plate names then
    plate: DataPlate = False if joint else data_plate
    evaluator, fixed = prepare(model, guide, (on_demand(*batch),), given, plate, seed)
    return Export(
        evaluator=evaluator,
        given=fixed,
        draws=GuideDraws(evaluator, num_draws, resample),
        coords=coords,
        dims=dims,
        predictive=predictive,
        log_likelihood=log_likelihood,
        num_particles=num_particles,
        local_guide=local_guide,
        bound=bound,
        data_plate=data_plate,
        file=file,
    ).container()


@dataclass(frozen=True, slots=True)
class Export:
    """What goes into a container, and how; see :func:`to_arviz`.

    Attributes:
        evaluator: of the pair.
        given: the values that global latents were fixed at.
        draws: of the latents.
        coords: dimension name to labels.
        dims: variable name to the names of its dimensions.
        predictive: whether to draw new data.
        log_likelihood: of what.
        num_particles: K, for a marginal one.
        local_guide: for a marginal one.
        bound: for a marginal one, in the place of particles.
        data_plate: for a marginal one.
        file: to be written to; None for a container in memory.
    """

    evaluator: Evaluator
    given: Given
    draws: Draws
    coords: Mapping[str, ArrayLike] | None = None
    dims: Mapping[str, Sequence[str]] | None = None
    predictive: bool = True
    log_likelihood: LogLikelihood = "pointwise"
    num_particles: int = 100
    local_guide: Program | None = None
    bound: MarginalBound | None = None
    data_plate: DataPlate = None
    file: str | os.PathLike[str] | None = None

    def container(self) -> Container:
        """Return the container; opened from the file where there is one."""
        assembly = _Assembly(self)
        if self.file is not None:
            return assembly.written(self.file)
        blocks = [groups for _, groups in assembly.blocks()]
        drawn = joined(blocks, assembly.maker.shared)
        rest = assembly.of_data()
        groups = {name: drawn.get(name, {}) | rest.get(name, {}) for name in {**drawn, **rest}}
        names, coords = assembly.names(drawn), assembly.coords()
        return container(groups, coords=coords, dims=names, attrs=assembly.attrs())


class _Assembly:
    """Groups as they are made, block by block, and what is known once all are."""

    def __init__(self, export: Export) -> None:
        self._export, evaluator = export, export.evaluator
        if export.log_likelihood not in get_args(LogLikelihood):
            raise ValueError(
                f"log_likelihood={export.log_likelihood!r}: one of {get_args(LogLikelihood)} is "
                "needed"
            )
        if export.predictive:
            check_drawable(evaluator.structure, evaluator.batch.device)
        self.maker = GroupMaker(evaluator, predictive=export.predictive)
        self._marginal: Marginal | None = None
        self._integrals: Integrals | None = None
        if export.log_likelihood == "marginal":
            count = as_count("num_particles", export.num_particles)
            self._marginal = Marginal(
                evaluator, export.local_guide, export.data_plate, count, export.bound
            )
        plates = {p.name for site in evaluator.structure.sites.values() for p in site.plates}
        if export.file is not None:
            format_of(export.file)
            _check_names([*evaluator.structure.sites, *sorted(plates)])
        self._whole = evaluator.structure.data_plate is None
        # Where all is one datum it has no dimension but in constant_data, and not a plate's name.
        self._datum = "batch" if self._whole and _DATUM in plates else _DATUM
        constants = ["pareto_k", "ess", *getattr(export.draws, "of_data", {}), "marginal_se"]
        self._taken = [*constants, self._datum, *plates]
        self._arguments = covariates(evaluator, self._taken)
        self._in_parts = isinstance(evaluator.batch, OnDemand)
        labels = (export.coords or {}).get(_DATUM, np.arange(evaluator.num_data))
        self._labels = np.asarray(labels)
        if not self._whole and len(self._labels) != evaluator.num_data:
            raise ValueError(
                f"coords[{_DATUM!r}] has {len(self._labels)} labels, for {evaluator.num_data} data"
            )

    def blocks(self) -> Iterator[tuple[slice, Groups]]:
        """Yield the groups of each block of data, arrays [chain, draw, ...]."""
        draws, maker = self._export.draws, self.maker
        for rows, groups in self._made():
            draws.settle(rows, groups, maker.shared)
            if self._marginal is not None:
                self._integrals = self._marginal(groups["posterior"])
                groups["log_likelihood"] = {"marginal": self._integrals.value}
            maker.hide_absent(rows, groups)
            shape = draws.num_chains, -1
            drawn = {
                group: {n: value.reshape(*shape, *value.shape[1:]) for n, value in some.items()}
                for group, some in groups.items()
            }
            yield rows, {**drawn, **(self._data_of(rows) if self._in_parts else {})}

    def _made(self) -> Iterator[tuple[slice, Groups]]:
        """Yield the groups of each block as they are made, by processes in turn."""
        blocks = iter(self._export.draws.blocks())
        # What the first one shows of the model, all processes are to know.
        yield from map(self.maker, itertools.islice(blocks, 1))
        # Of data on demand the maker knows the observed values of the block that it made last.
        several = Processes() if self._in_parts else processes()
        yield from several.by_turns(self.maker, blocks)

    def _data_of(self, rows: slice) -> Groups:
        """Return what is observed, and other arguments, of some rows that are read on demand."""
        arguments = of_rows(self._export.evaluator, rows, self._arguments, self._taken)
        found = {"observed_data": self.maker.observed, "constant_data": arguments}
        return {group: some for group, some in found.items() if some}

    def of_data(self) -> Groups:
        """Return the groups without draws, once all blocks are made."""
        constants = dict(self._export.draws.constants())
        if self._integrals is not None:
            constants["marginal_se"] = self._integrals.of_data
        if self._in_parts:  # those of rows are in the blocks
            constants |= {n: value for n, value in self._arguments.items() if not value.ndim}
            return {"constant_data": constants}
        constants |= self._arguments
        return {"observed_data": self.maker.observed, "constant_data": constants}

    def names(self, drawn: Groups) -> dict[str, list[str]]:
        """Return the names of each variable's dimensions after chain and draw."""
        lead = [] if self._whole else [self._datum]
        # With the group: a site may have the name of one of these.
        numbers = [f"constant_data/{name}" for name in self._export.draws.constants()]
        names = {name: [self._datum] for name in numbers}
        names |= {f"sample_stats/{name}": lead for name in drawn.get("sample_stats", {})}
        if self._marginal is not None:
            of_plate = ("log_likelihood/marginal", "constant_data/marginal_se")
            names |= {name: [self._marginal.dim] for name in of_plate}
        given, batch = dict(self._export.dims or {}), self._export.evaluator.batch
        alone = set(self._arguments) - set(self.maker.names)  # no site has the name
        sites = self.maker.dims(lead, {n: d for n, d in given.items() if n not in alone})
        for name, value in self._arguments.items():
            own = [self._datum] if value.ndim and batch.has_rows and not self._whole else []
            rest = value.ndim - len(own)
            tail = [f"{name}_dim_{i}" for i in range(rest)]
            if name in alone and len(given.get(name, tail)) != rest:
                raise ValueError(
                    f"dims[{name!r}]={list(given[name])}: {rest} names are needed, for the "
                    f"dimensions of this argument after {own}"
                )
            names[f"constant_data/{name}"] = [
                *own,
                *(given[name] if name in alone & set(given) else tail),
            ]
        return {**names, **sites}

    def coords(self, rows: slice = slice(None)) -> dict[str, ArrayLike]:
        """Return the labels of dimensions, of some of the data."""
        labels = {} if self._whole else {self._datum: self._labels[rows]}
        return {**(self._export.coords or {}), **labels}

    def attrs(self) -> dict[str, Any]:
        """Return what the container says of itself, once all blocks are made."""
        attrs: dict[str, Any] = {
            "inference_library": "pyro",
            "inference_library_version": pyro.__version__,
            "given": given_text(self._export.given),
            "log_likelihood": _POINTWISE,
            **self._export.draws.attrs(),
        }
        if self._integrals is not None:
            name = self._integrals.name
            attrs["log_likelihood"] = f"log p(x_n | global latents), by {name}"
            attrs["marginal_loo_bias"] = self._integrals.loo_bias
        return attrs

    def written(self, path: str | os.PathLike[str]) -> Container:
        """Write the container to a file, block by block, and return it opened."""
        labels = None if self._whole else self._labels
        drawn: Groups = {}
        here = processes()
        writes = streamed(path, labels, self._datum) if here.is_first else nullcontext()
        with writes as file:
            for rows, drawn in self.blocks():
                names, coords = self.names(drawn), self.coords(rows)
                if file is not None:
                    file.add(rows, datasets(drawn, coords=coords, dims=names))
            rest = datasets(self.of_data(), coords=self.coords(), dims=self.names(drawn))
            if file is not None:
                file.finish(rest, self.attrs())
        here.any(False)  # which waits for the file to be whole
        return read(path)


def _check_names(names: Sequence[str]) -> None:
    """Refuse names that no file can hold, before anything is drawn."""
    if bad := [name for name in names if "/" in name]:
        raise ValueError(
            f"file=: {', '.join(map(repr, bad))} cannot be written, as '/' stands between groups "
            "in a file: rename these sites or plates, or leave file out"
        )
