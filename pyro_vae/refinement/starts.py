"""Where a table's optimisation may start: the guide's answer, the prior, Gaussians at modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_vae.guides.base import of_family
from pyro_vae.guides.coordinates import middle_moments, normal_moments
from pyro_vae.guides.local import LocalGuide
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.on_demand import OnDemand
from pyro_vae.programs.state import evaluation
from pyro_vae.programs.types import Node, Program, Values
from pyro_vae.refinement.blocks import Block, ScoredGuide
from pyro_vae.refinement.climbing import Climber
from pyro_vae.refinement.lbfgs import minimize_rows

CLIMB, _POLISH = 60, 20  # iterations of L-BFGS, before the curvature is known and after
_MOVED = 0.1  # standard deviations: so far from where the curvature was taken it is taken anew
_LOWEST = 1e-2  # precision of a mode in units of the prior's: what is flatter says nothing
_WIDEST_HESSIAN = 256  # coordinates: its cost grows with them
_MOST_CURVATURE = 2**22  # numbers in a block's Hessians: few data may have more coordinates
_DRAWS = 256  # of a guide whose parameters cannot be read off
_SCREENED = 32  # draws, of which a few become starts of the search for modes
_STARTS, _FEW_STARTS, _MANY_COORDINATES = 3, 1, 16  # of draws of the guide, and of the prior
_MODES = 3  # of a datum at most
_WEAK_PRIOR = 1e-2  # its weight where the data's own mode is looked for
_APART = 3.0  # modes: so many standard deviations
_COMPARED = 64  # particles by which starts are compared


def find_modes(
    block: Block, places: Tensor, prior: float = 1.0, steps: int = CLIMB
) -> tuple[Tensor, Tensor]:
    """Return the modes [M, n, D] that L-BFGS finds from places [M, n, D], and how high they are.

    That is log p(x, z), up to a constant, [M, n], with the prior to a power; in so many steps.
    """
    shape, first = places.shape, iter([True])

    def objective(flat: Tensor) -> tuple[Tensor, Tensor]:
        height, slope = _height(block, flat.reshape(shape), CLIMB, prior, check=next(first, False))
        return -height.flatten(), -slope.flatten(0, 1)

    modes = minimize_rows(objective, places.flatten(0, 1), steps).rows.reshape(shape)
    height, _ = _height(block, modes, CLIMB, prior)
    # -inf stays what it is: by default it would become the lowest number, a height like others.
    return modes, height.nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def gaussian_at(block: Block, mode: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return mean [n, D] and scale_tril [n, D, D] of the Gaussian of the curvature at a mode.

    The mode is searched for once more, in whitened units. None where the model cannot be
    differentiated twice, or has too many coordinates.
    """
    if (white := _scale_tril(block, mode)) is None:
        return None

    def moved(y: Tensor) -> Tensor:
        return mode + (white @ y.unsqueeze(-1)).squeeze(-1)

    def objective(y: Tensor) -> tuple[Tensor, Tensor]:
        height, slope = _height(block, moved(y).unsqueeze(0), _POLISH)
        return -height[0], -(white.mT @ slope[0].unsqueeze(-1)).squeeze(-1)

    y = minimize_rows(objective, torch.zeros_like(mode), _POLISH).rows
    factor = _scale_tril(block, moved(y)) if float(y.abs().max()) > _MOVED else white
    return None if factor is None else (moved(y), factor)


def _scale_tril(block: Block, mode: Tensor) -> Tensor | None:
    """Return the Cholesky factor of the inverse of the curvature, [n, D, D]."""
    if (precision := _curvature(block.flat, mode)) is None:
        return None
    scale = block.prior_scale.double()
    precision = precision.double() * scale * scale.unsqueeze(-1)
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
    return (scale.unsqueeze(-1) * factor).to(mode)


def _curvature(flat: ScoredGuide, z: Tensor) -> Tensor | None:
    """Return minus the Hessian of log p(x, z) at z [n, D], [n, D, D]; None where there is none."""
    num_data, size = z.shape
    if size > _WIDEST_HESSIAN and num_data * size**2 > _MOST_CURVATURE:
        return None
    step = max(1, flat.evaluator.chunk_pairs // num_data)
    rows = []
    with torch.enable_grad():
        for some in torch.eye(size, dtype=z.dtype, device=z.device).split(step):
            at = z.expand(len(some), num_data, size).clone().requires_grad_()
            try:
                (slope,) = torch.autograd.grad(flat.log_joint(at).sum(), [at], create_graph=True)
                (row,) = torch.autograd.grad((slope * some.unsqueeze(1)).sum(), [at])
            except RuntimeError:  # an operation that can be differentiated once
                return None
            rows.append(-row)
    found = torch.cat(rows).movedim(0, 1)
    return (found + found.mT) / 2


def _height(
    block: Block, z: Tensor, calls: int, prior: float = 1.0, *, check: bool = False
) -> Sequence[Tensor]:
    """Return :func:`height` of z [K, n, D], by its graph."""
    # A tensor: a number would be a constant of the graph.
    return block.run(height, block.flat, [z.new_full((), prior), z], calls, check=check)


def height(flat: ScoredGuide, prior: Tensor, z: Tensor) -> list[Tensor]:
    """Return log p(x, z) with the prior to a power, [K, n], and its gradient, [K, n, D]."""
    z = z.detach().requires_grad_()
    height = flat.log_joint(z, prior)
    return [height.detach(), *torch.autograd.grad(height.sum(), [z])]


def answer_of(local: LocalGuide, guide: Program, evaluator: Evaluator) -> Tensor:
    """Return a guide's own answer in the parameters of a local guide, [N, P].

    Read off where the guide is of the same family, else matched to its proposals.
    """
    batch = evaluator.batch
    if isinstance(batch, OnDemand):
        found = []
        for rows in batch.parts():
            with evaluator.of_part(rows) as part:
                found.append(answer_of(local.of_rows(rows), guide, part))
        return torch.cat(found)
    with evaluation(guide), torch.no_grad():
        like = local.family, local.coordinates
        if of_family(guide) and (guide.family, guide.coordinates) == like:
            return guide.family_params(*batch.args, **batch.kwargs).clone()
        values, _ = evaluator.draw(slice(0, evaluator.num_data), _DRAWS, (3,))
        start = _matching(local, evaluator.guide_runs(2), evaluator.single_values(values))
        # The draws of a point have no width to match: the prior's stands in.
        return torch.where(torch.isfinite(start), start, local.table.to(start))


def _matching(local: LocalGuide, runs: Sequence[Mapping[str, Node]], values: Values) -> Tensor:
    """Return parameters of a local guide that match another guide's proposals, [N, P].

    Moments are read off a proposal on a real support that is Normal and alike in two runs of that
    guide; of others they are those of its draws.
    """
    found = []
    for coordinates in local.coordinates:
        nodes = [run[coordinates.name] for run in runs]
        moments = normal_moments(nodes) if coordinates.is_identity else None
        if moments is None:
            # Draws outside of the support have no coordinates, which are not finite.
            found.append(middle_moments(coordinates.rows(coordinates.unconstrained(values))))
        else:
            mean, std = (coordinates.rows(m.unsqueeze(0))[0] for m in moments)
            found.append((mean, std))
    return local.family.initial(*(torch.cat(parts, -1) for parts in zip(*found, strict=True)))


def starts_of(climber: Climber, own: Tensor, prior: Tensor) -> Tensor:
    """Return where each row may start, [C, N, P].

    That is the guide's own answer [N, P], parameters with the prior's moments, and others.
    """

    def of_block(block: Block) -> Tensor:
        mine = own[block.rows]
        rivals = _rivals(climber, block, mine, prior[block.rows])
        return torch.cat([mine.unsqueeze(0), rivals])

    every = torch.arange(own.shape[0], device=own.device)
    found = [tables for _, tables in climber.blocks.over(every, of_block)]
    most = max(len(tables) for tables in found)
    # A block whose data have fewer modes than another's repeats their own answer.
    return torch.cat([torch.cat([t, t[:1].expand(most - len(t), *t.shape[1:])]) for t in found], 1)


def _rivals(climber: Climber, block: Block, own: Tensor, prior: Tensor) -> Tensor:
    """Return starts beside the guide's own, [C, n, P]: the prior, and Gaussians at modes.

    The modes are those of log p(x, z) in unconstrained coordinates, found from the guide's
    location and from a few draws of guide and prior, chosen by their importance weights: so
    they lie where the posterior has its mass. Where the data contradict the prior no draw comes
    near their own mode: so one search begins where the likelihood is highest. The Gaussian at a
    mode has its curvature, which makes posteriors of any scale and correlation alike.
    """
    found = [prior]
    modes, heights = find_modes(block, _places(climber, block, own, prior))
    near = torch.zeros_like(heights, dtype=torch.bool)
    columns = torch.arange(own.shape[0], device=own.device)
    for _ in range(_MODES):
        heights = heights.masked_fill(near, -torch.inf)
        if not bool((heights > -torch.inf).any()):
            break
        highest = heights.argmax(0)
        if (gaussian := gaussian_at(block, modes[highest, columns])) is None:
            break
        mean, factor = gaussian
        found.append(climber.blocks.family.from_gaussian(mean, factor))
        away = torch.linalg.solve_triangular(factor, (modes - mean).movedim(0, -1), upper=False)
        near |= away.square().sum(1).T < _APART**2
        near[highest, columns] = True
    return torch.stack(found)


def _places(climber: Climber, block: Block, own: Tensor, prior: Tensor) -> Tensor:
    """Return where to look for modes from, [M, n, D]."""
    family, size = climber.blocks.family, climber.blocks.size
    _, noise = climber.noise(_SCREENED)
    spread = noise.unsqueeze(1).expand(-1, own.shape[0], -1)  # the same for every datum
    count = _STARTS if size <= _MANY_COORDINATES else _FEW_STARTS
    centre = torch.zeros_like(spread[:1])
    places = [family.from_noise(table, size, centre) for table in (own, prior)]
    generator = torch.Generator().manual_seed(block.evaluator.seed % 2**63)
    for table in (own, prior):
        weights = climber.log_weights(block, table, noise, 2).double()
        uniform = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
        # The largest of log weight plus Gumbel noise: a draw without replacement.
        score = weights - (-uniform.to(weights).log()).log()
        chosen = score.nan_to_num(-torch.inf, neginf=-torch.inf).topk(count, 0).indices
        draws = family.from_noise(table, size, spread)
        places.append(draws.gather(0, chosen.unsqueeze(-1).expand(-1, -1, size)))
    of_data, _ = find_modes(block, torch.cat(places[:2]), _WEAK_PRIOR)
    found = torch.cat([*places, of_data])
    return torch.where(found.isfinite(), found, found[1])


def best_of(climber: Climber, block: Block, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of tables [C, n, P] each datum has the highest ELBO at, and all ELBOs [C, n].

    The first where in doubt.
    """
    weight, noise = climber.noise(_COMPARED)
    weight = weight.double()
    found = [
        climber.log_weights(block, table, noise, len(tables), check=i == 0)
        for i, table in enumerate(tables)
    ]
    terms = torch.stack(found).double()
    elbos = (weight / weight.sum()) @ terms
    elbos = elbos.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    best = elbos.argmax(0)
    highest = terms.gather(0, best.expand(1, terms.shape[1], -1))[0]
    gain = weight.unsqueeze(1) * (highest - terms[0])
    if not climber.heavy:  # mirrored pairs are not independent, their means are
        gain = gain.unflatten(0, (2, -1)).mean(0)
    sure = gain.mean(0) > 2 * gain.std(0) / gain.shape[0] ** 0.5
    # Where the guide's own answer has no ELBO, every other start is better.
    return torch.where(sure | torch.isinf(elbos[0]), best, 0), elbos
