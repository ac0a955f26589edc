r"""Free bits: a floor under the KL of each latent dimension, on average over the batch.

.. math:: \sum_d \max(\lambda, \mathrm{KL}_d), \quad
          \mathrm{KL}_d = \sum_n \mathrm{KL}(q(z_{nd} | x_n), p(z_d))

(Kingma et al. 2016, arXiv:1606.04934, eq. 15), with :math:`\lambda` nats for each datum.
"""

from __future__ import annotations

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.losses.kl import kl_per_dimension
from pyro_vae.particles.training_run import TrainingRun


def kl_below_floor(run: TrainingRun, free_bits: float) -> Tensor:
    """Return the KL of the dimensions below the floor, which are not pressed further: a scalar.

    Args:
        run: of a pair.
        free_bits: nats of KL per latent dimension.

    Raises:
        ValueError: for a site whose KL has no closed form per dimension.
    """
    if run.plan.enumerated:
        raise ValueError(
            f"free_bits: the guide enumerates {list(run.plan.enumerated)}, of which a "
            "dimension's KL is no plain mean over data. Leave them out of the guide, and they "
            "are summed out"
        )
    given = []
    for name, nodes in run.proposals():
        kls, counts = [], []
        for guide_node, model_node in nodes:
            kl, reason = kl_per_dimension(guide_node, model_node)
            if kl is None:
                raise ValueError(
                    f"free_bits: latent site {name!r} has no KL of each dimension: {reason}"
                )
            event_ndim = kl.ndim - len(guide_node["fn"].batch_shape)
            scale, mask = run.scale(guide_node), guide_node["mask"]
            kls.append(_weighted(kl, scale, mask, event_ndim))
            counts.append(_weighted(torch.ones_like(kl), scale, mask, event_ndim))
        node = nodes[0][0]
        event_ndim, local = node["fn"].event_dim, run.is_local(name, node)
        kl, count = (_over_data(run, terms, event_ndim, local) for terms in (kls, counts))
        # A dimension under the floor gets its KL back: no pressure, no gradient.
        given.append(torch.where(kl < free_bits * count, kl, torch.zeros_like(kl)).sum())
    return torch.stack(given).sum() if given else torch.zeros(())


def _weighted(
    term: Tensor, scale: float | Tensor, mask: Tensor | bool | None, event_ndim: int
) -> Tensor:
    """Return a term of batch and event dimensions, scaled and masked along its batch."""
    last, first = tuple(range(term.ndim - event_ndim, term.ndim)), tuple(range(event_ndim))
    return scale_and_mask(term.movedim(last, first), scale, mask).movedim(first, last)


def _over_data(run: TrainingRun, terms: list[Tensor], event_ndim: int, local: bool) -> Tensor:
    """Return a site's term summed over the data, the mean of the particles.

    Args:
        run: of a pair.
        terms: of the site's batch and event shape, one for each trace.
        event_ndim: dimensions of an event.
        local: whether the site is in the data plate.
    """
    mode = run.plan.mode
    summed = (mode.data_dim if local else None, -mode.plate_dims if mode.leading else None)
    total: list[Tensor] = []
    for term in terms:
        batch_ndim = term.ndim - event_ndim
        axes = [batch_ndim + dim for dim in summed if dim is not None and batch_ndim + dim >= 0]
        total.append(term.sum(axes, keepdim=True) if axes else term)
    return torch.stack(total).sum(0) / run.num_particles
