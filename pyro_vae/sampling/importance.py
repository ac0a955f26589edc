"""Importance sampling of a base density with other draws mixed in, which betray what it misses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.programs.purposes import Purpose
from pyro_vae.refinement.blocks import Block, ScoredGuide
from pyro_vae.sampling.density import log_base, log_prior_and_likelihood
from pyro_vae.sampling.far_modes import ELSEWHERE, far_mode, log_gaussian
from pyro_vae.sampling.prepare import Ready
from pyro_vae.sampling.streams import Stream

_CHUNK = 250  # draws that are scored at once
# The mixture: shares of draws of the base, of it three times as wide, of a Gaussian at a mode that
# it does not reach, and of the prior.
_SHARES = (0.8, 0.1, 0.05, 0.05)
_SHARES_WITHOUT_PRIOR = (0.9, 0.1, 0.0, 0.0)
_WIDER = 3.0
_UNRESOLVED = 0.02  # the share of it that may lie where the dtype does not tell values apart


@dataclass(frozen=True, slots=True)
class Weighed:
    """Draws of n data with their importance weights.

    Attributes:
        z: unconstrained coordinates, [K, n, D].
        log_weights: log of p(x, z) over the mixture's density, [K, n], float64.
        elsewhere: the share of the posterior around a mode that the base does not reach, [n].
        unresolved: the share of it at values that the dtype rounds to the edge of their support,
            where the density that draws have is not the one that weights are divided by, [n].
        counts: of the draws of each density of the mixture, in their order.
    """

    z: Tensor
    log_weights: Tensor
    elsewhere: Tensor
    unresolved: Tensor
    counts: tuple[int, ...]

    @property
    def is_whole(self) -> Tensor:
        """For which data draws can be expected to have reached all of the posterior, [n]."""
        return (self.elsewhere <= ELSEWHERE) & (self.unresolved <= _UNRESOLVED)


def weigh(ready: Ready, rows: slice, block: Block, num_particles: int) -> Weighed:
    r"""Return draws of a defensive mixture, and their log weights.

    .. math:: \log w = \log p(x, z) - \log \sum_i \alpha_i q_i(z)

    with q_i the base density, the same three times as wide, a Gaussian at the highest mode that
    these do not reach, and the prior (Hesterberg 1995). The weights are at most 1 / 0.8 of those by
    the base alone; and where the posterior has a part that the base does not reach, but the others
    do, some weights are so large that k-hat and the effective sample size show it.

    Draws are stratified: each density has its share of them.
    """
    shares = _SHARES_WITHOUT_PRIOR if ready.evaluator.pair.masked else _SHARES
    counts = [round(share * num_particles) for share in shares[1:]]
    counts = [num_particles - sum(counts), *counts]
    table, seed = ready.table[rows], ready.evaluator.seed
    shape = sum(counts[:2]), rows.stop - rows.start, ready.blocks.num_noise
    z = ready.base_draws(
        rows, Stream(seed, Purpose.WEIGHED, rows.start).normal(table.new_empty(shape))
    )
    centre = ready.base_centre(rows)
    z = torch.cat([z[: counts[0]], centre + _WIDER * (z[counts[0] :] - centre)])
    inputs, is_far = [table, centre], torch.zeros_like(centre[:, 0], dtype=torch.bool)
    if counts[2]:
        far = far_mode(ready, rows, block, centre)
        noise = centre.new_empty(counts[2], *centre.shape)
        z = torch.cat([z, far.draws(Stream(seed, Purpose.WEIGHED_FAR, rows.start).normal(noise))])
        z = torch.cat([z, ready.prior_draws(rows, counts[3], (Purpose.WEIGHED, rows.start))])
        inputs, is_far = [*inputs, far.mean, far.factor], far.is_far
    # Draws of the prior on the edge of its support have no coordinates, and no weight.
    usable = z.isfinite().all(-1)
    z = torch.where(usable.unsqueeze(-1), z, centre)
    fractions = torch.tensor(counts, dtype=torch.float64, device=z.device) / num_particles
    weights, of_far = list[Tensor](), list[Tensor]()
    for some in z.split(_CHUNK):
        calls = math.ceil(num_particles / _CHUNK)
        terms = block.run(log_terms, block.scored, [*inputs, some], calls, check=not weights)
        joint, *densities = (term.double() for term in terms)
        parts = torch.stack(densities) + fractions[: len(densities)].log()[:, None, None]
        mixture = parts.logsumexp(0)
        weights.append((joint - mixture).nan_to_num(-math.inf, -math.inf, -math.inf))
        of_far.append((parts[2] - mixture).exp() if counts[2] else torch.zeros_like(mixture))
    log_weights = torch.cat(weights).masked_fill(~usable, -math.inf)
    posterior = log_weights.softmax(0)
    return Weighed(
        z,
        log_weights,
        torch.where(is_far, (posterior * torch.cat(of_far)).sum(0), 0.0),
        (posterior * ready.is_at_edge(z)).sum(0),
        tuple(count for count in counts if count),
    )


def log_terms(scored: ScoredGuide, table: Tensor, centre: Tensor, *more: Tensor) -> list[Tensor]:
    """Return log densities of coordinates, [K, n].

    These are p(x, z), the base, the wider base, and with more than z also the Gaussian of a mean
    and a factor, and the prior.
    """
    *gaussian, z = more
    with torch.no_grad():
        prior, log_likelihood = log_prior_and_likelihood(scored, table, z)
        base = log_base(scored, table, z)
        size = z.shape[-1]
        wide = log_base(scored, table, centre + (z - centre) / _WIDER) - size * math.log(_WIDER)
    found = [log_likelihood + prior, base, wide]
    return [*found, log_gaussian(gaussian[0], gaussian[1], z), prior] if gaussian else found
