"""Lower bounds on log p(x), datum by datum, with standard errors, in constant memory."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae.diagnostics.pareto_k import PARETO_K_THRESHOLD, heavy_tailed
from pyro_vae.diagnostics.psis import pareto_k_of_largest, tail_length
from pyro_vae.particles.estimators import (
    LargestWeights,
    StreamingELBO,
    StreamingIWAE,
    calibrated,
    mean_std_error,
)
from pyro_vae.particles.global_latents import given_text
from pyro_vae.particles.prepare import Prepared, by_block, prepare
from pyro_vae.programs.counts import as_count
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Particles, Program

__all__ = ["Bound", "elbo", "iwae_bound"]

logger = logging.getLogger(__name__)

# The squared skewness of an estimate above which a few particles decide its error.
_FEW_DECIDE = 0.5


@dataclass(frozen=True)
class Bound:
    """A lower bound on log p(x) for each datum, in nats.

    Attributes:
        name: what it is, for example "ELBO" or "IWAE-5000".
        value: [N], float64.
        std_error: Monte Carlo standard error of each, [N]: value ± 1.96 of them covers with
            probability 0.95 (see :func:`pyro_vae.particles.estimators.calibrated`).
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
    mean_of: Literal["weights", "log weights"] = "log weights"

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
        return float(mean_std_error(self.std_error, self.skewness, self.num_particles))

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
        """Return why value or error is not to be trusted, for the text; "" for no reason."""
        if self.largest is None or self.ess is None:
            return ""
        size, untrusted = self.value.shape[0], int(self.untrusted.sum())
        heavy = int(heavy_tailed(self.pareto_k, self.ess.cpu(), self.num_particles).sum())
        threshold = f"k-hat is above {PARETO_K_THRESHOLD}"
        of_weights = self.mean_of == "weights"
        parts = []
        if untrusted:
            above = f", and log p(x) may be far above: {threshold}"
            why = above if of_weights else ": a few particles decide it"
            parts.append(f"for {untrusted} of {size} data the error is not to be trusted{why}")
        if heavy and not of_weights:
            parts.append(
                f"for {heavy} of {size} data {threshold}: the guide misses a part of the posterior"
            )
        if bool(self.pareto_k.isnan().any()):
            parts.append(f"{self.num_particles} particles are too few for a k-hat")
        return "".join(f"; {part}" for part in parts)


def elbo(
    model: Program,
    guide: Program,
    *batch: Any,
    num_particles: int = 100,
    given: GivenValues | None = None,
    chunk_size: int | None = None,
    data_plate: DataPlate = None,
    particles: Particles = "auto",
    seed: int | None = None,
    compile: Compile = "auto",
) -> Bound:
    r"""Return the evidence lower bound of each datum.

    .. math:: \frac{1}{K} \sum_k \log w_k

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites.
        *batch: their arguments.
        num_particles: K, draws for each datum.
        given: as in :func:`pyro_vae.log_weights`.
        chunk_size: pairs (particle, datum) scored at once; bounds memory only.
        data_plate: as in :func:`pyro_vae.log_weights`.
        particles: as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`: "auto" records what is drawn and scored
            again and again, and compiles it where there is enough of it to save time.

    Returns:
        A Bound with value [N] and std_error [N], in nats; pareto_k [N] and ess [N] of the
        importance weights.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses.
    """
    num_particles = as_count("num_particles", num_particles)
    prepared = prepare(model, guide, batch, given, data_plate, seed, particles, compile)
    return _bound(StreamingELBO, prepared, num_particles, chunk_size)


def iwae_bound(
    model: Program,
    guide: Program,
    *batch: Any,
    num_particles: int = 5000,
    given: GivenValues | None = None,
    chunk_size: int | None = None,
    data_plate: DataPlate = None,
    particles: Particles = "auto",
    seed: int | None = None,
    compile: Compile = "auto",
) -> Bound:
    r"""Return the importance-weighted bound of each datum (Burda et al. 2016).

    .. math:: \log \frac{1}{K} \sum_k w_k

    A lower bound on log p(x) in expectation, which tightens with K. Memory does not
    grow with K. With the prior as guide it is naive Monte Carlo's estimate.

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites.
        *batch: their arguments.
        num_particles: K, draws for each datum.
        given: as in :func:`pyro_vae.log_weights`.
        chunk_size: pairs (particle, datum) scored at once; bounds memory only.
        data_plate: as in :func:`pyro_vae.log_weights`.
        particles: as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`: "auto" records what is drawn and scored
            again and again, and compiles it where there is enough of it to save time.

    Returns:
        A Bound with value [N] and std_error [N] (delta method), in nats; pareto_k [N] and
        ess [N] of the weights. Where k-hat is above 0.7 the standard error is not to be trusted;
        the bound says, printed, for how many data.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses.
    """
    num_particles = as_count("num_particles", num_particles)
    prepared = prepare(model, guide, batch, given, data_plate, seed, particles, compile)
    return _bound(StreamingIWAE, prepared, num_particles, chunk_size)


def _bound(
    stream: type[StreamingELBO] | type[StreamingIWAE],
    prepared: Prepared,
    num_particles: int,
    chunk_size: int | None,
) -> Bound:
    """Stream the log weights of an evaluator into a bound for each datum."""
    evaluator, fixed = prepared
    of_weights = stream is StreamingIWAE
    if evaluator.pair.point_sites:
        logger.warning(
            "%s: the guide proposes one point for %s, and a point has no entropy: the value is "
            "log p(x, z) there, the height of a density, and no bound on log p(x)",
            "IWAE" if of_weights else "ELBO",
            ", ".join(map(repr, evaluator.pair.point_sites)),
        )
    blocks = []
    for chunks in by_block(evaluator.chunks(num_particles, chunk_size)):
        block = _Block(stream(), num_particles)
        for chunk in chunks:
            block.update(chunk.weights.total)
        blocks.append(block)
    columns = zip(*(block.results() for block in blocks), strict=True)
    value, skewness, plain, ess, largest = (torch.cat(column, -1) for column in columns)
    name = f"IWAE-{num_particles}" if of_weights else "ELBO"
    evaluator.warn_of_outside(name, value == -math.inf)
    return Bound(
        name=name,
        value=value,
        std_error=calibrated(plain, skewness, num_particles),
        num_particles=num_particles,
        given=fixed,
        skewness=skewness,
        ess=ess,
        largest=largest,
        mean_of="weights" if of_weights else "log weights",
    )


class _Block:
    """What is kept of the log weights of a block of data, while particles come in."""

    def __init__(self, bound: StreamingELBO | StreamingIWAE, num_particles: int) -> None:
        self.bound = bound
        self.weights = bound if isinstance(bound, StreamingIWAE) else StreamingIWAE()
        self.largest = LargestWeights(tail_length(num_particles))

    def update(self, log_weights: Tensor) -> None:
        """Take in a chunk, [k, n]."""
        self.bound.update(log_weights)
        if self.weights is not self.bound:
            self.weights.update(log_weights)
        self.largest.update(log_weights)

    def results(self) -> tuple[Tensor, ...]:
        """Return values, skewnesses, standard errors, ess, [n] each, and the largest, [M, n]."""
        bound = self.bound
        ess, largest = self.weights.effective_sample_size, self.largest.value
        return bound.value, bound.skewness, bound.std_error, ess, largest
