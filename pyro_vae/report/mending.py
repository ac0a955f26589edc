"""What a repair and a sandwich say, in plain words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from pyro_vae.markup import plus_minus
from pyro_vae.report.findings import SMALL, SURE, Finding, Severity, by_severity

__all__ = ["of_repair", "of_sandwich"]

_HALF = 0.5  # of the data
_SURELY = 0.9  # with which an audit sees a share of wrong verdicts
_SHOWN = 10  # data that are named
# What is said of data that got a good verdict on a rung.
_RUNGS = {
    "importance": "the guide's answer with importance weights will do",
    "refined": "the guide's family will do once it is fitted to the datum: its encoder fell short",
    "full rank": "a Gaussian of the datum's own with any covariance is needed",
    "flow": "a normalizing flow of the datum's own is needed",
    "annealed": "annealed chains are needed: no fitted guide served",
    "chains": "long chains are needed: nothing cheaper served",
}


def of_repair(dataset: xr.Dataset) -> list[Finding]:
    """Return what the dataset of a :class:`~pyro_vae.Repair` says, the worst first."""
    return by_severity([_of_verdicts(dataset), *_of_rungs(dataset), *_of_audit(dataset)])


def _of_verdicts(dataset: xr.Dataset) -> Finding:
    good = np.asarray(dataset["good"].values, bool)
    numbers = {"good": float(good.mean())}
    if good.all():
        text = f"Every one of {good.size} posteriors can be trusted, as far as verdicts see"
        return Finding("verdicts", "good", text, numbers)
    bad = dataset["datum"].values[~good]
    names = ", ".join(map(str, bad[:_SHOWN])) + (", ..." if bad.size > _SHOWN else "")
    rungs = {str(name) for name in dataset["rung_name"].values}
    left = [rung for rung in ("annealed", "chains") if rung not in rungs]
    advice = "pv.sample_posterior with more draws and a longer warm-up is what is left."
    if left:
        named = " and ".join(map(repr, left))
        advice = f"pv.repair with {named} among its rungs climbs on; it takes longer."
    return Finding(
        "verdicts",
        "bad" if bad.size > _HALF * good.size else "warning",
        f"{bad.size} of {good.size} posteriors are not to be trusted: data {names}",
        numbers,
        advice,
    )


def _of_rungs(dataset: xr.Dataset) -> Iterator[Finding]:
    """Yield on which rung how many data ended well, and what that says."""
    good = np.asarray(dataset["good"].values, bool)
    for rung in map(str, dataset["rung_name"].values):
        share = float((good & (dataset["rung"].values == rung)).mean())
        if share:
            why = _RUNGS.get(rung, "this rung is needed")
            text = f"For {share:.0%} of the data {why} (rung {rung!r})"
            yield Finding("rungs", "note", text, {f"good on {rung!r}": share})


def _of_audit(dataset: xr.Dataset) -> Iterator[Finding]:
    audited, wrong = (int(dataset[name].sum()) for name in ("audited", "contradicted"))
    if wrong:
        yield Finding(
            "audit",
            "warning",
            f"Annealed chains contradicted {wrong} of {audited} good verdicts that were audited, "
            "and all good verdicts up to then were taken back",
            {"audited": audited, "contradicted": wrong},
            "A model whose posteriors hide modes from draws: begin with the rung 'annealed'.",
        )
    elif audited:
        share = 1 - (1 - _SURELY) ** (1 / audited)
        yield Finding(
            "audit",
            "good",
            f"Annealed chains contradicted none of {audited} good verdicts that were audited: were "
            f"{share:.0%} of all verdicts wrong, one would be with probability {_SURELY:g}",
            {"audited": audited, "contradicted": 0},
        )
    elif bool(dataset["good"].any()):
        text = "No good verdict was audited: a mode that no draw reaches would not be seen"
        advice = "audit= of pv.repair asks annealed chains about some of them."
        yield Finding("audit", "note", text, {"audited": 0}, advice)


def of_sandwich(dataset: xr.Dataset) -> list[Finding]:
    """Return what the dataset of a :class:`~pyro_vae.Sandwich` says, the worst first."""
    untrusted = np.asarray(dataset["untrusted"].values, bool)
    mean, error = float(dataset["width"].mean()), float(dataset.attrs["width_mean_se"])
    numbers = {"width": mean, "width_se": error, "untrusted": float(untrusted.sum())}
    text = f"log p(x) is known to within {plus_minus(mean, error)} nats per datum from both sides"
    severity: Severity = "good" if mean + SURE * error <= SMALL else "note"
    found = [Finding("log p(x)", severity, text, numbers)] if not untrusted.all() else []
    if untrusted.any():
        found.append(
            Finding(
                "log p(x)",
                "bad" if untrusted.mean() > _HALF else "warning",
                f"For {untrusted.sum()} of {untrusted.size} data the two bounds are not to be "
                "trusted: few chains carry them, or chains have not reached the posterior",
                {"untrusted": float(untrusted.sum())},
                "More steps (num_steps of pv.bdmc), or draws of longer chains (posterior=).",
            )
        )
    if not dataset.attrs.get("simulated", 0):
        text = "The upper bound is as good as the draws of chains that it starts at"
        found.append(Finding("upper bound", "note", text))
    return by_severity(found)
