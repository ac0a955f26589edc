"""Draws of each datum's exact posterior: chains of all data, moved by one program."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.diagnostics.convergence import Convergence
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.processes import processes
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Program
from pyro_vae.refinement.blocks import Block
from pyro_vae.sampling.density import TemperedDensity
from pyro_vae.sampling.far_modes import is_missed
from pyro_vae.sampling.hmc import Density, Kernel, Point, StepSizes
from pyro_vae.sampling.prepare import Ready, ready
from pyro_vae.sampling.samples import PosteriorSamples
from pyro_vae.sampling.streams import Stream

__all__ = ["sample_posterior"]

logger = logging.getLogger(__name__)

# Shares of the warm-up at whose ends the scale is learned, but for the first and the last.
_WINDOWS = (0.15, 0.3, 0.5, 0.75, 1.0)
_QUARTER = math.pi / 2  # in units of the scale: so far a trajectory of a Gaussian is a new draw
_FIRST_STEPS, _MOST_STEPS = 4, 64  # of a trajectory
_SLOW = 0.5  # autocorrelation from one draw to the next above which trajectories are too short
_DATA_SERVED = 0.95  # the share of the data for whose sake trajectories become longer
_PRIOR_COUNT = 5  # draws that independent coordinates count for
_DRAWS_PER_COORDINATE = 10  # of a window, at least, to learn correlations from it


def sample_posterior(
    model: Program,
    guide: Program,
    *batch: Any,
    num_chains: int = 4,
    num_draws: int = 1000,
    num_warmup: int = 400,
    target_acceptance: float = 0.8,
    given: GivenValues | None = None,
    data_plate: DataPlate = None,
    seed: int | None = None,
    compile: Compile = "auto",
    progress: bool = True,
) -> PosteriorSamples:
    r"""Draw from each datum's posterior by Hamiltonian Monte Carlo, all data at once.

    Every chain of every datum moves in one vectorized program, in unconstrained coordinates, from
    draws of the guide. Each datum has its own step size (dual averaging) and its own scale of each
    coordinate (from the guide, then from the warm-up). Trajectories have the same number of
    leapfrog steps for all data, about as many as the slowest twentieth of them need, and vary in
    length so that none returns to its start. Discrete latents are summed out, and drawn from
    their exact posterior given the others at the end.

    Chains know no more of the posterior than where they have been: that they agree (R-hat below
    1.01) does not say that no mode was missed. So modes out of their reach are looked for by 12
    short climbs from draws of the prior, but where a mask of the model leaves latents out: data of
    which the highest of these holds more than 0.01 of the posterior, by Laplace's approximation,
    and was not visited, have not converged (``missed``). A mode that no climb leads to is not seen.

    Args:
        model: a Pyro model.
        guide: a Pyro guide to start from: amortized, local, or hand-written.
        *batch: their arguments.
        num_chains: C, for each datum; at least 2.
        num_draws: S, of each chain, after the warm-up.
        num_warmup: transitions of each chain before that.
        target_acceptance: the wanted probability that a trajectory is accepted, in (0, 1); more
            are where steps of that size would make trajectories longer than is of use.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        data_plate: the name of the plate of the data, where it is not plain; False for all
            latents of the model jointly, as one datum.
        seed: of all random numbers; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`.
        progress: whether to show a bar; it appears after a second.

    Returns:
        A :class:`PosteriorSamples`: draws, R-hat, effective sample sizes, acceptance and
        divergences of each datum. A logged warning says how many data have not converged.

    Raises:
        ValueError: for what :func:`pyro_vae.refine` refuses, counts that are too small, and a
            target outside (0, 1).

    References:
        Neal (2011). MCMC using Hamiltonian dynamics. Handbook of Markov Chain Monte Carlo, ch. 5.
        Hoffman & Gelman (2014). The No-U-Turn sampler. JMLR 15.
        Hoffman & Sountsov (2022). Tuning-free generalized Hamiltonian Monte Carlo. AISTATS.

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
        >>> few = {"num_draws": 100, "num_warmup": 50, "seed": 0, "progress": False}
        >>> samples = pv.sample_posterior(model, guide, x, **few)
        >>> samples.draws["z"].shape
        torch.Size([4, 100, 2])
        >>> (samples.mean("z") - x / 2).abs().max().item() < 0.2
        True
    """
    settings = _Settings(
        as_count("num_chains", num_chains, 2),
        as_count("num_draws", num_draws, 4),
        as_count("num_warmup", num_warmup, 20),
        target_acceptance,
    )
    if not 0 < target_acceptance < 1:
        raise ValueError(f"target_acceptance={target_acceptance}: a number in (0, 1) is needed")
    prepared = ready(model, guide, batch, given, data_plate, seed, compile)
    total = settings.num_warmup + settings.num_draws
    here = processes()
    with tqdm(
        total=total * prepared.evaluator.num_data,
        desc="sample_posterior",
        unit="transition",
        disable=not (progress and here.is_first),
        delay=1.0,
    ) as bar:

        def sampled(some: tuple[slice, Block]) -> _Sampled:
            return _sample_block(prepared, *some, settings, bar)

        found = list(here.by_turns(sampled, prepared.each()))
    samples = _samples(prepared, found)
    samples.warn()
    return samples


@dataclass(frozen=True, slots=True)
class _Settings:
    num_chains: int
    num_draws: int
    num_warmup: int
    target: float


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Chains of a block of n data.

    Attributes:
        rows: which data.
        z: unconstrained coordinates, [C, S, n, D].
        log_joint: log p(x, z) of coordinates, the map's log determinant in it, [C, S, n].
        acceptance: mean probability of acceptance, [n].
        divergences: how many trajectories diverged after the warm-up, [n].
        missed: for which data they have not visited a mode, [n].
        kernel: that of the draws.
    """

    rows: slice
    z: Tensor
    log_joint: Tensor
    acceptance: Tensor
    divergences: Tensor
    missed: Tensor
    kernel: Kernel


def _sample_block(
    prepared: Ready, rows: slice, block: Block, settings: _Settings, bar: tqdm[Any]
) -> _Sampled:
    calls = (settings.num_warmup + settings.num_draws) * _FIRST_STEPS
    density = TemperedDensity(block, prepared.table[rows], "guide", calls)
    power = prepared.table.new_ones(rows.stop - rows.start, dtype=torch.float64)
    seed = prepared.evaluator.seed
    point = density(_starts(prepared, rows, settings.num_chains))
    kernel = Kernel(0.5 * torch.ones_like(power), prepared.base_scale(rows), _FIRST_STEPS)
    warm_up = Stream(seed, Purpose.CHAIN_WARM_UP, rows.start)
    point, kernel = _warm_up(density, point, kernel, power, warm_up, settings, bar)
    stream = Stream(seed, Purpose.CHAIN_DRAWS, rows.start)
    places, heights = [], []
    acceptance, diverged = torch.zeros_like(power), torch.zeros_like(power)
    for _ in range(settings.num_draws):
        point, probability, lost = kernel(density, point, power, stream)
        places.append(point.z)
        heights.append(point.height(power))
        acceptance += probability.mean(0) / settings.num_draws
        diverged += lost.sum(0)
        bar.update(len(power))
    z, log_joint = torch.stack(places, 1), torch.stack(heights, 1)
    flat = z.flatten(0, 1)
    missed = is_missed(prepared, rows, block, flat, _log_mass(flat, log_joint.flatten(0, 1)))
    return _Sampled(rows, z, log_joint, acceptance, diverged.long(), missed, kernel)


def _log_mass(z: Tensor, log_joint: Tensor) -> Tensor:
    r"""Return log of what p(x, z) integrates to where draws [K, n, D] are, at most, [n].

    It is :math:`\mathrm{E} \log p(x, z)` and the draws' entropy, which is at most that of the
    Gaussian of their covariance; of few draws, that of their variances.
    """
    draws, size = z.double(), z.shape[-1]
    centred = draws - draws.mean(0)
    if len(draws) < _DRAWS_PER_COORDINATE * size:
        volume = centred.square().mean(0).log().sum(-1)
    else:
        volume = torch.einsum("knd,kne->nde", centred, centred).div(len(draws)).logdet()
    return log_joint.mean(0) + 0.5 * (size * (1 + math.log(2 * math.pi)) + volume)


def _warm_up(
    density: Density,
    point: Point,
    kernel: Kernel,
    power: Tensor,
    stream: Stream,
    settings: _Settings,
    bar: tqdm[Any],
) -> tuple[Point, Kernel]:
    """Return where chains are after the warm-up, and the kernel to go on with."""
    sizes = StepSizes(kernel.step, settings.target)
    ends = [max(4, round(share * settings.num_warmup)) for share in _WINDOWS]
    length, places = _QUARTER, list[Tensor]()
    lengths = torch.full_like(sizes.current, length)  # of each datum, at most
    for number in range(1, settings.num_warmup + 1):
        kernel = Kernel(sizes.current, kernel.scale, _steps(sizes.current, length))
        point, acceptance, _ = kernel(density, point, power, stream)
        sizes.update(acceptance.mean(0))
        places.append(point.z)
        bar.update(len(power))
        # The last window leaves the scale as it is: step sizes are learned for it to the end.
        if number in ends[:-1]:
            window, places = torch.stack(places, 1), []
            # The first window is the way from the guide to the posterior.
            if number != ends[0]:
                slow = _is_slow(window)
                if number != ends[1] and float(slow.double().mean()) > 1 - _DATA_SERVED:
                    length *= 2
                    lengths = torch.where(slow, length, lengths)
                kernel = _learned(kernel, window)
            sizes.restart(sizes.average)
    # More steps than a datum needs, for others' sake or as their number is whole, are smaller ones:
    # after half a turn a Gaussian's trajectory is at the height where it began, then at the place.
    num_steps = _steps(sizes.average, length)
    step = torch.minimum(sizes.average, lengths / num_steps)
    return point, Kernel(step, kernel.scale, num_steps)


def _learned(kernel: Kernel, window: Tensor) -> Kernel:
    """Return the kernel with the scale of draws [C, W, n, D]."""
    draws = window.double()
    centred = draws - draws.mean((0, 1))
    count, size = draws.shape[0] * draws.shape[1], draws.shape[-1]
    variance = centred.square().mean((0, 1)).clamp_min(torch.finfo(torch.float32).tiny)
    weight = count / (count + _PRIOR_COUNT)
    if count < _DRAWS_PER_COORDINATE * size:
        before = kernel.scale.double().square()
        scale = (weight * variance + (1 - weight) * before).sqrt()
    else:
        covariance = torch.einsum("csnd,csne->nde", centred, centred) / count
        covariance = weight * covariance + (1 - weight) * torch.diag_embed(variance)
        root, failed = torch.linalg.cholesky_ex(covariance)
        diagonal = torch.diag_embed(variance.sqrt())
        scale = torch.where((failed > 0)[:, None, None], diagonal, root)
    return Kernel(kernel.step, scale.to(kernel.scale), kernel.num_steps)


def _is_slow(window: Tensor) -> Tensor:
    """Return for which data draws [C, W, n, D] follow too closely on one another, [n]."""
    centred = window.double() - window.double().mean((0, 1))
    variance = centred.square().mean((0, 1)).clamp_min(torch.finfo(torch.float32).tiny)
    follow = (centred[:, 1:] * centred[:, :-1]).mean((0, 1)) / variance
    return follow.amax(-1) > _SLOW


def _steps(sizes: Tensor, length: float) -> int:
    """Return the leapfrog steps of a trajectory of a length, in units of the scale."""
    return min(_MOST_STEPS, max(1, math.ceil(length / float(sizes.median()))))


def _starts(prepared: Ready, rows: slice, num_chains: int) -> Tensor:
    """Return a draw of the guide for each chain, [C, n, D]; of the base where it has no place."""
    evaluator, seed = prepared.evaluator, prepared.evaluator.seed
    values, _ = evaluator.draw(rows, num_chains, (Purpose.CHAIN_STARTS, rows.start))
    z = prepared.coordinates_of(values)
    shape = num_chains, rows.stop - rows.start, prepared.blocks.num_noise
    noise = Stream(seed, Purpose.CHAIN_STARTS, rows.start).normal(prepared.table.new_empty(shape))
    base = prepared.base_draws(rows, noise)
    return torch.where(z.isfinite().all(-1, keepdim=True), z.to(base), base)


def _samples(prepared: Ready, found: list[_Sampled]) -> PosteriorSamples:
    """Return what blocks of data gave as one, with the diagnostics of each datum."""
    evaluator = prepared.evaluator
    draws: dict[str, list[Tensor]] = {}
    for block in found:
        for name, value in _values(prepared, block).items():
            draws.setdefault(name, []).append(value)
    log_joint = torch.cat([block.log_joint for block in found], -1)
    diagnostics = [_diagnostics(block) for block in found]
    rhat, ess, ess_tail = (torch.cat(part) for part in zip(*diagnostics, strict=True))
    whole = evaluator.structure.data_dim is None
    return PosteriorSamples(
        {name: parts[0] if whole else torch.cat(parts, 2) for name, parts in draws.items()},
        log_joint,
        rhat,
        ess,
        ess_tail,
        torch.cat([block.acceptance for block in found]),
        torch.cat([block.divergences for block in found]),
        torch.cat([block.kernel.step for block in found]),
        tuple(block.kernel.num_steps for block in found),
        prepared.given,
        whole,
        torch.cat([block.missed for block in found]),
        evaluator.without_graphs(),
    )


def _values(prepared: Ready, block: _Sampled) -> dict[str, Tensor]:
    """Return the draws of a block by site, ``[C, S, n, ...]``, what was summed out among them."""
    values = prepared.values_of(
        block.rows, block.z.flatten(0, 1), (Purpose.CHAIN_SUMMED_OUT, block.rows.start)
    )
    return {name: value.unflatten(0, block.z.shape[:2]) for name, value in values.items()}


def _diagnostics(block: _Sampled) -> list[Tensor]:
    """Return the worst R-hat and effective sample sizes of each datum, [n] each."""
    quantities = torch.cat([block.z.double(), block.log_joint.unsqueeze(-1)], -1)
    num_chains, num_draws, num_data, count = quantities.shape
    flat = quantities.numpy(force=True).reshape(num_chains, num_draws, -1)
    rhat, *sizes = (numbers.reshape(num_data, count) for numbers in Convergence.of(flat))
    worst = [rhat.max(-1), *(size.min(-1) for size in sizes)]  # nan where one of them is
    return [torch.as_tensor(numbers, device=block.z.device) for numbers in worst]
