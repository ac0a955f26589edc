"""Annealed importance sampling: log p(x) from below, and with draws of the posterior from above."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.evaluation.bounds import Bound
from pyro_vae.particles.estimators import Estimate, calibrated, effective_sample_size
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.processes import processes
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Program
from pyro_vae.sampling.annealing import Annealer, Schedule
from pyro_vae.sampling.density import Start
from pyro_vae.sampling.prepare import Ready, ready

__all__ = ["ais"]

logger = logging.getLogger(__name__)


def ais(
    model: Program,
    guide: Program,
    *batch: Any,
    num_chains: int = 16,
    num_steps: int = 500,
    start: Start = "guide",
    schedule: Schedule = "adaptive",
    given: GivenValues | None = None,
    data_plate: DataPlate = None,
    seed: int | None = None,
    compile: Compile = "auto",
    progress: bool = True,
) -> Bound:
    r"""Return a lower bound on log p(x) of each datum by annealed importance sampling (Neal 2001).

    Chains of Hamiltonian Monte Carlo go from a density that can be drawn from, the guide's answer
    or the prior, to the posterior, through the densities
    :math:`f_\beta(z) = f_0(z)^{1 - \beta}\, p(x, z)^\beta`:

    .. math:: \log \frac{1}{C} \sum_c w_c, \quad
        \log w_c = \sum_t (\beta_t - \beta_{t-1}) \log \frac{p(x, z_{t-1})}{f_0(z_{t-1})}

    The mean of the weights is p(x) in expectation, so that the bound is below log p(x), and closes
    as the number of steps grows: also where the posterior is far from any Gaussian, and importance
    sampling through a guide misses nats. Step sizes, scales and the adaptive schedule are those of
    a pilot with random numbers of its own. A guide less than 0.3 times as wide as the posterior,
    by the curvature of log p(x, z) over its draws, is widened first: no number of steps spreads
    chains that begin at a point. Each chain takes 2 T transitions of three gradients,
    half of them in the pilot.

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites. One of a family is the start as it is, another
            one as independent Gaussians with the moments of its draws.
        *batch: their arguments.
        num_chains: C, independent chains of each datum.
        num_steps: T, of each chain.
        start: "guide" or "prior".
        schedule: of the powers: "linear", "sigmoidal" (Grosse et al. 2015), or "adaptive", for each
            datum so that log weights spread alike at each step.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        data_plate: as in :func:`pyro_vae.log_weights`.
        seed: of all random numbers; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`.
        progress: whether to show a bar; it appears after a second.

    Returns:
        A Bound with value [N] and std_error [N] over chains, in nats, and ess [N] of the weights.
        ``untrusted`` are data of which few chains carry the mean (ess below 0.3 C): give them more
        steps. So are data of which chains from the guide miss a mode with more than 0.01 of the
        posterior (``missed``): from a guide at one of several modes they stay there, alike, and the
        bound is log of that mode's share of p(x). Such modes are looked for by 12 short climbs from
        draws of the prior, and weighed by Laplace's approximation; not where a mask of the model
        leaves latents out. Chains with start="prior" are not checked: they reach all modes that
        draws of the prior lead to.

    Raises:
        ValueError: for what :func:`pyro_vae.refine` refuses, num_chains < 2, num_steps < 1, another
            start or schedule, and start="prior" where a mask of the model leaves latents out.

    References:
        Neal (2001). Annealed importance sampling. Statistics and Computing 11.
        Wu, Burda, Salakhutdinov & Grosse (2017). On the quantitative analysis of decoder-based
        generative models. ICLR.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 1.0))
        >>> x = torch.tensor([0.0, 2.0])
        >>> bound = pv.ais(model, guide, x, num_steps=50, seed=0, progress=False)
        >>> (bound.value - dist.Normal(0.0, 2**0.5).log_prob(x)).abs().max().item() < 0.2
        True
    """
    settings = AnnealingSettings(num_chains, num_steps, start, schedule)
    prepared = ready(model, guide, batch, given, data_plate, seed, compile)
    annealers = settings.annealers(prepared)
    total = settings.num_steps * prepared.evaluator.num_data
    shown = progress and processes().is_first
    with tqdm(total=total, desc="ais", unit="step", disable=not shown, delay=1.0) as bar:
        return lower_bound(f"AIS-{settings.num_steps}", annealers, prepared, bar.update)


@dataclass(frozen=True, slots=True)
class AnnealingSettings:
    """How chains are annealed, checked; see :func:`ais`."""

    num_chains: int
    num_steps: int
    start: Start
    schedule: Schedule

    def __post_init__(self) -> None:
        for name, least in (("num_chains", 2), ("num_steps", 1)):
            object.__setattr__(self, name, as_count(name, getattr(self, name), least))
        for name, among in (("start", Start), ("schedule", Schedule)):
            if (value := getattr(self, name)) not in get_args(among):
                raise ValueError(f"{name}={value!r}: one of {get_args(among)} is needed")

    def annealers(self, prepared: Ready) -> list[Annealer]:
        """Return the chains of each block of the data."""
        limits = self.num_chains, self.num_steps, self.schedule
        return [
            Annealer(prepared, rows, block, self.start, *limits) for rows, block in prepared.each()
        ]


def lower_bound(
    name: str, annealers: list[Annealer], prepared: Ready, report: Callable[[int], object]
) -> Bound:
    """Return the bound of chains that are run, each block of the data in turn."""

    def annealed(annealer: Annealer) -> tuple[Tensor, Tensor]:
        log_weights, z = annealer.forward(annealer.path(), report)
        return log_weights, annealer.misses(log_weights, z)

    found, missed = zip(*processes().by_turns(annealed, annealers), strict=True)
    return bound_of(name, torch.cat(found, 1), prepared, missed=torch.cat(missed))


def bound_of(
    name: str,
    log_weights: Tensor,
    prepared: Ready,
    *,
    missed: Tensor | None = None,
    upper: bool = False,
) -> Bound:
    r"""Return the bound of log weights of chains, [C, N].

    From below :math:`\log \frac{1}{C} \sum_c w_c`; from above, of weights of reverse chains,
    :math:`-\log \frac{1}{C} \sum_c 1 / w_c`. ``missed`` is that of a :class:`Bound`.
    """
    sign = -1.0 if upper else 1.0
    estimate = Estimate.iwae(sign * log_weights)
    error = calibrated(estimate.std_error, estimate.skewness, len(log_weights))
    return Bound(
        name,
        sign * estimate.value,
        error,
        len(log_weights),
        given=prepared.given,
        skewness=estimate.skewness,
        ess=effective_sample_size(sign * log_weights),
        mean_of="chains",
        missed=missed,
    )
