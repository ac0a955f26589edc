"""Several runs of training from different seeds, in one program, and how far they agree."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyro.optim
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from pyro_vae.diagnostics.units import units_of
from pyro_vae.particles.evaluator import prepare
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.state import Look, seeded
from pyro_vae.programs.types import Program
from pyro_vae.training.clipping import Clip
from pyro_vae.training.fit import fit
from pyro_vae.training.fit_result import FitResult
from pyro_vae.training.steps import TrainingSteps
from pyro_vae.training.together import run_together
from pyro_vae.training.validation import Validation

logger = logging.getLogger(__name__)

Array: TypeAlias = NDArray[np.float64]
Make: TypeAlias = Callable[[int], tuple[Program, Program]]

# Arguments of fit that are of one run alone.
_OF_ONE = (
    *("seed", "checkpoint", "checkpoint_every", "checkpoint_keep", "callbacks", "stop"),
    "distributed",
)
_SCORES = 8  # of each run, on other random numbers each
_DATA = 500  # that runs are compared on, at most
_DRAWS = 200  # of each posterior
_PARTS = 10  # of the data, each left out once for a standard error


@dataclass(frozen=True)
class ManyFits:
    """The result of :func:`fit_many`.

    Attributes:
        dataset: dims run and other. By run: ``elbo`` with its Monte Carlo error ``elbo_se``, in
            nats per datum, and ``below_best``, how much less it is than that of the best run, with
            the paired error ``below_best_se``; ``steps``. By run and other: ``distance`` of their
            posteriors, in posterior standard deviations, and ``alignment``, the share of the
            other's posterior means that a linear map of the run's explains, each with an error over
            the data (``_se``). Coordinate ``seed``. Attributes ``elbo_of`` (the data that elbo is
            of) and ``one_by_one`` (why each run took its steps by itself; "" where they were taken
            at once).
        pairs: model and guide of each run.
        results: of :func:`pyro_vae.fit`, of each run; None where it failed.
        errors: why a run failed; None where it did not.
    """

    dataset: xr.Dataset
    pairs: tuple[tuple[Program, Program], ...]
    results: tuple[FitResult | None, ...]
    errors: tuple[BaseException | None, ...]

    @property
    def best(self) -> int:
        """The run with the largest ELBO, counted from 0.

        Where others are within the errors of ``below_best`` it is one of several that are as good.
        On the data that it was chosen on its ELBO is too high by the choice: score it on others.
        """
        return int(np.nanargmax(self.dataset["elbo"].values))

    def summary(self) -> pd.DataFrame:
        """Return a table, a row for each run; distance and alignment are those to the best."""
        data, best = self.dataset, self.best
        table = data[["seed", "elbo", "elbo_se", "below_best", "below_best_se", "steps"]]
        frame = table.to_dataframe()
        for name in ("distance", "alignment"):
            frame[f"{name}_to_best"] = data[name].values[:, best]
        return frame

    def __repr__(self) -> str:
        data, best = self.dataset, self.best
        below = data["below_best"].values
        worst = int(np.nanargmax(below))
        failed = sum(error is not None for error in self.errors)
        lines = [
            f"ManyFits: {data.sizes['run']} runs, best run {best}: ELBO "
            f"{data['elbo'].values[best]:.3f} ± {data['elbo_se'].values[best]:.2g} nats per datum "
            f"({data.attrs['elbo_of']})",
            f"the worst is {below[worst]:.3g} ± {data['below_best_se'].values[worst]:.2g} below it",
        ]
        others = [r for r in range(len(below)) if r != best]
        if others and np.isfinite(data["distance"].values[best, others]).any():
            distance = np.nanmedian(data["distance"].values[best, others])
            alignment = np.nanmedian(data["alignment"].values[best, others])
            lines.append(
                f"posteriors of the others are {distance:.2g} standard deviations away (median), "
                f"and {alignment:.0%} the same up to a linear map"
            )
        if failed:
            lines.append(f"{failed} runs failed")
        return "\n".join(lines)


def fit_many(
    make: Make,
    data: Any,
    *,
    num_runs: int = 4,
    seeds: Sequence[int] | None = None,
    progress: bool = True,
    **options: Any,
) -> ManyFits:
    r"""Train several pairs from different seeds in one program, and say how far they agree.

    Each run is what ``pv.fit(*make(seed), data, seed=seed, ...)`` is, to rounding: its own
    parameters, order of the data and random numbers. The runs go step by step together. Their
    parameters lie in common memory, [R, ...]; loss and gradients of all of them are the traced
    graph of one, mapped over the first dimension (torch.func.vmap), and one update moves all. That
    program is compared with each run alone before it is used, and again later. Where there is none,
    each run takes its steps by itself, and a logged warning and ``one_by_one`` say why: where
    random numbers depend on parameters (draws of Gamma or Poisson variables, discrete ones), for a
    LocalGuide's rows, optimizers that mix numbers of a parameter, fewer than 100 steps, on CUDA
    devices.

    ELBOs are compared on the validation data, or else the first 500 training data, on common random
    numbers. So are posteriors, by 200 draws each:

    .. math::
        d_{rs}^2 = \frac{1}{N U} \sum_{n, u} \frac{(m_{rnu} - m_{snu})^2}{(v_{rnu} + v_{snu}) / 2}
        - \text{the noise of draws}, \qquad
        a_{rs} = 1 - \frac{\min_{A, b} \lVert m_s - m_r A - b \rVert^2}
        {\lVert m_s - \bar m_s \rVert^2}

    with the mean m and the variance v of unit u of datum n. The ELBO of most models is the same for
    rotated, mirrored or reordered latents. Then d is large between runs that are equally good, and
    the alignment a, which no linear map of the latents changes, is near 1.

    Args:
        make: from a seed to a model and a guide, made anew at each call. The global random state
            has that seed meanwhile. Modules hold all parameters (pyro.param in a function would
            be one parameter for all runs).
        data: as in :func:`pyro_vae.fit`.
        num_runs: R, at least 2; seeds are then 0 to R - 1.
        seeds: of the runs, in the place of num_runs; all different.
        progress: whether to show the bar of the first run.
        options: of :func:`pyro_vae.fit`: loss, optim (a function from parameters to an optimizer),
            schedule, batch_size, epochs, max_steps, validation_data, patience and others, but for
            those of one run: seed, checkpoint, callbacks, stop.

    Returns:
        A ManyFits. Runs that failed have an error there, and no numbers.

    Raises:
        TypeError: for an argument that fit does not have, or an optimizer that is made already,
            a ``make`` that is no function.
        ValueError: for arguments of one run alone, or runs that share parameters. What every run
            raises is raised too.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> x = torch.linspace(-1, 1, 50).unsqueeze(1)
        >>> def make(seed):
        ...     return model, pv.AmortizedGuide(model, torch.nn.Linear(1, 1), example=x)
        >>> fits = pv.fit_many(make, x, num_runs=2, epochs=2, progress=False)
        >>> fits.summary().shape
        (2, 8)
    """
    _check_make(make)
    chosen = _checked_seeds(num_runs, seeds)
    _check_options(options)
    pairs = [_made(make, seed) for seed in chosen]
    _check_apart(pairs)
    held: list[TrainingSteps | None] = [None] * len(chosen)

    def work(number: int, seed: int) -> Callable[[], FitResult]:
        own = {**options}
        if options.get("loss") is not None:
            own["loss"] = copy.deepcopy(options["loss"])

        def run() -> FitResult:
            shown = progress and number == 0
            return fit(*pairs[number], data, seed=seed, progress=shown, **own)

        return run

    clip = Clip(options.get("clip_norm"), options.get("clip_value"))
    works = [work(number, seed) for number, seed in enumerate(chosen)]
    runs, why = run_together(works, clip, held)
    errors = tuple(run.error for run in runs)
    if all(errors):
        raise next(error for error in errors if error is not None)
    for seed, error in zip(chosen, errors, strict=True):
        if error is not None:
            logger.warning("the run of seed %d failed: %s", seed, error)
    results = tuple(run.result for run in runs)
    dataset = _compared(pairs, results, held, options.get("validation_data"), chosen)
    dataset.attrs["one_by_one"] = why
    return ManyFits(dataset, tuple(pairs), results, errors)


def _checked_seeds(num_runs: int, seeds: Sequence[int] | None) -> list[int]:
    if seeds is not None and not isinstance(seeds, Sequence):
        raise TypeError(f"seeds={seeds!r}: a list is needed, of at least 2")
    found = list(range(as_count("num_runs", num_runs, 2))) if seeds is None else list(seeds)
    if len(found) < 2 or len(set(found)) < len(found):
        raise ValueError(f"seeds={found}: at least 2 are needed, all different")
    return found


def _check_options(options: dict[str, Any]) -> None:
    """Raise an error for what fit does not take, or several runs cannot have."""
    known = inspect.signature(fit).parameters
    for name in options:
        if name not in known:
            raise TypeError(f"fit_many has no argument {name!r}, and neither has fit")
        if name in _OF_ONE:
            advice = "seeds=[...] says those of the runs" if name == "seed" else "use pv.fit"
            raise ValueError(f"{name}: it is of one run; {advice}")
    if isinstance(options.get("optim"), (torch.optim.Optimizer, pyro.optim.PyroOptim)):
        what = "it moves the parameters of one run; pass a function from parameters to an optimizer"
        raise TypeError(f"optim: {what}, such as lambda parameters: torch.optim.Adam(parameters)")


def _check_make(make: object) -> None:
    if not callable(make):
        what = "a function from a seed to a new model and a new guide is needed"
        raise TypeError(f"make: {what}, found a {type(make).__name__}")


def _made(make: Make, seed: int) -> tuple[Program, Program]:
    with seeded(torch.device("cpu"), seed):
        pair = make(seed)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(
            f"make({seed}) returned {type(pair).__name__}; a model and a guide are needed"
        )
    return pair


def _check_apart(pairs: Sequence[tuple[Program, Program]]) -> None:
    """Raise ValueError where modules of two runs share parameters."""
    seen: dict[int, int] = {}
    for number, pair in enumerate(pairs):
        for program in pair:
            if isinstance(program, torch.nn.Module):
                for parameter in program.parameters():
                    if seen.setdefault(id(parameter), number) != number:
                        what = "share parameters; make(seed) is to make both anew at each call"
                        raise ValueError(f"runs {seen[id(parameter)]} and {number} {what}")


# --- how far the runs agree


def _compared(
    pairs: Sequence[tuple[Program, Program]],
    results: Sequence[FitResult | None],
    held: Sequence[TrainingSteps | None],
    validation_data: Any,
    seeds: Sequence[int],
) -> xr.Dataset:
    """Return the dataset of a ManyFits."""
    count = len(pairs)
    scores, elbo_of = np.full((count, _SCORES), np.nan), "validation data"
    means: list[Array | None] = [None] * count
    spreads: list[Array | None] = [None] * count
    for number, (result, steps) in enumerate(zip(results, held, strict=True)):
        if result is None or steps is None:
            continue
        with seeded(torch.device("cpu"), 0):
            batch, elbo_of = _batch(steps, validation_data)
            scores[number] = _scored(steps, batch, result)
            with Look() as look:
                means[number], spreads[number] = _posterior(*pairs[number], steps, batch)
            if look.error is not None:
                logger.info("posteriors are not compared: %s", look.error)
    mean = scores.mean(1)
    best = int(np.nanargmax(mean))
    below = scores[best] - scores
    distance, alignment = (np.full((2, count, count), np.nan) for _ in range(2))
    for r in range(count):
        for s in range(count):
            own, other = means[r], means[s]
            if own is None or other is None or own.shape != other.shape:
                continue
            v = spreads[r], spreads[s]
            distance[:, r, s] = _over_data(lambda rows: _distance(own, other, v, rows), len(own))  # noqa: B023
            alignment[:, r, s] = _over_data(lambda rows: _alignment(own, other, rows), len(own))  # noqa: B023
    dims = ("run", "other")
    return xr.Dataset(
        {
            "elbo": ("run", mean),
            "elbo_se": ("run", scores.std(1, ddof=1) / math.sqrt(_SCORES)),
            "below_best": ("run", below.mean(1)),
            "below_best_se": ("run", below.std(1, ddof=1) / math.sqrt(_SCORES)),
            "steps": ("run", [0 if result is None else result.steps for result in results]),
            "distance": (dims, distance[0]),
            "distance_se": (dims, distance[1]),
            "alignment": (dims, alignment[0]),
            "alignment_se": (dims, alignment[1]),
        },
        coords={"run": range(count), "other": range(count), "seed": ("run", list(seeds))},
        attrs={"elbo_of": elbo_of},
    )


def _batch(steps: TrainingSteps, validation_data: Any) -> tuple[Batch, str]:
    """Return the data that runs are compared on, and what they are."""
    data = steps.data
    if validation_data is not None:
        batch = data.validation(validation_data)
        size = batch.size
        part = batch if data.whole or size is None else batch.rows(slice(0, min(_DATA, size)))
        return part, "validation data"
    if data.whole or isinstance(data.guide, RowGuide):
        return data.source.all(), "training data"
    return data.source.example(data.source.some(_DATA)), "training data"


def _scored(steps: TrainingSteps, batch: Batch, result: FitResult) -> Array:
    """Return the ELBO of a run on several random numbers, in nats per datum."""
    if isinstance(steps.guide, RowGuide) and not steps.data.whole:
        elbo, error = result.history["elbo"][-1], result.history["elbo_std_error"][-1]
        # Numbers of this mean and standard error: those of its last epoch.
        spread = np.linspace(-1, 1, _SCORES)
        spread *= error * math.sqrt(_SCORES) / spread.std(ddof=1)
        found: Array = elbo + spread
        return found
    scores = [Validation(steps, batch, seed).score()[0] for seed in range(_SCORES)]
    return np.asarray(scores)


def _posterior(
    model: Program, guide: Program, steps: TrainingSteps, batch: Batch
) -> tuple[Array, Array]:
    """Return mean and variance of each unit of each datum's posterior, [N, U] each."""
    plate: Any = False if steps.data.whole and steps.data.structure is None else None
    arguments = batch.args or (dict(batch.kwargs),)
    evaluator, _ = prepare(model, guide, arguments, None, plate, 0)
    columns: list[Tensor] = []
    for rows in evaluator.data_blocks():
        size = rows.stop - rows.start
        values, _ = evaluator.draw(rows, _DRAWS, (Purpose.MANY_FITS, rows.start))
        names = [name for name in values if name in evaluator.structure.sites]
        units = [units_of(evaluator, name, values[name], _DRAWS, size)[0] for name in names]
        draws = torch.cat(units, -1).double()
        columns.append(torch.stack([draws.mean(0), draws.var(0)]))
    mean, variance = torch.cat(columns, 1).cpu().numpy()
    return mean, variance


def _over_data(estimate: Callable[[Any], float], count: int) -> tuple[float, float]:
    """Return an estimate of all data, and its standard error by leaving out parts of them."""
    rows = np.arange(count)
    value = estimate(rows)
    if count < 2 * _PARTS:
        return value, math.nan
    left = [estimate(rows[rows % _PARTS != part]) for part in range(_PARTS)]
    return value, math.sqrt((_PARTS - 1) * float(np.var(left)))


def _distance(own: Array, other: Array, variances: Sequence[Any], rows: Any) -> float:
    common = (variances[0][rows] + variances[1][rows]) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = (own[rows] - other[rows]) ** 2 / common - 2 / _DRAWS
    return (
        math.sqrt(max(float(np.nanmean(squares)), 0.0)) if np.isfinite(squares).any() else math.nan
    )


def _alignment(own: Array, other: Array, rows: Any) -> float:
    x = own[rows] - own[rows].mean(0)
    y = other[rows] - other[rows].mean(0)
    total = float((y**2).sum())
    if not total or len(rows) <= x.shape[1] + 1:
        return math.nan
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return 1 - float((left**2).sum()) / total
