"""Seconds from a cold start to a fixed validation ELBO: a VAE by hand, by pv.fit, by Pyro.

    python benchmarks/time_to_bound.py --data mnist.npz

A Bernoulli VAE (784-200-200-50, tanh) learns MNIST, images binarized afresh at each visit, by Adam
(1e-3) on minibatches of 20. Competitors are a loop by hand in plain PyTorch, eager and by
torch.compile, pv.fit with compile="auto" and compile=False, and pyro.infer.SVI
(TraceMeanField_ELBO, pyro.optim.Adam). All start from the same parameters and have the same
gradient estimator: one draw, the KL term analytic.

Each run is a process of its own with an empty compiler cache, so that compilation is paid. The
clock runs from the making of the networks; imports are printed apart. It stands still while the
ELBO of 1,000 held-out images is computed, every so many steps, by one function and the same random
numbers for all; the first of these points at the bound or above ends the run. The competitors run
in turns, and each time is divided by that of the first, the eager loop by hand, in the same turn.

start-up is what the first interval between two validations took beyond the median interval, and
any later one that took over 1.5 times the median: building, tracing, compiling.

Without --data the 8x8 digits that come with the package stand in: the same program, other figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import machine
import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import torch
import torch._dynamo  # which torch.optim imports at its first use: not on the clock
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_vae as pv

NUM_LATENTS = 50
HIDDEN = (200, 200)
LEARNING_RATE = 1e-3
VALIDATION_PARTICLES = 10
BOUND_MNIST, BOUND_DIGITS = -105.0, -24.0


class Networks(nn.Module):
    """Encoder, head and decoder; called, the negative ELBO of a minibatch, the loop by hand's."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        first, second = HIDDEN
        self.encoder = nn.Sequential(
            nn.Linear(num_features, first), nn.Tanh(), nn.Linear(first, second), nn.Tanh()
        )
        self.head = nn.Linear(second, 2 * NUM_LATENTS)
        self.decoder = nn.Sequential(
            nn.Linear(NUM_LATENTS, second),
            nn.Tanh(),
            nn.Linear(second, first),
            nn.Tanh(),
            nn.Linear(first, num_features),
        )
        with torch.no_grad():  # as pv.AmortizedGuide begins: every proposal near the prior
            self.head.weight.mul_(0.1)
            self.head.bias.zero_()

    def proposal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and log scale of q(z | x), each [N, L]."""
        loc, log_scale = self.head(self.encoder(x)).unflatten(-1, (-1, 2)).unbind(-1)
        return loc, log_scale

    def losses(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return the negative ELBO of each datum for given noise, [..., N, L]: [..., N]."""
        loc, log_scale = self.proposal(x)
        logits = self.decoder(loc + log_scale.exp() * noise)
        nll = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 1) - log_scale
        return nll.sum(-1) + kl.sum(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative ELBO of a minibatch, its sum in nats."""
        return self.losses(x, torch.randn(len(x), NUM_LATENTS, device=x.device)).sum()


class Portions:
    """Equal portions of a shuffled epoch, each binarized when its turn comes.

    pv.fit takes it for data drawn anew at each epoch; the loops draw from it in the same way.
    """

    def __init__(self, images: Tensor, max_value: int, size: int, seed: int) -> None:
        self.images, self.max_value, self.size = images, max_value, size
        self.generator = torch.Generator().manual_seed(seed)
        self.left: list[Tensor] = []

    def epoch(self, generator: torch.Generator) -> Tensor:
        """Return the next portion, black and white, [size, D]."""
        if not self.left:
            order = torch.randperm(len(self.images), generator=self.generator)
            self.left = [part for part in order.split(self.size) if len(part) == self.size]
        rows = self.images[self.left.pop()]
        return pv.datasets.StochasticBinarization(rows, self.max_value).epoch(generator)


@dataclass
class Run:
    """One competitor's way to the bound; its clock stands still during validation."""

    portions: Portions
    validation: Tensor
    bound: float
    batch_size: int
    max_steps: int
    seed: int
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    elbos: list[float] = field(default_factory=list)

    def start(self) -> Networks:
        """Start the clock; return the networks, the same for every competitor."""
        self._passed, self._since = 0.0, time.perf_counter()
        torch.manual_seed(self.seed)
        return Networks(self.validation.shape[1])

    def validate(self, networks: Networks, step: int) -> bool:
        """Note time and validation ELBO; return whether the run is over."""
        self._passed += time.perf_counter() - self._since
        shape = (VALIDATION_PARTICLES, len(self.validation), NUM_LATENTS)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            elbo = -float(networks.losses(self.validation, noise).mean())
        self.seconds.append(self._passed)
        self.steps.append(step)
        self.elbos.append(elbo)
        self._since = time.perf_counter()
        return elbo >= self.bound or step >= self.max_steps

    def loop(self, networks: Networks, step: Callable[[Tensor], object]) -> None:
        """Train by a function that takes a step on a minibatch."""
        generator, taken = torch.Generator().manual_seed(self.seed), 0
        while True:
            x = self.portions.epoch(generator)
            for index in torch.randperm(len(x)).split(self.batch_size):
                step(x[index])
                taken += 1
            if self.validate(networks, taken):
                return


def by_hand(run: Run, compiled: bool) -> None:
    """Train by a loop in plain PyTorch."""
    networks = run.start()
    loss = torch.compile(networks, dynamic=False) if compiled else networks
    optimizer = torch.optim.Adam(networks.parameters(), lr=LEARNING_RATE, fused=True)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()

    run.loop(networks, step)


def pyro_model(networks: Networks) -> Callable[[Tensor], None]:
    """Return the model as a user of Pyro writes it."""

    def model(x: Tensor) -> None:
        pyro.module("decoder", networks.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(NUM_LATENTS), 1.0).to_event(1))
            logits = networks.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    return model


def by_fit(run: Run, compiled: str | bool) -> None:
    """Train by pv.fit; a portion is its epoch, and a callback validates after it."""
    networks = run.start()
    model = pyro_model(networks)
    guide = pv.AmortizedGuide(model, networks.encoder, example=run.validation[:2])
    guide.head.load_state_dict(networks.head.state_dict())
    networks.head = guide.head
    pv.fit(
        model,
        guide,
        run.portions,
        batch_size=run.batch_size,
        max_steps=run.max_steps,
        seed=run.seed,
        compile=compiled,
        progress=False,
        callbacks=[lambda epoch: run.validate(networks, epoch.step)],
    )


def by_svi(run: Run) -> None:
    """Train by pyro.infer.SVI."""
    networks = run.start()

    def guide(x: Tensor) -> None:
        pyro.module("encoder", networks.encoder)
        pyro.module("head", networks.head)
        with pyro.plate("data", len(x)):
            loc, log_scale = networks.proposal(x)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    svi = pyro.infer.SVI(
        pyro_model(networks),
        guide,
        pyro.optim.Adam({"lr": LEARNING_RATE}),  # type: ignore[attr-defined]
        loss=pyro.infer.TraceMeanField_ELBO(),
    )
    run.loop(networks, svi.step)


COMPETITORS: dict[str, Callable[[Run], None]] = {
    "by hand": lambda run: by_hand(run, compiled=False),
    "by hand, torch.compile": lambda run: by_hand(run, compiled=True),
    'pv.fit, compile="auto"': lambda run: by_fit(run, "auto"),
    "pv.fit, compile=False": lambda run: by_fit(run, False),
    "pyro.infer.SVI": by_svi,
}


def make_run(arguments: argparse.Namespace) -> Run:
    """Return a run that has not started; its data are not on the clock."""
    images = pv.datasets.digits() if arguments.data is None else pv.datasets.load(arguments.data)
    held_out = pv.datasets.StochasticBinarization(images.test, images.max_value).fixed(0)
    every = min(arguments.validate_every, len(images.train) // arguments.batch_size)
    size = every * arguments.batch_size
    bound = BOUND_DIGITS if arguments.data is None else BOUND_MNIST
    return Run(
        Portions(images.train, images.max_value, size, arguments.seed),
        held_out[: arguments.num_validation],
        bound if arguments.bound is None else arguments.bound,
        arguments.batch_size,
        # A whole number of intervals, so that all end at a validation.
        math.ceil(arguments.max_steps / every) * every,
        arguments.seed,
    )


def only(arguments: argparse.Namespace) -> None:
    """Run one competitor and print what it found as JSON."""
    imports = time.time() - arguments.launched
    run = make_run(arguments)
    COMPETITORS[arguments.only](run)
    found = {"seconds": run.seconds, "steps": run.steps, "elbos": run.elbos}
    print(json.dumps({**found, "bound": run.bound, "imports": imports}))


@dataclass(frozen=True)
class Outcome:
    """What a run took: seconds and steps to the bound, inf and all steps where it was missed."""

    seconds: float
    start_up: float
    step_ms: float
    steps: int
    elbo: float
    imports: float

    @classmethod
    def of(cls, found: dict[str, Any]) -> Outcome:
        """Return it from what a fresh process printed."""
        seconds, steps, elbos = found["seconds"], found["steps"], found["elbos"]
        intervals = [b - a for a, b in zip([0.0, *seconds], seconds, strict=False)]
        usual = statistics.median(intervals[1:] or [math.nan])
        slow = [intervals[0], *(later for later in intervals[1:] if later > 1.5 * usual)]
        return cls(
            seconds[-1] if elbos[-1] >= found["bound"] else math.inf,
            sum(interval - usual for interval in slow),
            1e3 * usual / steps[0],
            steps[-1],
            elbos[-1],
            found["imports"],
        )


def in_fresh_process(name: str, arguments: argparse.Namespace, seed: int) -> Outcome:
    """Run one competitor in a process of its own, with an empty compiler cache."""
    options = ["--only", name, "--seed", str(seed)]
    for option in ("data", "bound", "batch_size", "num_validation", "validate_every", "max_steps"):
        value = getattr(arguments, option)
        # With "=", for a bound begins with a minus.
        options += [] if value is None else [f"--{option.replace('_', '-')}={value}"]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, *options, "--launched", repr(time.time())],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        )
    return Outcome.of(json.loads(done.stdout.splitlines()[-1]))


def report(outcomes: dict[str, list[Outcome]], reference: str) -> None:
    """Print the table."""
    print(
        f"{'competitor':<24}{'s to bound':>11}{'min - max':>16}{'start-up s':>12}"
        f"{'ms per step':>13}{'steps':>8}{'ratio':>7}   min - max"
    )
    for name, runs in outcomes.items():
        seconds = [run.seconds for run in runs]
        ratios = [
            run.seconds / other.seconds
            for run, other in zip(runs, outcomes[reference], strict=True)
        ]
        print(
            f"{name:<24}{statistics.median(seconds):>11.1f}"
            f"{f'{min(seconds):.1f} - {max(seconds):.1f}':>16}"
            f"{statistics.median(run.start_up for run in runs):>12.1f}"
            f"{statistics.median(run.step_ms for run in runs):>13.2f}"
            f"{statistics.median(run.steps for run in runs):>8.0f}"
            f"{statistics.median(ratios):>7.2f}   {min(ratios):.2f} - {max(ratios):.2f}"
        )
    for name, runs in outcomes.items():
        if missed := [run for run in runs if math.isinf(run.seconds)]:
            ended = ", ".join(f"{run.elbo:.2f}" for run in missed)
            print(f"{name}: {len(missed)} of {len(runs)} runs missed the bound; ELBO {ended}")
    imports = statistics.median(run.imports for runs in outcomes.values() for run in runs)
    print(f"not counted: start of the process and imports, {imports:.1f} s each")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="MNIST, for example as .npz (default: the 8x8 digits)")
    parser.add_argument(
        "--bound",
        type=float,
        help=f"validation ELBO in nats ({BOUND_MNIST:.0f}; {BOUND_DIGITS:.0f} for the digits)",
    )
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--num-validation", type=int, default=1000)
    parser.add_argument("--validate-every", type=int, default=500, help="steps")
    parser.add_argument("--max-steps", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--competitors",
        nargs="+",
        choices=COMPETITORS,
        default=list(COMPETITORS),
        metavar="NAME",
        help=f"some of: {'; '.join(COMPETITORS)}; ratios are to the first",
    )
    parser.add_argument("--only", choices=COMPETITORS, help=argparse.SUPPRESS)
    parser.add_argument("--launched", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only is not None:
        only(arguments)
        return
    print(machine.describe())
    plan, names = make_run(arguments), arguments.competitors
    every = plan.portions.size // plan.batch_size
    num_features = plan.validation.shape[1]
    print(
        f"{num_features}-{HIDDEN[0]}-{HIDDEN[1]}-{NUM_LATENTS} Bernoulli VAE, batch "
        f"{plan.batch_size}, to an ELBO of {plan.bound:g} nats on {len(plan.validation)} held-out "
        f"images, validated every {every} steps; {arguments.repeats} turns",
        flush=True,
    )
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    for turn in range(arguments.repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            outcome = in_fresh_process(name, arguments, arguments.seed + turn)
            outcomes[name].append(outcome)
            print(
                f"turn {turn}: {name}, {outcome.seconds:.1f} s, {outcome.steps} steps",
                file=sys.stderr,
            )
    report(outcomes, names[0])


if __name__ == "__main__":
    main()
