"""What a process pays before compiled code runs: the first time, and when it is on disk already.

    python benchmarks/cold_start.py

Fresh processes, the first with an empty folder for compiled code, the others with what it left
there. Each makes a 784-200-200-50 VAE and says what it takes, imports aside, until

- three steps of pv.CompiledSVI(compile=True) are done, of which the third is compiled;
- pv.iwae_bound(compile=True) of 250 images and 500 particles is there, beside what the same call
  takes again;

and how many graphs PyTorch has compiled, and read from disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import iwae_evaluation
import machine
import torch

import pyro_vae as pv


def main() -> None:
    """Print a line for each process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="after the first; default: %(default)s")
    parser.add_argument("--what", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what:
        PARTS[options.what]()
        return
    print(machine.describe())
    print(f"{'':<14}{'folder':<10}{'first call, s':>14}{'again, s':>10}{'compiled':>10}{'read':>6}")
    for what in PARTS:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for run in range(1 + options.runs):
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", __file__, "--what", what],
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
                    check=True,
                    capture_output=True,
                    text=True,
                )
                first, again, compiled, read = done.stdout.split()
                state = "empty" if run == 0 else "filled"
                print(f"{what:<14}{state:<10}{first:>14}{again:>10}{compiled:>10}{read:>6}")


def seconds(call: Callable[[], object]) -> float:
    """Return what a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def pair() -> tuple[pv.zoo.VAE, pv.AmortizedGuide, torch.Tensor]:
    """Return an untrained pair, and images."""
    torch.manual_seed(0)
    x = (torch.rand(250, 784) < 0.2).float()
    model = pv.zoo.VAE(784, iwae_evaluation.NUM_LATENTS, hidden=iwae_evaluation.HIDDEN[::-1])
    encoder = pv.nets.MLP([784, *iwae_evaluation.HIDDEN], activate_last=True)
    return model, pv.AmortizedGuide(model, encoder, example=x[:2]), x


def training() -> None:
    """Say what three steps take, and three more."""
    model, guide, x = pair()
    svi = pv.CompiledSVI(model, guide, torch.optim.Adam, pv.ELBO(), compile=True)
    report(lambda: [svi.step(x[:128]) for _ in range(3)])


def evaluation() -> None:
    """Say what a bound takes, and the same again."""
    model, guide, x = pair()
    report(lambda: pv.iwae_bound(model, guide, x, num_particles=500, compile=True, seed=0))


def report(call: Callable[[], object]) -> None:
    """Print the seconds of a call and of another one, and what PyTorch has counted."""
    first, again = seconds(call), seconds(call)
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    print(f"{first:.2f} {again:.2f} {found['fxgraph_cache_miss']} {found['fxgraph_cache_hit']}")


PARTS = {"training": training, "evaluation": evaluation}


if __name__ == "__main__":
    main()
