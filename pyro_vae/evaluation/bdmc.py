"""Bidirectional Monte Carlo: log p(x) from below and from above, so that its error is known."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.evaluation.ais import AnnealingSettings, bound_of
from pyro_vae.evaluation.bounds import Bound
from pyro_vae.evaluation.simulations import without_globals
from pyro_vae.markup import paragraphs
from pyro_vae.particles.global_latents import given_text
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.messages import as_count, as_seed
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Program, Values
from pyro_vae.report import mending
from pyro_vae.report.findings import Finding
from pyro_vae.sampling.annealing import Schedule
from pyro_vae.sampling.chains import sample_posterior
from pyro_vae.sampling.density import Start
from pyro_vae.sampling.exact_draws import Simulator, starts_of_latents, starts_of_samples
from pyro_vae.sampling.prepare import Ready, ready
from pyro_vae.sampling.samples import PosteriorSamples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Sandwich", "bdmc"]

# Standard errors by which an upper bound below the lower one contradicts it.
_CROSSED = 5.0
# Transitions by which chains that start at one draw forget it, in units of their steps; at most.
_MOVES, _MOST_MOVES = 0.2, 100


@dataclass(frozen=True)
class Sandwich:
    """The result of :func:`bdmc`: log p(x) of each datum from both sides, in nats.

    Attributes:
        lower: of forward chains, a :class:`Bound`.
        upper: of reverse chains, likewise, but from above.
        data: the data, as model and guide take them: simulated ones, or those at hand.
        simulated: whether the data were simulated from the model. Then reverse chains start at
            exact draws of the posterior; else at draws of chains, and ``upper`` is as good as they.
        mixed: for which data the starts of reverse chains may pass for independent draws of the
            posterior, [N]: the chains that made them have converged; of simulated data, at least
            half of the reverse chains have left the one exact draw that they share.
    """

    lower: Bound
    upper: Bound
    data: tuple[Any, ...] | dict[str, Any] = field(repr=False)
    simulated: bool
    mixed: Tensor = field(repr=False)

    @property
    def width(self) -> Tensor:
        """How far apart the bounds are, [N].

        In expectation neither is further than this from log p(x); by chance it may be negative.
        """
        return self.upper.value - self.lower.value

    @property
    def width_std_error(self) -> Tensor:
        """Standard error of each width over chains, [N]; the two sides are independent."""
        return torch.hypot(self.lower.std_error, self.upper.std_error)

    @property
    def mean_width(self) -> float:
        """Mean width over the data, in nats per datum."""
        return float(self.width.mean())

    @property
    def mean_width_std_error(self) -> float:
        """Standard error of the mean width.

        Of simulated data from the spread of the widths over the data, which are independent: it
        knows, too, that all reverse chains of a datum begin at one draw, and is that of the
        expected width of the model's data. It is no smaller than that from the errors over chains,
        which the widths of few data may be by chance. Else, and of one datum, it is the latter.
        """
        over_chains = math.hypot(self.lower.mean_std_error, self.upper.mean_std_error)
        if self.simulated and len(self.width) > 1:
            return max(over_chains, float(self.width.std() / len(self.width) ** 0.5))
        return over_chains

    @property
    def untrusted(self) -> Tensor:
        """For which data the bounds are not to be trusted, [N].

        Few chains carry one of them, forward chains miss a mode (``lower.missed``), the starts of
        reverse chains are no independent draws of the posterior (not ``mixed``), or the upper one
        is below the lower one by more than five standard errors.
        """
        crossed = self.width < -_CROSSED * self.width_std_error
        few = self.lower.untrusted | self.upper.untrusted
        return few | ~self.mixed | crossed.cpu()

    @functools.cached_property
    def dataset(self) -> xr.Dataset:
        """Of each datum: lower, upper and width, each with ``<name>_se``; untrusted, mixed.

        And lower_ess and upper_ess, how many chains carry each. Attributes: ``name``,
        ``simulated``, ``num_chains``, ``given``, ``units``; ``lower_mean_se``, ``upper_mean_se``
        and ``width_mean_se``, the standard errors of means over the data.
        """
        sides = (("lower", self.lower), ("upper", self.upper))
        columns = {name: bound.value for name, bound in sides} | {"width": self.width}
        columns |= {f"{name}_se": bound.std_error for name, bound in sides}
        columns |= {f"{name}_ess": bound.ess for name, bound in sides if bound.ess is not None}
        columns |= {"width_se": self.width_std_error, "untrusted": self.untrusted}
        columns["mixed"] = self.mixed
        return xr.Dataset(
            {name: ("datum", value.numpy(force=True)) for name, value in columns.items()},
            coords={"datum": np.arange(len(self.width))},
            attrs={
                "name": self._name,
                "simulated": int(self.simulated),  # netCDF has no truth values
                "num_chains": self.lower.num_particles,
                "given": given_text(self.lower.given),
                "units": "nats",
                **{f"{name}_mean_se": bound.mean_std_error for name, bound in sides},
                "width_mean_se": self.mean_width_std_error,
            },
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw both bounds of each datum, in order of their width; needs the extra ``plots``."""
        from pyro_vae.plots.evidence import plot_evidence

        return plot_evidence(self.dataset, ax=ax)

    def findings(self) -> list[Finding]:
        """Return what the numbers say in plain words, the worst first."""
        return mending.of_sandwich(self.dataset)

    @property
    def _name(self) -> str:
        return self.lower.name.removesuffix(" from below")

    def __repr__(self) -> str:
        low, high = (
            f"{bound.mean:.4f} ± {bound.mean_std_error:.4f}" for bound in (self.lower, self.upper)
        )
        where = "simulated from the model" if self.simulated else "at hand"
        given = f"; given {given_text(self.lower.given)}" if self.lower.given else ""
        text = (
            f"{self._name}: log p(x) between {low} and {high} nats per datum, "
            f"{self.mean_width:.4f} ± {self.mean_width_std_error:.4f} apart "
            f"({len(self.width)} data {where}{given})"
        )
        return "; ".join([text, *self._doubts()])

    def _repr_html_(self) -> str:
        return paragraphs(repr(self).split("; "))

    def _doubts(self) -> Iterator[str]:
        of_data = f"of {len(self.width)} data"
        failed = int((~self.mixed).sum())
        if not self.simulated:
            yield "the upper bound is as good as the draws of chains that it starts at"
        if failed:
            why = "reverse chains have not left the draw that they share"
            why = why if self.simulated else "these chains have not converged"
            yield f"for {failed} {of_data} {why}"
        few = self.lower.few_carry | self.upper.few_carry
        if few.any():
            yield (
                f"for {int(few.sum())} {of_data} few chains carry a bound, which may be far off to "
                "its side. More steps bring their weights together"
            )
        missed = self.lower.untrusted & ~self.lower.few_carry
        if missed.any():
            yield (
                f"for {int(missed.sum())} {of_data} forward chains miss a mode that holds more "
                "than 0.01 of the posterior, and the lower bound is too low. start='prior' sees it"
            )
        if crossed := int((self.untrusted & self.mixed & ~few & ~missed).sum()):
            yield (
                f"for {crossed} {of_data} the upper bound lies below the lower one: chains of one "
                "side miss a part of the posterior"
            )


def bdmc(
    model: Program,
    guide: Program,
    *batch: Any,
    num_data: int | None = None,
    posterior: PosteriorSamples | None = None,
    num_chains: int = 16,
    num_steps: int = 500,
    start: Start = "guide",
    schedule: Schedule = "adaptive",
    dream: Callable[[Values], Any] | None = None,
    given: GivenValues | None = None,
    data_plate: DataPlate = None,
    seed: int | None = None,
    compile: Compile = "auto",
    progress: bool = True,
) -> Sandwich:
    r"""Bound log p(x) of each datum from both sides (Grosse, Ghahramani & Adams 2015).

    Forward chains are those of :func:`ais`. Reverse chains go the same way back, from a draw of the
    posterior to the base, and the mean of their inverse weights is 1 / p(x) in expectation:

    .. math::
        \mathrm{E} \log \frac{1}{C} \sum_c w_c \;\le\; \log p(x) \;\le\;
        \mathrm{E} \Bigl[ -\log \frac{1}{C} \sum_c \frac{1}{\tilde w_c} \Bigr]

    With ``num_data``, **on data simulated from the model**: latents and data are drawn together, so
    that the latents are an exact draw of the posterior, and both inequalities hold whatever the
    chains do. All reverse chains of a datum begin at its one draw, move away from it by
    transitions that leave the posterior invariant (a fifth as many as ``num_steps``, at most 100),
    and are exact draws still. The bound is one all the same; but where the posterior has modes that
    chains do not cross, they are not independent, and the standard error of one datum's upper bound
    is that given the mode it began in. That of the mean width is from the spread over data.

    Without it, **on the data at hand**: reverse chains start at draws of long chains, and the upper
    bound is as good as these. Data whose chains have not converged are ``untrusted``.

    It takes 3 T transitions of three gradients for each chain and datum, and as many as the moves.

    Args:
        model: a Pyro model.
        guide: a Pyro guide, as of :func:`ais`.
        *batch: their arguments. With ``num_data`` an example of them: the observed values are
            drawn, all else (covariates, lengths, masks) stays, row by row.
        num_data: how many data to simulate; rows of the example are taken again from the first
            where they are fewer.
        posterior: what :func:`sample_posterior` gave for these data, to start at; by default it is
            called, with its own settings.
        num_chains: C, independent chains of each datum and direction.
        num_steps: T, of each chain.
        start: "guide" or "prior", where chains begin and reverse ones end.
        schedule: as in :func:`ais`.
        dream: where the arguments are not just the observed values: from a mapping (observed site
            to value) to the arguments that hold them.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        data_plate: as in :func:`pyro_vae.log_weights`.
        seed: of all random numbers; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`.
        progress: whether to show a bar; it appears after a second.

    Returns:
        A :class:`Sandwich`: lower, upper, width [N], in nats, with standard errors.

    Raises:
        ValueError: for what :func:`ais` refuses; of simulated data, where the model cannot be drawn
            from, where it is not plain which argument holds an observed site's values, where the
            model looks at these in another way, and for exact draws that are cut off at the edge of
            a support; draws of another model or other data as ``posterior``; num_data with
            posterior, and dream without num_data.

    References:
        Grosse, Ghahramani & Adams (2015). Sandwiching the marginal likelihood using bidirectional
        Monte Carlo. arXiv 1511.02543.
        Grosse, Ancha & Roy (2016). Measuring the reliability of MCMC inference with bidirectional
        Monte Carlo. NeurIPS.

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
        >>> few = {"num_steps": 50, "seed": 0, "progress": False}
        >>> sandwich = pv.bdmc(model, guide, torch.zeros(2), num_data=5, **few)
        >>> (x,) = sandwich.data
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        >>> errors = sandwich.lower.std_error, sandwich.upper.std_error
        >>> bool((sandwich.lower.value < exact + 4 * errors[0]).all())
        True
        >>> bool((sandwich.upper.value > exact - 4 * errors[1]).all())
        True
    """
    settings = AnnealingSettings(num_chains, num_steps, start, schedule)
    num_chains, num_steps = settings.num_chains, settings.num_steps
    seed = as_seed(seed)
    _check_sources(num_data, posterior, dream)
    arguments, fixed, latents = as_batch(*batch), None, None
    if num_data is not None:
        held, fixed = without_globals(model, guide, arguments, given, data_plate)
        count = as_count("num_data", num_data)
        remedy = "Or leave num_data out to take the data at hand"
        about: dict[str, Any] = {"dreamt": dream, "data_plate": data_plate}
        simulator = Simulator.of(held, arguments, count, who="bdmc", remedy=remedy, **about)
        found = simulator.draw(seed)
        arguments, latents, given = found.batch, found.latents, dict(fixed) or None
    prepared = ready(model, guide, (arguments,), given, data_plate, seed, compile)
    if fixed is not None:
        prepared = dataclasses.replace(prepared, given=fixed)
    if latents is not None:
        z, mixed = starts_of_latents(prepared, latents, num_chains), None
    else:
        options: dict[str, Any] = {"given": given, "data_plate": data_plate, "seed": seed}
        options |= {"compile": compile, "progress": progress}
        samples = posterior or sample_posterior(model, guide, arguments, **options)
        z = starts_of_samples(prepared, samples, num_chains)
        mixed = samples.converged.cpu()
    below, above, moved = _both_ways(settings, prepared, z, progress=progress)
    mixed = moved if mixed is None else mixed
    return Sandwich(below, above, _as_given(arguments), num_data is not None, mixed)


def _both_ways(
    settings: AnnealingSettings, prepared: Ready, z: Tensor, *, progress: bool
) -> tuple[Bound, Bound, Tensor]:
    """Return bounds from below and above, and of which data half of the reverse chains move off.

    Reverse chains begin at z, [C, N, D].
    """
    num_steps, lost = settings.num_steps, ~z.isfinite().all(-1)
    moves = min(_MOST_MOVES, math.ceil(_MOVES * num_steps))
    total = 2 * num_steps * prepared.evaluator.num_data
    forward, backward, missed, mixed = [], [], [], []
    with tqdm(total=total, desc="bdmc", unit="step", disable=not progress, delay=1.0) as bar:
        for annealer in settings.annealers(prepared):
            path, rows = annealer.path(), annealer.rows
            weights, ends = annealer.forward(path, bar.update)
            forward.append(weights)
            missed.append(annealer.misses(weights, ends))
            starts = torch.where(lost[:, rows, None], prepared.base_centre(rows), z[:, rows])
            weights, moved = annealer.backward(path, starts, bar.update, moves)
            backward.append(weights)
            mixed.append((moved.double().mean(0) >= 0.5).cpu())
    # From a draw beyond what numbers can hold no chain starts. It adds nothing to the mean of
    # 1 / w: the bound is too high, infinite where all chains begin at it, and holds.
    above = torch.cat(backward, 1).masked_fill(lost, torch.inf)
    name = f"BDMC-{num_steps}"
    return (
        bound_of(f"{name} from below", torch.cat(forward, 1), prepared, missed=torch.cat(missed)),
        bound_of(f"{name} from above", above, prepared, upper=True),
        torch.cat(mixed),
    )


def _check_sources(
    num_data: int | None, posterior: object, dream: Callable[[Values], Any] | None
) -> None:
    """Raise for arguments that go with simulated data, or with data at hand, and not with both."""
    if posterior is not None and not isinstance(posterior, PosteriorSamples):
        raise TypeError(
            f"posterior={posterior!r}: what pyro_vae.sample_posterior returns is needed"
        )
    if num_data is not None and posterior is not None:
        raise ValueError(
            "num_data simulates data, whose exact draws are known; posterior= is for the data at "
            "hand. Give one of the two"
        )
    if num_data is None and dream is not None:
        raise ValueError("dream= puts simulated values into a batch: give num_data, how many")


def _as_given(batch: Batch) -> tuple[Any, ...] | dict[str, Any]:
    """Return arguments as a user passes them: one tuple, or one mapping."""
    return dict(batch.kwargs) if batch.kwargs and not batch.args else tuple(batch.args)
