"""Importance sampling of a base density with wider draws mixed in, which betray what it misses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.refinement.blocks import Block, ScoredGuide
from pyro_vae.sampling.density import log_base, log_prior_and_likelihood
from pyro_vae.sampling.prepare import Ready
from pyro_vae.sampling.streams import Stream

_KEY = 41  # first in the key of the stream of random numbers, after the seed
_CHUNK = 250  # draws that are scored at once
# The mixture: shares of draws of the base, of it three times as wide, and of the prior.
_SHARES = (0.8, 0.1, 0.1)
_WIDER = 3.0


@dataclass(frozen=True, slots=True)
class Weighed:
    """Draws of n data with their importance weights.

    Attributes:
        z: unconstrained coordinates, [K, n, D].
        log_weights: log of p(x, z) over the mixture's density, [K, n], float64.
    """

    z: Tensor
    log_weights: Tensor


def weigh(ready: Ready, rows: slice, block: Block, num_particles: int) -> Weighed:
    r"""Return draws of a defensive mixture, and their log weights.

    .. math:: \log w = \log p(x, z) - \log \sum_i \alpha_i q_i(z)

    with q_i the base density, the same three times as wide, and the prior (Hesterberg 1995). The
    weights are at most 1 / 0.8 of those by the base alone; and where the posterior has a part that
    the base does not reach, but the wider ones do, some weights are so large that k-hat and the
    effective sample size show it.

    Draws are stratified: each density has its share of them.
    """
    shares = _SHARES if not ready.evaluator.pair.masked else (0.9, 0.1, 0.0)
    counts = [round(share * num_particles) for share in shares[1:]]
    counts = [num_particles - sum(counts), *counts]
    table = ready.table[rows]
    shape = sum(counts[:2]), rows.stop - rows.start, ready.blocks.num_noise
    noise = Stream(ready.evaluator.seed, _KEY, rows.start).normal(table.new_empty(shape))
    z = ready.base_draws(rows, noise)
    centre = ready.base_centre(rows)
    z = torch.cat([z[: counts[0]], centre + _WIDER * (z[counts[0] :] - centre)])
    if counts[2]:
        prior = ready.prior_draws(rows, counts[2], (_KEY, rows.start))
        z = torch.cat([z, prior])
    # Draws of the prior on the edge of its support have no coordinates, and no weight.
    usable = z.isfinite().all(-1)
    z = torch.where(usable.unsqueeze(-1), z, centre)
    fractions = torch.tensor(counts, dtype=torch.float64, device=z.device) / num_particles
    found: list[Tensor] = []
    for some in z.split(_CHUNK):
        inputs = [table, centre, some]
        calls = math.ceil(num_particles / _CHUNK)
        terms = block.run(log_terms, block.scored, inputs, calls, check=not found)
        joint, *densities = (term.double() for term in terms)
        mixture = torch.stack(densities) + fractions.log()[:, None, None]
        log_weights = joint - mixture.logsumexp(0)
        found.append(log_weights.nan_to_num(-math.inf, -math.inf, -math.inf))
    return Weighed(z, torch.cat(found).masked_fill(~usable, -math.inf))


def log_terms(scored: ScoredGuide, table: Tensor, centre: Tensor, z: Tensor) -> list[Tensor]:
    """Return log densities of coordinates, [K, n]: p(x, z), the base, the wider base, the prior."""
    with torch.no_grad():
        prior, log_likelihood = log_prior_and_likelihood(scored, table, z)
        base = log_base(scored, table, z)
        size = z.shape[-1]
        wide = log_base(scored, table, centre + (z - centre) / _WIDER) - size * math.log(_WIDER)
    return [log_likelihood + prior, base, wide, prior]
