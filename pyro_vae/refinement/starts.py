"""Where a table's optimisation may start: the guide's answer, the prior, Gaussians at modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_vae.guides.base import of_family
from pyro_vae.guides.coordinates import middle_moments, normal_moments
from pyro_vae.guides.local import LocalGuide
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.state import evaluation
from pyro_vae.programs.types import Node, Program, Values
from pyro_vae.refinement.blocks import Block
from pyro_vae.refinement.climbing import Climber
from pyro_vae.refinement.modes import find_modes, gaussian_at

_DRAWS = 256  # of a guide whose parameters cannot be read off
_SCREENED = 32  # draws, of which a few become starts of the search for modes
_STARTS, _FEW_STARTS, _MANY_COORDINATES = 3, 1, 16  # of draws of the guide, and of the prior
_MODES = 3  # of a datum at most
_WEAK_PRIOR = 1e-2  # its weight where the data's own mode is looked for
_APART = 3.0  # modes: so many standard deviations
_COMPARED = 64  # particles by which starts are compared


def answer_of(local: LocalGuide, guide: Program, evaluator: Evaluator) -> Tensor:
    """Return a guide's own answer in the parameters of a local guide, [N, P].

    Args:
        local: of the family that is refined.
        guide: of the same family, whose parameters are read off, or of another.
        evaluator: of the guide.
    """
    batch = evaluator.batch
    with evaluation(guide), torch.no_grad():
        if (
            of_family(guide)
            and guide.family == local.family
            and guide.coordinates == local.coordinates
        ):
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


def starts_of(climber: Climber, own: Tensor, prior: Tensor) -> Tensor:
    """Return where each row may start, [C, N, P]; the first is the guide's own answer.

    Args:
        climber: of the family.
        own: the guide's answer, [N, P].
        prior: parameters with the prior's moments, [N, P].
    """
    found = []
    for block in climber.blocks.at(torch.arange(own.shape[0], device=own.device)):
        mine = own[block.rows]
        rivals = _rivals(climber, block, mine, prior[block.rows])
        found.append(torch.cat([mine.unsqueeze(0), rivals]))
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
        gaussian = gaussian_at(block, modes[heights.argmax(0), columns])
        if gaussian is None:
            break
        mean, factor = gaussian
        found.append(climber.blocks.family.from_gaussian(mean, factor))
        away = torch.linalg.solve_triangular(factor, (modes - mean).movedim(0, -1), upper=False)
        near |= away.square().sum(1).T < _APART**2
        near[heights.argmax(0), columns] = True
    return torch.stack(found)


def _places(climber: Climber, block: Block, own: Tensor, prior: Tensor) -> Tensor:
    """Return where to look for modes from, [M, n, D]."""
    family, size = climber.blocks.family, climber.blocks.size
    noise = climber.noise(block, _SCREENED, own)
    spread = noise.spread(own.shape[0])
    count = _STARTS if size <= _MANY_COORDINATES else _FEW_STARTS
    centre = torch.zeros_like(spread[:1])
    places = [family.from_noise(table, size, centre) for table in (own, prior)]
    generator = torch.Generator().manual_seed(block.evaluator.seed % 2**63)
    for table in (own, prior):
        weights = climber.log_weights(block, table, noise.values, 2).double()
        uniform = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
        # The largest of log weight plus Gumbel noise: a draw without replacement.
        score = weights - (-uniform.to(weights).log()).log()
        chosen = torch.nan_to_num(score, nan=-torch.inf).topk(count, 0).indices
        draws = family.from_noise(table, size, spread)
        places.append(draws.gather(0, chosen.unsqueeze(-1).expand(-1, -1, size)))
    of_data, _ = find_modes(block, torch.cat(places[:2]), _WEAK_PRIOR)
    found = torch.cat([*places, of_data])
    return torch.where(found.isfinite(), found, found[1])


def best_of(climber: Climber, block: Block, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Return which start each datum has the highest ELBO at, the first where in doubt.

    Args:
        climber: of the family.
        block: of n data.
        tables: the starts, [C, n, P].

    Returns:
        The numbers of the best, [n], and all their ELBOs, [C, n].
    """
    noise = climber.noise(block, _COMPARED, tables[0])
    weight = noise.weight.double()
    terms = torch.stack(
        [
            climber.log_weights(block, table, noise.values, len(tables), check=i == 0).double()
            for i, table in enumerate(tables)
        ]
    )
    elbos = (weight / weight.sum()) @ terms
    elbos = torch.nan_to_num(elbos, nan=-torch.inf, posinf=-torch.inf)
    best = elbos.argmax(0)
    highest = terms.gather(0, best.expand(1, terms.shape[1], -1))[0]
    gain = weight.unsqueeze(1) * (highest - terms[0])
    if not climber.heavy:  # mirrored pairs are not independent, their means are
        gain = gain.unflatten(0, (2, -1)).mean(0)
    sure = gain.mean(0) > 2 * gain.std(0) / gain.shape[0] ** 0.5
    # Where the guide's own answer has no ELBO, every other start is better.
    return torch.where(sure | torch.isinf(elbos[0]), best, 0), elbos
