"""An evaluator of a user's pair on a batch, global latents fixed; its draws by block of data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pyro_vae.particles.evaluator import Chunk, Evaluator
from pyro_vae.particles.global_latents import Given, fix_globals_of_pair
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Particles, Program


class Prepared(NamedTuple):
    """What draws and scores a batch, and the values that global latents were fixed at."""

    evaluator: Evaluator
    given: Given


def prepare(
    model: Program,
    guide: Program,
    batch: tuple[Any, ...],
    given: GivenValues | None,
    data_plate: DataPlate,
    seed: int | None,
    particles: Particles = "auto",
    compile: Compile = "auto",
) -> Prepared:
    """Return an evaluator of a pair on a batch, both as :func:`pyro_vae.log_weights` takes them."""
    arguments = as_batch(*batch)
    model, guide, fixed = fix_globals_of_pair(model, guide, arguments, data_plate, given)
    evaluator = Evaluator(
        model,
        guide,
        arguments,
        data_plate=data_plate,
        particles=particles,
        seed=seed,
        compile=compile,
    )
    return Prepared(evaluator, fixed)


def by_block(chunks: Iterable[Chunk]) -> Iterator[Iterator[Chunk]]:
    """Return the chunks of each block of data in turn; use one up before the next is taken."""
    return (block for _, block in itertools.groupby(chunks, lambda chunk: chunk.rows.start))
