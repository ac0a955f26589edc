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
    """Return draws [count, ...] of all latents, as the truth has them, and the mean difficulty."""
    found = pv.to_arviz(*pair, x, num_draws=count, data_plate=False, seed=0)["posterior"]
    names = ["ability", "difficulty", *(["discrimination"] if two else [])]
    parts = {n: np.asarray(found[n].values, np.float64).reshape(count, -1) for n in names}
    if two:
        parts["discrimination"] = np.log(parts["discrimination"])
    return np.concatenate([*parts.values(), parts["difficulty"].mean(1, keepdims=True)], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Item responses by several guides.")
    parser.add_argument("--model", choices=MODELS, default="rasch")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--refine-steps", type=int, default=1200)
    ways = [*WAYS, ALL]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--particles", type=int, default=4000)
    parser.add_argument("--draws", type=int, default=10_000)
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
    width = truth["sd"]
    print(
        f"errors of the chains: a mean's at most {(truth['mean_se'] / width).max():.3f} sd, a "
        f"standard deviation's {100 * (truth['sd_se'] / width).max():.1f}%"
    )
    print(f"errors of the guides' draws: {args.draws**-0.5:.3f} sd, {(2 * args.draws) ** -0.5:.1%}")
    for way in args.ways:
        begin = time.perf_counter()
        pair = train(way, x, two, args.steps) if way in WAYS else refine(x, two, args.refine_steps)
        elapsed = time.perf_counter() - begin
        options: dict[str, Any] = {"data_plate": False, "seed": 0}
        bound = pv.elbo(*pair, x, num_particles=args.particles, **options)
        evidence = pv.iwae_bound(*pair, x, num_particles=args.particles, **options)
        found = draws(pair, x, two, args.draws)
        off = np.abs(found.mean(0) - truth["mean"]) / width
        ratio = found.std(0) / width
        print(f"{way}: {elapsed:.0f} s")
        for one in (bound, evidence):
            print(f"    {one.name:16s} {float(one.value):.2f} ± {float(one.std_error):.2f}")
        ess = float("nan") if evidence.ess is None else float(evidence.ess)
        print(f"    weights          k-hat {float(evidence.pareto_k):.2f}, ESS {ess:.0f}")
        for part, columns in parts.items():
            mine, widths = off[columns], ratio[columns]
            good = mine.max() <= MEAN_OFF and np.abs(widths - 1).max() <= WIDTH_OFF
            print(
                f"    {part:16s} means off by at most {mine.max():.3f} sd; sds {widths.min():.3f} "
                f"to {widths.max():.3f} of the chains'   {'good' if good else 'bad'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
