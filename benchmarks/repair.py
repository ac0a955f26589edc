"""Repair of deliberately bad guides, on models whose posterior is known.

    python benchmarks/repair.py
    python benchmarks/repair.py --flow

The posterior means, standard deviations and log p(x) come from algebra or a grid. The first table
counts where the data end; data called good that are wrong (a mean off by more than 0.2 posterior
standard deviations, or log p(x) off by more than 5 standard errors); and bounds of a rung that lie
below those of the rung before by more than 5 standard errors. ``--flow`` asks of the data that the
first three rungs leave: how many does a flow bring to a good verdict in a second, and how many do
the rungs after it?
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import machine
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae import demo
from pyro_vae.evaluation.rungs import RUNGS

F64 = torch.float64
FAR, ERRORS = 0.2, 5.0
FIRST = RUNGS[:3]


@dataclass(frozen=True)
class Case:
    """A model with a bad guide, data, and the exact answers: means and sds [N, D], log p(x) [N]."""

    name: str
    model: Callable[[Tensor], object]
    guide: Callable[..., object]
    x: Tensor
    mean: Tensor
    std: Tensor
    evidence: Tensor


def local(model: Callable[[Tensor], object], x: Tensor, loc: float, scale: float) -> pv.LocalGuide:
    """Return a mean-field guide with the same wrong answer for all data."""
    guide = pv.LocalGuide(model, num_data=len(x), example=x)
    with torch.no_grad():
        guide.table[..., 0], guide.table[..., 1] = loc, np.log(scale)
    return guide


def by_grid(log_joint: Callable[[Tensor, Tensor], Tensor], x: Tensor, axes: list[Tensor]) -> tuple:
    """Return the exact answers from log p(x, z) on a grid of z."""
    z = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    cell = float(np.prod([float(axis[1] - axis[0]) for axis in axes]))
    answers = []
    for value in x.double():
        terms = log_joint(value, z)
        evidence = terms.logsumexp(0)
        weight = (terms - evidence).exp().unsqueeze(-1)
        mean = (weight * z).sum(0)
        std = (weight * (z - mean).square()).sum(0).sqrt()
        answers.append((mean, std, evidence + np.log(cell)))
    return tuple(torch.stack(each) for each in zip(*answers, strict=True))


def two_modes(x: Tensor) -> None:
    """z ~ Normal(0, 2), x ~ Normal(z^2, 0.5)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 2.0))
        pyro.sample("x", dist.Normal(z.square(), 0.5), obs=x)


def banana(x: Tensor) -> None:
    """z ~ Normal(0, 1) twice, x ~ Normal(z_2 + 2 z_1^2, 0.3)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 1] + 2 * z[..., 0].square(), 0.3), obs=x)


def sparse_rate(x: Tensor) -> None:
    """z ~ Gamma(0.02, 0.02), x ~ Poisson(z)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(x.new_tensor(0.02), 0.02))
        pyro.sample("x", dist.Poisson(z), obs=x)


def two_modes_case() -> Case:
    x = torch.linspace(-1, 9, 32)
    grid = [torch.linspace(-12, 12, 60_001, dtype=F64)]

    def joint(value: Tensor, z: Tensor) -> Tensor:
        prior = dist.Normal(torch.zeros((), dtype=F64), 2.0).log_prob(z[:, 0])
        return prior + dist.Normal(z[:, 0].square(), 0.5).log_prob(value)

    exact = by_grid(joint, x, grid)
    return Case("two modes, guide at one", two_modes, local(two_modes, x, 2.0, 0.05), x, *exact)


def banana_case() -> Case:
    x = torch.linspace(-1, 6, 32)
    axis = torch.linspace(-6, 6, 1601, dtype=F64)

    def joint(value: Tensor, z: Tensor) -> Tensor:
        prior = dist.Normal(torch.zeros((), dtype=F64), 1.0).log_prob(z).sum(-1)
        return prior + dist.Normal(z[:, 1] + 2 * z[:, 0].square(), 0.3).log_prob(value)

    exact = by_grid(joint, x, [axis, axis])
    return Case("banana, narrow guide", banana, local(banana, x, 0.0, 0.1), x, *exact)


def rate_case(dtype: torch.dtype, loc: float, name: str) -> Case:
    x = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0]).repeat(4)
    shape, rate = 0.02 + x.double(), 1.02
    prior = dist.NegativeBinomial(torch.tensor(0.02, dtype=F64), probs=torch.tensor(1 / 1.02))
    answers = (shape / rate).unsqueeze(-1), (shape.sqrt() / rate).unsqueeze(-1)
    x = x.to(dtype)
    guide = local(sparse_rate, x, loc, 0.1)
    bits = str(dtype).removeprefix("torch.float")
    name = f"Gamma(0.02)-Poisson, {bits} bits, {name}"
    return Case(name, sparse_rate, guide, x, *answers, prior.log_prob(x.double()))


def encoder_case() -> Case:
    """Factor analysis of ten latents, with an encoder stopped after 30 steps."""
    torch.manual_seed(0)
    weight, noise = torch.randn(20, 10, dtype=F64), 0.7
    x = torch.randn(64, 10, dtype=F64) @ weight.T + noise * torch.randn(64, 20, dtype=F64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(10), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.to(x).T, noise).to_event(1), obs=x)

    precision = torch.eye(10, dtype=F64) + weight.T @ weight / noise**2
    covariance = precision.inverse()
    mean = x @ weight @ covariance / noise**2
    marginal = weight @ weight.T + noise**2 * torch.eye(20, dtype=F64)
    evidence = dist.MultivariateNormal(torch.zeros(20, dtype=F64), marginal).log_prob(x)
    x = x.float()
    guide = pv.AmortizedGuide(model, pv.nets.MLP([20, 64], activate_last=True), example=x)
    pv.fit(model, guide, x, max_steps=30, epochs=1000, seed=0, progress=False)
    std = covariance.diagonal().sqrt().expand(64, -1)
    return Case("10 factors, encoder of 30 steps", model, guide, x, mean, std, evidence)


def cases() -> Iterator[Case]:
    yield encoder_case()
    yield two_modes_case()
    yield banana_case()
    for dtype in (torch.float32, F64):
        yield rate_case(dtype, 0.0, "guide at 1")
        yield rate_case(dtype, -20.0, "guide at e^-20")


def report(case: Case) -> str:
    """Repair the posteriors of a case; return a row of the table."""
    pyro.set_rng_seed(0)
    begin = time.process_time()
    found = pv.repair(case.model, case.guide, case.x, seed=0, progress=False)
    seconds = time.process_time() - begin
    data, good = found.dataset, torch.as_tensor(found.good)
    draws = found.draws["z"].double().reshape(len(found.draws["z"]), len(case.x), -1)
    far = ((draws.mean(0) - case.mean).abs() / case.std).amax(-1)
    ratio = (draws.std(0) / case.std)[good]
    off = torch.as_tensor(data["log_evidence"].values) - case.evidence
    errors = off.abs() / torch.as_tensor(data["log_evidence_se"].values)
    wrong = good & ((far > FAR) | (errors > ERRORS))
    ended = found.summary()["good"].tolist()
    cells = [
        case.name,
        len(good),
        " / ".join(map(str, ended)),
        int((~good).sum()),
        int(wrong.sum()),
        falls(found),
        f"{float(far[good].max()):.2f}",
        f"{float(ratio.min()):.2f} - {float(ratio.max()):.2f}",
        f"{float(off[good].abs().max()):.3f} ({float(errors[good].max()):.1f})",
        f"{seconds:.0f}",
    ]
    if wrong.any():
        logging.warning("%s: wrong are %s", case.name, wrong.nonzero().flatten().tolist())
    return "| " + " | ".join(map(str, cells)) + " |"


def falls(found: pv.Repair) -> int:
    """Return how often a rung's log p(x) of a datum is below that of the rung before, in errors."""
    values = found.dataset["log_evidence_of_rung"].values
    errors = found.dataset["log_evidence_of_rung_se"].values
    count = 0
    for before, after in itertools.pairwise(range(len(values))):
        error = np.hypot(errors[before], errors[after])
        count += int(np.sum(values[after] < values[before] - ERRORS * error))
    return count


def digits() -> tuple[Callable, Callable, Tensor]:
    """Return the demo's VAE after its training, its guide and 96 held-out digits."""
    made = demo._Demo(pv.datasets.digits(), demo.Settings(), 0, "cpu")
    made.train(progress=False)
    return made.model, made.guide, made.parts["test"][:96]


def flow(name: str, model: Callable, guide: Callable, x: Tensor) -> None:
    """Print how many data that the first rungs leave each later one mends, and in what time."""
    options = {"seed": 0, "progress": False}
    found = pv.repair(model, guide, x, rungs=FIRST, **options)
    left = np.flatnonzero(~found.good)
    if isinstance(guide, pv.LocalGuide):
        guide = local(model, x[left], 0.0, 1.0)
    for rung in ("flow", *RUNGS[3:]):
        begin = time.process_time()
        good = int(pv.repair(model, guide, x[left], rungs=(rung,), **options).good.sum())
        seconds = time.process_time() - begin
        cells = name, rung, f"{good} of {len(left)}", f"{seconds:.1f}"
        print("|", " | ".join((*cells, f"{good / seconds:.3f}")), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", action="store_true", help="what a rung of a flow would bring")
    parser.add_argument("--only", default="", help="cases with this in their name")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    print(machine.describe())
    if arguments.flow:
        print("| data | rung | good | CPU s | good per s |\n|---|---|---|---|---|")
        for name, case in (("bananas", banana_case()), ("two modes", two_modes_case())):
            flow(name, case.model, case.guide, case.x)
        flow("digits", *digits())
        return
    print(
        f"| data and guide | data | good: {' / '.join(RUNGS)} | named bad | wrong of the good | "
        "bounds that fall | mean off, sd | sd, of the exact | log p(x) off, nats (errors) | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in (case for case in cases() if arguments.only in case.name):
        print(report(case), flush=True)


if __name__ == "__main__":
    main()
