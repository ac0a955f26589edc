"""Are two samples of pairs from one distribution? Maximum mean discrepancy, and swaps of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Swapped:
    """A statistic of paired samples, and its values with pairs swapped at random.

    Attributes:
        statistic: in units of its standard deviation over all swaps, whose mean is 0.
        swapped: likewise, [B].
    """

    statistic: float
    swapped: Tensor

    @property
    def p_value(self) -> float:
        """The probability of as large a statistic where swaps change nothing."""
        return p_value_of(self.statistic, self.swapped)


def mmd_of_swaps(x: Tensor, y: Tensor, signs: Tensor) -> Swapped:
    r"""Return the squared maximum mean discrepancy of pairs, and that of pairs swapped.

    .. math::
        \frac{1}{M (M - 1)} \sum_{i \ne j} s_i s_j h_{ij}, \quad
        h_{ij} = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j)

    (Gretton et al. 2012, Lemma 6, where all signs are one: unbiased.) To swap the members of pair i
    turns the sign of :math:`s_i`. Where x_i and y_i are exchangeable, given all else, each sign is
    as likely as the other, so that a test by the rank among random signs is exact, whatever the
    distribution and the number of pairs. The variance over signs is
    :math:`2 \sum_{i \ne j} h_{ij}^2`, but for the same factor squared. The kernel is a Gaussian
    whose width is the median distance between points of both samples, which no swap changes.

    Args:
        x: [M, D].
        y: [M, D].
        signs: 1 or -1, [B, M].

    References:
        Gretton, Borgwardt, Rasch, Schölkopf & Smola (2012). A kernel two-sample test. JMLR 13.
    """
    size = len(x)
    both = torch.cat([x, y]).double()
    distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    apart = distances[*torch.triu_indices(2 * size, 2 * size, 1)]
    width = apart.median()
    if not width:  # more than half of the points are one: of what is left, the mean
        width = apart.mean()
    if not width:
        return Swapped(0.0, torch.zeros(len(signs), dtype=torch.float64))
    kernel = torch.exp(-0.5 * (distances / width).square())
    xx, xy, yx, yy = (half for part in kernel.split(size) for half in part.split(size, 1))
    h = (xx + yy - xy - yx).fill_diagonal_(0.0)
    deviation = (2 * h.square().sum()).sqrt()
    if not deviation:
        return Swapped(0.0, torch.zeros(len(signs), dtype=torch.float64))
    signs = signs.to(h)
    return Swapped(float(h.sum() / deviation), ((signs @ h) * signs).sum(1) / deviation)


def p_value_of(statistic: float, swapped: Tensor) -> float:
    """Return (1 + #{b: T_b >= T}) / (1 + B) of a statistic T among those of random swaps, [B]."""
    rounding = 1e-9 * (1 + abs(statistic))
    return float(1 + (swapped >= statistic - rounding).sum()) / (1 + len(swapped))


def normal_scores(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return two samples [M, D] coordinate by coordinate as normal scores of their common ranks.

    A monotone map of a coordinate changes nothing then, and no tail is too heavy. Equal values
    share the mean of their ranks.
    """
    both = torch.cat([x, y]).cpu().numpy()
    ranks = np.empty(both.shape)
    for column in range(both.shape[1]):
        _, place, counts = np.unique(both[:, column], return_inverse=True, return_counts=True)
        ranks[:, column] = (np.cumsum(counts) - (counts - 1) / 2)[place.reshape(-1)]
    scores = torch.special.ndtri(torch.from_numpy(ranks / (len(both) + 1)))
    return scores[: len(x)], scores[len(x) :]
