"""A lower bound on log p(x) for each datum, with its standard error and its k-hat."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vae.diagnostics.pareto_k import PARETO_K_THRESHOLD, heavy_tailed
from pyro_vae.diagnostics.psis import pareto_k_of_largest
from pyro_vae.particles import estimators
from pyro_vae.particles.global_latents import given_text

__all__ = ["Bound"]


# The squared skewness of an estimate above which a few particles decide its error.
_FEW_DECIDE = 0.5


@dataclass(frozen=True)
class Bound:
    """A lower bound on log p(x) for each datum, in nats.

    Attributes:
        name: what it is, for example "ELBO" or "IWAE-5000".
        value: [N], float64.
        std_error: Monte Carlo standard error of each, [N]: value ± 1.96 of them covers with
            probability 0.95 (see :func:`pyro_vae.particles.modes.estimators.calibrated`).
        num_particles: K.
        given: global latent sites, and the values that they were fixed at: then the bound is on
            log p(x | these).
        skewness: of the particles' effects on the value, [N].
        ess: effective sample size of the importance weights, [N], between 1 and K.
        largest: the largest log weights of each datum, [M, N]: those that tell its k-hat.
        mean_of: "weights", or "log weights" as of the ELBO.
    """

    name: str
    value: Tensor
    std_error: Tensor
    num_particles: int
    given: Mapping[str, Tensor] = field(default_factory=dict)
    skewness: Tensor | None = None
    ess: Tensor | None = None
    largest: Tensor | None = field(default=None, repr=False)
    mean_of: str = "log weights"

    @property
    def mean(self) -> float:
        """Mean over the data, in nats per datum."""
        return float(self.value.mean())

    @property
    def mean_std_error(self) -> float:
        """Monte Carlo standard error of the mean for these data.

        Draws of different data are independent. The spread over other data that
        might have been drawn is not in it.
        """
        return float(estimators.mean_std_error(self.std_error, self.skewness, self.num_particles))

    @functools.cached_property
    def pareto_k(self) -> Tensor:
        """Pareto k-hat of each datum's importance weights, [N]; nan from too few particles.

        Above 0.7 the guide misses so much of the posterior that importance sampling through it is
        not to be trusted; infinite where every weight is zero.
        """
        k_hat = torch.full(self.value.shape, math.nan, dtype=torch.float64)
        if self.largest is None:
            return k_hat
        largest = self.largest.detach().cpu()
        some = ~(largest == -math.inf).all(0)
        k_hat[~some] = math.inf
        if bool(some.any()):
            found = pareto_k_of_largest(largest[:, some].T.numpy(), self.num_particles)
            k_hat[some] = torch.as_tensor(found, dtype=torch.float64)
        return k_hat

    @property
    def untrusted(self) -> Tensor:
        """For which data the error is not to be trusted, [N].

        Of a mean of weights, those of heavy tails (:func:`heavy_tailed`); of the ELBO, those of
        which a few particles decide it.
        """
        if self.skewness is None or self.ess is None:
            return torch.zeros(self.value.shape, dtype=torch.bool)
        if self.mean_of == "weights":
            return heavy_tailed(self.pareto_k, self.ess.cpu(), self.num_particles)
        return (self.skewness.square() > _FEW_DECIDE * self.num_particles).cpu()

    def __repr__(self) -> str:
        given = f"; given {given_text(self.given)}" if self.given else ""
        return (
            f"{self.name}: {self.mean:.4f} ± {self.mean_std_error:.4f} nats per datum "
            f"({self.value.shape[0]} data{given}){self._doubts()}"
        )

    def _doubts(self) -> str:
        """Return what a reader of the value has to know beside its error."""
        if self.largest is None or self.ess is None:
            return ""
        size, untrusted = self.value.shape[0], int(self.untrusted.sum())
        heavy = int(heavy_tailed(self.pareto_k, self.ess.cpu(), self.num_particles).sum())
        threshold = f"k-hat is above {PARETO_K_THRESHOLD}"
        doubts = ""
        if self.mean_of == "weights" and untrusted:
            doubts = (
                f"; for {untrusted} of {size} data the error is not to be trusted, and log p(x) "
                f"may be far above: {threshold}"
            )
        elif untrusted:
            doubts = (
                f"; for {untrusted} of {size} data the error is not to be trusted: a few "
                "particles decide it"
            )
        if self.mean_of != "weights" and heavy:
            doubts += (
                f"; for {heavy} of {size} data {threshold}: the guide misses a part of the "
                "posterior"
            )
        if bool(self.pareto_k.isnan().any()):
            doubts += f"; {self.num_particles} particles are too few for a k-hat"
        return doubts
