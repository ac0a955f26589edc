"""The result of compare_models: paired differences with two errors, a table, a figure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import xarray as xr

from pyro_vae import markup
from pyro_vae.particles.estimators import mean_std_error
from pyro_vae.report import choosing, sections
from pyro_vae.report.findings import Finding
from pyro_vae.report.page import page, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Standard errors by which a model must be worse than the best one to be told from it.
_APART = 2.0
_FEW = 30  # data, below which a spread over data is rough


@dataclass(frozen=True)
class ModelComparison:
    """The result of :func:`compare_models`.

    Attributes:
        dataset: dims (model, datum). ``log_evidence``, log p(x) in nats, with its Monte Carlo
            standard error ``log_evidence_se`` (value ± 1.96 of them covers with probability
            0.95); ``good``, whether both are to be trusted, else the value is a lower bound that
            may be far too low; ``source``, the rung of :func:`pyro_vae.repair` that it is from, or
            "exact" where every latent is summed out. Coordinate ``given`` says of each model which
            global latents are fixed.
    """

    dataset: xr.Dataset

    @property
    def best(self) -> str:
        """The model with the highest mean log p(x) of these data."""
        return str(self._models[int(np.argmax(self._values.mean(1)))])

    @property
    def indistinguishable(self) -> tuple[str, ...]:
        """The models that new data may not tell from the best one, which is among them.

        In the order that they were passed. Those of the verdict "unclear" are not among them.
        """
        verdicts = self.summary()["verdict"]
        return tuple(verdicts.index[verdicts.isin(["best", "not distinguishable"])])

    @property
    def preferred(self) -> str:
        """The first, in the order that they were passed, that is not distinguishable.

        The simplest that predicts as well as any, where the simplest come first.
        """
        return self.indistinguishable[0]

    def summary(self, reference: str | None = None) -> pd.DataFrame:
        """Return a row per model: means over the data, in nats per datum.

        ``log_evidence`` with its Monte Carlo error ``log_evidence_se``; ``difference`` from the
        reference, paired over the data, with two standard errors: ``difference_se``, the Monte
        Carlo one, for these data, and ``difference_se_new``, that of the expected difference for
        new data (nan from one datum); ``untrusted``, for how many data log p(x) is a bound that is
        not to be trusted; and the ``verdict``: "worse" where the difference is below zero by 2 of
        ``difference_se_new`` (and "better" where it is above), else "not distinguishable";
        "unclear" where it would not be worse if it were the reference's equal on its untrusted
        data, and from one datum, whose difference is a log Bayes factor.

        Args:
            reference: the model that differences are from; the best one by default.

        Raises:
            ValueError: for a reference that is no model.
        """
        if reference is None:
            reference = self.best
        elif reference not in self._models:
            raise ValueError(f"reference={reference!r}: the models are {self._models}")
        at = self._models.index(reference)
        rows = [self._row(number, at) for number in range(len(self._models))]
        return pd.DataFrame(rows, index=pd.Index(self._models, name="model"))

    def plot(self, reference: str | None = None, ax: Axes | None = None) -> Axes:
        """Draw the differences with both errors; needs the extra ``plots``.

        Args:
            reference: as in :meth:`summary`.
            ax: where to draw; new axes if None.
        """
        from pyro_vae.plots.models import plot_model_differences

        table = self.summary(reference)
        return plot_model_differences(
            {str(name): table[name].to_numpy() for name in table.columns},
            self._models,
            self.best if reference is None else reference,
            num_data=self.dataset.sizes["datum"],
            ax=ax,
        )

    def findings(self) -> list[Finding]:
        """Return what the numbers say in plain words, the worst first."""
        return choosing.of_models(self.dataset, self.summary())

    def to_html(self, path: str | Path | None = None, title: str = "Models compared") -> str:
        """Return a page of findings, a table and a figure; needs the extra ``plots``.

        Args:
            path: a file to write it to as well.
            title: of the page.
        """
        section = sections.of_models(self.dataset, self.summary())
        return written(page(title, [section]), path)

    @property
    def _models(self) -> list[str]:
        return list(map(str, self.dataset["model"].values))

    @property
    def _values(self) -> np.ndarray:
        return np.asarray(self.dataset["log_evidence"].values)

    def _row(self, model: int, reference: int) -> dict[str, float | int | str]:
        values, errors = self._values, self.dataset["log_evidence_se"].values
        bad = ~self.dataset["good"].values
        row: dict[str, float | int | str] = {
            "log_evidence": float(values[model].mean()),
            "log_evidence_se": _of_mean(errors[model]),
        }
        same = model == reference
        with np.errstate(invalid="ignore"):  # a datum that neither model allows
            difference = np.zeros_like(values[0]) if same else values[model] - values[reference]
        error = np.zeros_like(difference) if same else np.hypot(errors[model], errors[reference])
        if not same:
            verdict = _verdict(difference, error, bad[model], bad[reference])
        else:
            verdict = "best" if self.best == self._models[model] else "reference"
        row["difference"], row["difference_se"] = float(difference.mean()), _of_mean(error)
        row["difference_se_new"] = 0.0 if same else _error_for_new(difference, error)
        return {**row, "untrusted": int(bad[model].sum()), "verdict": verdict}

    def __repr__(self) -> str:
        rows, notes = self._rows_and_notes()
        return "\n".join([markup.text_table(rows), *notes])

    def _repr_html_(self) -> str:
        rows, notes = self._rows_and_notes()
        return markup.table(rows) + markup.paragraphs(notes)

    def _rows_and_notes(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """Return the table, its first row the head, and what stands below it."""
        table = self.summary()
        rows: list[tuple[str, ...]] = [
            ("model", "log p(x)", "difference", "these data", "new data", "untrusted", "verdict")
        ]
        for name, row in table.iterrows():
            numbers = (f"{row[n]:.4f}" for n in ("log_evidence", "difference"))
            errors = (f"± {row[n]:.4f}" for n in ("difference_se", "difference_se_new"))
            rows.append((str(name), *numbers, *errors, f"{row['untrusted']}", str(row["verdict"])))
        return rows, list(self._notes(table))

    def _notes(self, table: pd.DataFrame) -> Iterator[str]:
        """Yield what stands below the table."""
        data = self.dataset
        num_data = data.sizes["datum"]
        yield (
            f"{num_data} data; nats per datum; differences from {self.best!r}, with one standard "
            "error: Monte Carlo, for these data; over data, for new ones"
        )
        if num_data < _FEW:
            yield (
                f"{num_data} data are few: the error for new data is rough"
                if num_data > 1
                else "one datum says nothing of new data: its difference is a log Bayes factor"
            )
        others = [name for name in self.indistinguishable if name != self.best]
        if others:
            yield (
                f"not distinguishable from it for new data, by {_APART:g} standard errors: "
                f"{', '.join(map(repr, others))}; the first in your order is {self.preferred!r}"
            )
        for name, given in zip(self._models, data["given"].values, strict=True):
            sources = Counter(data["source"].sel(model=name).values.tolist())
            parts = ", ".join(f"{source} ({count})" for source, count in sources.items())
            yield f"{name}: log p(x) by {parts}" + (f"; given {given}" if given else "")
        for name, count in zip(self._models, np.isneginf(self._values).sum(1), strict=True):
            if count:
                yield (
                    f"{name}: no draw of its latents gives {count} of {num_data} data a density: "
                    "log p(x) is minus infinity there, unless all draws miss where it is not"
                )
        for model, row in table[table["untrusted"] > 0].iterrows():
            yield (
                f"{model}: for {row['untrusted']} of {num_data} data log p(x) is a lower bound "
                "that is not to be trusted, and may be far higher"
                + (": the difference may be the bound's" if row["verdict"] == "unclear" else "")
            )


def _verdict(
    difference: np.ndarray, error: np.ndarray, bad: np.ndarray, bad_reference: np.ndarray
) -> str:
    """Return what differences from a reference say, where bounds of either may be too low."""
    if np.isnan(difference).any() or len(difference) < 2:  # one says nothing of new data
        return "unclear"
    sign = _sign(difference, error)
    # Bounds that are too low make a model seem worse than it is, by an unknown amount.
    loose = bad if sign < 0 else bad_reference
    mended = np.where(loose & (sign * difference > 0), 0.0, difference)
    if sign and _sign(mended, error) != sign:
        return "unclear"
    return {-1: "worse", 0: "not distinguishable", 1: "better"}[sign]


def _sign(difference: np.ndarray, error: np.ndarray) -> int:
    """Return whether a mean is below or above zero by 2 standard errors for new data: -1, 0, 1."""
    mean = float(difference.mean())
    if np.isinf(mean):
        return 1 if mean > 0 else -1
    apart = abs(mean) > _APART * _error_for_new(difference, error)
    return int(np.sign(mean)) if apart else 0


def _error_for_new(difference: np.ndarray, error: np.ndarray) -> float:
    """Return the standard error of the expected difference: that over data, nan from one datum.

    Monte Carlo errors are part of the spread over data; of few data it may be less than they are.
    """
    if len(difference) < 2 or not np.isfinite(difference).all():
        return math.nan
    over_data = float(difference.std(ddof=1)) / len(difference) ** 0.5
    return max(over_data, _of_mean(error))


def _of_mean(errors: np.ndarray) -> float:
    return float(mean_std_error(torch.tensor(errors)))
