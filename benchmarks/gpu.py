"""What a machine with one GPU is asked, in under 8 minutes: tests, steps, a bound, a protocol.

    python benchmarks/gpu.py --data mnist.npz

Parts, each a process of its own with a budget of seconds, ended when that is spent:

- tests: those of CUDA graphs and the laws on a device;
- steps: a training step of factor analysis and of a 784-200-200-50 VAE on the device, by
  pyro.infer.SVI, by hand, under torch.compile, with CUDA graphs (mode="reduce-overhead"), by
  pv.CompiledSVI, and the matrix products alone (step_time.py says what each is);
- bound: IWAE-5000 of up to 10,000 test images, and its share of the matrix products alone;
- protocol: the VAE of one stochastic layer of Burda, Grosse & Salakhutdinov (2016), trained by the
  IWAE bound of 1, 5 and 50 particles: minibatches of 20, Adam with eps 1e-4, learning rate
  1e-3 times 10^(-i/7) for 3^i epochs, for as long as there is time; microseconds a step, and
  IWAE-5000 of test images with what was learned by then.

A part writes what it has found as it goes, so that one that is ended has not lost it: --out has a
JSON file, and a table in Markdown. Without --data the 8x8 digits stand in: the same programs, other
figures. --device cpu --quick tries the script itself, on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import iwae_evaluation
import machine
import step_time
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.training.fit_result import Epoch

BUDGETS = {"tests": 150, "steps": 150, "bound": 60, "protocol": 110}  # seconds
QUICK = {"tests": 60, "steps": 150, "bound": 60, "protocol": 100}
TESTS = ("tests/compiler/test_cuda_graphs.py", "tests/laws/test_cuda.py")
GEMM_PAIRS = (8000, 64_000, 256_000)  # at a time, on a device
ROOT = Path(__file__).resolve().parent.parent
# Test log likelihoods of the protocol after all of its 3,280 epochs (Burda et al. 2016, table 1).
PUBLISHED = {1: -86.76, 5: -85.54, 50: -84.78}

Found = dict[str, Any]


def main() -> None:
    """Run the parts one after the other, and write what each has found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="MNIST, for example as .npz (default: the 8x8 digits)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    parser.add_argument("--parts", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="a folder; default: gpu")
    parser.add_argument("--part", choices=list(BUDGETS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        PARTS[options.part](options, Results(options.out / f"{options.part}.json"))
        return
    budgets, found = QUICK if options.quick else BUDGETS, Results(options.out / "gpu.json")
    found.set("machine", machine.describe(options.device))
    print(found.content["machine"], flush=True)
    for part in options.parts:
        begin = time.perf_counter()
        ended = run_part(part, budgets[part])
        written = options.out / f"{part}.json"
        content = json.loads(written.read_text()) if written.exists() else {}
        seconds = round(time.perf_counter() - begin, 1)
        found.set(part, {"ended": ended, "seconds": seconds, **content})
        text = as_markdown(found.content)
        (options.out / "gpu.md").write_text(text)
        print(f"{part}: {ended} after {seconds:.0f} s", flush=True)
    print(text)


def run_part(part: str, budget: float) -> str:
    """Run a part as a process, for so many seconds at most; say how it ended."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            code = process.wait(budget)
        except BaseException as error:  # Ctrl-C too
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started: the tests
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"its {budget} s were over"
    return "whole" if code == 0 else f"failed (exit status {code})"


class Results:
    """What has been found so far, written at each change: whole, or as it was.

    Args:
        path: of a JSON file, which is begun anew.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.content = path, dict[str, Any]()
        path.unlink(missing_ok=True)

    def set(self, name: str, value: object) -> None:
        """Note a result."""
        self.content[name] = value
        half = self._path.with_suffix(".tmp")
        half.write_text(json.dumps(self.content, indent=1))
        half.replace(self._path)


# --- the parts


def run_tests(options: argparse.Namespace, results: Results) -> None:
    """Run the tests of the device; count them as they pass or fail."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    counts = {"PASSED": 0, "FAILED": 0, "SKIPPED": 0, "ERROR": 0}
    failures: list[str] = []
    with subprocess.Popen(
        [*command, *TESTS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            words = line.split()
            # "tests/x.py::test_y[z] PASSED [ 3%]"; a name in brackets may have spaces.
            outcome = next((w for w in words[1:] if w in counts), None)
            if line.startswith("tests/") and "::" in words[0] and outcome:
                counts[outcome] += 1
                if outcome in ("FAILED", "ERROR"):
                    failures.append(line.partition(f" {outcome}")[0])
                results.set("counts", counts)
                results.set("failures", failures)
            elif line.startswith("E  "):
                results.set("messages", [*results.content.get("messages", []), line.strip()[:300]])
    results.set("counts", counts)


def run_steps(options: argparse.Namespace, results: Results) -> None:
    """Time a step of each competitor."""
    loaded = images_of(options)
    binary = pv.datasets.StochasticBinarization(loaded.train, loaded.max_value).fixed(0)
    cases = step_time.cases(binary, 1)
    settings = argparse.Namespace(block=0.05, seconds=3.0 if options.quick else 8.0, turns=10)
    rows: list[Found] = []
    for name, batch_size in (("vae-200-200", 128), ("vae-200-200", 20), ("factor-analysis", 128)):
        if options.quick and rows:
            break
        case = cases[name]().on(options.device)
        print(step_time.check(case), flush=True)
        for competitor, (seconds, share) in step_time.measure(case, batch_size, settings).items():
            title = f"{case.title}, batch {batch_size}"
            ms = round(1e3 * seconds, 4)
            row = {"case": title, "by": competitor, "ms": ms, "share": round(share, 3)}
            results.set("rows", rows := [*rows, row])


def run_bound(options: argparse.Namespace, results: Results) -> None:
    """Time IWAE-5000 of more and more test images, beside the matrix products alone."""
    images, model, guide = pair_of(options)
    budget = 30.0
    train(options, images, model, guide, pv.ELBO(), seconds=1.0 if options.quick else 8.0)
    binary = pv.datasets.StochasticBinarization(images.test, images.max_value).fixed(0)
    num_particles = 200 if options.quick else 5000
    sizes = GEMM_PAIRS if options.device == "cuda" else (1000,)
    products = iwae_evaluation.best_products(model.decoder, sizes)
    rows: list[Found] = []
    for count in (50,) if options.quick else (200, 1000, 10_000):
        x = binary[:count].to(options.device)
        if rows and rows[-1]["seconds"] * len(x) / rows[-1]["images"] > budget / 2:
            break
        for turn in ("first", "second"):  # the first compiles, and captures
            begin = time.perf_counter()
            bound = pv.iwae_bound(model, guide, x, num_particles=num_particles, seed=0)
            seconds = time.perf_counter() - begin
            begin = time.perf_counter()
            products.run(num_particles * len(x))
            limit = time.perf_counter() - begin
            row: Found = {"images": len(x), "particles": num_particles, "call": turn}
            row |= {"seconds": round(seconds, 3), "share": round(limit / seconds, 3)}
            row |= {"nats": round(bound.mean, 3), "error": round(bound.mean_std_error, 4)}
            results.set("rows", rows := [*rows, row])


def run_protocol(options: argparse.Namespace, results: Results) -> None:
    """Train by the IWAE bound of 1, 5 and 50 particles, each for a third of the time."""
    rows: list[Found] = []
    for num_particles in (1, 5, 50):
        images, model, guide = pair_of(options)
        loss = pv.IWAE(num_particles)
        row = train(options, images, model, guide, loss, seconds=1.0 if options.quick else 20.0)
        row = {"k": num_particles, **row}
        row |= {"published, 3280 epochs": PUBLISHED[num_particles]} if options.data else {}
        results.set("rows", [*rows, row])
        binary = pv.datasets.StochasticBinarization(images.test, images.max_value).fixed(0)
        x = binary[: 20 if options.quick else 1000].to(options.device)
        bound = pv.iwae_bound(model, guide, x, num_particles=100 if options.quick else 5000, seed=0)
        row |= {"nats": round(bound.mean, 2), "error": round(bound.mean_std_error, 3)}
        results.set("rows", rows := [*rows, row])


PARTS: dict[str, Callable[[argparse.Namespace, Results], None]] = {
    "tests": run_tests,
    "steps": run_steps,
    "bound": run_bound,
    "protocol": run_protocol,
}


def images_of(options: argparse.Namespace) -> pv.datasets.ImageData:
    """Return the images."""
    return pv.datasets.digits() if options.data is None else pv.datasets.load(options.data)


def pair_of(
    options: argparse.Namespace,
) -> tuple[pv.datasets.ImageData, pv.zoo.VAE, pv.AmortizedGuide]:
    """Return the images and an untrained pair on the device."""
    images, model, guide = iwae_evaluation.make(options.data, 0)
    return images, model.to(options.device), guide.to(options.device)


def learning_rate(epoch: int) -> float:
    """Return the factor on the learning rate in an epoch, counted from 0."""
    i = 0
    while i < 7 and epoch >= 3**i:
        epoch, i = epoch - 3**i, i + 1
    return 10 ** (-i / 7)


def train(
    options: argparse.Namespace,
    images: pv.datasets.ImageData,
    model: nn.Module,
    guide: nn.Module,
    loss: pv.ELBO | pv.IWAE,
    seconds: float,
) -> Found:
    """Train by the protocol for so long; return steps, epochs and microseconds of a step."""
    parameters = nn.ModuleList([model, guide]).parameters()
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-4, fused=True)
    ends: list[tuple[int, float]] = []  # of epochs: steps and seconds so far

    def is_over(epoch: Epoch) -> bool:
        ends.append((epoch.step, epoch.elapsed))
        return len(ends) > 1 and epoch.elapsed > seconds  # graphs are made in the first

    done = pv.fit(
        model,
        guide,
        pv.datasets.StochasticBinarization(images.train, images.max_value),
        loss=loss,
        optim=optimizer,
        batch_size=20,
        epochs=sum(3**i for i in range(8)),
        device=options.device,
        progress=False,
        callbacks=[torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate), is_over],
    )
    (first, begin), (last, end) = ends[0], ends[-1]
    micros = round(1e6 * (end - begin) / (last - first), 1)
    elbo = round(done.history["elbo"][-1], 2)
    return {"epochs": len(ends), "steps": done.steps, "us per step": micros, "training ELBO": elbo}


# --- the table


def as_markdown(found: Found) -> str:
    """Return what was found as tables."""
    lines = [found["machine"], ""]
    for part, content in found.items():
        if part == "machine":
            continue
        lines += [f"## {part}: {content['ended']}, {content['seconds']} s", ""]
        if counts := content.get("counts"):
            lines += [", ".join(f"{n} {name.lower()}" for name, n in counts.items()), ""]
            lines += [f"- {text}" for text in content.get("failures", ())]
            lines += [f"  {text}" for text in content.get("messages", ())] + [""]
        if rows := content.get("rows"):
            names = list(dict.fromkeys(name for row in rows for name in row))
            table = [names, ["---"] * len(names)]
            table += [[str(row.get(name, "")) for name in names] for row in rows]
            lines += [f"| {' | '.join(cells)} |" for cells in table] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
