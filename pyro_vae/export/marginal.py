"""Log p(x_n | global latents) for draws of these: each datum's own latents integrated out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_vae.particles.estimators import StreamingIWAE
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.global_latents import Given, fix_globals
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.purposes import Purpose, bits_of
from pyro_vae.programs.sites import Structure, names_of
from pyro_vae.programs.state import unwrapped
from pyro_vae.programs.structure import DataPlateError
from pyro_vae.programs.types import DataPlate, Program

logger = logging.getLogger(__name__)

_LARGE = 0.5  # nats of standard error above which an integral is warned of


@dataclass(frozen=True, slots=True)
class Integrals:
    """The integrals over each datum's latents.

    Attributes:
        value: log p(x_n | g_s), importance-weighted bounds, [S, N], in nats.
        std_error: their standard errors, [S, N].
        name: of the bounds.
    """

    value: np.ndarray
    std_error: np.ndarray
    name: str = ""

    @property
    def of_data(self) -> np.ndarray:
        """Root mean square over draws of the standard error of each datum, [N]."""
        return np.asarray(np.sqrt(np.square(self.std_error).mean(0)))

    @property
    def loo_bias(self) -> float:
        """About how far their errors lower the sum over data of leave-one-out densities, in nats.

        The estimate of a datum is -log mean_s exp(-value); with independent errors e_s of mean
        -std_error**2 / 2, the mean of exp(-e_s) is about 1 + std_error**2.
        """
        return -float(np.square(self.std_error).mean(0).sum())


class FoundBound(Protocol):
    """A bound on log p(x) of each datum, as :class:`pyro_vae.Bound`."""

    @property
    def name(self) -> str:
        """What it is."""

    @property
    def value(self) -> Tensor:
        """In nats, [N]."""

    @property
    def std_error(self) -> Tensor:
        """Its standard error, [N]."""


class MarginalBound(Protocol):
    """A function that bounds log p(x) of each datum, given the global latents."""

    def __call__(
        self,
        model: Program,
        guide: Program,
        batch: Any,
        *,
        given: Mapping[str, Tensor],
        data_plate: DataPlate,
        seed: int,
    ) -> FoundBound:
        """Return the bound."""


class Marginal:
    """Integrates out the latents of each datum by importance sampling, given draws of the globals.

    Args:
        whole: of model and guide, with the batch as one datum.
        guide: proposes the latents of each datum given the globals; None for that of ``whole``.
        data_plate: the name of the plate of the data, where it is not plain.
        num_particles: K, of each datum for each draw.
        bound: what integrates in the place of so many particles; None for these.

    Raises:
        ValueError: for a model without global latents, or without latents of each datum.

    References:
        Merkle, Furr & Rabe-Hesketh (2019). Bayesian comparison of latent variable models:
        conditional versus marginal likelihoods. Psychometrika 84.
    """

    def __init__(
        self,
        whole: Evaluator,
        guide: Program | None,
        data_plate: DataPlate,
        num_particles: int,
        bound: MarginalBound | None = None,
    ) -> None:
        self._whole, self._num_particles, self._bound = whole, num_particles, bound
        self._guide = whole.pair.user_guide if guide is None else guide
        self._plate = data_plate if isinstance(data_plate, str) else None
        self.structure = _structure(whole, self._plate)

    @property
    def dim(self) -> str:
        """The name of the plate of the data."""
        plate = self.structure.data_plate
        return "datum" if plate is None else plate.name

    def __call__(self, draws: dict[str, np.ndarray]) -> Integrals:
        r"""Return the integrals for draws of the global latents, ``[S, *batch, *event]`` each.

        .. math:: \log \frac{1}{K} \sum_k \frac{p(x_n, z_{kn} | g_s)}{q(z_{kn} | x_n, g_s)}

        The random numbers of each draw are its own, so that errors average out over draws.
        """
        names = names_of(self.structure.global_latents)
        device = self._whole.batch.device
        given = {name: torch.as_tensor(draws[name], device=device) for name in names}
        if self._bound is not None:
            return self._by_bound(self._bound, given)
        values, errors = [], []
        held: dict[str, torch.Tensor] = {}
        evaluator: Evaluator | None = None
        for s in range(len(given[names[0]])):
            # Masks may depend on the globals, and are found out once by an evaluator.
            if evaluator is None or evaluator.pair.masked:
                held = {name: value[s].clone() for name, value in given.items()}
                evaluator, held = self._held_at(held)
            for name, value in held.items():
                value.copy_(given[name][s])  # in place: model and guide are held at this tensor
            evaluator.seed = bits_of(self._whole.seed, Purpose.EXPORTED_MARGINAL, s, count=32)
            found, error = self._of_draw(evaluator)
            values.append(found)
            errors.append(error)
        name = f"IWAE-{self._num_particles}"
        integrals = Integrals(np.stack(values), np.stack(errors), name)
        _warn(integrals, f"{self._num_particles} particles", "Take more (num_particles)")
        return integrals

    def _by_bound(self, bound: MarginalBound, given: Mapping[str, Tensor]) -> Integrals:
        """Return the integrals that a function gives, one draw of the globals after the other."""
        found, pair = [], self._whole.pair
        with contextlib.ExitStack() as stack:
            if isinstance(guide := unwrapped(self._guide), RowGuide):
                stack.enter_context(guide.for_any_data())
            for s in range(len(next(iter(given.values())))):
                held = {name: value[s] for name, value in given.items()}
                seed = bits_of(self._whole.seed, Purpose.EXPORTED_MARGINAL, s, count=32)
                options: dict[str, Any] = {"given": held, "data_plate": self._plate, "seed": seed}
                found.append(bound(pair.model, self._guide, pair.batch, **options))
        value, error = (
            torch.stack([getattr(each, what) for each in found]).numpy(force=True)
            for what in ("value", "std_error")
        )
        integrals = Integrals(value, error, found[0].name)
        _warn(integrals, integrals.name, "Take one that is tighter (bound)")
        return integrals

    def _held_at(
        self, values: dict[str, torch.Tensor]
    ) -> tuple[Evaluator, dict[str, torch.Tensor]]:
        """Return an evaluator of each datum, and the tensors that it reads the globals of."""
        guide = unwrapped(self._guide)
        with contextlib.ExitStack() as stack:
            if isinstance(guide, RowGuide):  # rows that were fitted at other values will do
                stack.enter_context(guide.for_any_data())
            try:
                evaluator, fixed = _evaluator(self._whole, self._guide, self._plate, values)
            except ValueError as error:
                raise ValueError(
                    "log_likelihood='marginal' needs a guide of the latents of each datum given "
                    f"the global ones (local_guide); of this one: {error}"
                ) from error
        return evaluator, dict(fixed)

    def _of_draw(self, evaluator: Evaluator) -> tuple[np.ndarray, np.ndarray]:
        """Return the integral of each datum, and its standard error, [N] each."""
        found = []
        for chunks in evaluator.blocks(self._num_particles):
            stream = StreamingIWAE()
            for chunk in chunks:
                stream.update(chunk.weights.total)
            found.append((stream.value, stream.std_error))
        value, error = (torch.cat(parts).numpy(force=True) for parts in zip(*found, strict=True))
        return value, error


def _evaluator(
    whole: Evaluator, guide: Program, plate: str | None, values: dict[str, torch.Tensor]
) -> tuple[Evaluator, Given]:
    """Return an evaluator of each datum, with the globals held at values, and these."""
    pair = whole.pair
    model, guides, fixed = fix_globals(pair.model, {"guide": guide}, pair.batch, plate, values)
    made = Evaluator(
        model,
        guides["guide"],
        pair.batch,
        data_plate=plate,
        seed=whole.seed,
        compile=False,  # a graph would keep the values that it was made at
    )
    return made, fixed


def _structure(whole: Evaluator, plate: str | None) -> Structure:
    """Return the model's structure with a plate of the data."""
    try:
        structure = whole.pair.looks.structure(plate, latents_needed=False)
    except DataPlateError as error:
        raise DataPlateError(
            "log_likelihood='marginal' integrates out the latents of each datum, in the plate of "
            "the data (data_plate='name' says which); 'pointwise' is log p(x | all latents). "
            f"This model: {str(error).split('. ')[0].split('; ')[0]}"
        ) from error
    if not structure.global_latents:
        raise ValueError(
            "log_likelihood='marginal' is log p(x | global latents) for each draw of these, and "
            "the model has none: its data are independent, and pyro_vae.iwae_bound gives log p(x)"
        )
    return structure


def _warn(found: Integrals, means: str, advice: str) -> None:
    large = found.of_data > _LARGE
    if large.any():
        logger.warning(
            "to_arviz: the integral over the latents of %d of %d data has a standard error of more "
            "than %g nats, by %s: az.loo comes out low by about %.1f nats in all. %s, or a better "
            "guide of these latents (local_guide)",
            int(large.sum()),
            large.size,
            _LARGE,
            means,
            -found.loo_bias,
            advice,
        )
