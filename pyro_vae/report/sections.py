"""What a page says of each kind of result: findings, tables, figures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from pyro_vae import markup
from pyro_vae.plots.calibration import plot_coverage, plot_ranks
from pyro_vae.plots.evidence import plot_evidence
from pyro_vae.plots.models import plot_model_differences
from pyro_vae.plots.outliers import plot_outliers
from pyro_vae.plots.posteriors import plot_rungs
from pyro_vae.plots.results import plot_gap_distribution, plot_gaps, plot_pareto_k
from pyro_vae.report import calibrating, choosing, findings, mending
from pyro_vae.report.page import Drawing, Section, Table

__all__ = [
    "of_calibration",
    "of_comparisons",
    "of_coverage",
    "of_models",
    "of_outliers",
    "of_repair",
    "of_sandwich",
]

_WORST = 10  # data that a table names
_QUANTITIES = 20  # of a test of ranks, that a table names


def of_comparisons(
    datasets: Mapping[str, xr.Dataset], tables: Mapping[str, pd.DataFrame]
) -> Section:
    """Return the section of one comparison (named ""), or of several parts of the data.

    Args:
        datasets: by part, that of a :class:`~pyro_vae.Comparison`.
        tables: by part, its summary.
    """
    order = sorted(datasets, key=lambda part: (part != "test", part))  # held-out data say more
    datasets = {part: datasets[part] for part in order}
    found = {part: findings.of_comparison(each, tables[part]) for part, each in datasets.items()}
    if {"train", "test"} <= set(tables):
        more = findings.of_generalization(tables["train"], tables["test"])
        found["test"] = findings.by_severity([*more, *found["test"]])
    shown = []
    for part, dataset in datasets.items():
        shown += [_numbers(part, dataset, tables[part]), _worst(part, dataset)]
    named = datasets if list(datasets) != [""] else datasets[""]
    drawings = [
        Drawing(
            lambda: plot_gaps(named, summaries=tables),
            "What each guide loses to log p(x), split into what its family loses (approximation "
            "gap) and what its encoder loses (amortization gap).",
        ),
        Drawing(
            lambda: plot_gap_distribution(named),
            "The share of the data that lose less than so many nats, for each guide.",
        ),
        Drawing(
            lambda: plot_pareto_k(named),
            "k-hat of each datum's importance weights: above the dashed line the tail is heavy.",
        ),
    ]
    part, dataset = next(iter(datasets.items()))
    where = f" ({part})" if part else ""
    drawings.append(
        Drawing(
            lambda: plot_evidence(dataset),
            f"Lower bounds on log p(x) of each datum{where}, from what stands for log p(x); hollow "
            "ones are not to be trusted.",
        )
    )
    lead = [_lead(part, dataset) for part, dataset in datasets.items()]
    return Section("Guides compared", lead, found, shown, drawings)


def _lead(part: str, dataset: xr.Dataset) -> str:
    given = f", given {dataset.attrs['given']}" if dataset.attrs.get("given") else ""
    text = (
        f"{dataset.sizes['datum']} data, {dataset.attrs['num_particles']} draws of each guide for "
        f"each{given}; log p(x) is {dataset.attrs['log_evidence_from']}."
    )
    return f"{part}: {text}" if part else text


def _numbers(part: str, dataset: xr.Dataset, table: pd.DataFrame) -> Table:
    """Return a row for each quantity, a column for each guide."""
    quantities = {
        "log_evidence": "log p(x)",
        "elbo": "ELBO",
        "approximation_gap": "approximation gap (family)",
        "amortization_gap": "amortization gap (encoder)",
    }
    columns = [["", *quantities.values(), "gaps measured against", "weights that are good"]]
    columns[0] += ["median ESS", "worst k-hat", "fits not converged"]
    references = map(str, dataset["reference"].values)
    for (guide, row), reference in zip(table.iterrows(), references, strict=True):
        column = [str(guide)]
        column += [markup.plus_minus(row[name], row[f"{name}_se"]) for name in quantities]
        column += ["itself" if reference == guide else reference or "-"]
        column += [f"{row['good']:.1%}", f"{row['ess_median']:.0f}"]
        columns.append([*column, f"{row['pareto_k_max']:.2f}", f"{row['not_converged']:.0f}"])
    where = f"{part}: means" if part else "Means"
    caption = f"{where} over the data in nats per datum, with Monte Carlo standard errors"
    return Table([list(row) for row in zip(*columns, strict=True)], caption)


def _worst(part: str, dataset: xr.Dataset) -> Table:
    """Return the data that the first guide loses most on."""
    guide = str(dataset["guide"].values[0])
    one = dataset.sel(guide=guide)
    gap = (one["log_evidence"] - one["elbo"]).values
    rows = [["datum", "log p(x) - ELBO", "family", "encoder", "ESS", "k-hat", "log p(x) trusted"]]
    for place in np.argsort(-np.nan_to_num(gap, nan=-np.inf), kind="stable")[:_WORST]:
        pairs = [
            markup.plus_minus(*(float(one[f"{name}{end}"].values[place]) for end in ("", "_se")))
            for name in ("approximation_gap", "amortization_gap")
        ]
        rows.append(
            [
                str(one["datum"].values[place]),
                f"{gap[place]:.3f}",
                *pairs,
                f"{one['ess'].values[place]:.0f}",
                f"{one['pareto_k'].values[place]:.2f}",
                "yes" if one["log_evidence_good"].values[place] else "no",
            ]
        )
    where = f" ({part})" if part else ""
    return Table(rows, f"The data that {guide!r} loses most on{where}", is_folded=True)


def of_repair(dataset: xr.Dataset, table: pd.DataFrame) -> Section:
    """Return the section of a repair, from its dataset and its summary."""
    good = np.asarray(dataset["good"].values, bool)
    rungs = ", ".join(map(str, dataset["rung_name"].values))
    tables = [Table(markup.cells(table), "Data by the rung on which they ended; seconds of each")]
    if not good.all():
        rows = [["datum", "last rung", "log p(x)", "ESS", "k-hat", "R-hat"]]
        for place in np.flatnonzero(~good):
            one = dataset.isel(datum=place)
            rows.append(
                [
                    str(one["datum"].item()),
                    str(one["rung"].item()),
                    markup.plus_minus(float(one["log_evidence"]), float(one["log_evidence_se"])),
                    f"{float(one['ess']):.0f}",
                    *(markup.plus_minus(float(one[name])) for name in ("pareto_k", "rhat")),
                ]
            )
        tables.append(Table(rows, "Data without a good verdict", is_folded=True))
    drawing = Drawing(
        lambda: plot_rungs(dataset), "How many data ended on each rung, and with which verdict."
    )
    lead = [
        f"{good.size} posteriors, each mended as far as it needs, on the rungs {rungs}: a datum "
        "climbs until its verdict is good."
    ]
    return Section("Posteriors mended", lead, {"": mending.of_repair(dataset)}, tables, [drawing])


def of_sandwich(dataset: xr.Dataset) -> Section:
    """Return the section of bounds from both sides."""
    size = dataset.sizes["datum"]
    rows = [["", "nats per datum"]]
    for name in ("lower", "upper", "width"):
        mean, error = float(dataset[name].mean()), float(dataset.attrs[f"{name}_mean_se"])
        rows.append([name, markup.plus_minus(mean, error)])
    drawing = Drawing(
        lambda: plot_evidence(dataset), "Both bounds of each datum, from the middle of the two."
    )
    lead = [f"{dataset.attrs.get('name', 'Chains')}: {size} data, bounds on log p(x) by chains."]
    tables = [Table(rows, "Means over the data with Monte Carlo standard errors")]
    return Section(
        "log p(x) from both sides", lead, {"": mending.of_sandwich(dataset)}, tables, [drawing]
    )


def of_calibration(dataset: xr.Dataset, table: pd.DataFrame) -> Section:
    """Return the section of a test of ranks, from its dataset and its summary."""
    names = ["p_value", "adjusted_p_value", "shift", "shift_se", "spread", "spread_se"]
    shown = table[names].head(_QUANTITIES)
    of = (
        f"The {len(shown)} of {len(table)} with the smallest p-values. "
        if len(table) > len(shown)
        else ""
    )
    caption = (
        f"{of}Shift and spread of simulated latents, in standard deviations of the guide's draws: "
        "0 and 1 of a calibrated guide"
    )
    drawing = Drawing(
        lambda: plot_ranks(dataset),
        "How far the ranks of each quantity are from uniform: those of a calibrated guide all stay "
        f"in the band with probability {1 - dataset.attrs['error_rate']:g}.",
    )
    lead = [
        f"{_simulated(dataset)} A simulated latent is ranked among the guide's draws given its "
        "data: where the guide is the posterior, any rank is as probable as any other."
    ]
    return Section(
        "Ranks of simulated latents",
        lead,
        {"": calibrating.of_calibration(dataset, table)},
        [Table(_rows(shown), caption)],
        [drawing],
    )


def of_coverage(dataset: xr.Dataset, table: pd.DataFrame) -> Section:
    """Return the section of credible regions, from its dataset and its summary."""
    shown = table.drop(columns=["chi_squared_p_value", "finding"])
    drawing = Drawing(
        lambda: plot_coverage(dataset),
        "How often credible regions hold the simulated latents, by their level: below the diagonal "
        "less often than they say.",
    )
    lead = [
        f"{_simulated(dataset)} A credible region of level a should hold the simulated latents in "
        "a share a of the simulations."
    ]
    return Section(
        "Coverage of credible regions",
        lead,
        {"": calibrating.of_coverage(dataset, table)},
        [Table(_rows(shown), "Shares of the simulations, with standard errors, and p-values")],
        [drawing],
    )


def _simulated(dataset: xr.Dataset) -> str:
    said = dataset.attrs
    resampled = ", resampled by their weights" if said["resampled"] != "no" else ""
    given = f", given {said['given']}" if said["given"] else ""
    return (
        f"{said['num_simulations']} latents with data drawn from the model{given}, "
        f"{said['num_draws']} draws of the guide for each{resampled}."
    )


def of_models(dataset: xr.Dataset, table: pd.DataFrame) -> Section:
    """Return the section of a comparison of models, from its dataset and its summary."""
    (best,) = table.index[table["verdict"] == "best"]
    head = ["model", "log p(x)", "difference", "error for new data", "untrusted", "verdict"]
    rows = [head]
    for name, row in table.iterrows():
        pairs = [
            markup.plus_minus(row[key], row[f"{key}_se"]) for key in ("log_evidence", "difference")
        ]
        new = markup.plus_minus(row["difference_se_new"])
        rows.append([str(name), *pairs, new, f"{row['untrusted']}", str(row["verdict"])])
    drawing = Drawing(
        lambda: plot_model_differences(
            {str(name): table[name].to_numpy() for name in table.columns},
            list(map(str, table.index)),
            str(best),
            num_data=dataset.sizes["datum"],
        ),
        f"Mean log p(x) of each model less that of {best!r}.",
    )
    given = [
        f"{name}: given {values}."
        for name, values in zip(table.index, dataset["given"].values, strict=True)
        if values
    ]
    size = dataset.sizes["datum"]
    lead = [f"{len(table)} models of the same {size} data, by log p(x) of each datum.", *given]
    caption = (
        f"Means over the data in nats per datum; differences from {best!r} with Monte Carlo "
        "errors, for these data, and beside them those for new data"
    )
    found = {"": choosing.of_models(dataset, table)}
    return Section("Models compared", lead, found, [Table(rows, caption)], [drawing])


def of_outliers(dataset: xr.Dataset, table: pd.DataFrame) -> Section:
    """Return the section of a search for outliers, from its dataset and its summary."""
    count = max(_WORST, min(int(dataset["outlier"].sum()), 5 * _WORST))
    shown = table.head(count).drop(columns=["adjusted_p_value"])
    kind = "calibration" if dataset.attrs["exact"] else "training"
    given = f", given {dataset.attrs['given']}" if dataset.attrs["given"] else ""
    lead = [
        f"{len(table)} data, ranked among {dataset.sizes['calibration']} {kind} data by "
        f"{', '.join(map(str, dataset['score'].values))}{given}. An ordinary datum has a p-value "
        "up to a level with at most that probability."
    ]
    drawing = Drawing(
        lambda: plot_outliers(dataset), "Two scores of each datum over those of ordinary ones."
    )
    caption = f"The {len(shown)} strangest data: p-value of all scores, each score, and its own"
    found = {"": choosing.of_outliers(dataset)}
    return Section("Outliers", lead, found, [Table(_rows(shown), caption)], [drawing])


def _rows(table: pd.DataFrame) -> list[list[str]]:
    """Return a table as rows, with its p-values to two digits and verdicts in words."""
    shown = table.copy()
    for name in map(str, table.columns):
        if name == "p_value" or name.startswith("p_") or name == "adjusted_p_value":
            shown[name] = [f"{value:.2g}" for value in table[name]]
        elif table[name].dtype == bool:
            shown[name] = ["yes" if value else "no" for value in table[name]]
    return markup.cells(shown)
