"""The posterior of item responses by long chains of Pyro's NUTS, for benchmarks/item_response.py.

    python benchmarks/item_response_truth.py

400 persons and 100 items are simulated from pv.zoo.ItemResponse, and a quarter of the answers is
kept. The potential and its gradient are written here in plain PyTorch, so that nothing of
pyro_vae's evaluation stands behind the answer. Written to benchmarks/data/item_response_MODEL.npz
are the responses (-1: not asked), and of each latent (abilities, difficulties, logarithms of
discriminations) and of the mean difficulty: mean, standard deviation, the standard errors of both,
bulk effective sample size and R-hat, by ArviZ. Takes 5 minutes of one core, or more.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import pyro_vae as pv

NUM_PERSONS, NUM_ITEMS, ANSWERED = 400, 100, 0.25
RHAT, ESS = 1.01, 400  # what the chains must reach
MODELS = {"rasch": False, "two-parameter": True}  # whether items differ in discrimination


def simulate(model: str) -> Tensor:
    """Return responses [persons, items], NaN where a person was not asked."""
    zoo = pv.zoo.ItemResponse(NUM_ITEMS, discrimination=MODELS[model])
    responses = zoo.simulate(NUM_PERSONS, seed=0)
    generator = torch.Generator().manual_seed(1)
    asked = torch.rand(responses.shape, generator=generator) < ANSWERED
    return torch.where(asked, responses, math.nan)


class _NegativeLogJoint(torch.autograd.Function):
    """-log p(x, abilities, difficulties, log discriminations) and its gradient, by hand."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, asked: Tensor, two: bool) -> Tensor:
        ability, difficulty = z[:NUM_PERSONS], z[NUM_PERSONS : NUM_PERSONS + NUM_ITEMS]
        log_a = z[NUM_PERSONS + NUM_ITEMS :] if two else z.new_zeros(NUM_ITEMS)
        a = log_a.exp()
        distance = ability[:, None] - difficulty
        logits = distance * a
        left = (x - logits.sigmoid()) * asked  # d log p(x) / d logits
        value = -((x * logits - torch.nn.functional.softplus(logits)) * asked).sum()
        value = value + 0.5 * ability.square().sum() + 0.5 * (difficulty / 1.5).square().sum()
        of_difficulty = left.sum(0) * a + difficulty / 1.5**2
        grads = [ability - left @ a, of_difficulty]
        if two:
            value = value + 0.5 * (log_a / 0.5).square().sum()
            grads.append(log_a / 0.5**2 - (left * distance).sum(0) * a)
        ctx.save_for_backward(torch.cat(grads))
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None, None


def chain(x: Tensor, two: bool, warmup: int, draws: int, seed: int) -> np.ndarray:
    """Return the draws of one chain, [draws, latents]."""
    asked = ~x.isnan()
    x, asked = x.nan_to_num().double(), asked.double()
    pyro.set_rng_seed(seed)
    size = NUM_PERSONS + NUM_ITEMS * (2 if two else 1)
    potential: Any = _NegativeLogJoint.apply
    kernel = NUTS(potential_fn=lambda params: potential(params["z"], x, asked, two))
    start = {"z": 0.5 * torch.randn(size, dtype=torch.double)}
    mcmc = MCMC(kernel, draws, warmup, initial_params=start, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()["z"].numpy()


def summary(draws: np.ndarray) -> dict[str, np.ndarray]:
    """Return moments, their errors and diagnostics of draws [chain, draw, quantity]."""
    found: dict[str, list[float]] = {}
    for column in range(draws.shape[-1]):
        one = draws[:, :, column]
        numbers = {
            "mean": one.mean(),
            "sd": one.std(),
            "mean_se": az.mcse(one, method="mean"),
            "sd_se": az.mcse(one, method="sd"),
            "ess": min(az.ess(one), az.ess(one, method="sd")),
            "rhat": az.rhat(one),
        }
        for name, number in numbers.items():
            found.setdefault(name, []).append(float(number))
    return {name: np.array(column, np.float32) for name, column in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Posterior of item responses by long chains.")
    parser.add_argument("--model", choices=MODELS, default="rasch")
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=2500, help="of each chain")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, two = simulate(args.model), MODELS[args.model]
    begin, chains = time.perf_counter(), []
    for seed in range(args.chains):
        chains.append(chain(x, two, args.warmup, args.draws, seed))
        print(f"chain {seed}: {time.perf_counter() - begin:.0f} s so far", flush=True)
    draws = np.stack(chains)
    items = draws[..., NUM_PERSONS : NUM_PERSONS + NUM_ITEMS]
    draws = np.concatenate([draws, items.mean(-1, keepdims=True)], -1)
    found = summary(draws)
    worst_rhat, least_ess = found["rhat"].max(), found["ess"].min()
    print(f"largest R-hat {worst_rhat:.4f}, least ESS {least_ess:.0f}")
    print(
        f"largest error of a mean {(found['mean_se'] / found['sd']).max():.3f} sd, of a standard "
        f"deviation {100 * (found['sd_se'] / found['sd']).max():.1f}%"
    )
    if worst_rhat >= RHAT or least_ess < ESS:
        raise SystemExit(f"not converged: R-hat < {RHAT} and ESS >= {ESS} are needed; more draws")
    responses = x.nan_to_num(-1).to(torch.int8).numpy()
    path = args.folder / f"item_response_{args.model.replace('-', '_')}.npz"
    arrays: dict[str, Any] = {"responses": responses, **found}
    np.savez_compressed(path, **arrays)
    print(f"wrote {path}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
