"""Where a table's optimisation may start: the guide's answer, the prior, Gaussians at modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_vae.guides.base import of_family
from pyro_vae.guides.local import LocalGuide
from pyro_vae.guides.moments import middle_moments, normal_moments
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.state import evaluation
from pyro_vae.programs.types import Node, Program, Values
from pyro_vae.refinement.climbing import Block, Climber
from pyro_vae.refinement.lbfgs import minimize_rows

__all__ = ["answer_of", "best_of", "rivals"]

_DRAWS = 256  # of a guide whose parameters cannot be read off
_SCREENED = 32  # draws, of which a few become starts of the search for modes
_STARTS, _FEW_STARTS, _MANY_COORDINATES = 3, 1, 16  # of draws of the guide, and of the prior
_MODES = 3  # of a datum at most
_CLIMB, _POLISH = 60, 20  # iterations of L-BFGS, before the curvature is known and after
_WEAK_PRIOR = 1e-2  # its weight where the data's own mode is looked for
_APART = 3.0  # modes: so many standard deviations
_LOWEST = 1e-2  # precision of a mode in units of the prior's: what is flatter says nothing
_WIDEST_HESSIAN = 256  # coordinates: its cost grows with them
_COMPARED = 64  # particles by which starts are compared


def answer_of(local: LocalGuide, guide: Program, scorer: Evaluator) -> Tensor:
    """Return a guide's own answer in the parameters of a local guide, [N, P]."""
    batch = scorer.batch
    with evaluation(guide), torch.no_grad():
        if (
            of_family(guide)
            and guide.family == local.family
            and guide.coordinates == local.coordinates
        ):
            return guide.family_params(*batch.args, **batch.kwargs).clone()
        values, _ = scorer.draw(slice(0, scorer.num_data), _DRAWS, (3,))
        start = _matching(local, scorer.guide_runs(2), scorer.single_values(values))
        # The draws of a point have no width to match: the prior's stands in.
        return torch.where(torch.isfinite(start), start, local.table.to(start))


def _matching(local: LocalGuide, runs: Sequence[Mapping[str, Node]], values: Values) -> Tensor:
    """Return parameters of a local guide that match another guide's proposals, [N, P].

    Args:
        local: whose family and coordinates they are.
        runs: the latent nodes of two runs of the other guide. Moments are read off a proposal on a
            real support that is Normal and alike in both; of others they are those of the draws.
        values: draws of the other guide, [K, batch..., event...] for each name; their preimages
            too where it keeps them.
    """
    means, stds = [], []
    for coordinates in local.coordinates:
        moments = None
        if coordinates.is_identity:
            moments = normal_moments([nodes[coordinates.name] for nodes in runs])
        if moments is None:
            # Draws outside of the support have no coordinates, which are not finite.
            mean, std = middle_moments(coordinates.rows(coordinates.unconstrained(values)))
        else:
            mean, std = (coordinates.rows(m.unsqueeze(0))[0] for m in moments)
        means.append(mean)
        stds.append(std)
    return local.family.initial(torch.cat(means, -1), torch.cat(stds, -1))


def rivals(climber: Climber, block: Block, own: Tensor, prior: Tensor) -> Tensor:
    """Return starts beside the guide's own, [C, n, P]: the prior, and Gaussians at modes.

    The modes are those of log p(x, z) in unconstrained coordinates, by L-BFGS from the guide's
    location and from a few draws of guide and prior, chosen by their importance weights: so
    they lie where the posterior has its mass. Where the data contradict the prior no draw comes
    near their own mode: so one search begins where the likelihood is highest. The Gaussian at a
    mode has its curvature, which makes posteriors of any scale and correlation alike.

    Args:
        climber: of the family.
        block: of n data.
        own: the guide's answer, [n, P].
        prior: parameters with the prior's moments, [n, P].
    """
    found = [prior]
    scale = block.prior_scale
    modes, heights = _climbed(climber, block, _places(climber, block, own, prior))
    near = torch.zeros_like(heights, dtype=torch.bool)
    columns = torch.arange(own.shape[0], device=own.device)
    for _ in range(_MODES):
        heights = heights.masked_fill(near, -torch.inf)
        if not bool((heights > -torch.inf).any()):
            break
        mode = modes[heights.argmax(0), columns]
        mode, factor = _whitened(climber, block, mode, scale)
        if factor is None:
            break
        found.append(block.guide.family.from_gaussian(mode, factor))
        away = torch.linalg.solve_triangular(factor, (modes - mode).movedim(0, -1), upper=False)
        near |= away.square().sum(1).T < _APART**2
        near[heights.argmax(0), columns] = True
    return torch.stack(found)


def best_of(climber: Climber, block: Block, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Return which start each datum has the highest ELBO at, the first where in doubt.

    Args:
        climber: of the family.
        block: of n data.
        tables: the starts, [C, n, P].

    Returns:
        The numbers of the best, [n], and all their ELBOs, [C, n].
    """
    noise, weight = climber.draws(block, _COMPARED, tables[0])
    terms = torch.stack(
        [
            climber.log_weights(block, table, noise, len(tables), check=i == 0).double()
            for i, table in enumerate(tables)
        ]
    )
    elbos = (weight.double() / weight.double().sum()) @ terms
    elbos = torch.nan_to_num(elbos, nan=-torch.inf, posinf=-torch.inf)
    best = elbos.argmax(0)
    highest = terms.gather(0, best.expand(1, terms.shape[1], -1))[0]
    gain = weight.double().unsqueeze(1) * (highest - terms[0])
    if not climber.heavy:  # mirrored pairs are not independent, their means are
        gain = gain.unflatten(0, (2, -1)).mean(0)
    sure = gain.mean(0) > 2 * gain.std(0) / gain.shape[0] ** 0.5
    # Where the guide's own answer has no ELBO, every other start is better.
    return torch.where(sure | torch.isinf(elbos[0]), best, 0), elbos


def _places(climber: Climber, block: Block, own: Tensor, prior: Tensor) -> Tensor:
    """Return where to look for modes from, [M, n, D]."""
    family, size = block.guide.family, block.guide.num_coordinates
    noise, _ = climber.draws(block, _SCREENED, own)
    spread = noise.unsqueeze(1).expand(-1, own.shape[0], -1)
    count = _STARTS if size <= _MANY_COORDINATES else _FEW_STARTS
    places = [family.from_noise(own, size, torch.zeros_like(spread[:1]))]
    places.append(family.from_noise(prior, size, torch.zeros_like(spread[:1])))
    generator = torch.Generator().manual_seed(block.scorer.seed % 2**63)
    for table in (own, prior):
        weights = climber.log_weights(block, table, noise, 2).double()
        uniform = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
        # The largest of log weight plus Gumbel noise: a draw without replacement.
        score = weights - (-uniform.to(weights).log()).log()
        chosen = torch.nan_to_num(score, nan=-torch.inf).topk(count, 0).indices
        draws = family.from_noise(table, size, spread)
        places.append(draws.gather(0, chosen.unsqueeze(-1).expand(-1, -1, size)))
    of_data, _ = _climbed(climber, block, torch.cat(places[:2]), _WEAK_PRIOR)
    found = torch.cat([*places, of_data])
    return torch.where(found.isfinite(), found, found[1])


def _climbed(
    climber: Climber, block: Block, places: Tensor, prior: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return modes found from places, [M, n, D], and how high they are, [M, n].

    Args:
        climber: of the family.
        block: of n data.
        places: [M, n, D].
        prior: the weight of the prior.
    """
    shape, calls = places.shape, 0

    def objective(flat: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        z = flat.reshape(shape)
        height, slope = climber.heights(block, z, _CLIMB, prior=prior, check=calls == 1)
        return -height.flatten(), -slope.flatten(0, 1)

    modes, _, _ = minimize_rows(objective, places.flatten(0, 1), _CLIMB)
    modes = modes.reshape(shape)
    heights, _ = climber.heights(block, modes, _CLIMB, prior=prior)
    return modes, torch.nan_to_num(heights, nan=-torch.inf, posinf=-torch.inf)


def _whitened(
    climber: Climber, block: Block, mode: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return a mode, searched for once more in whitened coordinates, and its scale_tril.

    Args:
        climber: of the family.
        block: of n data.
        mode: [n, D], near one.
        scale: the prior's standard deviations, [D].
    """
    factor = _factor(climber, block, mode, scale)
    if factor is None:
        return mode, None

    white = factor

    def objective(y: Tensor) -> tuple[Tensor, Tensor]:
        z = mode + (white @ y.unsqueeze(-1)).squeeze(-1)
        height, slope = climber.heights(block, z.unsqueeze(0), _POLISH)
        return -height[0], -(white.mT @ slope[0].unsqueeze(-1)).squeeze(-1)

    y, _, _ = minimize_rows(objective, torch.zeros_like(mode), _POLISH)
    moved = mode + (white @ y.unsqueeze(-1)).squeeze(-1)
    if float(y.abs().max()) > 0.1:
        factor = _factor(climber, block, moved, scale)
    return moved, factor


def _factor(climber: Climber, block: Block, mode: Tensor, scale: Tensor) -> Tensor | None:
    """Return the Cholesky factor of the covariance that the curvature says, [n, D, D]."""
    if mode.shape[1] > _WIDEST_HESSIAN:
        return None
    precision = climber.curvature(block, mode)
    if precision is None:
        return None
    precision = precision.double() * scale.double() * scale.double().unsqueeze(-1)
    eye = torch.eye(mode.shape[1], dtype=torch.float64, device=mode.device)
    usable = precision.isfinite().all(-1).all(-1)
    precision = torch.where(usable[:, None, None], precision, eye)
    values, vectors = torch.linalg.eigh(precision)
    flat = values < _LOWEST
    mended = (vectors * torch.where(flat, 1.0, values).unsqueeze(-2)) @ vectors.mT
    precision = torch.where(flat.any(-1)[:, None, None], mended, precision)
    # The Cholesky factor of an inverse, without the inverse.
    root, failed = torch.linalg.cholesky_ex(precision.flip(-2, -1))
    root = torch.where((failed > 0)[:, None, None], eye, root)
    factor = torch.linalg.solve_triangular(root.flip(-2, -1).mT, eye, upper=False)
    return (scale.double().unsqueeze(-1) * factor).to(mode)
