"""Lower bounds on log p(x), datum by datum, with standard errors, in constant memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from pyro_vae.batches import as_batch
from pyro_vae.estimators import StreamingELBO, StreamingIWAE
from pyro_vae.global_latents import fix_globals_of_pair
from pyro_vae.results import Bound
from pyro_vae.scorer import Scorer

__all__ = ["elbo", "iwae_bound"]

logger = logging.getLogger(__name__)


def elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    num_particles: int = 100,
    chunk_size: int | None = None,
    data_plate: str | bool | None = None,
    particles: str = "auto",
    seed: int | None = None,
    compile: str | bool = "auto",
) -> Bound:
    r"""Return the evidence lower bound of each datum.

    .. math:: \frac{1}{K} \sum_k \log w_k

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites.
        *batch: their arguments.
        num_particles: K, draws for each datum.
        chunk_size: pairs (particle, datum) scored at once; bounds memory only.
        data_plate: as in :func:`pyro_vae.log_weights`.
        particles: as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`: "auto" records what is drawn and scored
            again and again, and compiles it where there is enough of it to save time.

    Returns:
        A Bound with value [N] and std_error [N], in nats.

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
    chunk_size: int | None = None,
    data_plate: str | bool | None = None,
    particles: str = "auto",
    seed: int | None = None,
    compile: str | bool = "auto",
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
        chunk_size: pairs (particle, datum) scored at once; bounds memory only.
        data_plate: as in :func:`pyro_vae.log_weights`.
        particles: as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`: "auto" records what is drawn and scored
            again and again, and compiles it where there is enough of it to save time.

    Returns:
        A Bound with value [N] and std_error [N] (delta method), in nats. Where the
        Pareto k-hat of the weights is above 0.7 the standard error is not to be trusted.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses.
    """
    return _bound(
        f"IWAE-{num_particles}",
        StreamingIWAE,
        model,
        guide,
        batch,
        num_particles,
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
    chunk_size: int | None,
    data_plate: str | bool | None,
    particles: str,
    seed: int | None,
    compile: str | bool,
) -> Bound:
    arguments = as_batch(*batch)
    model, guide, given = fix_globals_of_pair(model, guide, arguments, data_plate)
    scorer = Scorer(
        model,
        guide,
        arguments,
        data_plate=data_plate,
        particles=particles,
        seed=seed,
        compile=compile,
    )
    if scorer.point_sites:
        logger.warning(
            "%s: the guide proposes one point for %s, and a point has no entropy: the value is "
            "log p(x, z) there, the height of a density, and no bound on log p(x)",
            name,
            ", ".join(map(repr, scorer.point_sites)),
        )
    streams: dict[int, StreamingELBO | StreamingIWAE] = {}
    for chunk in scorer.chunks(num_particles, chunk_size):
        streams.setdefault(chunk.rows.start, stream()).update(chunk.weights.total)
    return Bound(
        name=name,
        value=torch.cat([block.value for block in streams.values()]),
        std_error=torch.cat([block.std_error for block in streams.values()]),
        num_particles=num_particles,
        given=given,
    )
