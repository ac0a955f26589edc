"""A training step of a LocalGuide against the rows of its table: time and memory.

    OMP_NUM_THREADS=1 python benchmarks/local_rows.py

A linear Gaussian model of 10 latents and 20 features, a table of families.Normal in float32, Adam,
minibatches of 128. A step of pv.fit moves the rows of its minibatch alone, each by moments and a
step count of its own; beside it stands a step that moves the whole table, which is what an
optimizer without a rule for rows does (a class that inherits from Adam). Both by graphs that are
replayed (compile="replay"), the former eagerly too (compile=False), and with the table and its
moments in memory-mapped files (storage=...; their pages count in a process's memory while they are
in the machine's, which may drop them).

Each cell is a process of its own, in turns. It makes data and guide, takes some steps that are not
measured, and then measures some hundred, one by one, minibatch included, as the processor's time of
this process: others that run on the machine do not count in it, but in what they leave of caches.
Said are the median over steps, the time before the first step, and the resident memory at its peak:
the data, the table, its moments, the copy that fit keeps to come back to, and what it remembers of
each datum at its end.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv

NUM_LATENTS, NUM_FEATURES, BATCH_SIZE = 10, 20, 128
WARM = 60  # steps that are not measured
COMPILE = {"replayed": "replay", "eager": False}
ROWS, DISK, WHOLE = "its rows", "its rows, on disk", "all rows"


class WholeTable(torch.optim.Adam):
    """Adam under another name, for which there is no rule of rows: it moves the whole table."""


class Clock:
    """Notes the processor's time after each step, and ends training after some."""

    def __init__(self, steps: int) -> None:
        self.steps, self.times = steps, list[float]()

    def on_step(self, step: object) -> bool:
        """Note the time; return whether there were steps enough."""
        self.times.append(time.process_time())
        return len(self.times) > self.steps


def measure(num_data: int, how: str, what: str, steps: int) -> dict[str, float]:
    """Return the milliseconds of a step, the seconds before the first, and MiB at the peak."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        storage = Path(folder) / "table.npy" if what == DISK else None
        return _measure(num_data, how, what == WHOLE, storage, steps)


def _measure(
    num_data: int, how: str, whole: bool, storage: Path | None, steps: int
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(NUM_LATENTS, NUM_FEATURES, generator=generator)
    x = torch.randn(num_data, NUM_FEATURES, generator=generator)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(NUM_LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weights, 1.0).to_event(1), obs=x)

    optim = functools.partial(WholeTable if whole else torch.optim.Adam, lr=1e-3, fused=True)
    clock, begin = Clock(WARM + steps), time.process_time()
    guide = pv.LocalGuide(model, num_data=num_data, example=x[:5], storage=storage)
    pv.fit(
        model,
        guide,
        x,
        optim=optim,
        batch_size=BATCH_SIZE,
        compile=COMPILE[how],
        epochs=10**6,
        max_steps=WARM + steps,
        callbacks=[clock],
        progress=False,
    )
    each = [after - before for before, after in itertools.pairwise(clock.times[WARM:])]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = clock.times[0] - begin
    return {"ms": 1e3 * statistics.median(each), "start": start, "peak": peak}


def row(num_data: int, how: str, what: str, steps: int) -> dict[str, float]:
    """Return what a process of its own measures."""
    options = ["--one", json.dumps([num_data, how, what, steps])]
    found = subprocess.run(
        [sys.executable, __file__, *options], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=float, nargs="+", default=[1e3, 1e5, 1e6, 1e7])
    parser.add_argument("--whole-up-to", type=float, default=1e6, help="rows of whole tables")
    parser.add_argument("--steps", type=int, default=400, help="that are measured")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each, in turns")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("pyro_vae").setLevel(logging.ERROR)
    if arguments.one is not None:
        print(json.dumps(measure(*arguments.one)))
        return
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"{machine.describe()}; load {load}; {arguments.steps} steps, medians of processes")
    sizes = [int(n) for n in arguments.rows]
    cells = [(n, how, ROWS) for n in sizes for how in COMPILE]
    cells += [(n, "replayed", DISK) for n in sizes]
    cells += [(n, "replayed", WHOLE) for n in sizes if n <= arguments.whole_up_to]
    found: dict[tuple[int, str, str], list[dict[str, float]]] = {cell: [] for cell in cells}
    for _ in range(arguments.repeats):
        for cell in cells:
            slow = cell[2] == WHOLE and cell[0] >= 1e6
            found[cell].append(row(*cell, 20 if slow else arguments.steps))
    print(
        "| rows | step | moves | ms | against the fewest rows | before the first, s | peak, MiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for cell in sorted(cells, key=lambda cell: (cell[2], cell[1], cell[0])):
        num_data, *kind = cell
        median = {n: statistics.median(r[n] for r in found[cell]) for n in ("ms", "start", "peak")}
        fewest = min(other for other in cells if list(other[1:]) == kind)
        share = median["ms"] / statistics.median(r["ms"] for r in found[fewest])
        print(
            f"| {num_data:,} | {kind[0]} | {kind[1]} | {median['ms']:.3f} | {share:.2f} "
            f"| {median['start']:.1f} | {median['peak']:,.0f} |"
        )


if __name__ == "__main__":
    main()
