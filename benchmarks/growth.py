"""How time and memory grow: of pv.iwae_bound, of a step of pv.fit, and of pv.refine.

    python benchmarks/growth.py --data mnist.npz

Three tables for a Bernoulli VAE (784-200-200-50 on MNIST; the 8x8 digits stand in without --data):

- pv.iwae_bound against the particles K and the data N;
- a step of pv.fit, compiled ("auto") and not, against the latent dimension and the batch;
- pv.refine against the data N, after a short training.

Every measurement is a fresh process. It prints the resident memory at its peak before, when
libraries, data and networks are there and a small call has been made, and at its peak after. What
lies between is what the measured call needs. Time is the median over the repeats, which go through
a table in turns. Data are drawn with replacement from the training images, each binarized afresh.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import machine
import torch
from iwae_evaluation import peak_memory
from torch import Tensor

import pyro_vae as pv

NUM_LATENTS = 50
HIDDEN = (200, 200)
REFINE_TRAINING_STEPS = 500


def make(data: str | None, num_latents: int) -> tuple[Tensor, int, pv.zoo.VAE, pv.AmortizedGuide]:
    """Return the grey images, their largest intensity and an untrained pair."""
    images = pv.datasets.digits() if data is None else pv.datasets.load(data)
    num_features = images.train.shape[1]
    torch.manual_seed(0)
    model = pv.zoo.VAE(num_features, num_latents, hidden=HIDDEN[::-1])
    encoder = pv.nets.MLP([num_features, *HIDDEN], activate_last=True)
    guide = pv.AmortizedGuide(model, encoder, example=torch.zeros(2, num_features))
    return images.train, images.max_value, model, guide


def draw(images: Tensor, max_value: int, num_data: int) -> Tensor:
    """Return binarized images, drawn with replacement, [N, D]."""
    rows = torch.randint(len(images), (num_data,), generator=torch.Generator().manual_seed(0))
    x = torch.empty(num_data, images.shape[1])
    # In parts, so that the making of the data does not set the peak.
    for start in range(0, num_data, 1000):
        part = slice(start, start + 1000)
        binary = pv.datasets.StochasticBinarization(images[rows[part]], max_value)
        x[part] = binary.fixed(start)
    return x


def iwae_bound(data: str | None, num_particles: int, num_data: int) -> dict[str, float]:
    """Measure one bound; the parameters' values do not matter to it."""
    images, max_value, model, guide = make(data, NUM_LATENTS)
    x = draw(images, max_value, num_data)
    pv.iwae_bound(model, guide, x[:2], num_particles=2)
    before, begin = peak_memory(), time.perf_counter()
    pv.iwae_bound(model, guide, x, num_particles=num_particles, seed=0)
    return {"seconds": time.perf_counter() - begin, "before": before, "peak": peak_memory()}


def fit_step(
    data: str | None,
    num_latents: int,
    batch_size: int,
    compiled: str | bool,
    epochs: int,
    steps: int,
) -> dict[str, float]:
    """Measure a step of training: the median of the later half of the epochs."""
    images, max_value, model, guide = make(data, num_latents)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": False}
    x = draw(images, max_value, batch_size)
    pv.fit(model, guide, x, max_steps=1, compile=False, **options)
    before = peak_memory()
    # Memory of a minibatch alone: pv.fit looks at all its data at once before the first step.
    pv.fit(model, guide, x, max_steps=epochs * steps, compile=compiled, **options)
    peak, x = peak_memory(), draw(images, max_value, batch_size * steps)
    ends = [0.0]
    options["callbacks"] = [lambda epoch: ends.append(epoch.elapsed)]
    pv.fit(model, guide, x, epochs=epochs, compile=compiled, **options)
    took = [(end - begin) / steps for begin, end in pairwise(ends)]
    late = statistics.median(took[len(took) // 2 :])
    return {"seconds": late, "before": before, "peak": peak}


def refine(data: str | None, num_data: int) -> dict[str, float]:
    """Measure the refinement of a short-trained guide."""
    images, max_value, model, guide = make(data, NUM_LATENTS)
    binary = pv.datasets.StochasticBinarization(images, max_value)
    pv.fit(model, guide, binary, max_steps=REFINE_TRAINING_STEPS, compile=False, progress=False)
    x = draw(images, max_value, num_data)
    pv.elbo(model, guide, x[:2], num_particles=2)
    before, begin = peak_memory(), time.perf_counter()
    refined = pv.refine(model, guide, x, seed=0)
    seconds = time.perf_counter() - begin
    converged = float(refined.converged.double().mean())
    return {"seconds": seconds, "before": before, "peak": peak_memory(), "converged": converged}


MEASURED: dict[str, Callable[..., dict[str, float]]] = {
    "iwae_bound": iwae_bound,
    "fit_step": fit_step,
    "refine": refine,
}


def in_fresh_process(what: str, arguments: tuple[Any, ...]) -> dict[str, float]:
    """Measure in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--only", json.dumps([what, *arguments])],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(
    what: str, rows: Iterable[tuple[Any, ...]], repeats: int
) -> dict[tuple[Any, ...], dict[str, float]]:
    """Return the median of what each row's runs found, all rows in turns."""
    found: dict[tuple[Any, ...], list[dict[str, float]]] = {row: [] for row in rows}
    for _ in range(repeats):
        for row, runs in found.items():
            runs.append(in_fresh_process(what, row))
    return {
        row: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for row, runs in found.items()
    }


def along_both(
    values: Iterable[int], others: Iterable[int], value: int, other: int
) -> list[tuple[int, int]]:
    """Return pairs along each of two axes, the other held at its given value; none twice."""
    pairs = [*((v, other) for v in values), *((value, o) for o in others)]
    return list(dict.fromkeys(pairs))


def table_of_bounds(arguments: argparse.Namespace) -> None:
    """Print time and memory of pv.iwae_bound."""
    pairs = along_both(
        arguments.particles, arguments.num_data, arguments.fixed_particles, arguments.fixed_data
    )
    rows = [(arguments.data, K, N) for K, N in pairs]
    print("\npv.iwae_bound")
    print(f"{'K':>8}{'N':>8}{'s':>10}{'µs per pair':>13}{'before MiB':>12}{'peak MiB':>10}")
    for (_, K, N), found in medians("iwae_bound", rows, arguments.repeats).items():
        print(
            f"{K:>8}{N:>8}{found['seconds']:>10.2f}{1e6 * found['seconds'] / (K * N):>13.2f}"
            f"{found['before']:>12.0f}{found['peak']:>10.0f}",
            flush=True,
        )


def table_of_steps(arguments: argparse.Namespace) -> None:
    """Print time and memory of a step of pv.fit."""
    pairs = along_both(
        arguments.latents, arguments.batch_sizes, NUM_LATENTS, arguments.fixed_batch_size
    )
    settings: list[str | bool] = [False, "auto"]
    rest = (arguments.epochs, arguments.steps)
    rows = [(arguments.data, L, B, setting, *rest) for L, B in pairs for setting in settings]
    found = medians("fit_step", rows, arguments.repeats)
    print('\na step of pv.fit: compile=False, then compile="auto"')
    cells = f"{'ms':>10}{'before MiB':>12}{'peak MiB':>10}"
    print(f"{'latents':>8}{'batch':>8}{cells}{cells}{'ratio':>8}")
    for L, B in pairs:
        eager, auto = (found[(arguments.data, L, B, setting, *rest)] for setting in settings)
        columns = "".join(
            f"{1e3 * each['seconds']:>10.2f}{each['before']:>12.0f}{each['peak']:>10.0f}"
            for each in (eager, auto)
        )
        print(f"{L:>8}{B:>8}{columns}{auto['seconds'] / eager['seconds']:>8.2f}", flush=True)


def table_of_refinement(arguments: argparse.Namespace) -> None:
    """Print time and memory of pv.refine."""
    rows = [(arguments.data, N) for N in arguments.refine_data]
    print("\npv.refine")
    print(
        f"{'N':>8}{'s':>10}{'ms per datum':>14}{'converged':>11}{'before MiB':>12}{'peak MiB':>10}"
    )
    for (_, N), found in medians("refine", rows, arguments.repeats).items():
        print(
            f"{N:>8}{found['seconds']:>10.1f}{1e3 * found['seconds'] / N:>14.1f}"
            f"{found['converged']:>11.0%}{found['before']:>12.0f}{found['peak']:>10.0f}",
            flush=True,
        )


TABLES: dict[str, Callable[[argparse.Namespace], None]] = {
    "bounds": table_of_bounds,
    "steps": table_of_steps,
    "refinement": table_of_refinement,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="MNIST, for example as .npz (default: the 8x8 digits)")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--repeats", type=int, default=3)
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--particles", type=int, nargs="+", default=[50, 500, 5000])
    bounds.add_argument("--num-data", type=int, nargs="+", default=[100, 1000, 10_000])
    bounds.add_argument("--fixed-particles", type=int, default=500, help="where N varies")
    bounds.add_argument("--fixed-data", type=int, default=1000, help="where K varies")
    steps = parser.add_argument_group("steps")
    steps.add_argument("--latents", type=int, nargs="+", default=[2, 10, 50, 200, 800])
    steps.add_argument("--batch-sizes", type=int, nargs="+", default=[20, 128, 512, 2048])
    steps.add_argument("--fixed-batch-size", type=int, default=128, help="where latents vary")
    steps.add_argument("--epochs", type=int, default=10)
    steps.add_argument("--steps", type=int, default=50, help="in an epoch")
    refinement = parser.add_argument_group("refinement")
    refinement.add_argument("--refine-data", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--only", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only is not None:
        what, *rest = arguments.only
        print(json.dumps(MEASURED[what](*rest)))
        return
    print(machine.describe())
    for table in arguments.tables:
        TABLES[table](arguments)


if __name__ == "__main__":
    main()
