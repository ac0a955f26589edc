"""What stands for log p(x) in a comparison: importance weights, annealed chains, or a formula."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.evaluation.ais import AnnealingSettings, lower_bound
from pyro_vae.evaluation.bounds import Bound
from pyro_vae.guides.exact import ExactGuide
from pyro_vae.particles.estimators import independent_difference
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import on_rows
from pyro_vae.programs.on_demand import OnDemand
from pyro_vae.programs.state import evaluation
from pyro_vae.programs.types import DataPlate, GivenValues, Program
from pyro_vae.sampling.density import Start
from pyro_vae.sampling.prepare import Ready, ready

Evidence: TypeAlias = Literal["auto", "iwae", "ais", "exact"]
Array: TypeAlias = NDArray[np.float64]

# Chains of a datum; and their steps: more only for the data that the first ones do not serve.
_CHAINS, _STEPS = 16, (128, 512)
_BELOW = 2.0  # standard errors of each, by which annealed chains must be worse to be left out
_CONTRADICTED = 5.0  # standard errors by which a bound contradicts one that is lower
_ABOVE = 6.0  # standard errors by which an ELBO contradicts an exact value
_ROUNDING = 1e-4  # of log p(x), and as many nats: what float32 may be off


@dataclass(frozen=True, slots=True)
class Source:
    """log p(x) of some data from elsewhere than importance weights.

    Attributes:
        rows: which data, [n].
        names: where each is from, [n].
        value: in nats, [n].
        std_error: calibrated, [n].
        skewness: of the chains' effects on the value, [n].
        ess: effective chains, [n]; nan of what no chains were run for.
        good: whether value and error are to be trusted, [n].
        count: C, chains of each; 1 of none.
    """

    rows: NDArray[np.int64]
    names: np.ndarray
    value: Array
    std_error: Array
    skewness: Array
    ess: Array
    good: NDArray[np.bool_]
    count: int


def check_evidence(evidence: object) -> None:
    """Raise ValueError for an unknown choice."""
    if evidence not in get_args(Evidence):
        raise ValueError(f"evidence={evidence!r}: one of {get_args(Evidence)} is needed")


# --- annealed chains


def annealed(
    model: Program,
    named: tuple[str, Program],
    batch: Batch,
    rows: Tensor,
    given: GivenValues | None,
    data_plate: DataPlate,
    seed: int,
    progress: bool,
) -> Source:
    """Return log p(x) of rows of the data by annealed chains from a guide, with its name.

    16 chains of 128 steps from the guide; where few of them carry the mean, of 512 steps; where
    they miss a mode, of 512 steps from the prior, whose chains reach all modes that it leads to.
    (Modes are not looked for where masks of the model leave no prior: all goes on from the guide.)

    Raises:
        ValueError: for what :func:`pyro_vae.ais` refuses.
    """
    of, guide = named
    best = _Best(len(rows))
    first, more = _STEPS
    tries: list[tuple[int, Start]] = [(first, "guide"), (more, "guide"), (more, "prior")]
    for steps, start in tries:
        todo = np.flatnonzero(~best.good & (best.missed == (start == "prior")))
        if not todo.size:
            continue
        some = rows[torch.as_tensor(todo)]
        with _ready(model, guide, batch, some, given, data_plate, seed) as (prepared, mine):
            bound = _bound(prepared, steps, start, progress)
        best.take(todo, bound, mine, "the prior" if start == "prior" else repr(of))
    return Source(rows.numpy(), best.names, **best.columns, good=best.good, count=_CHAINS)


class _Best:
    """Of several bounds on each datum's log p(x) the one to keep."""

    def __init__(self, num_data: int) -> None:
        self.names = np.full(num_data, "", dtype=object)
        numbers = ("value", "std_error", "skewness", "ess")
        self.columns = {name: np.full(num_data, np.nan) for name in numbers}
        self.good, self.missed = np.zeros((2, num_data), dtype=bool)

    def take(self, rows: NDArray[np.int64], bound: Bound, mine: Tensor, of: str) -> None:
        """Take those of a bound's data `mine` that are better than what rows have.

        Better is a trusted bound, but for one clearly below a value that is there: all are bounds
        from below, and chains that give less have missed a part, however alike their weights are.
        Of untrusted ones the higher is kept.
        """
        found = {name: getattr(bound, name)[mine].numpy(force=True) for name in self.columns}
        value, before = found["value"], self.columns["value"][rows]
        errors = found["std_error"], self.columns["std_error"][rows]
        error = np.hypot(*(np.nan_to_num(each) for each in errors))
        good = ~bound.untrusted[mine].numpy() & ~(value < before - _CONTRADICTED * error)
        kept = good | (self.names[rows] == "") | (value > before)
        for name, column in self.columns.items():
            column[rows[kept]] = found[name][kept]
        self.names[rows[kept]] = f"{bound.name} from {of}"
        self.good[rows] = good
        self.missed[rows] = False if bound.missed is None else bound.missed[mine].numpy(force=True)


@contextlib.contextmanager
def _ready(
    model: Program,
    guide: Program,
    batch: Batch,
    rows: Tensor,
    given: GivenValues | None,
    data_plate: DataPlate,
    seed: int,
) -> Iterator[tuple[Ready, Tensor]]:
    """Yield what chains of some rows need, and where these rows are among its data.

    Of a model that does not take fewer data, chains of all of them.
    """
    if batch.size is None or data_plate is False or len(rows) == batch.size:
        yield ready(model, guide, (batch,), given, data_plate, seed, "auto"), rows
        return
    with on_rows(guide, rows):
        yield (
            ready(model, guide, (batch.rows(rows),), given, data_plate, seed, "auto"),
            torch.arange(len(rows)),
        )


def _bound(prepared: Ready, num_steps: int, start: Start, progress: bool) -> Bound:
    settings = AnnealingSettings(_CHAINS, num_steps, start, "adaptive")
    total = num_steps * prepared.evaluator.num_data
    look: dict[str, Any] = {"unit": "step", "unit_scale": True, "delay": 1.0}
    with tqdm(total=total, desc="annealed chains", disable=not progress, **look) as bar:
        annealers = settings.annealers(prepared)
        return lower_bound(f"AIS-{num_steps}", annealers, prepared, bar.update)


# --- exact values


def exact(
    model: Program, batch: Batch, evaluator: Evaluator, data_plate: DataPlate, *, fixed: bool
) -> Source:
    """Return log p(x) as a formula of the model has it, or a sum over all its discrete latents.

    Args:
        model: the model as it was passed.
        batch: the data.
        evaluator: of the model with any guide.
        data_plate: as in :func:`pyro_vae.log_weights`.
        fixed: whether global latents are fixed.

    Raises:
        ValueError: where there is no such formula, and for one that does not give a finite number
            for each datum.
    """
    num_data, structure = evaluator.num_data, evaluator.structure
    latents = (*structure.local_latents, *structure.global_latents)
    if callable(formula := getattr(model, "log_evidence", None)) and not fixed:
        name = f"{type(model).__name__}.log_evidence"
        with torch.no_grad(), evaluation(model):
            if isinstance(batch, OnDemand):
                parts = (batch.rows(rows) for rows in batch.parts())
                found = [torch.as_tensor(formula(*part.args, **part.kwargs)) for part in parts]
                value = torch.cat(found).double().cpu()
            else:
                value = torch.as_tensor(formula(*batch.args, **batch.kwargs)).double().cpu()
        if value.shape != (num_data,) or not bool(value.isfinite().all()):
            raise ValueError(
                f"evidence='exact': {name} returned shape {list(value.shape)} with "
                f"{int(value.isfinite().sum())} finite numbers; one for each of {num_data} data is "
                "needed"
            )
    elif latents and all(site.enumerable for site in latents):
        name = "the sum over all values of discrete latents"
        program = evaluator.pair.model
        guide = ExactGuide(program, example=evaluator.pair.batch, data_plate=data_plate)
        scored = Evaluator(program, guide, batch, data_plate=data_plate, seed=0)
        value = torch.cat([chunk.weights.total[0] for chunk in scored.chunks(1)]).double().cpu()
    else:
        why = "its global latents are fixed" if fixed else "it has no method log_evidence(*batch)"
        raise ValueError(
            f"evidence='exact': log p(x) of this model is not known by a formula: {why}, and its "
            "latents are not all discrete. Give the model such a method, [N] in nats, or take "
            "evidence='auto'"
        )
    zero, nan = np.zeros(num_data), np.full(num_data, np.nan)
    names = np.full(num_data, f"exact, by {name}", dtype=object)
    good = np.ones(num_data, dtype=bool)
    return Source(np.arange(num_data), names, value.numpy(), zero, zero, nan, good, 1)


def check_exact(dataset: xr.Dataset, source: Source) -> None:
    """Raise ValueError for exact values below an ELBO: they are not log p(x) of this model."""
    error = _ABOVE * dataset["elbo_se"].values + _ROUNDING * (1 + np.abs(source.value))
    low = (source.value < dataset["elbo"].values - error).any(0)
    if low.any():
        raise ValueError(
            f"evidence='exact': log p(x) {source.names[0].removeprefix('exact, ')} lies below an "
            f"ELBO for {low.sum()} of {low.size} data ({np.flatnonzero(low)[:5].tolist()}), and so "
            "is not that of this model on these data"
        )


# --- into the dataset


def worse(dataset: xr.Dataset, source: Source) -> NDArray[np.bool_]:
    """Return for which of its data a source's bound is clearly below that of importance weights."""
    value, error = (dataset[f"log_evidence{end}"].values[source.rows] for end in ("", "_se"))
    best = value - _BELOW * np.nan_to_num(error)
    return np.asarray(source.value + _BELOW * np.nan_to_num(source.std_error) < best)


def take(
    dataset: xr.Dataset, source: Source, references: Mapping[str, str], evidence: Evidence
) -> None:
    """Put log p(x) of a source into a comparison's dataset, and the gaps that follow from it.

    With "auto", but for data whose bound by importance weights is clearly higher.
    """
    count = dataset.attrs["num_particles"]
    if evidence != "exact":
        _note_annealed(dataset, source, count)
    chosen = np.ones(len(source.rows), dtype=bool)
    if evidence == "auto":
        chosen = ~worse(dataset, source)
    rows = source.rows[chosen]
    # Told as of K particles: its square over K is then that of the chains.
    skewness = source.skewness * (count / source.count) ** 0.5
    columns = {
        "log_evidence": source.value,
        "log_evidence_se": source.std_error,
        "log_evidence_skewness": skewness,
        "log_evidence_ess": source.ess,
        "log_evidence_pareto_k": np.full(len(source.rows), np.nan),
        "log_evidence_tail_share": np.full(len(source.rows), np.nan),
        "log_evidence_good": source.good,
        "evidence_from": source.names,
    }
    for name, column in columns.items():
        dataset[name] = ("datum", _with(dataset[name].values, rows, column[chosen]))
    for number, guide in enumerate(dataset["guide"].values):
        if (best := references.get(str(guide))) is None:
            continue
        gap, error, skew = _minus_elbo(dataset, best, source)
        for end, column in (("", gap), ("_se", error), ("_skewness", skew)):
            gaps = dataset[f"approximation_gap{end}"].values.copy()
            gaps[number, rows] = column[chosen]
            dataset[f"approximation_gap{end}"] = (("guide", "datum"), gaps)
    dataset.attrs["log_evidence_from"] = _sources_text(dataset)


def _with(column: np.ndarray, rows: NDArray[np.int64], values: np.ndarray) -> np.ndarray:
    """Return a column with other values in some rows; it may be a view of another variable."""
    column = column.copy()
    column[rows] = values
    return column


def _note_annealed(dataset: xr.Dataset, source: Source, count: int) -> None:
    """Put the bound of annealed chains into a dataset, and how far it is above each ELBO."""
    num_guides, num_data = dataset["elbo"].shape
    for name, column in (("", source.value), ("_se", source.std_error), ("_ess", source.ess)):
        every = np.full(num_data, np.nan)
        every[source.rows] = column
        dataset[f"ais{name}"] = ("datum", every)
    good = np.zeros(num_data, dtype=bool)
    dataset["ais_good"] = ("datum", _with(good, source.rows, source.good))
    found = [_minus_elbo(dataset, str(guide), source) for guide in dataset["guide"].values]
    for end, of_guides in zip(("", "_se", "_skewness"), zip(*found, strict=True), strict=True):
        every = np.full((num_guides, num_data), np.nan)
        every[:, source.rows] = np.stack(of_guides)
        dataset[f"ais_minus_elbo{end}"] = (("guide", "datum"), every)


def _minus_elbo(dataset: xr.Dataset, guide: str, source: Source) -> tuple[Array, Array, Array]:
    """Return how far a source is above a guide's ELBO, [n], with error and skewness."""
    count = dataset.attrs["num_particles"]
    elbo, error, skew = (
        dataset[f"elbo{end}"].sel(guide=guide).values[source.rows]
        for end in ("", "_se", "_skewness")
    )
    pairs = ((source.std_error, error), (source.skewness, skew))
    errors, skews = ((torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)
    found = independent_difference(errors, skews, (source.count, count), count)
    return source.value - elbo, *(each.numpy() for each in found)


def _sources_text(dataset: xr.Dataset) -> str:
    """Return where log p(x) is from, and for how many data where that differs."""
    counts = Counter(dataset["evidence_from"].values.tolist())
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} for {number} data" for name, number in counts.items())
