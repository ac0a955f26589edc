"""How often pv.compare_models picks the right number of latents, and what its intervals cover.

    python benchmarks/model_choice.py --repetitions 20

In each repetition a probabilistic PCA with 2 latents and 8 features is drawn at random, with
training data and held-out data. Models with 1, 2, 3 and 4 latents are trained on the first by
pv.fit, each with a linear encoder to a mean-field Gaussian, and compared on the second.
Superfluous latents do no harm but for what they overfit: two picks are counted,

- best: the model with the highest log p(x) of the held-out data;
- preferred: the first of those that new data may not tell from it, the fewest latents first.

What intervals should cover is known by algebra: log p(x) of each datum is a Gaussian density, and
the expected difference of two models for new data is one of Gaussians too.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import time

import machine
import numpy as np
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.zoo import ProbabilisticPCA

FEATURES, TRUTH, CANDIDATES = 8, 2, (1, 2, 3, 4)


def trained(num_latents: int, x: Tensor, seed: int) -> tuple[ProbabilisticPCA, pv.AmortizedGuide]:
    """Return a model and its guide, trained on data [N, D]."""
    torch.manual_seed(seed)
    model = ProbabilisticPCA(FEATURES, num_latents)
    guide = pv.AmortizedGuide(model, torch.nn.Identity(), example=x[:5])
    for rate, epochs in ((0.02, 150), (0.002, 30)):  # with fewer a small model may look worse
        optim = functools.partial(torch.optim.Adam, lr=rate)
        pv.fit(
            model, guide, x, batch_size=100, epochs=epochs, optim=optim, seed=seed, progress=False
        )
    return model, guide


def gaussian(model: ProbabilisticPCA) -> torch.distributions.MultivariateNormal:
    """Return p(x)."""
    with torch.no_grad():
        loadings, noise = model.loadings.double(), model.noise.double()
        covariance = loadings @ loadings.T + noise.square().diag()
        return torch.distributions.MultivariateNormal(model.mean.double(), covariance)


def expected_log_density(model: ProbabilisticPCA, truth: ProbabilisticPCA) -> float:
    """Return the mean of a model's log p(x) over data of the truth, in nats."""
    mine, theirs = gaussian(model), gaussian(truth)
    return float(-torch.distributions.kl_divergence(theirs, mine) - theirs.entropy())


def repetition(seed: int, num_train: int, num_test: int) -> dict[str, np.ndarray | str]:
    """Return the picks of one repetition, and errors in units of what was said of them."""
    torch.manual_seed(1000 + seed)
    truth = ProbabilisticPCA(FEATURES, TRUTH)
    x, held_out = (
        truth.simulate(n, seed=7919 * seed + i) for i, n in enumerate((num_train, num_test))
    )
    models = {f"{count} latents": trained(count, x, seed) for count in CANDIDATES}
    found = pv.compare_models(
        models, held_out, num_particles=1000, audit=0, seed=seed, progress=False
    )
    if seed == 0:
        print(found)
    exact = {n: gaussian(m).log_prob(held_out.double()).numpy() for n, (m, _) in models.items()}
    expected = {n: expected_log_density(model, truth) for n, (model, _) in models.items()}
    data = found.dataset
    of_datum = np.stack([exact[name] for name in models]) - data["log_evidence"].values
    monte_carlo, new = [], []
    for first, second in itertools.combinations(models, 2):
        row = found.summary(second).loc[first]
        here = (exact[first] - exact[second]).mean()
        there = expected[first] - expected[second]
        monte_carlo.append((row["difference"] - here) / row["difference_se"])
        new.append((row["difference"] - there) / row["difference_se_new"])
    return {
        "best": found.best,
        "preferred": found.preferred,
        "datum": (of_datum / data["log_evidence_se"].values).ravel(),
        "monte carlo": np.array(monte_carlo),
        "new": np.array(new),
        "good": data["good"].values.ravel(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--train", type=int, default=1000, help="data; default: %(default)s")
    parser.add_argument("--test", type=int, default=1000, help="data; default: %(default)s")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine.describe())
    found = []
    for seed in range(options.repetitions):
        begin = time.perf_counter()
        found.append(repetition(seed, options.train, options.test))
        one = found[-1]
        print(
            f"{seed:>3}: best {one['best']}, preferred {one['preferred']}, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    right = f"{TRUTH} latents"
    for pick in ("best", "preferred"):
        count = sum(one[pick] == right for one in found)
        print(f"{pick} is the right one in {count} of {len(found)} repetitions")
    labels = {
        "datum": "log p(x) of a datum",
        "monte carlo": "mean difference for these data, Monte Carlo error",
        "new": "expected difference for new data, error over data",
    }
    for key, label in labels.items():
        z = np.concatenate([np.asarray(one[key]) for one in found])
        inside = (np.abs(z) <= 1.96).mean()
        print(f"{label}: 1.96 errors cover {inside:.1%} of {z.size}; mean error {z.mean():+.2f}")
    good = np.concatenate([np.asarray(one["good"]) for one in found])
    print(f"{good.mean():.2%} of {good.size} log p(x) have a good verdict")


if __name__ == "__main__":
    main()
