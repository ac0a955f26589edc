"""Effective draws per second: chains of all data at once, and Pyro's NUTS datum by datum.

    python benchmarks/chains.py --models factors digits --nuts-data 20

Both draw from the posteriors of the same data in one process. Effective draws of a datum are the
fewest (bulk, as ArviZ counts them) of its coordinates and of their squared distances from their
means: chains that swing from side to side have many of the first, and not of the second. Seconds
are of the processor, so that neighbours count little; warm-up is in both. Then the two are
compared: means and standard deviations of each coordinate, in standard errors of their difference.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import machine
import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import pyro_vae as pv
from pyro_vae import demo
from pyro_vae.diagnostics.convergence import Convergence

NUTS_DRAWS = NUTS_WARM_UP = 300


@dataclass(frozen=True)
class Found:
    """Moments of a datum's coordinates [D], the effective draws of each, and the seconds."""

    mean: np.ndarray
    std: np.ndarray
    ess: np.ndarray
    ess_of_std: np.ndarray
    seconds: float

    @classmethod
    def of(cls, draws: np.ndarray, seconds: float) -> Found:
        """Return what draws [C, S, D] give."""
        draws = draws.astype(float)
        mean = draws.mean((0, 1))
        ess = [Convergence.of(each).ess_bulk for each in (draws, np.square(draws - mean))]
        return cls(mean, draws.std((0, 1), ddof=1), ess[0], ess[1], seconds)

    @property
    def effective(self) -> float:
        """The fewest effective draws."""
        return float(min(self.ess.min(), self.ess_of_std.min()))

    def apart(self, other: Found) -> tuple[np.ndarray, np.ndarray]:
        """Return how many standard errors means and standard deviations are apart, [D] each."""
        means = np.sqrt(self.std**2 / self.ess + other.std**2 / other.ess)
        # Of the standard deviation of a nearly Gaussian coordinate.
        stds = np.sqrt(self.std**2 / (2 * self.ess_of_std) + other.std**2 / (2 * other.ess_of_std))
        return (self.mean - other.mean) / means, (self.std - other.std) / stds


def factors(num_data: int) -> tuple[torch.nn.Module, Callable, Tensor]:
    """Return factor analysis of 20 features and 10 latents, an encoder that knows little, data."""
    torch.manual_seed(0)
    model = pv.zoo.FactorAnalysis(20, 10)
    x = model.simulate(num_data, seed=1)
    guide = pv.AmortizedGuide(model, model.make_encoder([64]), example=x)
    pv.fit(model, guide, x, max_steps=500, epochs=1000, seed=0, progress=False)
    return model, guide, x


def digits(num_data: int) -> tuple[torch.nn.Module, Callable, Tensor]:
    """Return the demo's VAE after its training, its guide and held-out digits."""
    made = demo._Demo(pv.datasets.digits(), demo.Settings(num_data=num_data), 0, "cpu")
    made.train(progress=False)
    return made.model, made.guide, made.parts["test"]


def nuts(model: Callable, x: Tensor, datum: int) -> Found:
    """Draw from the posterior of one datum by Pyro's NUTS."""
    pyro.set_rng_seed(datum)
    mcmc = MCMC(
        NUTS(model), num_samples=NUTS_DRAWS, warmup_steps=NUTS_WARM_UP, disable_progbar=True
    )
    begin = time.process_time()
    mcmc.run(x[datum : datum + 1])
    seconds = time.process_time() - begin
    draws = mcmc.get_samples(group_by_chain=True)["z"].detach().numpy()
    return Found.of(draws.reshape(*draws.shape[:2], -1), seconds)


def report(name: str, model: torch.nn.Module, guide: Callable, x: Tensor, num_nuts: int) -> None:
    """Print the rates of both, their ratio, and how far apart they are."""
    model.requires_grad_(False).eval()  # NUTS would keep gradients of all parameters
    begin = time.process_time()
    samples = pv.sample_posterior(model, guide, x, seed=0, progress=False)
    seconds = time.process_time() - begin
    draws = samples.draws["z"].numpy()
    ours = [Found.of(draws[:, :, datum], seconds / len(x)) for datum in range(len(x))]
    rate = sum(found.effective for found in ours) / seconds
    agreed = float((samples.rhat < 1.01).double().mean())
    print(
        f"{name}: {len(x)} data in {seconds:.1f} CPU s, {rate:.0f} effective draws per s; R-hat "
        f"below 1.01 for {agreed:.1%}, converged {samples.converged.double().mean():.1%}; leapfrog "
        f"steps {samples.num_steps}",
        flush=True,
    )
    theirs = [nuts(model, x, datum) for datum in range(num_nuts)]
    rates = np.array([found.effective / found.seconds for found in theirs])
    apart = [mine.apart(their) for mine, their in zip(ours, theirs, strict=False)]
    means, stds = (np.concatenate(each) for each in zip(*apart, strict=True))
    print(
        f"  NUTS: {num_nuts} data, {np.mean([found.seconds for found in theirs]):.1f} CPU s each, "
        f"{np.median(rates):.2f} effective draws per s ({rates.min():.2f} - {rates.max():.2f}); "
        f"ratio {rate / np.median(rates):.0f} ({rate / rates.max():.0f} - "
        f"{rate / rates.min():.0f})\n  standard errors apart, of {means.size} coordinates: means "
        f"root mean square {np.sqrt(np.mean(means**2)):.2f}, largest {abs(means).max():.1f}; "
        f"standard deviations {np.sqrt(np.mean(stds**2)):.2f}, largest {abs(stds).max():.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["factors", "digits"], help="which")
    parser.add_argument("--num-data", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--nuts-data", type=int, default=20, help="default: %(default)s")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    print(machine.describe())
    for name in arguments.models:
        model, guide, x = {"factors": factors, "digits": digits}[name](arguments.num_data)
        report(name, model, guide, x, min(arguments.nuts_data, len(x)))


if __name__ == "__main__":
    main()
