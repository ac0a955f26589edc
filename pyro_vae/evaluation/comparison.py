"""The result of compare, from log weights of draws: gaps with paired errors, a table, a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.diagnostics.verdict import FEWEST_EFFECTIVE, Weights, pareto_k_threshold
from pyro_vae.markup import paragraphs, table, text_table
from pyro_vae.particles.estimators import (
    Estimate,
    calibrated,
    iwae_bound,
    mean_std_error,
    mixture_log_guide,
)
from pyro_vae.programs.handlers import drop_references
from pyro_vae.programs.state import module_of, unwrapped
from pyro_vae.programs.types import Program
from pyro_vae.report import findings, sections
from pyro_vae.report.findings import Finding
from pyro_vae.report.page import page, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ESTIMATES = (
    *("elbo", "log_evidence", "approximation_gap", "amortization_gap"),
    *("iwae_minus_elbo", "ais_minus_elbo"),
)
_PARTS = ("", "_se", "_skewness")
_TITLES = {"elbo": "ELBO", "log_evidence": "log p(x)"}
_TITLES |= {"iwae_minus_elbo": "IWAE - ELBO", "ais_minus_elbo": "AIS - ELBO"}
# Variables of the chosen estimate of log p(x), and their names as those of the guide it is through.
_EVIDENCE = {f"log_evidence{part}": f"iwae_bound{part}" for part in _PARTS}
_EVIDENCE |= {f"log_evidence_{name}": name for name in ("pareto_k", "ess", "tail_share")}


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        dataset: dims (guide, datum). Of each guide and datum, in nats: elbo, iwae_bound,
            approximation_gap, amortization_gap, each with its standard error ``<name>_se``
            (value ± 1.96 of them covers with probability 0.95) and ``<name>_skewness``, that of
            the particles' effects on it, from which errors of means over data are made;
            iwae_minus_elbo and, for data with annealed chains, ais_minus_elbo, likewise;
            pareto_k, ess, tail_share and good, the verdict on the guide's importance weights
            (:mod:`pyro_vae.diagnostics.verdict`), converged (of the guide's reference). Of each
            datum: log_evidence, likewise, with evidence_from, its source; log_evidence_pareto_k,
            log_evidence_ess and log_evidence_tail_share of the weights it was made from, and
            log_evidence_good, whether it and its error are to be trusted; ais, ais_se,
            ais_ess and ais_good of annealed chains, where there are any. Coordinate ``reference``
            names the refined guide that each guide's gaps are measured against. The attribute
            ``log_evidence_from`` says which estimate log_evidence is, ``given`` which global
            latents are fixed.
        guides: name to guide, the refined ones too.
    """

    dataset: xr.Dataset
    guides: Mapping[str, Program]

    def summary(self) -> pd.DataFrame:
        """Return a row per guide: means over the data with Monte Carlo standard errors.

        In nats per datum. ``pareto_k_bad`` is the share of data with k-hat above its threshold for
        K particles, ``good`` that with a good verdict on the guide's importance weights,
        ``not_converged`` the number of data whose refined guide has not converged.
        ``ais_minus_elbo`` is the mean over the data that have annealed chains.
        """
        data, columns = self.dataset, {}
        for name in (name for name in _ESTIMATES if name in data):
            known = data
            if name == "ais_minus_elbo":
                known = data.isel(datum=np.flatnonzero(np.isfinite(data["ais"].values)))
            every = (known[f"{name}{end}"].broadcast_like(known["elbo"]) for end in _PARTS)
            value, errors, skews = (each.transpose("guide", "datum") for each in every)
            columns[name] = value.mean("datum").values
            columns[f"{name}_se"] = _errors_of_means(
                errors.values, skews.values, data.attrs["num_particles"]
            )
        columns["pareto_k_max"] = data["pareto_k"].max("datum").values
        columns["pareto_k_bad"] = (
            (data["pareto_k"] > data.attrs["pareto_k_threshold"]).mean("datum").values
        )
        columns["ess_median"] = data["ess"].median("datum").values
        columns["good"] = data["good"].mean("datum").values
        columns["not_converged"] = (~data["converged"]).sum("datum").values
        return pd.DataFrame(columns, index=pd.Index(data["guide"].values, name="guide"))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the gaps of each guide as bars; needs the extra ``plots``."""
        from pyro_vae.plots.results import plot_gaps

        return plot_gaps(self.dataset, ax=ax, summaries=self.summary())

    def findings(self) -> list[Finding]:
        """Return what the numbers say in plain words, the worst first."""
        return findings.of_comparison(self.dataset, self.summary())

    def to_html(self, path: str | Path | None = None, title: str = "Guides compared") -> str:
        """Return a page of findings, tables and figures; needs the extra ``plots``.

        Args:
            path: a file to write it to as well.
            title: of the page.
        """
        section = sections.of_comparisons({"": self.dataset}, {"": self.summary()})
        return written(page(title, [section]), path)

    def __getstate__(self) -> dict[str, Any]:
        for guide in self.guides.values():
            if (module := module_of(unwrapped(guide))) is not None:
                drop_references(module)
        return dict(vars(self))

    def __repr__(self) -> str:
        return format_table({"": self})

    def _repr_html_(self) -> str:
        rows, notes = _rows_and_notes({"": self})
        return table(rows) + paragraphs(notes)


def format_table(comparisons: Mapping[str, Comparison]) -> str:
    """Return the gap table of comparisons as text, by a label (train, test) or "", with notes."""
    rows, notes = _rows_and_notes(comparisons)
    return "\n".join([text_table(rows), *notes])


def _rows_and_notes(
    comparisons: Mapping[str, Comparison],
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the gap table, its first row the head, and what is to be said below it."""
    notes: list[str] = []
    shown = [n for n in _ESTIMATES if any(n in c.dataset for c in comparisons.values())]
    titles = [_TITLES.get(name, name.replace("_", " ")) for name in shown]
    rows = [("guide", *titles, "worst k-hat", "median ESS", "good")]
    for label, comparison in comparisons.items():
        data = comparison.dataset
        for guide, row in comparison.summary().iterrows():
            pairs = ((row.get(n, math.nan), row.get(f"{n}_se", math.nan)) for n in shown)
            numbers = ("-" if math.isnan(v) else f"{v:.3f} ± {error:.3f}" for v, error in pairs)
            verdict = f"{row['pareto_k_max']:.2f}", f"{row['ess_median']:.0f}", f"{row['good']:.1%}"
            rows.append((f"{label} {guide}".strip(), *numbers, *verdict))
            if row["not_converged"] and data["reference"].sel(guide=guide) == guide:
                notes.append(
                    f"{label} {guide}: {int(row['not_converged'])} of {data.sizes['datum']} data "
                    "have not converged; their approximation gap is too large and their "
                    "amortization gap too small"
                )
        notes.append(f"{label} {_evidence_text(data)}")
    notes.append(_verdict_text([each.dataset for each in comparisons.values()]))
    return rows, [note.strip() for note in notes]


def _evidence_text(data: xr.Dataset) -> str:
    """Return where log p(x) is from, and how far it is to be trusted, for the table."""
    given = f"; given {data.attrs['given']}" if data.attrs["given"] else ""
    bad = int((~data["log_evidence_good"]).sum())
    doubt = (
        f"; a lower bound, and for {bad / data.sizes['datum']:.1%} of the data one that is not to "
        "be trusted, nor its standard error"
    )
    if data.attrs["evidence"] == "iwae":
        doubt += f", which evidence='auto' would anneal ({bad} data)"
    refused = data.attrs.get("ais_refused", "")
    why = f"; annealed chains are not to be had: {refused}" if refused else ""
    return (
        f"log p(x): {data.attrs['log_evidence_from']}, {data.sizes['datum']} data{given}; nats "
        f"per datum ± Monte Carlo standard error{doubt if bad else ''}{why}"
    )


def _verdict_text(found: Sequence[xr.Dataset]) -> str:
    """Return what a good verdict is, for the table."""
    count = int(found[0].attrs["num_particles"])
    few = f", more than K = {count} can give" if count < FEWEST_EFFECTIVE else ""
    return (
        f"good: share of the data whose importance weights can be trusted: {FEWEST_EFFECTIVE} "
        f"effective ones (ESS) or more{few}, and no heavy tail (k-hat above "
        f"{pareto_k_threshold(count):.2f} for K = {count}) that carries weight"
    )


def _errors_of_means(errors: np.ndarray, skews: np.ndarray, num_particles: int) -> np.ndarray:
    """Return errors of means over data, [G], from calibrated errors and skewnesses [G, N]."""
    pairs = zip(torch.tensor(errors), torch.tensor(skews), strict=True)
    return np.array([float(mean_std_error(*pair, num_particles)) for pair in pairs])


def reduce_block(
    drawn: Sequence[tuple[Tensor, Tensor]], names: Sequence[str], references: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Return the estimates of a block of data, with standard errors and skewnesses.

    Args:
        drawn: log p(x, z) of each guide's draws, [K, n], and log q of them under all guides,
            [G, K, n]; [1, K, n] under the one that drew them where others cannot score them.
        names: of the guides.
        references: name to the name of the refined guide that gaps are measured against.

    Returns:
        By name: of each guide, [G, n], elbo, amortization_gap and iwae_minus_elbo; of each of E
        estimates of log p(x), [E, n], iwae_bound with its pareto_k, ess and tail_share; of both,
        [G * E, n], approximation_gap. E is G, or G + 1 where the last is that of the mixture of all
        guides. Estimates have ``<name>_se`` and ``<name>_skewness`` beside them.
    """
    crossed = len(drawn[0][1]) > 1
    raw = [joint - own[i if crossed else 0] for i, (joint, own) in enumerate(drawn)]
    weights = [weight.double() for weight in raw]
    elbos = [Estimate.elbo(weight) for weight in weights]
    evidences = [Estimate.iwae(weight) for weight in weights]
    if crossed:
        mixed = torch.stack([j.double() - mixture_log_guide(q.double()) for j, q in drawn])
        # One particle of the mixture is one draw of every guide: common random numbers make those
        # draws dependent, and the particles not.
        together = mixed.flatten(0, 1)
        value = iwae_bound(together)
        evidences.append(Estimate(value, torch.exp(mixed - value).mean(0) - 1.0))
        raw.append(together.to(raw[0].dtype))
    of_name = dict(zip(names, elbos, strict=True))
    nan = torch.full_like(elbos[0].value, math.nan)
    bests = [of_name.get(references.get(name, ""), Estimate(nan, nan)) for name in names]
    gaps = (best - own for best, own in zip(bests, elbos, strict=True))
    gains = (bound - own for bound, own in zip(evidences, elbos, strict=False))
    own = [Weights.of(each.T.cpu().numpy()) for each in raw]
    return {
        **_columns("elbo", elbos),
        **_columns("amortization_gap", gaps),
        **_columns("approximation_gap", (each - best for best in bests for each in evidences)),
        **_columns("iwae_bound", evidences),
        **_columns("iwae_minus_elbo", gains),
        "pareto_k": np.stack([each.pareto_k for each in own]),
        "tail_share": np.stack([each.tail_share for each in own]),
        "ess": np.stack([each.ess for each in own]),
    }


def _columns(name: str, estimates: Iterable[Estimate]) -> dict[str, np.ndarray]:
    """Return values, calibrated standard errors and skewnesses of some estimates, [*, n] each."""
    rows = []
    for each in estimates:
        error = calibrated(each.std_error, each.skewness, len(each.influence))
        rows.append((each.value, error, each.skewness))
    columns = (torch.stack(column).cpu().numpy() for column in zip(*rows, strict=True))
    return dict(zip((f"{name}{part}" for part in _PARTS), columns, strict=True))


def gap_dataset(
    blocks: Sequence[Mapping[str, np.ndarray]],
    names: Sequence[str],
    references: Mapping[str, str],
    num_particles: int,
) -> xr.Dataset:
    """Return the dataset of a comparison, in nats, with the tightest bound as log p(x).

    The blocks are what :func:`reduce_block` returns of each block of data, for the same names and
    references; num_particles is K of each guide.
    """
    arrays = {name: np.concatenate([block[name] for block in blocks], -1) for name in blocks[0]}
    errors = _errors_of_means(arrays["iwae_bound_se"], arrays["iwae_bound_skewness"], num_particles)
    mixture = len(names) if len(errors) > len(names) else None
    chosen = tightest(arrays["iwae_bound"].mean(1), errors, mixture)
    for gap in (f"approximation_gap{part}" for part in _PARTS):
        arrays[gap] = arrays[gap][chosen :: len(errors)]
    if chosen == mixture:  # its particles are draws of every guide
        evidence_particles = num_particles * len(names)
        source = f"the mixture of {' and '.join(map(repr, names))}"
    else:
        evidence_particles, source = num_particles, repr(names[chosen])
    own = (arrays[name][: len(names)] for name in ("pareto_k", "ess", "tail_share"))
    used = Weights(
        evidence_particles, *(arrays[n][chosen] for n in ("pareto_k", "ess", "tail_share"))
    )
    text = f"IWAE-{evidence_particles} through {source}"
    known = np.isfinite(arrays["iwae_bound_se"][chosen])
    return xr.Dataset(
        {
            "good": (("guide", "datum"), Weights(num_particles, *own).good),
            "log_evidence_good": ("datum", used.trusted & known),
            "evidence_from": ("datum", np.full(arrays["elbo"].shape[1], text, dtype=object)),
            **{name: (("guide", "datum"), arrays[name][: len(names)]) for name in sorted(arrays)},
            **{name: ("datum", arrays[mine][chosen]) for name, mine in _EVIDENCE.items()},
        },
        coords={
            "guide": list(names),
            "datum": np.arange(arrays["elbo"].shape[1]),
            "reference": ("guide", [references.get(name, "") for name in names]),
        },
        attrs={
            "evidence": "iwae",
            "log_evidence_from": text,
            "log_evidence_num_particles": evidence_particles,
            "num_particles": num_particles,
            "pareto_k_threshold": pareto_k_threshold(num_particles),
            "units": "nats",
        },
    )


def tightest(means: np.ndarray, errors: np.ndarray, mixture: int | None) -> int:
    """Return which of several lower bounds is the tightest, by their means over the data.

    Of those not clearly below the best, at two standard errors, the one with the smallest
    standard error: to first order a bound of this kind is low by half its variance. Choosing
    by the value alone would choose a heavy tail that happened to give a large weight; and by the
    error alone, one that happened to miss it. The mixture has the lightest tail: it is taken
    where its error is not more than twice the smallest.
    """
    errors = np.nan_to_num(errors)
    plausible = means + 2 * errors >= (means - 2 * errors).max()
    least = int(np.argmin(np.where(plausible, errors, np.inf)))
    if mixture is not None and plausible[mixture] and errors[mixture] <= 2 * errors[least]:
        return mixture
    return least
