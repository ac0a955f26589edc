"""Data that do not fit in memory: a Zarr of counts, made, trained on, bounded, and exported.

    python benchmarks/large_data.py --folder /tmp/large                  # 10^6 rows, 2,000 columns
    python benchmarks/large_data.py --rows 10000 --columns 200

Counts are Poisson, of a factor model with 10 factors, about one in three of them not zero, in
chunks of 1,000 rows. Each part is a fresh process, of which the seconds, the processor's seconds,
and the resident memory at its peak are printed:

- make: the array is drawn and written, chunk by chunk;
- fit: a factor model with an amortized guide, in minibatches of 1,000, for two passes at most;
- bounds: the ELBO and IWAE-50 of the first rows;
- posterior: 20 draws of each of these rows to a Zarr folder, with their log likelihoods.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import machine
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import zarr
from iwae_evaluation import peak_memory
from torch import Tensor, nn

import pyro_vae as pv

NUM_FACTORS = 10
CHUNK = 1000  # rows
NUM_PARTICLES, NUM_DRAWS = 50, 20


class Factors(nn.Module):
    """z ~ Normal(0, I); x ~ Poisson(exp(b + W z)), a column each."""

    def __init__(self, num_columns: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(NUM_FACTORS, num_columns)

    def forward(self, x: Tensor) -> None:
        """Observe the counts of a batch, [N, D]."""
        pyro.module("factors", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(NUM_FACTORS), 1.0).to_event(1))
            rate = self.decoder(z).clamp(max=10.0).exp()
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


class Encoder(nn.Module):
    """Features of the logarithms of counts."""

    def __init__(self, num_columns: int) -> None:
        super().__init__()
        self.net = pv.nets.MLP([num_columns, 128], activate_last=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of counts [N, D], [N, 128]."""
        features: Tensor = self.net(x.float().log1p())
        return features


def pair(num_columns: int) -> tuple[Factors, pv.AmortizedGuide]:
    """Return an untrained pair."""
    torch.manual_seed(0)
    model = Factors(num_columns)
    example = torch.zeros(2, num_columns, dtype=torch.long)
    return model, pv.AmortizedGuide(model, Encoder(num_columns), example=example)


def make(folder: Path, rows: int, columns: int) -> str:
    """Draw the counts and write them."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.25, (NUM_FACTORS, columns)).astype("f4")
    means = rng.normal(-1.0, 0.7, columns).astype("f4")
    array = zarr.create_array(
        str(folder / "counts.zarr"), shape=(rows, columns), chunks=(CHUNK, columns), dtype="u2"
    )
    total = nonzero = 0
    for start in range(0, rows, CHUNK):
        size = min(CHUNK, rows - start)
        z = rng.standard_normal((size, NUM_FACTORS), dtype="f4")
        x = rng.poisson(np.exp(means + z @ weights)).astype("u2")
        array[start : start + size] = x
        total, nonzero = total + int(x.sum()), nonzero + int((x > 0).sum())
    size = sum(file.stat().st_size for file in (folder / "counts.zarr").rglob("*"))
    share, mean = nonzero / (rows * columns), total / (rows * columns)
    return f"{size / 2**30:.2f} GiB on disk, {share:.2f} of the counts not zero, mean {mean:.2f}"


def counts(folder: Path) -> zarr.Array:
    """Return the array, opened."""
    return zarr.open_array(str(folder / "counts.zarr"), mode="r")


def fit(folder: Path, rows: int, columns: int, steps: int) -> str:
    """Train a pair, and keep it."""
    model, guide = pair(columns)
    x = counts(folder)
    result = pv.fit(
        model,
        guide,
        x,
        batch_size=CHUNK,
        max_steps=steps,
        shuffle="blocks",
        optim=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
        progress=False,
    )
    torch.save([model.state_dict(), guide.state_dict()], folder / "pair.pt")
    elbos = ", ".join(f"{elbo:.1f}" for elbo in result.history["elbo"])
    return f"{result.steps} steps; ELBO of each epoch {elbos} nats per datum"


def trained(folder: Path, columns: int) -> tuple[Factors, pv.AmortizedGuide]:
    """Return the trained pair."""
    found = pair(columns)
    for module, state in zip(found, torch.load(folder / "pair.pt"), strict=True):
        module.load_state_dict(state)
    return found


def bounds(folder: Path, columns: int, count: int) -> str:
    """Bound log p(x) of the first rows."""
    model, guide = trained(folder, columns)
    x = pv.take(counts(folder), slice(0, count))
    elbo = pv.elbo(model, guide, x, num_particles=NUM_PARTICLES, seed=0)
    iwae = pv.iwae_bound(model, guide, x, num_particles=NUM_PARTICLES, seed=0)
    return (
        f"{count} rows: ELBO {elbo.mean:.3f} ± {elbo.mean_std_error:.3f}, "
        f"IWAE-{NUM_PARTICLES} {iwae.mean:.3f} ± {iwae.mean_std_error:.3f}"
    )


def posterior(folder: Path, columns: int, count: int) -> str:
    """Write draws of the first rows."""
    model, guide = trained(folder, columns)
    file = folder / "posterior.zarr"
    tree = pv.to_arviz(
        model,
        guide,
        pv.take(counts(folder), slice(0, count)),
        num_draws=NUM_DRAWS,
        predictive=False,
        file=file,
        seed=0,
    )
    size = sum(each.stat().st_size for each in file.rglob("*"))
    sizes = dict(tree["posterior"]["z"].sizes)
    return f"{size / 2**30:.2f} GiB on disk; z {sizes}"


PARTS: dict[str, Callable[..., str]] = {
    "make": make,
    "fit": fit,
    "bounds": bounds,
    "posterior": posterior,
}


def in_fresh_process(what: str, folder: Path, numbers: list[int]) -> None:
    """Run a part in a process of its own and print what it took."""
    subprocess.run(
        [sys.executable, __file__, "--only", json.dumps([what, str(folder), *numbers])], check=True
    )


def run_part(what: str, folder: str, numbers: list[int]) -> None:
    """Run a part in this process."""
    begin = time.perf_counter(), time.process_time()
    before = peak_memory()
    told = PARTS[what](Path(folder), *numbers)
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    memory = f"{peak_memory():.0f} MiB at the peak ({before:.0f} before)"
    print(f"{what}: {wall:.0f} s, of the processor {cpu:.0f}; {memory}; {told}", flush=True)


def main() -> None:
    """Run all parts, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--columns", type=int, default=2000)
    parser.add_argument("--steps", type=int, help="two passes by default")
    parser.add_argument("--bounded", type=int, default=10**5, help="rows of bounds and posterior")
    parser.add_argument("--folder", type=Path, help="a temporary one by default")
    parser.add_argument("--keep", action="store_true", help="keep the files of the folder")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only is not None:
        what, where, *numbers = json.loads(arguments.only)
        run_part(what, where, numbers)
        return
    rows, columns = arguments.rows, arguments.columns
    steps, count = arguments.steps or 2 * -(-rows // CHUNK), min(arguments.bounded, rows)
    print(machine.describe(), flush=True)
    print(f"{rows} rows, {columns} columns", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        folder = Path(made)
        in_fresh_process("make", folder, [rows, columns])
        in_fresh_process("fit", folder, [rows, columns, steps])
        in_fresh_process("bounds", folder, [columns, count])
        in_fresh_process("posterior", folder, [columns, count])
        if arguments.keep and arguments.folder is not None:
            shutil.copytree(folder, arguments.folder / "kept", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
