"""IWAE-5000 of a Bernoulli VAE: pv.iwae_bound beside a hand-written PyTorch loop.

    python benchmarks/iwae_evaluation.py --data mnist.npz

Trains a 784-200-200-50 VAE (tanh, images binarized afresh at each epoch) for a few epochs, then
measures the bound of 1,000 test images by both, in turns, in one process. The loop is what one
writes by hand: encoder, reparameterized draws, decoder, binary cross entropy, logsumexp over
chunks; no Pyro, no standard errors. The sizes of its chunks are chosen by trying several and
keeping the fastest. Peak memory is that of a fresh process for each number of particles.

Without --data the 8x8 digits that come with the package stand in: the same program, other figures.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_vae as pv

NUM_LATENTS = 50
HIDDEN = (200, 200)
# Candidates for the loop: data in a chunk, and pairs (particle, datum) in it.
LOOP_DATA = (50, 250, 1000)
LOOP_PAIRS = (1000, 2000, 4000, 8000, 16000)
MEMORY_PARTICLES = (50, 500, 5000)


def make(
    data: str | None, seed: int
) -> tuple[pv.datasets.ImageData, pv.zoo.VAE, pv.AmortizedGuide]:
    """Return the images and an untrained pair."""
    images = pv.datasets.digits() if data is None else pv.datasets.load(data)
    num_features = images.train.shape[1]
    torch.manual_seed(seed)
    model = pv.zoo.VAE(num_features, NUM_LATENTS, hidden=HIDDEN[::-1])
    encoder = pv.nets.MLP([num_features, *HIDDEN], activate_last=True)
    return images, model, pv.AmortizedGuide(model, encoder, example=torch.zeros(2, num_features))


def test_images(images: pv.datasets.ImageData, num_data: int, seed: int) -> Tensor:
    """Return held-out images with one draw of black and white, [N, D]."""
    binary = pv.datasets.StochasticBinarization(images.test, images.max_value).fixed(seed)
    return binary[:num_data]


@torch.no_grad()
def by_hand(
    model: pv.zoo.VAE,
    guide: pv.AmortizedGuide,
    x: Tensor,
    num_particles: int,
    data: int,
    pairs: int,
) -> Tensor:
    """Return IWAE-K of each image, [N], by the loop."""
    bounds = []
    for rows in x.split(data):
        loc, log_scale = guide.head(guide.encoder(rows)).view(len(rows), -1, 2).unbind(-1)
        scale, step, found = log_scale.exp(), max(1, pairs // len(rows)), []
        for start in range(0, num_particles, step):
            noise = torch.randn(min(step, num_particles - start), *loc.shape)
            z = loc + scale * noise
            logits = model.decoder(z)
            nll = binary_cross_entropy_with_logits(logits, rows.expand_as(logits), reduction="none")
            # log N(z; 0, 1) - log N(z; loc, scale): the constants cancel.
            prior_over_guide = (0.5 * (noise.square() - z.square()) + log_scale).sum(-1)
            found.append(torch.logsumexp(prior_over_guide - nll.sum(-1), 0))
        bounds.append(torch.logsumexp(torch.stack(found), 0) - math.log(num_particles))
    return torch.cat(bounds)


def best_sizes(run: Callable[[int, int, int], Tensor], num_data: int) -> tuple[int, int]:
    """Return the (data, pairs) with which the loop is fastest, by short trials."""
    seconds: dict[tuple[int, int], float] = {}
    for _ in range(3):
        for data in LOOP_DATA:
            for pairs in LOOP_PAIRS:
                if min(data, num_data) <= pairs:
                    begin = time.perf_counter()
                    run(64, data, pairs)
                    passed = time.perf_counter() - begin
                    seconds[data, pairs] = min(passed, seconds.get((data, pairs), math.inf))
    return min(seconds, key=lambda sizes: seconds[sizes])


def peak_memory() -> float:
    """Return the peak resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux getrusage counts the memory of the parent at the time of the fork as well.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024**2 if sys.platform == "darwin" else peak / 1024


def peak_in_fresh_process(arguments: argparse.Namespace, num_particles: int) -> tuple[float, float]:
    """Return the peak before and after the bound, in MiB, of a process of its own."""
    options = ["--num-data", str(arguments.num_data), "--seed", str(arguments.seed)]
    options += ["--data", arguments.data] if arguments.data else []
    done = subprocess.run(
        [sys.executable, __file__, "--only-memory", str(num_particles), *options],
        check=True,
        capture_output=True,
        text=True,
    )
    before, after = done.stdout.split()
    return float(before), float(after)


def only_memory(arguments: argparse.Namespace) -> None:
    """Print the peak before and after one bound; the parameters' values do not matter to it."""
    images, model, guide = make(arguments.data, arguments.seed)
    x = test_images(images, arguments.num_data, arguments.seed)
    pv.iwae_bound(model, guide, x[:2], num_particles=2)  # what the libraries load lazily
    before = peak_memory()
    pv.iwae_bound(model, guide, x, num_particles=arguments.only_memory, seed=0)
    print(before, peak_memory())


def train(arguments: argparse.Namespace) -> tuple[pv.zoo.VAE, pv.AmortizedGuide, Tensor]:
    images, model, guide = make(arguments.data, arguments.seed)
    x = test_images(images, arguments.num_data, arguments.seed)
    result = pv.fit(
        model,
        guide,
        pv.datasets.StochasticBinarization(images.train, images.max_value),
        epochs=arguments.epochs,
        seed=arguments.seed,
        progress=sys.stderr.isatty(),
    )
    print(f"{images!r}; {result!r}")
    return model, guide, x


def agreement(bound: pv.Bound, loops: list[Tensor]) -> str:
    """Compare one bound with the loop's runs, in standard errors of the difference."""
    # The loop draws as many particles, so its error is that of the bound.
    differences = [loop.double() - bound.value for loop in loops]
    error = math.sqrt(2) * bound.mean_std_error
    means = [float(difference.mean()) / error for difference in differences]
    z = torch.stack(differences) / (math.sqrt(2) * bound.std_error)
    return (
        f"mean: pv {bound.mean:.3f} ± {bound.mean_std_error:.3f}, loop "
        f"{', '.join(f'{float(loop.double().mean()):.3f}' for loop in loops)} "
        f"({', '.join(f'{m:+.1f}' for m in means)} standard errors of the difference)\n"
        f"image by image: root mean square {float(z.square().mean().sqrt()):.2f} standard errors; "
        "1 where both are right and the errors too"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="MNIST, for example as .npz (default: the 8x8 digits)")
    parser.add_argument("--num-data", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--num-particles", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--chunk-size", type=int, help="of pv.iwae_bound (default: its own)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--only-memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_memory is not None:
        only_memory(arguments)
        return
    print(machine.describe())
    model, guide, x = train(arguments)
    K = arguments.num_particles
    sizes = best_sizes(lambda k, data, pairs: by_hand(model, guide, x, k, data, pairs), len(x))
    print(f"the loop's chunks: {sizes[0]} data, {sizes[1]} pairs (the fastest of those tried)")
    pv.iwae_bound(model, guide, x, num_particles=16)  # both are warm now
    seconds: dict[str, list[float]] = {"pv.iwae_bound": [], "the loop": []}
    bounds, loops = [], []
    for repeat in range(arguments.repeats):
        turns: list[tuple[str, Callable[[], None]]] = [
            (
                "pv.iwae_bound",
                lambda seed=repeat: bounds.append(
                    pv.iwae_bound(
                        model,
                        guide,
                        x,
                        num_particles=K,
                        chunk_size=arguments.chunk_size,
                        seed=seed,
                    )
                ),
            ),
            ("the loop", lambda: loops.append(by_hand(model, guide, x, K, *sizes))),
        ]
        # Who goes first alternates, so that a machine that slows down favours neither.
        for name, turn in turns if repeat % 2 == 0 else reversed(turns):
            begin = time.perf_counter()
            turn()
            seconds[name].append(time.perf_counter() - begin)
    print(f"\nIWAE-{K} of {len(x)} images, {arguments.repeats} repetitions")
    print(f"{'':<16} {'median s':>9} {'min - max':>17}")
    for name, found in seconds.items():
        spread = f"{min(found):.2f} - {max(found):.2f}"
        print(f"{name:<16} {statistics.median(found):9.2f} {spread:>17}")
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(
        f"{'ratio':<16} {statistics.median(ratios):9.2f} "
        f"{f'{min(ratios):.2f} - {max(ratios):.2f}':>17}   pv / loop, pair by pair"
    )
    print(agreement(bounds[0], loops))
    if not arguments.no_memory:
        print(f"\npeak memory of pv.iwae_bound on {len(x)} images, fresh processes")
        print(f"{'particles':>9} {'before MiB':>11} {'peak MiB':>9}")
        for num_particles in MEMORY_PARTICLES:
            before, after = peak_in_fresh_process(arguments, num_particles)
            print(f"{num_particles:>9} {before:11.0f} {after:9.0f}")


if __name__ == "__main__":
    main()
