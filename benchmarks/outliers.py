"""How often pv.outliers finds strange digits, and how often it takes ordinary ones for strange.

    python benchmarks/outliers.py

A VAE is trained on 1,077 of the packaged digits of 8 x 8 pixels. The other 720, which it never saw,
are calibration data and held-out data, in halves that are drawn anew in each of some splits:

- held-out digits: false alarms, which are to be as many as the level says;
- the same turned upside down (a 0, a 1 or an 8 is then hardly strange, and a 6 is a 9);
- draws of another model, a probabilistic PCA of the digits, rounded to whole counts;
- uniform noise, and every pixel of a digit put in another place, the same for all.

The rates are at level 0.05, of the combined p-value and of each score alone.
"""

from __future__ import annotations

import argparse
import logging
import time

import machine
import numpy as np
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.diagnostics.conformal import Conformal

LEVEL = 0.05


def trained(x: Tensor, validation: Tensor) -> tuple[pv.zoo.VAE, pv.AmortizedGuide]:
    """Return a VAE and its guide, trained on digits [N, 64]."""
    torch.manual_seed(0)
    model = pv.zoo.VAE(64, 10, hidden=(200, 200), num_trials=16)
    guide = pv.AmortizedGuide(model, model.make_encoder((200, 200)), example=x[:5])
    options = {"validation_data": validation, "patience": 20, "epochs": 300, "seed": 0}
    pv.fit(model, guide, x, progress=False, **options)
    return model, guide


def strangers(x: Tensor, train: Tensor) -> dict[str, Tensor]:
    """Return data that are no digits, by name, as many as x [N, 64]."""
    generator = torch.Generator().manual_seed(1)
    mean = train.mean(0)
    _, values, axes = torch.linalg.svd(train - mean, full_matrices=False)
    z = torch.randn(len(x), 10, generator=generator) * values[:10] / len(train) ** 0.5
    rest = (values[10:].square().sum() / len(train) / 54).sqrt()
    noise = rest * torch.randn(x.shape, generator=generator)
    return {
        "upside down": x.flip(1),
        "probabilistic PCA": (mean + z @ axes[:10] + noise).round().clamp(0, 16),
        "noise": torch.randint(17, x.shape, generator=generator).float(),
        "pixels in other places": x[:, torch.randperm(64, generator=generator)],
    }


def rates(old: np.ndarray, new: np.ndarray, two_sided: np.ndarray) -> np.ndarray:
    """Return the share of new data that are outliers: combined, then by each score."""
    found = Conformal.of(old, new, two_sided)
    columns = np.concatenate([found.combined[:, None], found.of_score], 1)
    return (columns <= LEVEL).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=200)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine.describe())
    images = pv.datasets.digits()
    every = torch.cat([images.train, images.test]).float()
    train, rest = every[:1077], every[1077:]
    begin = time.perf_counter()
    model, guide = trained(train[:900], train[900:])
    print(f"trained in {time.perf_counter() - begin:.0f} s")
    begin = time.perf_counter()
    kinds = {"held out": rest, **strangers(rest, train)}
    data = torch.cat(list(kinds.values()))
    # The scores of a datum depend on no other: splits need them once.
    asked = {"train": train, "level": LEVEL, "num_particles": 500, "seed": 0}
    found = pv.outliers(model, guide, data, calibration=rest, **asked)
    print(f"{len(data)} data scored in {time.perf_counter() - begin:.0f} s")
    names = [str(name) for name in found.dataset["score"].values]
    scores = np.stack([found.dataset[name].values for name in names], 1)
    scores = scores.reshape(len(kinds), len(rest), len(names))
    two_sided = np.array([name != "distance" for name in names])
    rng = np.random.default_rng(0)
    of_split = []
    for _ in range(options.splits):
        order = rng.permutation(len(rest))
        calibration, new = np.split(order, 2)
        of_split.append([rates(scores[0][calibration], each[new], two_sided) for each in scores])
    shares = np.array(of_split)
    head = ("data", "combined", *names)
    print(" | ".join(f"{name:>22}" for name in head))
    for kind, mean, spread in zip(kinds, shares.mean(0), shares.std(0), strict=True):
        row = [f"{100 * m:.1f} % (± {100 * s:.1f})" for m, s in zip(mean, spread, strict=True)]
        print(" | ".join(f"{text:>22}" for text in (kind, *row)))
    assert images.train_labels is not None
    assert images.test_labels is not None
    labels = torch.cat([images.train_labels, images.test_labels])[1077:].numpy()
    upside_down = found.outlier.reshape(len(kinds), len(rest))[1]
    by_digit = (f"{n} {100 * upside_down[labels == n].mean():.0f} %" for n in range(10))
    print("upside down, of each digit:", ", ".join(by_digit))
    fitted = pv.outliers(model, guide, rest, **asked)
    print(f"held out, ranked among training data: {100 * fitted.outlier.mean():.1f} %")


if __name__ == "__main__":
    main()
