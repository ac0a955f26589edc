"""What a comparison of models and a search for outliers say, in plain words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import xarray as xr

from pyro_vae.diagnostics.conformal import chance_of_as_many
from pyro_vae.markup import plus_minus
from pyro_vae.report.findings import FEW, RARE, Finding, by_severity

__all__ = ["of_models", "of_outliers"]

_FEW_DATA = 30  # below which a spread over data is rough
_SHOWN = 5  # data that are named
_FALSE = 0.1  # share of false alarms among the data that are called all the same
_SCORES = {
    "distance": "the encoder's features lie far from those of the training data",
    "log_evidence": "log p(x) is unlike that of the others",
    "predictive": "replicas of the datum, from latents of its own posterior, are unlike it",
}


def of_models(dataset: xr.Dataset, table: pd.DataFrame) -> list[Finding]:
    """Return what a comparison of models says, the worst first.

    Args:
        dataset: that of a :class:`~pyro_vae.ModelComparison`.
        table: its summary, from the best model.
    """
    verdicts = table["verdict"]
    best = str(table.index[verdicts == "best"][0])
    found = [_of_choice(table, best), *_of_size(dataset.sizes["datum"])]
    for model, row in table.iterrows():
        if row["verdict"] == "worse":
            found.append(
                Finding(
                    "models",
                    "note",
                    f"{model!r} predicts worse than {best!r}, by "
                    f"{plus_minus(-row['difference'], row['difference_se_new'])} nats per datum "
                    "for new data",
                    {key: float(row[key]) for key in ("difference", "difference_se_new")},
                )
            )
        if row["verdict"] == "unclear" and dataset.sizes["datum"] > 1:
            found.append(_of_unclear(str(model), row, dataset))
    return by_severity([*found, *_of_bounds(dataset, table)])


def _of_choice(table: pd.DataFrame, best: str) -> Finding:
    """Return which model predicts best, and which ones as well for all that the data say."""
    same = [str(name) for name in table.index[table["verdict"] == "not distinguishable"]]
    unclear = table.index[table["verdict"] == "unclear"]
    evidence = table["log_evidence"].astype(float)
    numbers = {f"log_evidence of {best!r}": float(evidence[best])}
    if not np.isfinite(evidence[best]):
        text = "No model allows all of these data: each gives some of them no density"
        return Finding("models", "bad", text, numbers, "Compare them on the data that all allow.")
    head = f"{best!r} gives these data the highest log p(x)"
    if same:
        gaps = table["difference"].astype(float)
        first = next(str(n) for n in table.index if str(n) == best or str(n) in same)
        others = ", ".join(map(repr, same))
        return Finding(
            "models",
            "note",
            f"{head}, but new data may not tell {others} from it; the first that predicts as well "
            f"as any, in the order that they were passed, is {first!r}",
            {**numbers, **{f"difference of {name!r}": float(gaps[name]) for name in same}},
            "More held-out data tell them apart, or there is nothing to tell.",
        )
    if len(unclear):
        return Finding("models", "note", f"{head}; not of all is it known how much lower", numbers)
    text = f"{head}, and all others predict new data worse, by 2 standard errors or more"
    return Finding("models", "good", text, numbers)


def _of_size(num_data: int) -> Iterator[Finding]:
    if num_data == 1:
        text = "One datum says nothing of new data: its difference is a log Bayes factor"
        yield Finding("data", "warning", text, {"data": 1.0}, "Compare models on more data.")
    elif num_data < _FEW_DATA:
        text = f"{num_data} data are few: the error for new data is rough"
        yield Finding("data", "note", text, {"data": float(num_data)})


def _of_unclear(model: str, row: pd.Series, dataset: xr.Dataset) -> Finding:
    return Finding(
        "models",
        "warning",
        f"Whether {model!r} predicts worse is not known: were its log p(x) as high as the best "
        f"model's on the {row['untrusted']} of {dataset.sizes['datum']} data where it is a bound "
        "that is not to be trusted, it would not be",
        {"untrusted": float(row["untrusted"]), "difference": float(row["difference"])},
        "Train its guide longer, or give it a richer family; pv.repair with the rung 'chains' says "
        "what its posteriors are like.",
    )


def _of_bounds(dataset: xr.Dataset, table: pd.DataFrame) -> Iterator[Finding]:
    """Yield for how many data log p(x) of each model is a bound that may be far too low."""
    num_data = dataset.sizes["datum"]
    bad = table["untrusted"].astype(int)
    if not bad.any():
        text = f"log p(x) of every model can be trusted for all {num_data} data"
        yield Finding("log p(x)", "good", text, {"untrusted": 0.0})
    for model, count in bad[bad > 0].items():
        yield Finding(
            "log p(x)",
            "warning" if count > FEW * num_data else "note",
            f"log p(x) of {model!r} is not to be trusted for {count} of {num_data} data: there it "
            "is a lower bound, and the model may be better than it seems",
            {f"untrusted of {model!r}": float(count)},
        )


def of_outliers(dataset: xr.Dataset) -> list[Finding]:
    """Return what a search for outliers says, the worst first.

    Args:
        dataset: that of :class:`~pyro_vae.Outliers`.
    """
    outlier = np.asarray(dataset["outlier"].values, bool)
    level, exact = float(dataset.attrs["level"]), bool(dataset.attrs["exact"])
    found, expected = int(outlier.sum()), level * outlier.size
    many = chance_of_as_many(found, outlier.size, dataset.sizes["calibration"], level)
    numbers = {"outliers": float(found), "expected": expected, "probability of as many": many}
    order = np.argsort(dataset["p_value"].values, kind="stable")[:_SHOWN]
    names = ", ".join(map(str, dataset["datum"].values[[k for k in order if outlier[k]]]))
    strange = f"; the strangest are {names}" if found else ""
    text = f"{found} of {outlier.size} data are outliers at level {level:g}{strange}"
    if not exact:
        findings = [Finding("outliers", "note", text, numbers), _of_training()]
    elif many <= RARE:
        text += f". Were all ordinary, about {expected:.1f} would be"
        advice = "Look at these data before posteriors or predictions of them are used."
        findings = [Finding("outliers", "bad", text, numbers, advice)]
    elif (sure := int((dataset["adjusted_p_value"].values <= _FALSE).sum())) > 0:
        text += (
            f". About {expected:.1f} would be if all were ordinary; but of the {sure} with an "
            f"adjusted p-value up to {_FALSE:g} at most that share is there by chance, on average"
        )
        numbers[f"adjusted_p_value up to {_FALSE:g}"] = float(sure)
        findings = [Finding("outliers", "warning", text, numbers, "Look at these data.")]
    else:
        text += f". That is no more than chance gives: about {expected:.1f} if all are ordinary"
        findings = [Finding("outliers", "good", text, numbers)]
    return by_severity([*findings, *_of_scores(dataset, outlier), *_of_log_p(dataset)])


def _of_training() -> Finding:
    return Finding(
        "outliers",
        "warning",
        "Data were ranked among training data, which the model was fitted to: ordinary new data "
        "look stranger than they are, and more of them are called outliers than the level says",
        {"exact": 0.0},
        "Pass calibration= of pv.outliers: ordinary data that model and guide were not fitted to.",
    )


def _of_scores(dataset: xr.Dataset, outlier: np.ndarray) -> Iterator[Finding]:
    """Yield which score most of the outliers owe their name to."""
    if not outlier.any():
        return
    values = dataset["p_value_of"].values[outlier]
    names = [str(name) for name in dataset["score"].values]
    counts = np.bincount(values.argmin(1), minlength=len(names))
    for place in np.argsort(-counts, kind="stable"):
        if counts[place]:
            name = names[place]
            why = _SCORES.get(name, f"the statistic {name.removeprefix('predictive_')!r} is off")
            text = f"Of {counts[place]} outliers the strangest score is {name!r}: {why}"
            yield Finding("scores", "note", text, {name: float(counts[place])})


def _of_log_p(dataset: xr.Dataset) -> Iterator[Finding]:
    bad = int((~np.asarray(dataset["log_evidence_good"].values, bool)).sum())
    if bad:
        yield Finding(
            "log p(x)",
            "note",
            f"log p(x) of {bad} of {dataset.sizes['datum']} data is not to be trusted; it is "
            "ranked among estimates of the same kind, so that p-values hold all the same",
            {"log_evidence_good": 1 - bad / dataset.sizes["datum"]},
        )
