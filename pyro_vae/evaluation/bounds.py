"""Lower bounds on log p(x), datum by datum, with standard errors, in constant memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.diagnostics.psis import tail_length
from pyro_vae.evaluation.bound import Bound
from pyro_vae.particles.estimators import LargestWeights, StreamingELBO, StreamingIWAE, calibrated
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.global_latents import fix_globals_of_pair
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.counts import as_count
from pyro_vae.programs.types import Compile, Particles

__all__ = ["elbo", "iwae_bound"]

logger = logging.getLogger(__name__)


def elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    num_particles: int = 100,
    given: Mapping[str, Any] | None = None,
    chunk_size: int | None = None,
    data_plate: str | bool | None = None,
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
    return _bound(
        "ELBO",
        StreamingELBO,
        model,
        guide,
        batch,
        num_particles,
        given,
        chunk_size,
        data_plate,
        particles,
        seed,
        compile,
    )


def iwae_bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    num_particles: int = 5000,
    given: Mapping[str, Any] | None = None,
    chunk_size: int | None = None,
    data_plate: str | bool | None = None,
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
    return _bound(
        "IWAE",
        StreamingIWAE,
        model,
        guide,
        batch,
        num_particles,
        given,
        chunk_size,
        data_plate,
        particles,
        seed,
        compile,
    )


def _bound(
    name: str,
    stream: type[StreamingELBO] | type[StreamingIWAE],
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: tuple[Any, ...],
    num_particles: int,
    given: Mapping[str, Any] | None,
    chunk_size: int | None,
    data_plate: str | bool | None,
    particles: Particles,
    seed: int | None,
    compile: Compile,
) -> Bound:
    num_particles = as_count("num_particles", num_particles)
    arguments = as_batch(*batch)
    model, guide, fixed = fix_globals_of_pair(model, guide, arguments, data_plate, given)
    scorer = Evaluator(
        model,
        guide,
        arguments,
        data_plate=data_plate,
        particles=particles,
        seed=seed,
        compile=compile,
    )
    if scorer.pair.point_sites:
        logger.warning(
            "%s: the guide proposes one point for %s, and a point has no entropy: the value is "
            "log p(x, z) there, the height of a density, and no bound on log p(x)",
            name,
            ", ".join(map(repr, scorer.pair.point_sites)),
        )
    blocks: dict[int, _Block] = {}
    for chunk in scorer.chunks(num_particles, chunk_size):
        block = blocks.setdefault(chunk.rows.start, _Block(stream(), num_particles))
        block.update(chunk.weights.total)
    of_weights = stream is StreamingIWAE

    def joined(values: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(values), -1)

    value = joined(block.bound.value for block in blocks.values())
    named = f"{name}-{num_particles}" if of_weights else name
    scorer.warn_of_outside(named, value == -math.inf)
    skewness = joined(block.bound.skewness for block in blocks.values())
    plain = joined(block.bound.std_error for block in blocks.values())
    return Bound(
        name=named,
        value=value,
        std_error=calibrated(plain, skewness, num_particles),
        num_particles=num_particles,
        given=fixed,
        skewness=skewness,
        ess=joined(block.weights.effective_sample_size for block in blocks.values()),
        largest=joined(block.largest.value for block in blocks.values()),
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
