"""One script by one process and by several, under torchrun: the same numbers, and how much faster.

    python benchmarks/torchrun.py [--processes 2] [--batch-size 1024]

A VAE of 784 pixels (two layers of 400, 20 latents), float64, is evaluated by IWAE and then trained
on the same global minibatches by one process and by several, one thread each. Printed are the
largest differences between the curves of losses and between the bounds of the data, milliseconds
per step, and what a step consists of:

- compute: a step of one process on its share of the minibatch;
- drawing: the normals of the whole minibatch less those of the share, which each process draws too;
- all-reduce: the sum of a buffer of the size of the gradients, alone, processes in step;
- the rest: copies into the buffer, waiting for the slowest.

Times are medians over steps that were replayed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
import torch.distributed as dist
from torch import nn

import pyro_vae as pv

LATENTS, PIXELS, WIDTH, DATA = 20, 784, 400, 8192


class Clock(pv.callbacks.Callback):
    """Notes the time, and the ELBO, after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.elbos: list[float] = []

    def on_step(self, step: pv.callbacks.Step) -> None:
        """Note them."""
        self.times.append(time.perf_counter())
        self.elbos.append(step.elbo)

    def median(self) -> float:
        """Milliseconds per step, the first half left out."""
        half = self.times[len(self.times) // 2 :]
        return 1000 * statistics.median(b - a for a, b in itertools.pairwise(half))


def pair() -> tuple[pv.zoo.VAE, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.rand(DATA, PIXELS, dtype=torch.float64).bernoulli()
    model = pv.zoo.VAE(PIXELS, LATENTS, hidden=[WIDTH, WIDTH]).double()
    guide = pv.AmortizedGuide(model, model.make_encoder().double(), example=x[:8]).double()
    return model, guide, x


def timed(function: Callable[[], object], count: int = 50) -> float:
    """Milliseconds of a call, the median."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


def work(batch_size: int, steps: int, out: Path) -> None:
    """What each process does: train, evaluate, time the parts; the first one writes."""
    torch.set_num_threads(1)
    model, guide, x = pair()
    begin = time.perf_counter()
    bound = pv.iwae_bound(model, guide, x[:1024], num_particles=200, seed=0, compile="replay")
    found = {"bound": bound.value.tolist(), "evaluation": time.perf_counter() - begin}
    clock = Clock()
    options = {"compile": "replay", "progress": False, "max_steps": steps}
    pv.fit(model, guide, x, batch_size=batch_size, callbacks=[clock], **options)
    found |= {"elbos": clock.elbos, "step": clock.median()}
    size = dist.get_world_size() if dist.is_initialized() else 1
    share = -(-batch_size // size)
    draw = [torch.empty(n, LATENTS, dtype=torch.float64) for n in (batch_size, share)]
    whole, part = (timed(noise.normal_) for noise in draw)
    found["drawing"] = whole - part
    count = sum(p.numel() for p in [*model.parameters(), *guide.parameters()])
    if size > 1:
        buffer = torch.zeros(count, dtype=torch.float64)
        found["all-reduce"] = timed(lambda: dist.all_reduce(buffer))
    else:
        found["all-reduce"] = 0.0
    # The share alone: as long as other processes do the same, memory is shared as in a step.
    alone = Clock()
    model, guide, x = pair()
    options["max_steps"] = steps // 2
    pv.fit(model, guide, x, batch_size=share, callbacks=[alone], distributed=False, **options)
    found["compute"] = alone.median()
    if int(os.environ.get("RANK", 0)) == 0:
        out.write_text(json.dumps(found))


def run(processes: int, batch_size: int, steps: int) -> dict[str, list[float] | float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        script = [__file__, "--out", str(out), "--batch-size", str(batch_size)]
        command = [sys.executable, *(launcher if processes > 1 else []), *script]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--steps", str(steps)], env=env, check=True)
        return json.loads(out.read_text())


def largest(one: list[float], other: list[float]) -> float:
    """The largest difference, relative to the size of the numbers."""
    return max(abs(a - b) / (1 + abs(a)) for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="of a process that this script starts")
    options = parser.parse_args()
    if options.out is not None:
        work(options.batch_size, options.steps, options.out)
        return
    print(machine.describe(), "in this process; one thread in those that are timed")
    sizes = options.batch_size, options.steps
    one, many = run(1, *sizes), run(options.processes, *sizes)
    print(f"{options.processes} processes beside one, {options.steps} steps of {sizes[0]} data:")
    print(f"  curves of losses differ by {largest(one['elbos'], many['elbos']):.1e}, relative")
    same = one["bound"] == many["bound"]
    print(f"  bounds of 1,024 data: {'identical' if same else 'NOT IDENTICAL'}")
    print(f"{'ms per step':24}{'one':>10}{'several':>10}")
    for name in ("step", "compute", "drawing", "all-reduce"):
        print(f"{name:24}{one[name]:10.2f}{many[name]:10.2f}")
    rest = many["step"] - many["compute"] - many["drawing"] - many["all-reduce"]
    print(f"{'the rest':24}{'':>10}{rest:10.2f}")
    print(f"speed-up of a step {one['step'] / many['step']:.2f}")
    print(f"speed-up of evaluation {one['evaluation'] / many['evaluation']:.2f}")


if __name__ == "__main__":
    main()
