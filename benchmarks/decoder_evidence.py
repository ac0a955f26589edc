"""What is log p(x) of a trained decoder? IWAE-5000 and AIS, and the gaps of an MNIST VAE.

    python benchmarks/decoder_evidence.py --data mnist.npz --epochs 1000 --save vae.pt

Trains a 784-200-200-50 Bernoulli VAE (tanh; KL warm-up over the first eighth; learning rates of
Burda, Grosse & Salakhutdinov 2016: 1e-3 times 10^(-i/7) for 3^i of 3280 parts), then prints of
1,000 training images, in nats per image:

- IWAE-5000 and AIS of the first --num-annealed images through the amortized guide, their
  difference, and how far apart they are at most;
- L[q], L[q*] of a guide refined for each image in the same family, and log p(x) as IWAE-5000
  through the refined guide, or AIS of all images where that is higher: the gap table of Cremer,
  Li & Duvenaud (2018), whose numbers for such a VAE stand beside.

With --load a pair that --save wrote is taken in place of training.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import machine
import torch
from torch import Tensor, nn

import pyro_vae as pv

NUM_LATENTS, HIDDEN = 50, (200, 200)
PARTS = sum(3**i for i in range(8))
# Cremer, Li & Duvenaud (2018): MNIST, fully factorized Gaussian, training images.
PUBLISHED = {"log p(x)": -89.80, "L[q*]": -91.23, "L[q]": -92.57}


def make(num_features: int) -> tuple[pv.zoo.VAE, pv.AmortizedGuide]:
    """Return an untrained pair."""
    torch.manual_seed(0)
    encoder = pv.nets.MLP([num_features, *HIDDEN], activate_last=True)
    model = pv.zoo.VAE(num_features, NUM_LATENTS, hidden=HIDDEN[::-1])
    return model, pv.AmortizedGuide(model, encoder, example=torch.zeros(2, num_features))


def rate(epoch: int, epochs: int) -> float:
    """Return the factor on the learning rate after an epoch."""
    part, i = epoch / epochs * PARTS, 0
    while part >= 3**i and i < 7:
        part -= 3**i
        i += 1
    return 10 ** (-i / 7)


def train(
    model: pv.zoo.VAE,
    guide: pv.AmortizedGuide,
    images: pv.datasets.ImageData,
    epochs: int,
    device: str,
) -> None:
    optimizer = torch.optim.Adam(nn.ModuleList([model, guide]).to(device).parameters(), lr=1e-3)
    steps = epochs * -(-len(images.train) // 100)
    result = pv.fit(
        model,
        guide,
        pv.datasets.StochasticBinarization(images.train, images.max_value),
        optim=optimizer,
        schedule=pv.schedules.LinearWarmup(max(1, steps // 8)),
        batch_size=100,
        epochs=epochs,
        device=device,
        progress=sys.stderr.isatty(),
        callbacks=[torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: rate(e, epochs))],
    )
    print(f"{images!r}; {result!r}", flush=True)


def line(name: str, value: Tensor, error: Tensor, seconds: float | None = None) -> None:
    """Print a mean over images with its Monte Carlo standard error."""
    taken = "" if seconds is None else f"   {seconds:.0f} s"
    mean_error = float(error.square().sum().sqrt()) / len(value)
    print(f"{name:<34}{float(value.mean()):10.3f} ± {mean_error:.3f}{taken}", flush=True)


def bound(name: str, call: object, *arguments: object, **options: object) -> pv.Bound:
    begin = time.perf_counter()
    found: pv.Bound = call(*arguments, seed=0, **options)  # type: ignore[operator]
    line(name, found.value, found.std_error, time.perf_counter() - begin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="MNIST, for example as .npz (default: the 8x8 digits)")
    parser.add_argument("--epochs", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--num-data", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--num-annealed", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--num-steps", type=int, default=2000, help="of AIS; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--save", type=Path, help="where the trained pair goes")
    parser.add_argument("--load", type=Path, help="a pair that was saved")
    options = parser.parse_args()
    print(machine.describe())
    images = pv.datasets.digits() if options.data is None else pv.datasets.load(options.data)
    model, guide = make(images.train.shape[1])
    pair = nn.ModuleList([model, guide]).to(options.device)
    if options.load:
        pair.load_state_dict(torch.load(options.load, map_location=options.device))
    else:
        train(model, guide, images, options.epochs, options.device)
    if options.save:
        torch.save(pair.state_dict(), options.save)
    binary = pv.datasets.StochasticBinarization(images.train, images.max_value).fixed(0)
    x = binary[: options.num_data].to(options.device)

    print(f"\n{len(x)} training images, nats per image, Monte Carlo standard errors")
    elbo = bound("L[q], analytic KL", pv.elbo, model, guide, x, num_particles=1000)
    iwae = bound("IWAE-5000, amortized guide", pv.iwae_bound, model, guide, x)
    few = min(options.num_annealed, len(x))
    steps = {"num_steps": options.num_steps, "progress": False}
    ais = bound(f"AIS-{options.num_steps} of {few}", pv.ais, model, guide, x[:few], **steps)
    missed = ais.value - iwae.value[:few]
    line("AIS - IWAE-5000 of these", missed, torch.hypot(ais.std_error, iwae.std_error[:few]))
    small, large = (float((missed > nats).double().mean()) for nats in (0.1, 1.0))
    print(
        f"AIS - IWAE-5000 is above 0.1 nats for {small:.1%} of the images, above 1 for "
        f"{large:.1%}, from {float(missed.min()):.2f} to {float(missed.max()):.2f}; not to be "
        f"trusted: AIS of {int(ais.untrusted.sum())} of {few}, IWAE-5000 of "
        f"{int(iwae.untrusted.sum())} of {len(x)}"
    )
    begin = time.perf_counter()
    local = pv.refine(model, guide, x, seed=0, progress=False)
    print(
        f"refined: {float(local.converged.double().mean()):.1%} converged, "
        f"{time.perf_counter() - begin:.0f} s",
        flush=True,
    )
    best = bound("L[q*], refined", pv.elbo, model, local, x, num_particles=1000)
    tight = bound("IWAE-5000, refined guide", pv.iwae_bound, model, local, x)
    away = ais.value - tight.value[:few]
    line("AIS - IWAE-5000, refined", away, torch.hypot(ais.std_error, tight.std_error[:few]))
    evidence = ais if few == len(x) and ais.mean > tight.mean else tight

    print(f"\n{'':<24}{'here':>10}{'published':>12}")
    here = {"log p(x)": evidence.mean, "L[q*]": best.mean, "L[q]": elbo.mean}
    for name, of in (
        *((name, lambda table, name=name: table[name]) for name in here),
        ("approximation gap", lambda table: table["log p(x)"] - table["L[q*]"]),
        ("amortization gap", lambda table: table["L[q*]"] - table["L[q]"]),
    ):
        print(f"{name:<24}{of(here):10.2f}{of(PUBLISHED):12.2f}")


if __name__ == "__main__":
    main()
