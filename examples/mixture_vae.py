"""Clusters without labels: a VAE with a mixture prior, its component summed out.

Four clusters of latents, seen through a curved map in ten noisy dimensions. The guide proposes z
alone; the component c is summed out in training, and drawn from its exact posterior afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.zoo.likelihoods import Gaussian

CORNERS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def clusters(num_data: int) -> tuple[Tensor, Tensor]:
    label = torch.randint(4, (num_data,))
    z = 2.5 * CORNERS[label] + 0.6 * torch.randn(num_data, 2)
    x = torch.tanh(0.3 * z @ torch.randn(2, 10)) + z @ torch.randn(2, 10) / 3
    return x + 0.3 * torch.randn(num_data, 10), label


def purity(component: Tensor, label: Tensor) -> float:
    """Share of data whose true cluster is the commonest one of their component."""
    table = torch.zeros(4, 4).index_put_((component, label), torch.ones(()), accumulate=True)
    return float(table.max(1).values.sum() / len(label))


def main() -> None:
    torch.manual_seed(0)
    x, label = clusters(1300)
    train, test = x.split([1000, 300])
    model = pv.zoo.MixtureVAE(10, 2, 4, hidden=[32], likelihood=Gaussian())
    with torch.no_grad():
        model.means.copy_(CORNERS)  # components that begin apart do not share a cluster
    guide = pv.AmortizedGuide(model, model.make_encoder([32]), example=train)
    print(pv.describe(model, train))
    pv.fit(
        model,
        guide,
        train,
        loss=pv.IWAE(5, "dreg"),
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        epochs=25,
        progress=False,
    )
    print(pv.iwae_bound(model, guide, test, num_particles=500, seed=0))

    draws = pv.to_arviz(model, guide, test, num_draws=20, seed=0)["posterior"]["c"]
    component = torch.from_numpy(draws.values[0]).mode(0).values
    print(f"purity of the components {purity(component, label[1000:]):.3f}")


if __name__ == "__main__":
    main()
