"""What chains of all data gave: draws, and per datum whether they can be trusted."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_vae.arviz_versions import Container
from pyro_vae.export.arviz import Export, LogLikelihood
from pyro_vae.export.draws import GivenDraws
from pyro_vae.export.marginal import MarginalBound
from pyro_vae.markup import paragraphs
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.global_latents import Given, given_text
from pyro_vae.programs.types import DataPlate, Program

__all__ = ["PosteriorSamples"]

logger = logging.getLogger(__name__)

RHAT_THRESHOLD = 1.01  # Vehtari et al. (2021)
_FEWEST_OF_CHAIN = 100  # effective draws of a datum, for each chain: the same


@dataclass(frozen=True, slots=True)
class PosteriorSamples:
    """Draws of each datum's posterior from several chains.

    Attributes:
        draws: latent site to values ``[C, S, N, *inner plates, *event]``; without N where all is
            one datum.
        log_joint: log p(x, z) of each draw in unconstrained coordinates (the map's log determinant
            in it), in nats, [C, S, N], float64.
        rhat: the largest rank-normalized split R-hat of a datum's unconstrained coordinates and of
            its log p(x, z), [N]; nan where a chain did not move.
        ess: the smallest bulk effective sample size of these, [N].
        ess_tail: the smallest tail effective sample size, [N].
        acceptance: mean probability of acceptance, [N].
        divergences: trajectories that lost the energy, [N], after the warm-up.
        step_size: of each datum, in units of the scales that were learned, [N].
        num_steps: leapfrog steps of a trajectory, about, by block of data.
        given: the values that global latents were fixed at, by name.
        is_whole: whether all is one datum, so that draws have no N.
        missed: for which data chains have not visited a mode that holds more than a hundredth of
            the posterior, as Laplace's approximation weighs it, [N]; None where it was not looked
            for.
        evaluator: of the pair that they are of, on these data; copies and pickles are without it.
    """

    draws: dict[str, Tensor]
    log_joint: Tensor
    rhat: Tensor
    ess: Tensor
    ess_tail: Tensor
    acceptance: Tensor
    divergences: Tensor
    step_size: Tensor
    num_steps: tuple[int, ...]
    given: Given
    is_whole: bool = False
    missed: Tensor | None = None
    evaluator: Evaluator | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[object, ...]:
        *values, _ = (getattr(self, each.name) for each in fields(self))
        return type(self), tuple(values)

    @property
    def converged(self) -> Tensor:
        """For which data chains agree and are long enough, [N].

        R-hat below 1.01, bulk and tail effective sample sizes of 100 for each chain (Vehtari et al.
        2021), divergences of fewer than one trajectory in a hundred, and no mode that they are
        known to miss.
        """
        num_chains, num_draws = self.log_joint.shape[:2]
        enough = _FEWEST_OF_CHAIN * num_chains
        agree = (
            (self.rhat < RHAT_THRESHOLD)
            & (torch.minimum(self.ess, self.ess_tail) > enough)
            & (self.divergences < 0.01 * num_chains * num_draws)
        )
        return agree if self.missed is None else agree & ~self.missed

    def __repr__(self) -> str:
        num_chains, num_draws, num_data = self.log_joint.shape
        given = f"; given {given_text(self.given)}" if self.given else ""
        ess = torch.minimum(self.ess, self.ess_tail).nan_to_num(0.0)
        return (
            f"{num_chains} chains of {num_draws} draws of {', '.join(self.draws)} for {num_data} "
            f"data{given}; {int(self.converged.sum())} of {num_data} have converged; the largest "
            f"R-hat is {float(self.rhat.nan_to_num(torch.inf).max()):.3f}, the smallest effective "
            f"sample size {float(ess.min()):.0f}; {int((self.divergences > 0).sum())} data have "
            "divergences"
        )

    def _repr_html_(self) -> str:
        return paragraphs(repr(self).split("; "))

    def mean(self, site: str) -> Tensor:
        """Return the posterior mean of a site's values, ``[N, ...]``."""
        return self.draws[site].double().mean((0, 1))

    def std(self, site: str) -> Tensor:
        """Return the posterior standard deviation of a site's values, ``[N, ...]``."""
        return self.draws[site].double().flatten(0, 1).std(0)

    def to_arviz(
        self,
        *,
        coords: Mapping[str, ArrayLike] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        predictive: bool = True,
        log_likelihood: LogLikelihood = "pointwise",
        num_particles: int = 100,
        local_guide: Program | None = None,
        bound: MarginalBound | None = None,
        data_plate: DataPlate = None,
        file: str | os.PathLike[str] | None = None,
    ) -> Container:
        """Return the draws in ArviZ's container, with their chains.

        The groups and the arguments are those of :func:`pyro_vae.to_arviz`. sample_stats has lp,
        the log joint of unconstrained coordinates, and log_p, log p(x, z); constant_data of each
        datum: rhat, ess, ess_tail, acceptance, divergences, converged.

        Raises:
            ValueError: as :func:`pyro_vae.to_arviz`, and where the samples hold no evaluator.
        """
        if self.evaluator is None:
            raise ValueError(
                "samples that were copied or pickled are without their model: make the container "
                "before, to_arviz(file=...), or take .draws"
            )
        names = ("rhat", "ess", "ess_tail", "acceptance", "divergences", "converged")
        given = GivenDraws(
            self.evaluator,
            {name: value.flatten(0, 1) for name, value in self.draws.items()},
            self.log_joint.shape[0],
            {"lp": self.log_joint.flatten(0, 1)},
            {name: getattr(self, name).numpy(force=True) for name in names},
        )
        return Export(
            evaluator=self.evaluator,
            given=self.given,
            draws=given,
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

    def warn(self) -> None:
        """Log for how many data chains have not converged."""
        failed = ~self.converged
        if bool(failed.any()):
            missed = 0 if self.missed is None else int(self.missed.sum())
            modes = (
                f". Chains of {missed} data have not visited a mode that holds more than 0.01 of "
                "the posterior: pyro_vae.repair weighs all modes"
            )
            logger.warning(
                "sample_posterior: chains of %d of %d data have not converged (the largest R-hat "
                "is %.3f, the smallest effective sample size %.0f, %d data have divergences). Give "
                "them more draws (num_draws), a longer warm-up (num_warmup) or a better guide%s",
                int(failed.sum()),
                failed.numel(),
                float(np.nanmax(self.rhat.numpy(force=True), initial=0.0)),
                float(torch.minimum(self.ess, self.ess_tail).nan_to_num(0.0).min()),
                int((self.divergences > 0).sum()),
                modes if missed else "",
            )
