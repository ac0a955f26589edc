"""A Pyro script, faster: pv.CompiledSVI in the place of pyro.infer.SVI, one line changed.

Both train the same VAE from the same parameters, in turns, on the same batches and random numbers.
So the losses must agree, and times are compared within a turn. The first turn, in which the graph
is traced, is not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv

TURNS, STEPS = 11, 20


def pair(name: str) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    decoder = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64))

    def model(x: Tensor) -> None:
        pyro.module(f"{name} decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Binomial(16, logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module(f"{name} encoder", encoder)
        loc, log_scale = encoder(x / 16).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def turn(svi: Any, batches: list[Tensor], seed: int) -> tuple[list[float], float]:
    """Return the losses of some steps, and seconds per step."""
    torch.manual_seed(seed)
    begin = time.perf_counter()
    losses = [svi.step(batch) for batch in batches]
    return losses, (time.perf_counter() - begin) / len(batches)


def main() -> None:
    images, optim = pv.datasets.digits().train.float(), pyro.optim.Adam({"lr": 1e-3})
    before = SVI(*pair("eager"), optim, loss=TraceMeanField_ELBO())
    after = pv.CompiledSVI(*pair("traced"), optim, loss=TraceMeanField_ELBO())  # the changed line

    times, gaps = [], []
    for seed in range(TURNS):
        torch.manual_seed(seed)
        batches = [images[torch.randint(len(images), (20,))] for _ in range(STEPS)]
        (eager, slow), (traced, fast) = (turn(svi, batches, seed) for svi in (before, after))
        gaps += [abs(b - a) / abs(a) for a, b in zip(eager, traced, strict=True)]
        times.append((slow, fast))
    slow, fast = (1000 * statistics.median(column) for column in zip(*times[1:], strict=True))
    print(f"steps of CompiledSVI are {after.mode}")
    print(f"pyro.infer.SVI, ms per step   {slow:.2f}")
    print(f"pv.CompiledSVI, ms per step   {fast:.2f}")
    ratio = statistics.median(slow / fast for slow, fast in times[1:])
    print(f"ratio, median of the turns    {ratio:.1f}")
    print(f"losses differ at most by the fraction {max(gaps):.1e}")


if __name__ == "__main__":
    main()
