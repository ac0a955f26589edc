"""Time of a training step: Pyro's SVI, PyTorch by hand and pv.CompiledSVI side by side.

    python benchmarks/step_time.py --data mnist.npz

A step picks a minibatch from tensors by index_select, then computes loss, gradients and Adam's
update. Competitors are

- Pyro's SVI, with pyro.optim.Adam and the loss of Pyro's own that fits;
- the same model in plain PyTorch (handwritten.py), with fused Adam and with Adam's default;
- the same under torch.compile: the loss is compiled, fused Adam stands outside;
- pv.CompiledSVI with fused Adam, its traced graph replayed, and compiled.

The last row is the matrix products (and convolutions) of the step by hand alone, forward and
backward: no elementwise work, no update, outputs allocated once. The share of a competitor is
their time over its own, in the same turn.

With --device cuda there is one more: torch.compile with CUDA graphs (mode="reduce-overhead").

All have the same architecture and start from the same parameters. Before a model is timed, the
loss by hand and its gradient are compared with those of the Pyro pair, under the same noise. All
competitors run in turns in one process. A competitor's turn is several steps, about --block
seconds of them, for in training too a step follows another of its own kind; each time is divided
by that of the same turn. Printed are the medians, and for ratios the quartiles.

A line before each table says what the competitors' first steps took beyond steps of theirs later
on: tracing and compiling. Compiled code is kept in an empty folder for the time of the run, and
what the first compilation of a process takes is printed once, at the top.

torch.compile leaves recurrent networks to eager mode, unless a setting of it says otherwise. The
deep Markov model has two of them in its encoder: --allow-rnn compiles them by hand too.

Without --data the 8x8 digits stand in for the images: the same program, other figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import handwritten
import machine
import pyro.infer
import pyro.optim
import torch
from handwritten import Amortized, mlp
from products import Products
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

import pyro_vae as pv

LEARNING_RATE = 1e-3
NUM_LATENTS = 50
FEATURES = 200
CHANNELS = (16, 32)
PARTICLES = 50
WARM_UP = 8  # steps; traced, compiled and captured by then
OBSERVED, STATE, HIDDEN = 20, 10, 32  # of the deep Markov model

PYRO = "Pyro's SVI"
HAND = "by hand"
DEFAULT_ADAM = "by hand, default Adam"
HAND_COMPILED = "by hand, torch.compile"
HAND_GRAPHS = "by hand, torch.compile, CUDA graphs"
AT_ONCE = "by hand, steps at once, torch.compile"
REPLAY = "CompiledSVI, replay"
COMPILED = "CompiledSVI, compiled"
LIMIT = "matrix products alone"
RATIOS = (
    (COMPILED, HAND_COMPILED),
    (COMPILED, HAND_GRAPHS),
    (COMPILED, AT_ONCE),
    (REPLAY, HAND),
    (REPLAY, DEFAULT_ADAM),
    (PYRO, COMPILED),
)

Pair = tuple[nn.Module, pv.AmortizedGuide]
Step = Callable[[Tensor], float]  # from the rows of a minibatch to its loss


@dataclass(frozen=True)
class Case:
    """A model of both kinds, its data, and the losses.

    Attributes:
        title: for the table.
        data: what a batch is taken from, tensors [N, ...].
        pair: makes the model and the guide.
        by_hand: makes the same by hand.
        loss: makes ours.
        pyro_loss: makes Pyro's.
        at_once: makes another one by hand, that does without a loop over steps.
        batch_sizes: where none are asked for.
        device: where data, parameters and steps are.
    """

    title: str
    data: tuple[Tensor, ...]
    pair: Callable[[], Pair]
    by_hand: Callable[[], Amortized]
    loss: Callable[[], pv.ELBO | pv.IWAE] = pv.ELBO
    pyro_loss: Callable[[], pyro.infer.ELBO] = pyro.infer.TraceMeanField_ELBO
    at_once: Callable[[], Amortized] | None = None
    batch_sizes: tuple[int, ...] = (20, 128, 1024)
    device: str = "cpu"

    def on(self, device: str) -> Case:
        """Return the case on a device."""
        data = tuple(tensor.to(device) for tensor in self.data)
        return dataclasses.replace(self, data=data, device=device)

    def batch(self, index: Tensor) -> tuple[Tensor, ...]:
        """Return a minibatch."""
        return tuple(tensor.index_select(0, index) for tensor in self.data)

    def index(self, batch_size: int) -> Tensor:
        """Return the rows of a minibatch, drawn with replacement: data may be few."""
        return torch.randint(len(self.data[0]), (batch_size,), device=self.device)

    def start(self) -> Pair:
        """Return a new pair, with the same parameters at every call."""
        torch.manual_seed(0)
        model, guide = self.pair()
        return model.to(self.device), guide.to(self.device)


def factor_analysis() -> Case:
    """A model so small that nothing but overhead is left."""
    num_observed, num_latents, width = 10, 3, 16

    def pair() -> Pair:
        model = pv.zoo.FactorAnalysis(num_observed, num_latents)
        example = torch.zeros(2, num_observed)
        return model, pv.AmortizedGuide(model, model.make_encoder([width]), example=example)

    def by_hand() -> Amortized:
        encoder = mlp([num_observed, width], activate_last=True)
        return handwritten.FactorAnalysis(encoder, width, num_latents, num_observed)

    return Case(
        title=f"factor analysis, {num_observed} observed, {num_latents} latents",
        data=(pv.zoo.FactorAnalysis(num_observed, num_latents).simulate(10_000),),
        pair=pair,
        by_hand=by_hand,
        batch_sizes=(20, 64, 128, 1024),
    )


def vae(images: Tensor, hidden: tuple[int, ...], num_particles: int = 1) -> Case:
    """A Bernoulli VAE of flat images; of several particles, by the IWAE bound."""
    num_pixels = images.shape[1]
    down, up = [num_pixels, *hidden], [NUM_LATENTS, *hidden[::-1], num_pixels]

    def pair() -> Pair:
        model = pv.zoo.VAE(num_pixels, NUM_LATENTS, hidden=hidden[::-1])
        encoder = pv.nets.MLP(down, activate_last=True)
        return model, pv.AmortizedGuide(model, encoder, example=images[:2])

    def by_hand() -> Amortized:
        encoder, decoder = mlp(down, activate_last=True), mlp(up)
        if num_particles == 1:
            return handwritten.VAE(encoder, hidden[-1], NUM_LATENTS, decoder)
        return handwritten.IWAE(encoder, hidden[-1], NUM_LATENTS, decoder, num_particles)

    sizes = "-".join(map(str, [*down, NUM_LATENTS]))
    if num_particles == 1:
        return Case(f"VAE {sizes}", (images,), pair, by_hand)
    return Case(
        title=f"IWAE-{num_particles} {sizes}",
        data=(images,),
        pair=pair,
        by_hand=by_hand,
        loss=functools.partial(pv.IWAE, num_particles),
        pyro_loss=functools.partial(
            pyro.infer.RenyiELBO,
            alpha=0.0,
            num_particles=num_particles,
            vectorize_particles=True,
            max_plate_nesting=1,
        ),
    )


def conv(images: Tensor) -> Case:
    """A Bernoulli VAE of square images, two convolutions down and two up."""
    side = math.isqrt(images.shape[1])
    images = images.reshape(-1, 1, side, side)

    def pair() -> Pair:
        model = pv.zoo.ConvVAE((1, side, side), NUM_LATENTS, channels=CHANNELS[::-1])
        encoder = model.make_encoder(FEATURES, channels=CHANNELS)
        return model, pv.AmortizedGuide(model, encoder, example=images[:2])

    def by_hand() -> Amortized:
        first, second = CHANNELS
        encoder = handwritten.conv_encoder(side, FEATURES, (first, second))
        decoder = handwritten.conv_decoder(side, NUM_LATENTS, (second, first))
        return handwritten.VAE(encoder, FEATURES, NUM_LATENTS, decoder)

    return Case(
        title=f"convolutional VAE {side} x {side}, channels {CHANNELS[0]} and {CHANNELS[1]}, "
        f"{FEATURES} features, {NUM_LATENTS} latents",
        data=(images,),
        pair=pair,
        by_hand=by_hand,
    )


def deep_markov(num_steps: int) -> Case:
    """A deep Markov model, independent proposals of the states from a recurrent encoder."""
    simulator = pv.zoo.DeepMarkovModel(OBSERVED, STATE, hidden=[HIDDEN])
    # Of twice the length, lengths are from T to 2 T, so that the first T steps are all there: the
    # draws past a sequence's end, which Pyro's loss counts in the guide, would make another loss.
    sequences = simulator.simulate(2000, num_steps=2 * num_steps)[0][:, :num_steps].contiguous()
    data = sequences, torch.full((len(sequences),), num_steps)

    def pair() -> Pair:
        model = pv.zoo.DeepMarkovModel(OBSERVED, STATE, hidden=[HIDDEN])
        example = data[0][:2], data[1][:2]
        return model, pv.AmortizedGuide(model, model.make_encoder(HIDDEN), example=example)

    by_hand = functools.partial(
        handwritten.DeepMarkovModel,
        OBSERVED,
        STATE,
        hidden=HIDDEN,
        num_steps=num_steps,
        encoder_hidden=HIDDEN,
    )
    return Case(
        title=f"deep Markov model, {num_steps} steps, {OBSERVED} observed, {STATE} latents",
        data=data,
        pair=pair,
        by_hand=by_hand,
        pyro_loss=pyro.infer.Trace_ELBO,
        at_once=functools.partial(by_hand, unrolled=False),
    )


def cases(images: Tensor, num_steps: int) -> dict[str, Callable[[], Case]]:
    """Return what makes each model to time, by the name to ask for it."""
    return {
        "factor-analysis": factor_analysis,
        "vae-200": lambda: vae(images, (200,)),
        "vae-400": lambda: vae(images, (400,)),
        "vae-200-200": lambda: vae(images, (200, 200)),
        "conv": lambda: conv(images),
        "iwae": lambda: vae(images, (200, 200), PARTICLES),
        "deep-markov": lambda: deep_markov(num_steps),
    }


def pyro_step(case: Case) -> Step:
    """Return a step of Pyro's SVI."""
    model, guide = case.start()
    # Pyro makes these classes when it is imported: a type checker does not know of them.
    optim = pyro.optim.Adam({"lr": LEARNING_RATE})  # type: ignore[attr-defined]
    svi = pyro.infer.SVI(model, guide, optim, loss=case.pyro_loss())
    return lambda index: svi.step(*case.batch(index))


def hand_step(
    case: Case,
    make: Callable[[], Amortized],
    *,
    fused: bool | None = True,
    compiled: bool = False,
    mode: str | None = None,
) -> Step:
    """Return a step as one writes it by hand; mode is torch.compile's."""
    module = make().to(case.device)
    handwritten.copy_parameters(module, *case.start())
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, fused=fused)
    loss_of = torch.compile(module, mode=mode) if compiled else module

    def step(index: Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_of(*case.batch(index))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_step(case: Case, how: str | bool) -> Step:
    """Return a step of CompiledSVI, compiled or replayed."""
    model, guide = case.start()
    optim = functools.partial(torch.optim.Adam, lr=LEARNING_RATE, fused=True)
    svi = pv.CompiledSVI(model, guide, optim, case.loss(), compile=how)
    return lambda index: svi.step(*case.batch(index))


def product_step(case: Case, batch_size: int) -> Step:
    """Return a step of the matrix products alone: those of a step by hand."""
    module = case.by_hand().to(case.device)
    batch = case.batch(case.index(batch_size))
    products = Products(lambda: module(*batch).backward(), case.device)
    return lambda _: products.run()


def competitors(case: Case) -> dict[str, Step]:
    """Return a step of each, of a model of its own."""
    found = {
        PYRO: pyro_step(case),
        HAND: hand_step(case, case.by_hand),
        DEFAULT_ADAM: hand_step(case, case.by_hand, fused=None),
        HAND_COMPILED: hand_step(case, case.by_hand, compiled=True),
    }
    if case.device == "cuda":
        found[HAND_GRAPHS] = hand_step(case, case.by_hand, compiled=True, mode="reduce-overhead")
    if case.at_once is not None:
        found[AT_ONCE] = hand_step(case, case.at_once, compiled=True)
    return {**found, REPLAY: our_step(case, "replay"), COMPILED: our_step(case, True)}


def check(case: Case, num_data: int = 20) -> str:
    """Compare the loss by hand and its gradients with the pair's, under the same noise."""
    model, guide = case.start()
    by_hand, loss = case.by_hand().to(case.device), case.loss()
    handwritten.copy_parameters(by_hand, model, guide)
    batch = case.batch(case.index(num_data))
    loss.loss(model, guide, *batch)  # the first call finds out how to run the pair
    torch.manual_seed(1)
    theirs = loss.loss_and_grads(model, guide, *batch)
    torch.manual_seed(1)
    mine = by_hand(*batch)
    mine.backward()
    pairs = list(handwritten.copied_gradients(by_hand, model, guide))
    apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    length = math.sqrt(sum(float(b.square().sum()) for _, b in pairs))
    errors = abs(mine.item() - theirs) / abs(theirs), apart / length
    if not max(errors) < 1e-4:
        raise RuntimeError(
            f"{case.title}: by hand {mine.item()}, the pair {theirs}, and gradients are apart by "
            f"{errors[1]:.1e} of their length: not the same model"
        )
    return (
        f"the same noise: by hand {mine.item() / num_data:.4f} nats per datum, the pair "
        f"{theirs / num_data:.4f}; gradients are apart by {errors[1]:.0e} of their length"
    )


def timed(step: Step, indices: list[Tensor]) -> float:
    """Return the seconds of some steps."""
    begin = time.perf_counter()
    for index in indices:
        step(index)
    return time.perf_counter() - begin


def measure(
    case: Case, batch_size: int, options: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Print a table of one model and batch size; return seconds of a step and shares by name."""
    torch.compiler.reset()  # else a second batch size would be compiled for any size
    steps = {**competitors(case), LIMIT: product_step(case, batch_size)}
    names = list(steps)
    torch.manual_seed(2)
    warm_up = [case.index(batch_size) for _ in range(WARM_UP)]
    first_loss: dict[str, float] = {}
    starting: dict[str, float] = {}  # seconds of all the warm-up
    usual: dict[str, float] = {}  # seconds of a step
    for name, step in steps.items():
        torch.manual_seed(3)  # the same noise for all but torch.compile, which has its own
        begin = time.perf_counter()
        first_loss[name] = step(warm_up[0]) / batch_size
        starting[name] = time.perf_counter() - begin
        found = [timed(step, [index]) for index in warm_up[1:]]
        starting[name] += sum(found)
        usual[name] = min(found)
    block = {name: min(50, max(1, round(options.block / usual[name]))) for name in names}
    turn_seconds = sum(block[name] * usual[name] for name in names)
    turns = min(options.turns, max(5, round(options.seconds / turn_seconds)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        indices = [case.index(batch_size) for _ in range(max(block.values()))]
        for name in names[first:] + names[:first]:
            times[name].append(timed(steps[name], indices[: block[name]]) / block[name])
    beyond = {
        name: starting[name] - WARM_UP * statistics.median(times[name])
        for name in names
        if name not in (PYRO, HAND, DEFAULT_ADAM, LIMIT)
    }
    print(f"\n{case.title}, batch {batch_size}, {turns} turns")
    print("seconds to start: " + "; ".join(f"{k} {v:.1f}" for k, v in beyond.items()))
    report(times, block, first_loss)
    return {
        name: (statistics.median(found), share_of_limit(times, name))
        for name, found in times.items()
    }


def share_of_limit(times: Mapping[str, list[float]], name: str) -> float:
    """Return the median over turns of the matrix products' time over a competitor's."""
    return statistics.median(a / b for a, b in zip(times[LIMIT], times[name], strict=True))


def report(
    times: Mapping[str, list[float]], block: Mapping[str, int], first_loss: Mapping[str, float]
) -> None:
    """Print what was measured, and the ratios."""
    print(
        f"{'':<40}{'ms per step':>12}{'share of limit':>16}{'steps a turn':>14}"
        f"{'first loss, nats per datum':>28}"
    )
    for name, found in times.items():
        middle = 1e3 * statistics.median(found)
        share = share_of_limit(times, name)
        print(f"{name:<40}{middle:>12.3f}{share:>16.2f}{block[name]:>14}{first_loss[name]:>28.2f}")
    print(f"{'ratio':<64}{'median':>8}   (quartiles)")
    for above, below in RATIOS:
        if above in times and below in times:
            ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"{f'{above} / {below}':<64}{middle:>8.2f}   ({low:.2f} - {high:.2f})")


def first_compilation() -> float:
    """Return the seconds of compiling a trivial function: what a process pays once."""
    weight = torch.zeros(8, requires_grad=True)
    begin = time.perf_counter()
    torch.compile(lambda x: (x * weight).tanh().sum())(torch.ones(8)).backward()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    names = list(cases(torch.zeros(1, 64), 1))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="an .npz of MNIST (x_train, y_train, x_test, y_test)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--batch-size", type=int, nargs="+", help="default: 20 128 1024")
    parser.add_argument(
        "--num-steps", type=int, default=20, help="of the deep Markov model; default: %(default)s"
    )
    parser.add_argument(
        "--allow-rnn", action="store_true", help="torch._dynamo.config.allow_rnn = True"
    )
    parser.add_argument("--turns", type=int, default=30, help="at most; default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        help="of a table, about, but 5 turns; default: %(default)s",
    )
    parser.add_argument(
        "--block", type=float, default=0.1, help="seconds of a turn; default: %(default)s"
    )
    options = parser.parse_args()
    if options.turns < 2:
        parser.error("--turns: quartiles need at least 2")
    if options.allow_rnn:
        dynamo_config.allow_rnn = True
    print(f"{machine.describe(options.device)}{', allow_rnn' * options.allow_rnn}")
    loaded = pv.datasets.digits() if options.data is None else pv.datasets.load(options.data)
    images = pv.datasets.StochasticBinarization(loaded.train, loaded.max_value).fixed(0)
    make = cases(images, options.num_steps)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        print(
            f"the first compilation of the process, of a trivial function: "
            f"{first_compilation():.1f} s"
        )
        for name in options.models:
            torch.manual_seed(0)
            case = make[name]().on(options.device)
            print(f"\n{case.title}: {check(case)}")
            for batch_size in options.batch_size or case.batch_sizes:
                measure(case, batch_size, options)
                gc.collect()  # a model's parameters leave Pyro's store with it


if __name__ == "__main__":
    main()
