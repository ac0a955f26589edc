"""A mode of each posterior that a base density or chains do not reach, as a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.programs.purposes import Purpose
from pyro_vae.refinement.blocks import Block
from pyro_vae.refinement.starts import CLIMB, find_modes, gaussian_at
from pyro_vae.sampling.density import log_base, log_prior_and_likelihood
from pyro_vae.sampling.prepare import Ready

# The share of the posterior that may lie around a mode out of reach: where there is one, others
# that were not found may hold as much.
ELSEWHERE = 0.01
_FEW = 0.1  # times a mode's share: chains with fewer of their draws there have not been there
_ALL = 0.9  # the share of draws at a mode that says that the chains are in it, and in no other
_DRAWS = 256  # of the prior
# So many of them are climbed from as they come: a mode that half lead to is missed in 1 of 64 data.
_ANY = 6
# And so many of those out of the base's reach under which the datum is likeliest: a mode that few
# draws lead to may hold more than those do.
_LIKELY = 6
# Steps of a climb that only asks whether there is such a mode: near its top, where the dtype does
# not tell heights apart, further ones cost most. The mode found is polished.
_SHORT = 20
_APART = 4.0  # standard deviations, beyond where draws of a Gaussian lie


@dataclass(frozen=True, slots=True)
class FarMode:
    """A Gaussian with the curvature of each posterior at its highest mode out of reach.

    Attributes:
        mean: [n, D].
        factor: Cholesky factors of the covariances, [n, D, D].
        is_far: for which data there is such a mode, [n]; for the others it is the highest one.
    """

    mean: Tensor
    factor: Tensor
    is_far: Tensor

    def draws(self, noise: Tensor) -> Tensor:
        """Return draws [K, n, D] made of noise [K, n, D]."""
        return self.mean + torch.einsum("nde,kne->knd", self.factor, noise)

    def log_density(self, z: Tensor) -> Tensor:
        """Return the log density of coordinates [K, n, D], [K, n]."""
        return log_gaussian(self.mean, self.factor, z)


def far_mode(ready: Ready, rows: slice, block: Block, centre: Tensor) -> FarMode:
    """Return the highest mode out of the base's reach, of those that the prior's draws lead to.

    Args:
        ready: the pair.
        rows: of the block.
        block: of n data.
        centre: the middle of the base density, [n, D].

    Raises:
        ValueError: where a mask of the model leaves latents out, which have no prior.
    """
    table = ready.table[rows]
    reach = _reach(centre.shape[-1])

    @torch.no_grad()
    def is_out_of_reach(z: Tensor) -> Tensor:
        middle = log_base(block.scored, table, centre.unsqueeze(0))
        return log_base(block.scored, table, z) < middle - reach

    mode, is_far = _highest(ready, rows, block, centre, is_out_of_reach, CLIMB)
    width = torch.diag_embed(ready.base_scale(rows))
    mean, factor = gaussian_at(block, mode) or (mode, width)
    usable = mean.isfinite().all(-1) & factor.isfinite().flatten(1).all(1)
    mean = torch.where(usable.unsqueeze(-1), mean, centre)
    factor = torch.where(usable[:, None, None], factor, width)
    return FarMode(mean, factor, is_far & usable)


def _highest(
    ready: Ready,
    rows: slice,
    block: Block,
    centre: Tensor,
    is_out_of_reach: Callable[[Tensor], Tensor],
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Return the highest mode out of reach, [n, D], else of all, and which data have one, [n]."""
    table = ready.table[rows]
    draws = ready.prior_draws(rows, _DRAWS, (Purpose.FAR_MODES, rows.start))
    draws = torch.where(draws.isfinite().all(-1, keepdim=True), draws, centre)
    with torch.no_grad():
        _, likelihood = log_prior_and_likelihood(block.scored, table, draws)
    likelihood = likelihood.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    likely = torch.where(is_out_of_reach(draws), likelihood, -torch.inf)[_ANY:].topk(_LIKELY, 0)
    chosen = likely.indices.unsqueeze(-1).expand(-1, -1, draws.shape[-1])
    places = torch.cat([draws[:_ANY], draws[_ANY:].gather(0, chosen)])
    modes, heights = find_modes(block, places, steps=steps)
    far = is_out_of_reach(modes) & (heights > -torch.inf)
    is_far = far.any(0)
    highest = torch.where(far | ~is_far, heights, -torch.inf).argmax(0)
    return modes[highest, torch.arange(len(centre), device=modes.device)], is_far


def is_missed(
    ready: Ready,
    rows: slice,
    block: Block,
    z: Tensor,
    log_mass: Tensor,
    weights: Tensor | None = None,
    begin: Tensor | None = None,
) -> Tensor:
    r"""Return for which data chains miss a mode with more than a hundredth of the posterior, [n].

    That is the highest mode out of reach of the draws' independent Gaussians, of those that the
    prior's draws lead to, with the mass of Laplace's approximation,
    :math:`\log p(x, \hat z) + \tfrac{D}{2} \log 2 \pi + \log \det L`. It is missed where fewer
    draws are within reach of its Gaussian than a tenth of its share; or where it is out of reach of
    the chains' begin and not all have gone there: of those that cross late on their way the few
    early ones carry the sum, and there may be none.

    Nothing is said (False) where a mask of the model leaves latents out, which have no prior, and
    of models without second derivatives, or with too many coordinates for them.

    Args:
        ready: the pair.
        rows: of the block.
        block: of n data.
        z: draws of the chains, [K, n, D].
        log_mass: log of what p(x, z) integrates to where the chains are, [n].
        weights: of the draws, [K, n], with sum 1; all alike by default.
        begin: of annealed chains, [C, n, D].
    """
    if ready.evaluator.pair.masked:
        return torch.zeros_like(log_mass, dtype=torch.bool)
    if weights is None:
        weights = torch.full_like(z[..., 0], 1 / len(z))
    weights = weights.to(z)
    centre, is_beyond_ends = _beyond(z, weights)
    is_beyond_begin = is_beyond_ends
    if begin is not None:
        _, is_beyond_begin = _beyond(begin, torch.full_like(begin[..., 0], 1 / len(begin)))

    def is_out_of_reach(z: Tensor) -> Tensor:
        return is_beyond_ends(z) | is_beyond_begin(z)

    mode, is_far = _highest(ready, rows, block, centre, is_out_of_reach, _SHORT)
    if not bool(is_far.any()) or (gaussian := gaussian_at(block, mode)) is None:
        return torch.zeros_like(log_mass, dtype=torch.bool)
    far = FarMode(*gaussian, is_far)
    at = far.mean.unsqueeze(0)
    with torch.no_grad():
        prior, likelihood = log_prior_and_likelihood(block.scored, ready.table[rows], at)
    top = far.log_density(at)
    mass = ((prior + likelihood).double() - top.double())[0]
    share = (mass - log_mass).sigmoid()
    near = top - far.log_density(z) <= _reach(z.shape[-1])
    found = (weights * near).sum(0)
    few = found < _FEW * share
    if begin is not None:
        few |= is_beyond_begin(mode) & (found < _ALL)
    return is_far & (share > ELSEWHERE) & few


def _beyond(z: Tensor, weights: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the mean of draws [K, n, D], [n, D], and what says of [..., n, D] if beyond them."""
    centre = torch.einsum("kn,knd->nd", weights, z)
    variance = torch.einsum("kn,knd->nd", weights, (z - centre).square())
    spread = variance.clamp_min(torch.finfo(z.dtype).tiny).sqrt()
    reach = _reach(z.shape[-1])
    return centre, lambda z: 0.5 * ((z - centre) / spread).square().sum(-1) > reach


def _reach(size: int) -> float:
    """Return how far below its top a Gaussian's log density is at the end of its reach."""
    return 0.5 * (math.sqrt(size) + _APART) ** 2


def log_gaussian(mean: Tensor, factor: Tensor, z: Tensor) -> Tensor:
    """Return the log density of coordinates [K, n, D], [K, n], of Gaussians, one for each datum."""
    away = (z - mean).permute(1, 2, 0)
    white = torch.linalg.solve_triangular(factor, away, upper=False)
    constant = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = constant + 0.5 * z.shape[-1] * math.log(2 * math.pi)
    return -0.5 * white.square().sum(1).T - constant
