r"""What the numbers of a comparison say, in plain words: the encoder, the family, or neither.

Each finding follows from numbers of the dataset by a rule with a stated threshold; none is of an
opinion. A gap is nats of KL(q, posterior): 0.1 of them is a distance of at most 0.22 in total
variation (Pinsker's inequality).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
import xarray as xr

from pyro_vae.diagnostics.verdict import FEWEST_EFFECTIVE, LIGHT_TAIL
from pyro_vae.markup import plus_minus

__all__ = ["Finding", "of_comparison", "of_generalization"]

Severity: TypeAlias = Literal["bad", "warning", "note", "good"]
SEVERITIES: tuple[Severity, ...] = ("bad", "warning", "note", "good")

SMALL = 0.1  # nats per datum: a gap up to it is no loss worth speaking of
SURE = 2.0  # standard errors that a number must be away from a threshold
RARE = 0.01  # probability below which more outliers than expected are no chance
FEW = 0.05  # share of the data that may be in doubt before a conclusion is
_GROWS = 2.0  # times the training data's gap, from which on an encoder does not generalize
_TENTH, _HALF, _FEWEST_DATA = 0.1, 0.5, 20  # a tenth of so many data holds half of the gap
_SHOWN = 5  # data that are named

# For the page: what the rules compare with what.
THRESHOLDS = {
    "a gap is small": f"up to {SMALL} nats per datum",
    "a number is clear of a threshold": f"{SURE:g} standard errors away",
    "a conclusion is open": f"more than {FEW:.0%} of the data are in doubt",
    "an encoder does not generalize": (
        f"held-out data lose more than {_GROWS:g} times what the training data do"
    ),
    "few data hold the loss": f"{_TENTH:.0%} of {_FEWEST_DATA} or more data hold half of it",
    "weights are good": (
        f"{FEWEST_EFFECTIVE} or more are effective and no heavy tail carries more than "
        f"{LIGHT_TAIL:g} times its share"
    ),
    "ranks are not uniform, a coverage is off": (
        "a calibrated guide would be rejected, by any of them, with probability error_rate"
    ),
    "a model predicts worse": f"{SURE:g} standard errors, those for new data",
    "there are outliers": (
        f"of as many ordinary data so many would be called with probability {RARE:g} or less"
    ),
}


@dataclass(frozen=True)
class Finding:
    """A sentence that follows from numbers.

    Attributes:
        about: what it is of, such as "encoder" or "log p(x)".
        severity: "bad", "warning" (a number is not to be relied on), "note" or "good".
        text: what was found.
        evidence: the numbers that it follows from, by their names in the dataset or summary.
        advice: what to do next; "" where there is nothing.
    """

    about: str
    severity: Severity
    text: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    advice: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, [f"{self.severity}: {self.text}.", self.advice]))


def by_severity(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings, the worst first."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def of_comparison(dataset: xr.Dataset, table: pd.DataFrame) -> list[Finding]:
    """Return what a comparison says, the worst first.

    Args:
        dataset: that of a :class:`~pyro_vae.Comparison`.
        table: its summary.
    """
    found = [_of_evidence(dataset), *_of_convergence(dataset)]
    references = [str(name) for name in dataset["reference"].values]
    for guide, reference in zip(map(str, dataset["guide"].values), references, strict=True):
        one = _Guide.of(dataset, table, guide, reference)
        if one.outside:
            found.append(_of_outside(one))
        elif guide != reference:
            found += [*_of_gaps(one), *_of_concentration(dataset, one)]
        elif references.count(guide) == 1:  # else its users' findings say what its family loses
            found += _of_family_alone(one)
        found.append(_of_weights(dataset, guide))
    return by_severity(found)


def of_generalization(
    train: pd.DataFrame, test: pd.DataFrame, names: tuple[str, str] = ("train", "test")
) -> list[Finding]:
    """Return whether encoders lose more on held-out data than on those they were trained on.

    Args:
        train: summary of a comparison on training data.
        test: that of one on held-out data; guides that are in both are looked at.
        names: what the parts are called.
    """
    found = []
    for guide in test.index.intersection(train.index):
        (seen, seen_se), (new, new_se) = (
            tuple(part.loc[guide, ["amortization_gap", "amortization_gap_se"]])
            for part in (train, test)
        )
        clear = new - seen > SURE * np.hypot(seen_se, new_se) and new - SURE * new_se > SMALL
        if not clear or new <= _GROWS * seen:
            continue
        found.append(
            Finding(
                "generalization",
                "bad",
                f"The encoder of {guide!r} loses {plus_minus(new, new_se)} nats per datum on "
                f"{names[1]} and {plus_minus(seen, seen_se)} on {names[0]}: it does not generalize",
                {f"amortization_gap of {names[0]}": seen, f"amortization_gap of {names[1]}": new},
                "More training data, a smaller encoder or one with dropout, or training that stops "
                "by held-out data (validation_data and patience of pv.fit) would help most.",
            )
        )
    return found


@dataclass(frozen=True)
class _Guide:
    """The numbers of one guide that rules look at; gaps and errors in nats per datum."""

    name: str
    reference: str
    family: float
    family_se: float
    encoder: float
    encoder_se: float
    total: float
    total_se: float
    num_data: int
    untrusted: int
    unconverged: int
    outside: int
    better: tuple[str, float] | None

    @classmethod
    def of(cls, dataset: xr.Dataset, table: pd.DataFrame, name: str, reference: str) -> _Guide:
        row = table.loc[name].to_dict()
        names = ("approximation_gap", "amortization_gap")
        family, encoder = (float(row[gap]) for gap in names)
        family_se, encoder_se = (float(row[f"{gap}_se"]) for gap in names)
        total, total_se = family + encoder, family_se + encoder_se
        if np.isnan(total):
            total = float(row["log_evidence"] - row["elbo"])
            total_se = float(row["log_evidence_se"] + row["elbo_se"])
        other = table[table.index == dataset["reference"].values]["approximation_gap"].dropna()
        best = None
        if len(other) and other.idxmin() != reference:
            best = str(other.idxmin()), float(other.min())
        return cls(
            name,
            reference,
            family,
            family_se,
            encoder,
            encoder_se,
            total,
            total_se,
            num_data=dataset.sizes["datum"],
            untrusted=int((~dataset["log_evidence_good"]).sum()),
            unconverged=int((~dataset["converged"].sel(guide=name)).sum()),
            outside=int(np.isneginf(dataset["elbo"].sel(guide=name).values).sum()),
            better=best,
        )

    @property
    def evidence_open(self) -> bool:
        return self.untrusted > FEW * self.num_data

    @property
    def split_open(self) -> bool:
        return self.unconverged > FEW * self.num_data

    @property
    def is_below(self) -> bool:
        """Whether the refined guide, which should be the best, is clearly below this one."""
        return self.encoder + SURE * self.encoder_se < -SMALL

    @property
    def numbers(self) -> dict[str, float]:
        return {
            "approximation_gap": self.family,
            "approximation_gap_se": self.family_se,
            "amortization_gap": self.encoder,
            "amortization_gap_se": self.encoder_se,
            "data with untrusted log p(x)": self.untrusted,
            "data not converged": self.unconverged,
        }


def _loses(value: float, error: float) -> bool | None:
    """Return whether a gap is above the small one, None where its error leaves that open."""
    if value - SURE * error > SMALL:
        return True
    return False if value + SURE * error <= SMALL else None


def _of_gaps(one: _Guide) -> Iterator[Finding]:
    """Yield what a guide loses, and by which of its two parts."""
    if np.isnan(one.encoder):
        yield Finding(
            "gap",
            "note",
            f"{one.name!r} loses {plus_minus(one.total, one.total_se)} nats per datum to log p(x), "
            "and no refined guide says whether by its family or by its encoder",
            {"log_evidence - elbo": one.total},
            "Name one by reference=, or write the guide by one of pv.families.",
        )
        return
    family, encoder = _loses(one.family, one.family_se), _loses(one.encoder, one.encoder_se)
    doubts = one.evidence_open or one.split_open or one.is_below
    if encoder is False and family is False and not doubts:
        yield Finding(
            "gap",
            "good",
            f"{one.name!r} loses {plus_minus(one.total, one.total_se)} nats per datum to log p(x): "
            "neither its encoder nor its family loses more than a little",
            one.numbers,
        )
        return
    yield _of_encoder(one, encoder)
    yield _of_family(one, family)


def _of_encoder(one: _Guide, loses: bool | None) -> Finding:
    amount = f"{plus_minus(one.encoder, one.encoder_se)} nats per datum"
    text = (
        f"The encoder of {one.name!r} loses {amount} against {one.reference!r}, the same family "
        "fitted to each datum alone"
    )
    open_text = (
        f"; at least that, as {one.unconverged} of {one.num_data} of these fits have not converged"
    )
    limit = open_text if one.unconverged else ""
    if one.is_below:
        return Finding(
            "encoder",
            "warning",
            f"{one.reference!r}, fitted to each datum alone, has a lower ELBO than {one.name!r}, "
            f"by {plus_minus(-one.encoder, one.encoder_se)} nats per datum: it is not at its "
            "optimum, and the split into encoder and family is not to be relied on",
            one.numbers,
            "Raise max_steps of pv.compare.",
        )
    if loses:
        share = one.encoder / (one.encoder + max(0.0, one.family))
        main = one.encoder - one.family > SURE * (one.encoder_se + one.family_se)
        most = "at most " if one.evidence_open else ""
        doubt = ", for log p(x) may be higher" if one.evidence_open else ""
        return Finding(
            "encoder",
            "bad" if main and not one.evidence_open else "warning",
            f"{text}: {most}{share:.0%} of what it loses to log p(x){doubt}{limit}",
            {**one.numbers, "share of the encoder": share},
            "A larger encoder, longer training or more training data close this gap; pv.refine and "
            "pv.repair close it now, for the data at hand.",
        )
    if loses is None:
        text = f"{text}: within its error of {SMALL} nats, so that it may be small or not{limit}"
        return Finding("encoder", "note", text, one.numbers, "Raise num_particles of pv.compare.")
    severity: Severity = "warning" if one.split_open else "good"
    return Finding("encoder", severity, f"{text}: little{limit}", one.numbers)


def _of_family(one: _Guide, loses: bool | None) -> Finding:
    amount = f"{plus_minus(one.family, one.family_se)} nats per datum"
    text = f"The family of {one.name!r} loses {amount}, fitted to each datum alone"
    limits = []
    if one.untrusted:
        limits.append(
            f"more than that where log p(x) is not to be trusted ({one.untrusted} of "
            f"{one.num_data} data)"
        )
    if one.unconverged:
        limits.append(
            f"less than that where the fit has not converged ({one.unconverged} of "
            f"{one.num_data} data)"
        )
    limit = f"; it may be {', and '.join(limits)}" if limits else ""
    if loses:
        main = one.family - one.encoder > SURE * (one.encoder_se + one.family_se)
        share = one.family / (one.family + max(0.0, one.encoder))
        advice = (
            "A richer family closes this gap, and no longer training does: "
            "pv.families.FullRankNormal() where latents are correlated, pv.families.Flow() else. "
            "Pass them to pv.compare to see what they would gain."
        )
        if one.better is not None and one.better[1] < one.family - SURE * one.family_se:
            name, value = one.better
            advice = f"A richer family closes this gap: that of {name!r} loses {value:.3f} nats."
        return Finding(
            "family",
            "bad" if main and not one.split_open else "warning",
            f"{text}: {share:.0%} of what {one.name!r} loses to log p(x){limit}",
            {**one.numbers, "share of the family": share},
            advice,
        )
    if loses is None:
        text = f"{text}: within its error of {SMALL} nats, so that it may be small or not{limit}"
        return Finding("family", "note", text, one.numbers, "Raise num_particles of pv.compare.")
    severity: Severity = "warning" if one.evidence_open else "good"
    return Finding("family", severity, f"{text}: little{limit}", one.numbers)


def _of_family_alone(one: _Guide) -> Iterator[Finding]:
    if not np.isnan(one.family):
        yield _of_family(one, _loses(one.family, one.family_se))


def _of_outside(one: _Guide) -> Finding:
    return Finding(
        "gap",
        "bad",
        f"For {one.outside} of {one.num_data} data draws of {one.name!r} fall where the model has "
        "no density, and its ELBO is minus infinity",
        {"data with an ELBO of minus infinity": one.outside},
        "The guide must draw within the support of the model's latents and of its likelihood.",
    )


def _of_evidence(dataset: xr.Dataset) -> Finding:
    num_data, bad = dataset.sizes["datum"], int((~dataset["log_evidence_good"]).sum())
    numbers = {"log_evidence_good": 1 - bad / num_data}
    if not bad:
        text = f"log p(x) and its standard error can be trusted for all {num_data} data"
        return Finding("log p(x)", "good", text, numbers)
    advice = "pv.bdmc bounds these from both sides, and pv.repair looks for what they miss."
    if dataset.attrs.get("evidence") == "iwae":
        advice = "evidence='auto' of pv.compare runs annealed chains for these."
    return Finding(
        "log p(x)",
        "bad" if bad > _HALF * num_data else "warning",
        f"log p(x) is not to be trusted for {bad} of {num_data} data, nor its standard error: it "
        "is a lower bound made of too few effective weights or of a heavy tail",
        numbers,
        advice,
    )


def _of_convergence(dataset: xr.Dataset) -> Iterator[Finding]:
    """Yield for how many data each refined guide is at its optimum."""
    for guide in map(str, dataset["guide"].values):
        if str(dataset["reference"].sel(guide=guide).item()) != guide:
            continue
        num_data = dataset.sizes["datum"]
        some = int((~dataset["converged"].sel(guide=guide)).sum())
        numbers = {"not_converged": float(some)}
        if not some:
            text = f"{guide!r}, fitted to each datum alone, has converged for all {num_data} data"
            yield Finding("convergence", "good", text, numbers)
            continue
        yield Finding(
            "convergence",
            "warning",
            f"{guide!r}, fitted to each datum alone, has not converged for {some} of {num_data} "
            "data: the loss of its family is overstated there, and that of encoders understated",
            numbers,
            "Raise max_steps of pv.compare.",
        )


def _of_weights(dataset: xr.Dataset, guide: str) -> Finding:
    """Return whether importance weights serve, by k-hat beside the effective sample size."""
    one, count = dataset.sel(guide=guide), int(dataset.attrs["num_particles"])
    k_hat, ess = (np.asarray(one[name].values, float) for name in ("pareto_k", "ess"))
    good, num_data = np.asarray(one["good"].values, bool), dataset.sizes["datum"]
    threshold = float(dataset.attrs["pareto_k_threshold"])
    heavy, few = k_hat > threshold, ess < FEWEST_EFFECTIVE
    text = (
        f"Importance weights through {guide!r} make a posterior that can be trusted for "
        f"{good.sum()} of {num_data} data"
    )
    parts = []
    if few.any():
        parts.append(f"fewer than {FEWEST_EFFECTIVE} of {count} are effective for {few.sum()}")
    if heavy.any():
        parts.append(f"k-hat is above {threshold:.2f} for {heavy.sum()}")
    if (both := int((heavy & good).sum())) > 0:
        parts.append(f"{both} of these are good all the same: their tail carries hardly any weight")
    if (few & ~heavy).any():
        parts.append(f"{int((few & ~heavy).sum())} have a low k-hat and too few effective weights")
    advice = ""
    if not good.all():
        advice = "pv.repair gives these data a posterior of their own."
        if count < FEWEST_EFFECTIVE:
            advice = f"num_particles={count} can give no posterior a good verdict: raise it."
    numbers = {
        "good": float(good.mean()),
        "data with k-hat above its threshold": float(heavy.sum()),
        "data with too few effective weights": float(few.sum()),
    }
    severity: Severity = "good" if good.mean() >= 1 - FEW else "note"
    return Finding("weights", severity, "; ".join([text, *parts]), numbers, advice)


def _of_concentration(dataset: xr.Dataset, one: _Guide) -> Iterator[Finding]:
    """Yield which data hold the loss, where few do."""
    if not _loses(one.total, one.total_se) or one.num_data < _FEWEST_DATA:
        return
    gap = (dataset["log_evidence"] - dataset["elbo"].sel(guide=one.name)).values.clip(0.0)
    order = np.argsort(-gap, kind="stable")
    count = int(np.ceil(_TENTH * one.num_data))
    share = float(gap[order[:count]].sum() / gap.sum())
    if share <= _HALF:
        return
    worst = ", ".join(map(str, dataset["datum"].values[order[:_SHOWN]]))
    yield Finding(
        "few data",
        "note",
        f"{count} of {one.num_data} data hold {share:.0%} of what {one.name!r} loses; the worst "
        f"are {worst}",
        {"share of the worst tenth": share},
        "Look at these data first: pv.repair mends them one by one.",
    )
