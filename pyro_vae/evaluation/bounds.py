"""Log weights of a guide's draws; lower bounds on log p(x), datum by datum, in constant memory."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae.diagnostics.psis import pareto_k_of_largest, tail_length
from pyro_vae.diagnostics.verdict import Weights, tail_share_of
from pyro_vae.markup import paragraphs
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.estimators import (
    LargestWeights,
    LogWeights,
    StreamingELBO,
    StreamingIWAE,
    calibrated,
    mean_std_error,
)
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.particles.global_latents import Given, given_text
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.on_demand import on_demand
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Particles, Program

logger = logging.getLogger(__name__)

# The squared skewness of an estimate above which a few particles decide its error.
_FEW_DECIDE = 0.5
# The share of effective chains below which log weights spread by more than a nat.
_EQUAL_CHAINS = 0.3


@dataclass(frozen=True)
class Bound:
    """A bound on log p(x) for each datum, in nats: from below, but for the upper one of a Sandwich.

    Attributes:
        name: what it is, for example "ELBO" or "IWAE-5000".
        value: [N], float64.
        std_error: Monte Carlo standard error of each, [N]: value ± 1.96 of them covers with
            probability 0.95 (see :func:`pyro_vae.particles.estimators.calibrated`).
        num_particles: K.
        given: global latent sites, and the values that they were fixed at: then the bound is on
            log p(x | these).
        skewness: of the particles' effects on the value, [N].
        ess: effective sample size of the importance weights, [N], between 1 and K.
        largest: the largest log weights of each datum, [M, N]: those that tell its k-hat.
        tail_share: what these carry, in units of what as many average weights would, [N].
        mean_of: "weights", "log weights" as of the ELBO, or "chains" for weights of chains.
        missed: for which data chains miss a mode that holds more than a hundredth of the
            posterior, as Laplace's approximation weighs it, [N]; None where it was not looked for.
    """

    name: str
    value: Tensor
    std_error: Tensor
    num_particles: int
    given: Mapping[str, Tensor] = field(default_factory=dict)
    skewness: Tensor | None = None
    ess: Tensor | None = None
    largest: Tensor | None = field(default=None, repr=False)
    tail_share: Tensor | None = None
    mean_of: Literal["weights", "log weights", "chains"] = "log weights"
    missed: Tensor | None = None

    @property
    def mean(self) -> float:
        """Mean over the data, in nats per datum."""
        return float(self.value.mean())

    @property
    def mean_std_error(self) -> float:
        """Monte Carlo standard error of the mean for these data, not of others that might be."""
        return float(mean_std_error(self.std_error, self.skewness, self.num_particles))

    @functools.cached_property
    def pareto_k(self) -> Tensor:
        """Pareto k-hat of each datum's importance weights, [N]; nan from too few particles.

        How heavy the tail of the weights is, which matters where it carries weight: see
        ``untrusted``. Infinite where every weight is zero.
        """
        if self.largest is None:
            return torch.full(self.value.shape, math.nan, dtype=torch.float64)
        k_hat = torch.full(self.value.shape, math.inf, dtype=torch.float64)
        largest = self.largest.detach().cpu()
        some = (largest != -math.inf).any(0)
        found = pareto_k_of_largest(largest[:, some].T.numpy(), self.num_particles)
        k_hat[some] = torch.as_tensor(found, dtype=torch.float64)
        return k_hat

    @property
    def untrusted(self) -> Tensor:
        """For which data the error is not to be trusted, [N].

        Of a mean of weights, by the rule of :mod:`pyro_vae.diagnostics.verdict`: a heavy tail that
        carries weight, or few effective particles, or too few for a k-hat; of the ELBO, where a few
        particles decide the error; of chains, which are too few for a tail, where their weights are
        far from equal, or they miss a mode (``missed``).
        """
        if self.mean_of == "chains":
            return self.few_carry | self._missed
        if self.mean_of == "weights" and self._weights is not None:
            return torch.as_tensor(~self._weights.trusted)
        if self.mean_of == "weights" or self.skewness is None:
            return torch.zeros(self.value.shape, dtype=torch.bool)
        return (self.skewness.square() > _FEW_DECIDE * self.num_particles).cpu()

    @property
    def few_carry(self) -> Tensor:
        """For which data few of the chains carry the mean, [N]."""
        if self.ess is None:
            return torch.zeros(self.value.shape, dtype=torch.bool)
        return ~(self.ess > _EQUAL_CHAINS * self.num_particles).cpu()

    @property
    def _missed(self) -> Tensor:
        if self.missed is None:
            return torch.zeros(self.value.shape, dtype=torch.bool)
        return self.missed.cpu()

    @functools.cached_property
    def _weights(self) -> Weights | None:
        """What the guide's importance weights look like; None of chains, and where not known."""
        if self.ess is None or self.largest is None or self.tail_share is None:
            return None
        columns = (self.pareto_k, self.ess, self.tail_share)
        return Weights(self.num_particles, *(each.numpy(force=True) for each in columns))

    def __repr__(self) -> str:
        given = f"; given {given_text(self.given)}" if self.given else ""
        bound = f"{self.name}: {self.mean:.4f} ± {self.mean_std_error:.4f} nats per datum"
        return "; ".join([f"{bound} ({len(self.value)} data{given})", *self._doubts()])

    def _repr_html_(self) -> str:
        return paragraphs(repr(self).split("; "))

    def _doubts(self) -> Iterator[str]:
        """Yield why value or error is not to be trusted."""
        if self.mean_of == "chains":
            if few := int(self.few_carry.sum()):
                yield (
                    f"for {few} of {len(self.value)} data neither value nor error is to be "
                    "trusted: few chains carry the mean. More steps bring their weights together"
                )
            if missed := int(self._missed.sum()):
                yield (
                    f"for {missed} of {len(self.value)} data log p(x) is higher: chains from the "
                    "guide miss a mode that holds more than 0.01 of the posterior. pyro_vae.ais "
                    "with start='prior' and more steps, or pyro_vae.repair, sees it"
                )
            return
        doubt = "" if self._weights is None else self._weights.doubt
        if self.mean_of == "log weights" and (few := int(self.untrusted.sum())):
            yield (
                f"for {few} of {len(self.value)} data the error is not to be trusted: a few "
                "particles decide it"
            )
        if doubt and self.mean_of == "weights":
            yield f"{doubt}. There log p(x) may be far above, and the error too small"
        elif doubt:
            yield f"as a proposal for importance sampling: {doubt}"


def log_weights(
    model: Program,
    guide: Program,
    *batch: Any,
    num_particles: int,
    given: GivenValues | None = None,
    chunk_size: int | None = None,
    data_plate: DataPlate = None,
    particles: Particles = "auto",
    seed: int | None = None,
    compile: Compile = "auto",
) -> LogWeights:
    r"""Draw particles from the guide and return their log weights, datum by datum.

    .. math:: \log w_{kn} = \log p(x_n | z_{kn}) + \log p(z_{kn}) - \log q(z_{kn} | x_n)

    Scales (subsampling, poutine.scale) are stripped; masks are kept. Modules run in
    eval mode, without gradients. Discrete latents c of finite support that the guide does
    not propose are summed out: p(z) is the sum over c of p(c, z), and p(x | z) = p(x, z) / p(z).

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites, of any make.
        *batch: their arguments: tensors with a row per datum; or one tuple or mapping. Arrays in
            files, sparse matrices, an AnnData and loaders are read some rows at a time.
        num_particles: K, draws for each datum.
        given: values of global latent sites, by name: the weights are then of p(x, z | these),
            model and guide alike. Without it a guide's ``global_guide`` gives its median.
        chunk_size: pairs (particle, datum) that the model scores at once: bounds
            memory, changes no result.
        data_plate: the name of the plate of the data, where it is not plain; False to
            treat the whole batch as one datum (weights [K, 1]).
        particles: how several particles are run at once: in a "plate" outside the
            model's own, by "repeat" of the batch, in a "loop"; "auto" takes the first
            that agrees with single particles.
        seed: of the draws; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`: "auto" records what is drawn and scored
            again and again, and compiles it where there is enough of it to save time.

    Returns:
        LogWeights with log_likelihood, log_prior, log_guide and total, each [K, N], in
        nats, in the dtype of the model.

    Raises:
        DataPlateError: where it is not plain which plate is that of the data.
        ValueError: for an empty batch, NaN in the data, observed values outside their
            support, num_particles < 1, global latents that are not given (but of a global_guide
            that knows its median: they are held there), a guide whose sites are not the
            model's, and a density that is not the same for particles together and alone.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def posterior(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> weights = pv.log_weights(model, posterior, torch.zeros(3), num_particles=4)
        >>> weights.total.std().item() < 1e-6
        True
    """
    num_particles = as_count("num_particles", num_particles)
    data = (on_demand(*batch),)
    evaluator, fixed = prepare(model, guide, data, given, data_plate, seed, particles, compile)

    def weights_of(chunks: Iterable[Chunk]) -> LogWeights:
        return LogWeights.concatenate([chunk.weights for chunk in chunks], 0)

    found = evaluator.over_blocks(weights_of, num_particles, chunk_size)
    return dataclasses.replace(LogWeights.concatenate(list(found), 1), given=fixed)


def elbo(
    model: Program,
    guide: Program,
    *batch: Any,
    num_particles: int = 100,
    given: GivenValues | None = None,
    chunk_size: int | None = None,
    data_plate: DataPlate = None,
    particles: Particles = "auto",
    seed: int | None = None,
    compile: Compile = "auto",
) -> Bound:
    r"""Return the evidence lower bound of each datum.

    .. math:: \frac{1}{K} \sum_k \log w_k

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites.
        *batch: their arguments.
        num_particles: K, draws for each datum.
        given: as in :func:`pyro_vae.log_weights`.
        chunk_size: pairs (particle, datum) scored at once; bounds memory only.
        data_plate: as in :func:`pyro_vae.log_weights`.
        particles: as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.
        compile: as in :func:`pyro_vae.log_weights`.

    Returns:
        A Bound with value [N] and std_error [N], in nats; pareto_k [N] and ess [N] of the
        importance weights.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses.
    """
    num_particles = as_count("num_particles", num_particles)
    data = (on_demand(*batch),)
    prepared = prepare(model, guide, data, given, data_plate, seed, particles, compile)
    return _bound(StreamingELBO, prepared, num_particles, chunk_size)


def iwae_bound(
    model: Program,
    guide: Program,
    *batch: Any,
    num_particles: int = 5000,
    given: GivenValues | None = None,
    chunk_size: int | None = None,
    data_plate: DataPlate = None,
    particles: Particles = "auto",
    seed: int | None = None,
    compile: Compile = "auto",
) -> Bound:
    r"""Return the importance-weighted bound of each datum (Burda et al. 2016).

    .. math:: \log \frac{1}{K} \sum_k w_k

    A lower bound on log p(x) in expectation, which tightens with K. Memory does not
    grow with K. With the prior as guide it is naive Monte Carlo's estimate.

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites.
        *batch: their arguments.
        num_particles: K, draws for each datum.
        given: as in :func:`pyro_vae.log_weights`.
        chunk_size: pairs (particle, datum) scored at once; bounds memory only.
        data_plate: as in :func:`pyro_vae.log_weights`.
        particles: as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.
        compile: as in :func:`pyro_vae.log_weights`.

    Returns:
        A Bound with value [N] and std_error [N] (delta method), in nats; pareto_k [N] and
        ess [N] of the weights. Where ``untrusted``, log p(x) may be far above, and the standard
        error is too small; the bound says, printed, for how many data and why.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses.
    """
    num_particles = as_count("num_particles", num_particles)
    data = (on_demand(*batch),)
    prepared = prepare(model, guide, data, given, data_plate, seed, particles, compile)
    return _bound(StreamingIWAE, prepared, num_particles, chunk_size)


def _bound(
    stream: type[StreamingELBO | StreamingIWAE],
    prepared: tuple[Evaluator, Given],
    num_particles: int,
    chunk_size: int | None,
) -> Bound:
    """Stream the log weights of an evaluator into a bound for each datum."""
    evaluator, fixed = prepared
    of_weights = stream is StreamingIWAE
    if points := evaluator.pair.point_sites:
        logger.warning(
            "%s: the guide proposes one point for %s, and a point has no entropy: the value is "
            "log p(x, z) there, the height of a density, and no bound on log p(x)",
            "IWAE" if of_weights else "ELBO",
            ", ".join(map(repr, points)),
        )

    def bound_of(chunks: Iterable[Chunk]) -> tuple[Tensor, ...]:
        bound, largest = stream(), LargestWeights(tail_length(num_particles))
        weights = bound if isinstance(bound, StreamingIWAE) else StreamingIWAE()
        for chunk in chunks:
            for each in {bound, weights, largest}:
                each.update(chunk.weights.total)
        results = (bound.value, bound.skewness, bound.std_error, weights.value)
        return (*results, weights.effective_sample_size, largest.value)

    columns = zip(*evaluator.over_blocks(bound_of, num_particles, chunk_size), strict=True)
    value, skewness, plain, log_mean, ess, top = (torch.cat(column, -1) for column in columns)
    name = f"IWAE-{num_particles}" if of_weights else "ELBO"
    evaluator.warn_of_outside(name, value == -math.inf)
    error = calibrated(plain, skewness, num_particles)
    share = torch.as_tensor(tail_share_of(top.T.numpy(force=True), log_mean.numpy(force=True)))
    found = Bound(name, value, error, num_particles, fixed, skewness, ess, top, share)
    return dataclasses.replace(found, mean_of="weights") if of_weights else found
