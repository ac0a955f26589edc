"""Lower bounds on log p(x), datum by datum, with standard errors, in constant memory."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from pyro_vae.diagnostics.psis import tail_length
from pyro_vae.evaluation.bound import Bound
from pyro_vae.particles.estimators import LargestWeights, StreamingELBO, StreamingIWAE, calibrated
from pyro_vae.particles.prepare import Prepared, by_block, prepare
from pyro_vae.programs.counts import as_count
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Particles, Program

__all__ = ["elbo", "iwae_bound"]

logger = logging.getLogger(__name__)


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
    prepared = prepare(
        model,
        guide,
        batch,
        given=given,
        data_plate=data_plate,
        particles=particles,
        seed=seed,
        compile=compile,
    )
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
    prepared = prepare(
        model,
        guide,
        batch,
        given=given,
        data_plate=data_plate,
        particles=particles,
        seed=seed,
        compile=compile,
    )
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
    value = torch.cat([block.bound.value for block in blocks])
    name = f"IWAE-{num_particles}" if of_weights else "ELBO"
    evaluator.warn_of_outside(name, value == -math.inf)
    skewness = torch.cat([block.bound.skewness for block in blocks])
    plain = torch.cat([block.bound.std_error for block in blocks])
    return Bound(
        name=name,
        value=value,
        std_error=calibrated(plain, skewness, num_particles),
        num_particles=num_particles,
        given=fixed,
        skewness=skewness,
        ess=torch.cat([block.weights.effective_sample_size for block in blocks]),
        largest=torch.cat([block.largest.value for block in blocks], 1),
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
