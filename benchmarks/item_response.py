"""Item responses by several guides, beside the posterior of long chains.

    python benchmarks/item_response.py
    python benchmarks/item_response.py --model two-parameter

The responses and the truth are those that benchmarks/item_response_truth.py stored: 400 persons,
100 items, a quarter of the answers, Rasch's model or one with a discrimination of each item. Four
amortized guides are trained alike, of full-rank or independent proposals for the items, and
abilities that see their draws or do not; and one Gaussian of all latents is refined. Printed are,
of each, the ELBO of all data, the IWAE bound, k-hat and effective sample size of importance weights
of everything jointly, and how far means and standard deviations are from those of the chains: of
abilities, difficulties and logarithms of discriminations (the worst of each), and of the mean
difficulty. Bad are those where a mean is off by more than 0.1 standard deviations, or a standard
deviation by more than 10%. Takes some ten minutes of an idle core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pyro_vae as pv

DATA = Path(__file__).parent / "data"
MODELS = {"rasch": False, "two-parameter": True}  # whether items differ in discrimination
MEAN_OFF, WIDTH_OFF = 0.1, 0.1  # posterior standard deviations; a share of one
WAYS = {
    "full rank, top-down": (AutoMultivariateNormal, True),
    "full rank": (AutoMultivariateNormal, False),
    "independent, top-down": (AutoNormal, True),
    "independent": (AutoNormal, False),
}
ALL = "all latents, full rank"
Pair = tuple[Any, Any]


def train(way: str, x: Tensor, two: bool, steps: int) -> Pair:
    """Return model and guide of a way, trained on all data at each step."""
    kind, top_down = WAYS[way]
    torch.manual_seed(0)
    items = pv.zoo.ItemResponse(x.shape[1], discrimination=two)
    model = pv.MissingData(items)
    encoder = pv.MissingEncoder(pv.nets.MLP([2 * x.shape[1], 128, 128], activate_last=True))
    guide = pv.AmortizedGuide(
        model, encoder, example=x, global_guide=kind(items.items, init_scale=0.3), top_down=top_down
    )
    made: list[torch.optim.Optimizer] = []

    def optim(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(parameters, lr=0.01, fused=True))
        return made[0]

    def fall(epoch: pv.Epoch) -> None:
        """Let the learning rate fall from 0.01 to 0.0001 over the last 70% of the steps."""
        made[0].param_groups[0]["lr"] = 0.01 ** (1 + max(0.0, (epoch.step / steps - 0.3) / 0.7))

    pv.fit(
        model,
        guide,
        x,
        loss=pv.ELBO(4, estimator="stl"),
        optim=optim,
        max_steps=steps,
        batch_size=len(x),
        compile="replay",
        callbacks=[fall],
        progress=False,
    )
    return model, guide


def refine(x: Tensor, two: bool, steps: int) -> Pair:
    """Return the model, and a Gaussian of all its latents."""
    model = pv.MissingData(pv.zoo.ItemResponse(x.shape[1], discrimination=two))
    family = pv.families.FullRankNormal()
    start = pv.LocalGuide(model, num_data=1, example=x, family=family, data_plate=False)
    options: dict[str, Any] = {"max_steps": steps, "seed": 0, "progress": False}
    return model, pv.refine(model, start, x, data_plate=False, **options)


def draws(pair: Pair, x: Tensor, two: bool, count: int) -> np.ndarray:
    """Return a guide's draws [count, ...] of all latents, as :func:`latents` has them."""
    found = pv.to_arviz(*pair, x, num_draws=count, data_plate=False, seed=0)["posterior"]
    return latents({name: torch.tensor(found[name].values) for name in found.data_vars}, two)


def latents(found: Mapping[str, Tensor], two: bool) -> np.ndarray:
    """Return draws of all latents as the truth has them, and of the mean difficulty."""
    names = ["ability", "difficulty", *(["discrimination"] if two else [])]
    parts = {n: found[n].double().flatten(0, 1).numpy() for n in names}
    if two:
        parts["discrimination"] = np.log(parts["discrimination"])
    return np.concatenate([*parts.values(), parts["difficulty"].mean(1, keepdims=True)], 1)


def chains(pair: Pair, x: Tensor, steps: int) -> pv.PosteriorSamples:
    """Return chains of all latents, which start at a guide."""
    begin = time.perf_counter()
    options: dict[str, Any] = {"data_plate": False, "num_draws": steps, "num_warmup": 1000}
    found = pv.sample_posterior(*pair, x, seed=0, progress=False, **options)
    print(
        f"chains: {time.perf_counter() - begin:.0f} s, R-hat {float(found.rhat):.3f}, ESS "
        f"{float(found.ess):.0f}, {'' if found.converged.all() else 'not '}converged",
        flush=True,
    )
    return found


def told(pair: Pair, x: Tensor, posterior: pv.PosteriorSamples) -> None:
    """Print what a user who has no truth is told of a guide: bounds, weights, the verdict."""
    options: dict[str, Any] = {"data_plate": False, "seed": 0}
    elbo = pv.elbo(*pair, x, num_particles=4000, **options)
    bound = pv.iwae_bound(*pair, x, num_particles=4000, **options)
    for one in (elbo, bound):
        print(f"    {one.name:16s} {float(one.value):.2f} ± {float(one.std_error):.2f}")
    ess = float("nan") if bound.ess is None else float(bound.ess)
    print(f"    weights          k-hat {float(bound.pareto_k):.2f}, ESS {ess:.0f}")
    check = pv.check_draws(*pair, x, posterior=posterior, **options)
    numbers = [
        f"{name} {row['worst']:.3f} ± {row['se']:.3f} ({row['site']})"
        for name, row in check.summary().iterrows()
    ]
    print(f"    check_draws      {', '.join(numbers)}   {verdict(bool(check.good[0]))}")


def beside(found: np.ndarray, truth: Any, parts: dict[str, slice]) -> None:
    """Print how far draws are from the stored truth."""
    off = np.abs(found.mean(0) - truth["mean"]) / truth["sd"]
    ratio = found.std(0) / truth["sd"]
    for part, columns in parts.items():
        mine, widths = off[columns], ratio[columns]
        good = mine.max() <= MEAN_OFF and np.abs(widths - 1).max() <= WIDTH_OFF
        print(
            f"    {part:16s} means off by at most {mine.max():.3f} sd; sds {widths.min():.3f} to "
            f"{widths.max():.3f} of the truth's   {verdict(bool(good))}",
            flush=True,
        )


def verdict(good: bool) -> str:
    return "good" if good else "bad"


def main() -> None:
    parser = argparse.ArgumentParser(description="Item responses by several guides.")
    parser.add_argument("--model", choices=MODELS, default="rasch")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--refine-steps", type=int, default=1200)
    ways = [*WAYS, ALL]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--chain-draws", type=int, default=1000, help="of each of four chains")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine.describe())
    two = MODELS[args.model]
    truth = np.load(DATA / f"item_response_{args.model.replace('-', '_')}.npz")
    responses = torch.from_numpy(truth["responses"]).float()
    x = torch.where(responses < 0, torch.nan, responses)
    first, second = x.shape[0], sum(x.shape)
    parts = {"abilities": slice(0, first), "difficulties": slice(first, second)}
    if two:
        parts["discriminations"] = slice(second, second + x.shape[1])
    parts["mean difficulty"] = slice(-1, None)
    print(
        f"errors of the truth: a mean's at most {(truth['mean_se'] / truth['sd']).max():.3f} sd, a "
        f"standard deviation's {100 * (truth['sd_se'] / truth['sd']).max():.1f}%"
    )
    print(f"errors of the guides' draws: {args.draws**-0.5:.3f} sd, {(2 * args.draws) ** -0.5:.1%}")
    posterior = None
    for way in args.ways:
        begin = time.perf_counter()
        pair = train(way, x, two, args.steps) if way in WAYS else refine(x, two, args.refine_steps)
        elapsed = time.perf_counter() - begin
        if posterior is None:
            posterior = chains(pair, x, args.chain_draws)
            beside(latents(posterior.draws, two), truth, parts)
        print(f"{way}: {elapsed:.0f} s")
        told(pair, x, posterior)
        beside(draws(pair, x, two, args.draws), truth, parts)


if __name__ == "__main__":
    main()
