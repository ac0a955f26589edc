"""pv.refine of many data at once beside a loop over them by pyro.infer.SVI with AutoNormal.

    python benchmarks/refine_loop.py --data mnist.npz

A Bernoulli VAE (784-200-200-50, tanh) is trained for a few epochs. Then each of 1,000 held-out
images gets a mean-field guide of its own, the decoder fixed: by pv.refine, and by what a user of
Pyro writes in its place. That is, for each datum, AutoNormal on the model of this datum alone,
beginning at the encoder's location, and Adam (ClippedAdam) with a learning rate that falls
exponentially to a hundredth of its first. Such a loop has no test of convergence: it is run with
several numbers of steps, and the table says what each costs and what ELBO it ends at.

The loop is timed on a few of the data and scaled to all. The ELBOs are those of these few, under
both guides with the same random numbers, and the standard errors are those of the paired
differences. Both run in turns in one process; the ratios are of the same turn.

Without --data the 8x8 digits that come with the package stand in: the same program, other figures.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import machine
import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor

import pyro_vae as pv

NUM_LATENTS = 50
HIDDEN = (200, 200)
FALL = 0.01  # of the loop's learning rate, over all its steps


def train(arguments: argparse.Namespace) -> tuple[pv.zoo.VAE, pv.AmortizedGuide, Tensor]:
    """Return a trained pair and the data to refine, [N, D], held out where there are as many."""
    images = pv.datasets.digits() if arguments.data is None else pv.datasets.load(arguments.data)
    num_features = images.train.shape[1]
    torch.manual_seed(arguments.seed)
    model = pv.zoo.VAE(num_features, NUM_LATENTS, hidden=HIDDEN[::-1])
    encoder = pv.nets.MLP([num_features, *HIDDEN], activate_last=True)
    guide = pv.AmortizedGuide(model, encoder, example=torch.zeros(2, num_features))
    result = pv.fit(
        model,
        guide,
        pv.datasets.StochasticBinarization(images.train, images.max_value),
        epochs=arguments.epochs,
        seed=arguments.seed,
        progress=sys.stderr.isatty(),
    )
    print(f"{images!r}; {result!r}")
    pool = torch.cat([images.test, images.train])[: arguments.num_data]
    return model, guide, pv.datasets.StochasticBinarization(pool, images.max_value).fixed(0)


def by_loop(
    model: pv.zoo.VAE,
    guide: pv.AmortizedGuide,
    x: Tensor,
    steps: int,
    learning_rate: float,
    num_particles: int,
) -> Tensor:
    """Return location and log scale of each datum's guide, [N, L, 2], by Pyro alone."""
    decoder = copy.deepcopy(model.decoder).requires_grad_(False)

    def model_of_one(row: Tensor) -> None:
        with pyro.plate("data", len(row)):
            z = pyro.sample("z", dist.Normal(row.new_zeros(NUM_LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=row)

    with torch.no_grad():
        locations = guide.family_params(x)[..., 0]
    found = []
    for i in range(len(x)):
        pyro.clear_param_store()
        start = init_to_value(values={"z": locations[i : i + 1]})
        own = AutoNormal(model_of_one, init_loc_fn=start)
        optim = pyro.optim.ClippedAdam({"lr": learning_rate, "lrd": FALL ** (1 / steps)})
        loss = pyro.infer.Trace_ELBO(
            num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1
        )
        svi = pyro.infer.SVI(model_of_one, own, optim, loss)
        for _ in range(steps):
            svi.step(x[i : i + 1])
        found.append(torch.stack([own.locs.z.detach(), own.scales.z.detach().log()], -1))
    return torch.cat(found)


def log_weights(model: pv.zoo.VAE, x: Tensor, table: Tensor, num_particles: int) -> Tensor:
    """Return the log weights of draws from a guide's table, [K, N]; the same draws each time."""
    guide = pv.LocalGuide(model, num_data=len(x), example=x)
    with torch.no_grad():
        guide.table.copy_(table)
    return pv.log_weights(model, guide, x, num_particles=num_particles, seed=0).total.double()


def mean_and_error(terms: Tensor) -> tuple[float, float]:
    """Return the mean over the data of terms, [K, N], and its Monte Carlo standard error."""
    errors = terms.std(0) / len(terms) ** 0.5
    return float(terms.mean()), float(errors.square().sum().sqrt()) / terms.shape[1]


def measure(arguments: argparse.Namespace) -> None:
    """Train, measure and print."""
    model, guide, x = train(arguments)
    some = x[: arguments.loop_data]
    print(
        f"{len(x)} data; the loop: {len(some)} of them, {arguments.num_particles} particles, "
        f"learning rate {arguments.learning_rate:g}; {arguments.repeats} turns"
    )

    def refine() -> Tensor:
        refined = pv.refine(model, guide, x, tolerance=arguments.tolerance, seed=0)
        print(f"pv.refine: {int(refined.converged.sum())} of {len(x)} data converged")
        return refined.table.detach()[: len(some)]

    def loop(steps: int) -> Tensor:
        return by_loop(model, guide, some, steps, arguments.learning_rate, arguments.num_particles)

    turns: dict[str, tuple[int, Callable[[], Tensor]]] = {"pv.refine": (len(x), refine)}
    for steps in arguments.loop_steps:
        turns[f"loop, {steps} steps"] = (len(some), lambda steps=steps: loop(steps))  # type: ignore[misc]
    pv.refine(model, guide, some[:2], max_steps=2, tolerance=1e6, seed=0)  # both are warm now
    by_loop(model, guide, some[:1], 2, arguments.learning_rate, arguments.num_particles)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    tables: dict[str, Tensor] = {}
    names = list(turns)
    for repeat in range(arguments.repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            size, turn = turns[name]
            begin = time.perf_counter()
            table = turn()
            seconds[name].append((time.perf_counter() - begin) / size)
            tables.setdefault(name, table)
    report(arguments, model, guide, x, seconds, tables)


def report(
    arguments: argparse.Namespace,
    model: pv.zoo.VAE,
    guide: pv.AmortizedGuide,
    x: Tensor,
    seconds: dict[str, list[float]],
    tables: dict[str, Tensor],
) -> None:
    """Print the table."""
    some = x[: arguments.loop_data]
    with torch.no_grad():
        tables = {**tables, "the encoder": guide.family_params(some)}
    terms = {
        name: log_weights(model, some, table, arguments.elbo_particles)
        for name, table in tables.items()
    }
    total = f"s for {len(x)}"
    print(
        f"{'':<18}{'s per datum':>12}{total:>12}{'':>10}{'ratio':>8}{'min - max':>18}"
        f"{'ELBO':>10}{'minus that of pv.refine':>26}"
    )
    for name in terms:
        cost = f"{'':>60}"
        if name in seconds:
            middle = statistics.median(seconds[name])
            ratios = [a / b for a, b in zip(seconds[name], seconds["pv.refine"], strict=True)]
            how = "measured" if name == "pv.refine" else "scaled"
            cost = (
                f"{middle:>12.4f}{middle * len(x):>12.1f}{how:>10}{statistics.median(ratios):>8.1f}"
                f"{f'{min(ratios):.1f} - {max(ratios):.1f}':>18}"
            )
        mean, _ = mean_and_error(terms[name])
        gain, error = mean_and_error(terms[name] - terms["pv.refine"])
        difference = "" if name == "pv.refine" else f"{gain:+.3f} ± {error:.3f}"
        print(f"{name:<18}{cost}{mean:>10.3f}{difference:>26}")
    print(
        f"ELBO: mean over {len(some)} data in nats, {arguments.elbo_particles} particles; "
        "± the standard error of the paired difference"
    )
    enough = [
        name
        for name in seconds
        if mean_and_error(terms[name] - terms["pv.refine"])[0] > -arguments.tolerance
    ]
    print(f"within {arguments.tolerance:g} nats of pv.refine: {', '.join(enough[1:]) or 'no loop'}")


def main() -> None:
    """Parse the command, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="MNIST, for example as .npz (default: the 8x8 digits)")
    parser.add_argument("--num-data", type=int, default=1000)
    parser.add_argument("--loop-data", type=int, default=5)
    parser.add_argument("--loop-steps", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of the loop, at first")
    parser.add_argument("--num-particles", type=int, default=16, help="of the loop's gradient")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of pv.refine, in nats")
    parser.add_argument("--elbo-particles", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(machine.describe())
    measure(arguments)


if __name__ == "__main__":
    main()
