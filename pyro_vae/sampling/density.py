"""The densities of a block of data that chains move in, from a base to the posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pyro_vae.refinement.blocks import Block, ScoredGuide
from pyro_vae.sampling.hmc import Point

# Where annealing starts: the guide's answer, or the prior.
Start: TypeAlias = Literal["guide", "prior"]


class TemperedDensity:
    r"""The density :math:`f_0(z)\, r(z)^\beta` of a block's unconstrained coordinates.

    From the guide, :math:`f_0` is the family's normalized density :math:`q` and
    :math:`r = p(x, z) / q(z)`; from the prior, :math:`f_0 = p(z)` and :math:`r = p(x \mid z)`.
    At power 1 both are :math:`p(x, z)` with the map to the supports. Coordinates that a mask of the
    model leaves out have the family's density at every power.

    Args:
        block: of n data.
        table: the family's parameters, [n, P].
        start: what f_0 is.
        calls: evaluations to be expected.
        wider: a guide's middle [n, D], and how many times wider than the guide f_0 is about it in
            each coordinate, [n, D].
    """

    def __init__(
        self, block: Block, table: Tensor, start: Start, calls: int, wider: Sequence[Tensor] = ()
    ) -> None:
        self._block, self._calls, self._given = block, calls, [table, *wider]
        self._function = from_guide if start == "guide" else from_prior
        self._called = False

    def __call__(self, z: Tensor) -> Point:
        """Return the point of coordinates [C, n, D]."""
        check, self._called = not self._called, True
        inputs, block = [*self._given, z], self._block
        return Point(z, *block.run(self._function, block.scored, inputs, self._calls, check=check))


def from_guide(scored: ScoredGuide, table: Tensor, *more: Tensor) -> list[Tensor]:
    """Return log q, log p(x, z) - log q, and their gradients by z.

    More than z is the middle that q is widened about, and how many times.
    """
    *wider, z = more
    z = z.detach().requires_grad_()
    if wider:
        centre, width = wider
        base = log_base(scored, table, centre + (z - centre) / width).double()
        base = base - width.double().log().sum(-1)
    else:
        base = log_base(scored, table, z).double()
    prior, log_likelihood = log_prior_and_likelihood(scored, table, z)
    # In float64: far from a narrow base its density is a large number, which is to cancel.
    return _with_slopes(base, (log_likelihood + prior).double() - base, z)


def from_prior(scored: ScoredGuide, table: Tensor, z: Tensor) -> list[Tensor]:
    """Return log p(z), log p(x | z), and their gradients by z."""
    z = z.detach().requires_grad_()
    return _with_slopes(*log_prior_and_likelihood(scored, table, z), z)


def log_base(scored: ScoredGuide, table: Tensor, z: Tensor) -> Tensor:
    """Return the family's log density of coordinates, [C, n]."""
    guide, size = scored.guide, scored.guide.num_coordinates
    return guide.family.conditional(table, size, z[..., :0], slice(0, size)).log_prob(z)


def log_prior_and_likelihood(
    scored: ScoredGuide, table: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log p(z) of coordinates, the map's log determinant in it, and log p(x | z), [C, n].

    What a family's density of coordinates exceeds that of the values by is the log determinant: by
    the prior's parameters, as by those of a narrow guide both are large and their difference is
    rounded away. Where a mask leaves coordinates out, it is the log density of these by the table
    too, which stands in for their prior.
    """
    guide, evaluator = scored.guide, scored.evaluator
    rows = slice(0, evaluator.num_data)
    values = evaluator.from_single(guide.values_of(z))
    params = table if evaluator.pair.masked else guide.table.detach()
    with guide.using(params):
        log_guide = evaluator.score_guide(rows, values)
    log_likelihood, log_prior = evaluator.score_model(rows, values)
    return log_prior + (log_base(scored, params, z) - log_guide), log_likelihood


def _with_slopes(base: Tensor, ratio: Tensor, z: Tensor) -> list[Tensor]:
    slopes = [_slope(base, z, keep=True), _slope(ratio, z, keep=False)]
    return [base.detach(), ratio.detach(), *slopes]


def _slope(term: Tensor, z: Tensor, *, keep: bool) -> Tensor:
    """Return the gradient of a term [C, n] by z; zero where it does not depend on z smoothly."""
    if not term.requires_grad:
        return torch.zeros_like(z)
    grads: Sequence[Tensor | None] = torch.autograd.grad(
        term.sum(), [z], retain_graph=keep, allow_unused=True
    )
    return torch.zeros_like(z) if grads[0] is None else grads[0]
