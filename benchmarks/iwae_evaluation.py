"""IWAE-5000 of a Bernoulli VAE: pv.iwae_bound, a loop by hand, Pyro, and the GEMM limit.

    python benchmarks/iwae_evaluation.py --data mnist.npz

Trains a 784-200-200-50 VAE (tanh, images binarized afresh at each epoch) for a few epochs, then
measures the bound of 1,000 test images by each competitor, in turns, in one process:

- pv.iwae_bound;
- the loop that one writes by hand: encoder, reparameterized draws, decoder, binary cross entropy,
  logsumexp over chunks; no Pyro, no standard errors;
- pyro.infer.RenyiELBO(alpha=0), particles vectorized, all of a few images at a time.

The GEMM limit is the time of the decoder's matrix products alone, for as many pairs (particle,
datum): no draws, no elementwise work, outputs allocated once. A program whose products are
PyTorch's in float32 has them to pay; the share is the limit over a competitor's time, in the same
turn. The loop, Pyro and the limit each get the fastest chunk of several that are tried. Peak memory
is that of a fresh process for each number of particles.

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
from typing import TypeVar

import machine
import pyro.infer
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_vae as pv

NUM_LATENTS = 50
HIDDEN = (200, 200)
# Candidates for the loop: data in a chunk, and pairs (particle, datum) in it.
LOOP_DATA = (50, 250, 1000)
LOOP_PAIRS = (1000, 2000, 4000, 8000, 16000)
# Candidates for RenyiELBO: data at a time, each with all its particles.
RENYI_DATA = (1, 2, 5, 10, 25)
# Candidates for the matrix products: pairs at a time.
GEMM_PAIRS = (500, 1000, 2000, 4000, 8000, 16000)
MEMORY_PARTICLES = (50, 500, 5000)
PV, LOOP, PYRO, LIMIT = "pv.iwae_bound", "the loop", "RenyiELBO", "GEMM limit"

Candidate = TypeVar("Candidate")


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
    sizes = [(d, p) for d in LOOP_DATA for p in LOOP_PAIRS if min(d, num_data) <= p]
    return fastest(sizes, lambda size: run(64, *size), lambda size: 1.0)


def by_renyi(
    model: pv.zoo.VAE, guide: pv.AmortizedGuide, x: Tensor, num_particles: int, data: int
) -> float:
    """Return the mean IWAE-K of the images by Pyro's loss."""
    loss = pyro.infer.RenyiELBO(
        alpha=0, num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1
    )
    return -sum(loss.loss(model, guide, rows) for rows in x.split(data)) / len(x)


def best_renyi(model: pv.zoo.VAE, guide: pv.AmortizedGuide, x: Tensor, num_particles: int) -> int:
    """Return the data at a time with which Pyro's loss is fastest, by trials of one chunk."""
    sizes = [data for data in RENYI_DATA if data == 1 or data <= len(x)]
    return fastest(sizes, lambda n: by_renyi(model, guide, x[:n], num_particles, n), float)


class MatrixProducts:
    """The decoder's matrix products alone, for a number of pairs at a time.

    Args:
        decoder: whose linear layers are taken, in their order.
        pairs: rows of a product (columns, where transposed).
        transposed: whether a pair is a column: weight @ inputs in place of inputs @ weight.T.

    On the device of the decoder, which is waited for.
    """

    def __init__(self, decoder: nn.Module, pairs: int, transposed: bool) -> None:
        self.pairs, self.transposed = pairs, transposed
        layers = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
        self.weights = [layer.weight.detach() for layer in layers]
        widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
        self.device = self.weights[0].device
        shapes = [(width, pairs) if transposed else (pairs, width) for width in widths]
        self.buffers = [torch.randn(shape, device=self.device) for shape in shapes]

    def run(self, num_pairs: int) -> None:
        """Multiply as often as this many pairs need; a last chunk that is not full counts whole."""
        for _ in range(math.ceil(num_pairs / self.pairs)):
            for weight, given, out in zip(
                self.weights, self.buffers, self.buffers[1:], strict=False
            ):
                if self.transposed:
                    torch.mm(weight, given, out=out)
                else:
                    torch.mm(given, weight.t(), out=out)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def __repr__(self) -> str:
        return f"{self.pairs} pairs as {'columns' if self.transposed else 'rows'}"


def best_products(decoder: nn.Module, sizes: tuple[int, ...] = GEMM_PAIRS) -> MatrixProducts:
    """Return the matrix products whose chunk is fastest, by short trials."""
    candidates = [MatrixProducts(decoder, n, across) for n in sizes for across in (False, True)]
    return fastest(
        candidates,
        lambda some: some.run(64_000),
        lambda some: math.ceil(64_000 / some.pairs) * some.pairs,
    )


def fastest(
    candidates: list[Candidate],
    run: Callable[[Candidate], object],
    work: Callable[[Candidate], float],
) -> Candidate:
    """Return the candidate with the least time for its work, the best of three trials of each."""
    seconds = [math.inf] * len(candidates)
    for _ in range(3):
        for i, candidate in enumerate(candidates):
            begin = time.perf_counter()
            run(candidate)
            passed = (time.perf_counter() - begin) / work(candidate)
            seconds[i] = min(passed, seconds[i])
    return candidates[seconds.index(min(seconds))]


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


def agreement(bound: pv.Bound, loops: list[Tensor], renyis: list[float]) -> str:
    """Compare one bound with the others' runs, in standard errors of the difference."""
    # The others draw as many particles, so their errors are that of the bound.
    error = math.sqrt(2) * bound.mean_std_error
    lines = [f"mean: {PV} {bound.mean:.3f} ± {bound.mean_std_error:.3f}"]
    for name, means in ((LOOP, [float(run.double().mean()) for run in loops]), (PYRO, renyis)):
        away = ", ".join(f"{(mean - bound.mean) / error:+.1f}" for mean in means)
        lines.append(
            f"mean: {name} {', '.join(f'{mean:.3f}' for mean in means)} ({away} standard errors of "
            "the difference)"
        )
    differences = [loop.double() - bound.value for loop in loops]
    z = torch.stack(differences) / (math.sqrt(2) * bound.std_error)
    lines.append(
        f"image by image, the loop: root mean square {float(z.square().mean().sqrt()):.2f} "
        "standard errors; 1 where both are right and the errors too"
    )
    return "\n".join(lines)


def measure(turns: dict[str, Callable[[int], None]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each, in turns; each is told the number of the turn."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for repeat in range(repeats):
        # Who goes first changes, so that a machine that slows down favours none.
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            turns[name](repeat)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(seconds: dict[str, list[float]]) -> None:
    """Print the table of times, ratios to the loop and shares of the limit."""
    print(
        f"{'':<16} {'median s':>9} {'min - max':>17} {'ratio to loop':>14} {'min - max':>13} "
        f"{'share of limit':>15} {'min - max':>13}"
    )
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds[LOOP], strict=True)]
        shares = [limit / a for a, limit in zip(found, seconds[LIMIT], strict=True)]
        print(
            f"{name:<16} {statistics.median(found):9.2f} "
            f"{f'{min(found):.2f} - {max(found):.2f}':>17} {statistics.median(ratios):14.2f} "
            f"{f'{min(ratios):.2f} - {max(ratios):.2f}':>13} {statistics.median(shares):15.2f} "
            f"{f'{min(shares):.2f} - {max(shares):.2f}':>13}"
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
    data, products = best_renyi(model, guide, x, K), best_products(model.decoder)
    print(
        f"the fastest chunks of those tried: the loop {sizes[0]} data, {sizes[1]} pairs; RenyiELBO "
        f"{data} data; GEMM limit {products}"
    )
    pv.iwae_bound(model, guide, x, num_particles=16)  # all are warm now
    bounds: list[pv.Bound] = []
    loops: list[Tensor] = []
    renyis: list[float] = []

    def by_bound(seed: int) -> None:
        chunk_size = arguments.chunk_size
        bounds.append(
            pv.iwae_bound(model, guide, x, num_particles=K, chunk_size=chunk_size, seed=seed)
        )

    turns: dict[str, Callable[[int], None]] = {
        PV: by_bound,
        LOOP: lambda _: loops.append(by_hand(model, guide, x, K, *sizes)),
        PYRO: lambda _: renyis.append(by_renyi(model, guide, x, K, data)),
        LIMIT: lambda _: products.run(K * len(x)),
    }
    seconds = measure(turns, arguments.repeats)
    print(f"\nIWAE-{K} of {len(x)} images, {arguments.repeats} repetitions; ratios turn by turn")
    report(seconds)
    print(agreement(bounds[0], loops, renyis))
    if not arguments.no_memory:
        print(f"\npeak memory of pv.iwae_bound on {len(x)} images, fresh processes")
        print(f"{'particles':>9} {'before MiB':>11} {'peak MiB':>9}")
        for num_particles in MEMORY_PARTICLES:
            before, after = peak_in_fresh_process(arguments, num_particles)
            print(f"{num_particles:>9} {before:11.0f} {after:9.0f}")


if __name__ == "__main__":
    main()
