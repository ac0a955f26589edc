"""Data that a model makes by itself, from its prior: no guide, and no data needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from numpy.typing import ArrayLike
from pyro import poutine
from torch import Tensor

from pyro_vae.particles.weighted_moments import WeightedMoments
from pyro_vae.prediction.dataset import as_dataset
from pyro_vae.prediction.expectations import error_of_shares, is_categorical, one_hot
from pyro_vae.prediction.pairs import plate_of_data
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.handlers import Unobserve
from pyro_vae.programs.masks import lift_masks
from pyro_vae.programs.messages import as_count, as_seed, trace_of
from pyro_vae.programs.purposes import Purpose, seed_of
from pyro_vae.programs.sites import Structure, absent, array_of, inner_dims, names_of
from pyro_vae.programs.state import Look, arguments_of, looking, seeded
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import DataPlate, Node, Program
from pyro_vae.sampling.exact_draws import check_generative, of_size

__all__ = ["generate"]

_WHO = "generate"
# Values of arguments that nothing but their number may be taken from, beside NaN.
_TRIED = (0.0, 1.0, -1.0, 1e3)


def generate(
    model: Program,
    num_draws: int = 100,
    *,
    like: Any = None,
    sites: Iterable[str] | None = None,
    given: Mapping[str, Any] | None = None,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    data_plate: DataPlate = None,
    seed: int | None = None,
) -> xr.Dataset:
    r"""Draw latents and data from a model: :math:`z \sim p(z),\ x \sim p(x | z)`.

    Each draw is a datum of its own, of all draws in one run of the model whose data plate has
    ``num_draws`` entries. Where the model has global latents, and these are not given, each draw is
    a run with global latents of its own; with ``data_plate=False`` a run is a whole data set.

    A model asks its arguments for the number of data: without ``like`` it is called with tensors
    [num_draws] of NaN, which serve where it takes ``len(x)``, a dtype, a device, and ``obs=x``, and
    no more. One that uses their values or shapes (covariates, lengths) needs an example.

    Args:
        model: a Pyro model.
        num_draws: S.
        like: an example of its arguments, a tensor, a tuple or a mapping. Observed values in it are
            not looked at; all else is taken row by row, again from the first where rows are fewer
            than draws.
        sites: names of latent and observed sites; all of them by default.
        given: values of latent sites, which are not drawn then.
        coords: dimension name to labels.
        dims: site name to the names of its dimensions after draw.
        data_plate: as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.

    Returns:
        An xarray.Dataset: of each site x its draws ``x`` [draw, ...], their mean ``x_mean`` with
        its standard error ``x_mean_se``, and ``x_sd``; of categories ``x_probability`` and
        ``x_probability_se`` [..., x_class]. NaN where a mask leaves a value out.

    Raises:
        ValueError: for a model that needs ``like``, has a pyro.factor, or a likelihood that cannot
            be drawn from; for sites that are not there.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.zoo.ProbabilisticPCA(5, 2)
        >>> found = pv.generate(model, 1000, seed=0)
        >>> found["x"].dims, found["z"].shape
        (('draw', 'x_dim_0'), (1000, 2))
    """
    count, seed = as_count("num_draws", num_draws), as_seed(seed)
    held = {name: torch.as_tensor(value) for name, value in (given or {}).items()}
    maker = _Maker.of(model, count, None if like is None else as_batch(like), held, data_plate)
    names = maker.checked(sites)
    found = maker.draw(count, names, seed)
    return _dataset(maker, found, names, coords, dims)


@dataclass(frozen=True)
class _Maker:
    """A model, and how it draws.

    Attributes:
        model: a Pyro model.
        batch: its arguments, of all draws or of one.
        structure: of the model on these.
        given: values of latents that are not drawn.
        runs: whether each draw is a run.
    """

    model: Program
    batch: Batch
    structure: Structure
    given: Mapping[str, Tensor]
    runs: bool

    @classmethod
    def of(
        cls,
        model: Program,
        count: int,
        like: Batch | None,
        given: Mapping[str, Tensor],
        data_plate: DataPlate,
    ) -> _Maker:
        whole = data_plate is False
        batch = _blank(model, count) if like is None else like
        if whole and like is None and batch.args:
            raise ValueError(
                f"{_WHO}: with data_plate=False each draw is a whole data set, and nothing says "
                "of which size; pass like=, an example of the model's arguments"
            )
        if like is not None and not whole and like.size is not None:
            batch = of_size(like, count, whole=False)
        structure = _structure(model, batch, given, data_plate, blank=like is None)
        if unknown := set(given) - set(structure.sites):
            raise ValueError(f"given: the model has no sites {sorted(unknown)}")
        check_generative(structure, batch, "")
        shared = set(names_of(structure.global_latents)) - set(given)
        runs = whole or structure.data_plate is None or bool(shared)
        if runs and not whole and batch.size is not None:
            batch = batch.rows(slice(0, 1))
            structure = _structure(model, batch, given, data_plate, blank=like is None)
        return cls(model, batch, structure, given, runs)

    def checked(self, sites: Iterable[str] | None) -> list[str]:
        """Return the names of what is drawn."""
        known = [name for name in self.structure.sites if name not in self.given]
        names = known if sites is None else [sites] if isinstance(sites, str) else list(sites)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"sites={names}: the model draws no {unknown}, only {known}")
        if not names:
            raise ValueError(f"sites=[]: name some of {known}")
        return names

    def draw(self, count: int, names: Sequence[str], seed: int) -> dict[str, np.ndarray]:
        """Return draws of sites, ``[S, ...]``; NaN where masks leave values out."""
        runs = count if self.runs else 1
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for k in range(runs):
            nodes = _drawn(self.model, self.batch, self.given, seed_of(seed, Purpose.GENERATED, k))
            for name in names:
                site = self.structure.sites[name]
                value = array_of(nodes[name]["value"], site, self.structure)
                if (where := absent(site, self.structure)) is not None:
                    value = np.where(where, np.nan, value)
                by_row = self.structure.data_dim is not None and site.kind != "global latent"
                parts[name].append(value if by_row else value[np.newaxis])
        return {name: np.concatenate(values) for name, values in parts.items()}


def _blank(model: Program, count: int) -> Batch:
    """Return arguments that say how many data there are, and nothing else."""
    needed = [name for name, needed in arguments_of(model).items() if needed]
    return Batch(tuple(torch.full((count,), torch.nan) for _ in needed), {})


def _check_blank(
    model: Program, batch: Batch, given: Mapping[str, Tensor], nodes: Mapping[str, Node]
) -> None:
    """Raise ValueError where values of arguments change what is drawn, or what a mask leaves out.

    NaN alone would not tell: a comparison with it is false, and torch.where and nan_to_num hide it.
    """
    count = batch.size or 0
    tried = torch.tensor(_TRIED).repeat(-(-count // len(_TRIED)) + 1)
    for start in range(len(_TRIED) if 0 < count < len(_TRIED) else min(count, 1)):
        others = Batch(tuple(tried[start : start + count] for _ in batch.args), {})
        found = _drawn(model, others, given, 0)
        for name, node in nodes.items():
            masks = not _same(node.get("mask"), found[name].get("mask"))
            known = "_missing" in node.get("infer", {})  # what is missing is drawn all the same
            if node["type"] == "sample" and (
                (masks and not known) or not _same(node["value"], found[name]["value"])
            ):
                raise ValueError(f"what it draws of {name!r} changes with their values")


def _same(one: Any, other: Any) -> bool:
    """Return whether two values or masks are the same."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other or bool(torch.all(torch.as_tensor(one == other)))
    return one.shape == other.shape and bool(torch.isclose(one, other, 0, 0, True).all())


def _drawn(model: Program, batch: Batch, given: Mapping[str, Tensor], seed: int) -> dict[str, Node]:
    """Return the statements of a run whose observed sites are drawn, but for what is given."""
    with looking(model, device=batch.device), seeded(batch.device, seed), poutine.block():
        program = (
            pyro.condition(Unobserve()(model), data=dict(given)) if given else Unobserve()(model)
        )
        return dict(lift_masks(trace_of(program, batch)).nodes.items())


def _structure(
    model: Program, batch: Batch, given: Mapping[str, Tensor], data_plate: DataPlate, *, blank: bool
) -> Structure:
    """Return the structure of a model on data of its own."""
    with Look() as look:
        nodes = _drawn(model, batch, given, 0)
        if blank:
            _check_blank(model, batch, given, nodes)
        # That nothing in these counts, draws of NaN have shown.
        shown = Batch(tuple(map(torch.zeros_like, batch.args)), {}) if blank else batch
        own = {
            site.name: torch.as_tensor(nodes[site.name]["value"]).to(site.value.dtype)
            for site in ModelLooks(model, shown).run.observed
            if site.name in nodes
        }
        if blank and any(bool(torch.as_tensor(value).isnan().any()) for value in own.values()):
            raise ValueError("what it draws is not a number")
        looks = ModelLooks(pyro.condition(model, data=own), shown)
        if data_plate is False:
            return looks.structure(data_plate, latents_needed=False)
        if (plate := plate_of_data(looks.run, shown, data_plate)) is None:
            return looks.structure(data_plate, latents_needed=False)  # says what is not plain
        return looks.run.with_data_plate(plate)
    if not blank and look.error is not None:
        raise look.error
    raise ValueError(
        f"{_WHO}: the model takes more from its arguments than how many data there are "
        f"({look.error}); pass like=, an example of them, whose observed values are not looked at"
    ) from look.error


def _dataset(
    maker: _Maker,
    found: Mapping[str, np.ndarray],
    names: Sequence[str],
    coords: Mapping[str, ArrayLike] | None,
    dims: Mapping[str, Sequence[str]] | None,
) -> xr.Dataset:
    """Return draws with their means, errors and standard deviations."""
    variables: dict[str, np.ndarray] = {}
    own: dict[str, list[str]] = {}
    for name in names:
        site, draws = maker.structure.sites[name], found[name]
        own[name] = inner_dims(site, maker.structure)
        numbers = torch.as_tensor(draws)
        classes = is_categorical(site.fn)
        moments = WeightedMoments(np.full((1, len(draws)), 1 / len(draws)))
        moments.update((one_hot(numbers, site.fn) if classes else numbers).unsqueeze(1))
        results = {what: value[0] for what, value in moments.results().items()}
        variables[name] = draws
        if classes:
            variables[f"{name}_probability"] = results["mean"]
            variables[f"{name}_probability_se"] = error_of_shares(
                results["mean"], results["mean_se"], len(draws)
            )
        else:
            variables |= {f"{name}_{what}": value for what, value in results.items()}
    return as_dataset(variables, own, [], coords, dims).assign_attrs(
        num_draws=len(next(iter(found.values())))
    )
