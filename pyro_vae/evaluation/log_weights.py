"""Log weights of a guide's draws, for each particle and datum."""

from __future__ import annotations

import dataclasses
from typing import Any

from pyro_vae.particles.log_weights import LogWeights
from pyro_vae.particles.prepare import by_block, prepare
from pyro_vae.programs.counts import as_count
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Particles, Program

__all__ = ["log_weights"]


def log_weights(
    model: Program,
    guide: Program,
    *batch: Any,
    num_particles: int,
    given: GivenValues | None = None,
    chunk_size: int | None = None,
    data_plate: DataPlate = None,
    particles: Particles = "auto",
    seed: int | None = None,
    compile: Compile = "auto",
) -> LogWeights:
    r"""Draw particles from the guide and return their log weights, datum by datum.

    .. math:: \log w_{kn} = \log p(x_n | z_{kn}) + \log p(z_{kn}) - \log q(z_{kn} | x_n)

    Scales (subsampling, poutine.scale) are stripped; masks are kept. Modules run in
    eval mode, without gradients. Discrete latents c of finite support that the guide does
    not propose are summed out: p(z) is the sum over c of p(c, z), and p(x | z) = p(x, z) / p(z).

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites, of any make.
        *batch: their arguments: tensors with a row per datum; or one tuple or mapping.
        num_particles: K, draws for each datum.
        given: values of global latent sites, by name: the weights are then of p(x, z | these),
            model and guide alike. Without it a guide's ``global_guide`` gives its median.
        chunk_size: pairs (particle, datum) that the model scores at once: bounds
            memory, changes no result.
        data_plate: the name of the plate of the data, where it is not plain; False to
            treat the whole batch as one datum (weights [K, 1]).
        particles: how several particles are run at once: in a "plate" outside the
            model's own, by "repeat" of the batch, in a "loop"; "auto" takes the first
            that agrees with single particles.
        seed: of the draws; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`: "auto" records what is drawn and scored
            again and again, and compiles it where there is enough of it to save time.

    Returns:
        LogWeights with log_likelihood, log_prior, log_guide and total, each [K, N], in
        nats, in the dtype of the model.

    Raises:
        DataPlateError: where it is not plain which plate is that of the data.
        ValueError: for an empty batch, NaN in the data, observed values outside their
            support, num_particles < 1, global latents that are not given (but of a global_guide
            that knows its median: they are held there), a guide whose sites are not the
            model's, and a density that is not the same for particles together and alone.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def posterior(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> weights = pv.log_weights(model, posterior, torch.zeros(3), num_particles=4)
        >>> weights.total.std().item() < 1e-6
        True
    """
    num_particles = as_count("num_particles", num_particles)
    evaluator, fixed = prepare(model, guide, batch, given, data_plate, seed, particles, compile)
    blocks = [
        LogWeights.concatenate([chunk.weights for chunk in block], 0)
        for block in by_block(evaluator.chunks(num_particles, chunk_size))
    ]
    return dataclasses.replace(LogWeights.concatenate(blocks, 1), given=fixed)
