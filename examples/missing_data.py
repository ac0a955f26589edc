"""Missing data: the lower half of a digit is given, the upper half is filled in.

The model is an ordinary VAE, the encoder is told which pixels it sees. In training half of the
images are whole, and of the others a half is missing, anew at each epoch.

Usage: python examples/missing_data.py [figure.png]
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import pyro_vae as pv


class Halves:
    """Images of which, anew at each epoch, a half is missing: one of four, or none."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def epoch(self, generator: torch.Generator) -> Tensor:
        row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        halves = torch.stack([row < 4, row >= 4, column < 4, column >= 4]).reshape(4, 64)
        parts = torch.cat([halves, torch.zeros_like(halves)])
        chosen = torch.randint(len(parts), (len(self.images),), generator=generator)
        return self.images.masked_fill(parts[chosen], math.nan)


def main(path: Path) -> None:
    torch.manual_seed(0)
    digits = pv.datasets.digits()
    train, truth = digits.train / digits.max_value, digits.test[:100] / digits.max_value
    missing = torch.arange(64) < 32  # the upper half
    seen = truth.masked_fill(missing, math.nan)

    vae = pv.zoo.VAE(64, 8, hidden=[64], likelihood=pv.zoo.likelihoods.Gaussian(0.25))
    model = pv.MissingData(vae)
    encoder = pv.MissingEncoder(pv.nets.MLP([2 * 64, 128], activate_last=True))
    guide = pv.AmortizedGuide(model, encoder, example=seen[:5])
    pv.fit(
        model,
        guide,
        Halves(train),
        loss=pv.IWAE(10, "dreg"),  # whose guide covers the posterior: importance weights are used
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        batch_size=256,
        epochs=50,
        progress=False,
    )

    bound = pv.iwae_bound(model, guide, seen, num_particles=1000, seed=0)
    print(f"log p(lower half)          {bound.mean:.2f} ± {bound.mean_std_error:.2f} nats")
    imputed = pv.impute(model, guide, seen, num_draws=100, num_particles=1000, seed=0)
    print(imputed)
    mean = torch.as_tensor(imputed.dataset["x_mean"].values)
    for name, guess in (("imputed upper half", mean), ("mean image", train.mean(0))):
        error = (guess - truth)[:, missing].square().mean().sqrt()
        print(f"{name + ', RMSE':26} {error:.3f}")
    ax = imputed.plot(truth=truth, num_columns=12)
    ax.figure.savefig(path, dpi=120)
    print(f"figure: {path}")


if __name__ == "__main__":
    given = sys.argv[1:] or [Path(tempfile.mkdtemp()) / "missing_data.png"]
    main(Path(given[0]))
