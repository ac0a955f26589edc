"""What the proposals of all data gain by the draws of the latents that they share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_vae.guides.coordinates import prior_moments, side_by_side
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import Values


class SharedDraws(nn.Module):
    r"""From a datum's features f and the global latents g to what its parameters gain.

    .. math:: \frac{1}{\sqrt{2 F}} W\, [\tanh(A f + a + B g),\ (C f + c) \odot D g]

    The products hold a slope by g that is another for each datum, as that of a person's ability by
    the difficulties of the questions that this person was asked; no sum of f and g under a tanh
    has it. W begins at zero: at first nothing is gained. g is in units of its prior. A step of
    Adam changes every weight by the learning rate; the root keeps what is gained from changing by
    the sum of 2 F such steps, at which a log scale runs away.

    Args:
        looks: what runs of the model have shown.
        structure: of the model, with global latents that are continuous.
        features: of the example, [n, F].
        num_params: what is gained, for each datum.
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, looks: ModelLooks, structure: Structure, features: Tensor, num_params: int
    ) -> None:
        super().__init__()
        self.coordinates = side_by_side(structure.global_latents, None)
        loc, scale = prior_moments(looks, structure, self.coordinates)
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)
        width = features.shape[1]
        self.of_datum = nn.Linear(width, 2 * width)
        self.of_shared = nn.Linear(len(loc), 2 * width, bias=False)
        self.last = nn.Linear(2 * width, num_params, bias=False)
        nn.init.zeros_(self.last.weight)
        self.to(features.device, features.dtype)

    def forward(self, features: Tensor, values: Values) -> Tensor:
        """Return what parameters gain, ``[..., P]``.

        Args:
            features: [N, F], or with dimensions of size 1 between the two, for those of plates.
            values: of the global latents, ``[..., *batch, *event]``.
        """
        found = [c.flatten(c.transform.inv(values[c.name])) for c in self.coordinates]
        shape = torch.broadcast_shapes(*(rows.shape[:-1] for rows in found))
        g = torch.cat([rows.expand(*shape, -1) for rows in found], -1).to(self.loc)
        while g.ndim > 1 and len(g) == 1:
            g = g[0]  # a dimension of plates that the data are not in
        place, gate = self.of_datum(features).chunk(2, -1)
        moved, slope = self.of_shared((g - self.loc) / self.scale).chunk(2, -1)
        hidden = torch.cat([(place + moved).tanh(), gate * slope], -1)
        gained: Tensor = self.last(hidden) * hidden.shape[-1] ** -0.5
        return gained
