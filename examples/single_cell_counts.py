"""Counts of genes in cells of three types: find the types, and how deep each cell was sequenced.

Data are drawn from the model itself with latents set to three centres. The size factor of a cell
is a latent as well, with a broad prior: the fit must tell a cell of more molecules from one of
other genes.
"""

from __future__ import annotations

import torch

import pyro_vae as pv

torch.manual_seed(0)
NUM_GENES, NUM_CELLS = 40, 700


def main() -> None:
    truth = pv.zoo.SingleCellCounts(NUM_GENES, 2, hidden=[16], size_prior=(6.0, 0.5))
    with torch.no_grad():
        truth.log_inverse_dispersion.copy_(torch.linspace(-0.5, 2.5, NUM_GENES))
        for parameter in truth.decoder.parameters():
            parameter.mul_(1.5)  # types that differ more than those of a new network
    kind = torch.randint(3, (NUM_CELLS,))
    centres = 3 * torch.tensor([[0.0, 1.0], [0.87, -0.5], [-0.87, -0.5]])
    z = centres[kind] + 0.2 * torch.randn(NUM_CELLS, 2)
    size = torch.distributions.LogNormal(*truth.size_prior).sample((NUM_CELLS,))
    with torch.no_grad():
        counts = truth.likelihood(z, size).sample()

    model = pv.zoo.SingleCellCounts(NUM_GENES, 2, hidden=[16], size_prior=(6.0, 1.0))
    print(pv.describe(model, counts))
    guide = pv.AmortizedGuide(model, model.make_encoder([32]), example=counts)
    result = pv.fit(
        model,
        guide,
        counts,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        epochs=50,
        progress=False,
    )
    print(result)
    with torch.no_grad():
        draws = [guide(counts) for _ in range(50)]
    z = torch.stack([draw["z"] for draw in draws]).mean(0)
    log_size = torch.stack([draw["size"] for draw in draws]).log().mean(0)
    centres = torch.stack([z[kind == i].mean(0) for i in range(3)])
    nearest = torch.cdist(z, centres).argmin(1)
    logs = torch.stack([truth.log_inverse_dispersion, model.log_inverse_dispersion]).detach()
    sizes = torch.stack([size.log(), log_size])
    print(f"cells nearest to their type's mean {float((nearest == kind).float().mean()):.3f}")
    print(f"correlation of log sizes           {float(torch.corrcoef(sizes)[0, 1]):.3f}")
    print(f"correlation of log dispersions     {float(torch.corrcoef(logs)[0, 1]):.3f}")


if __name__ == "__main__":
    main()
