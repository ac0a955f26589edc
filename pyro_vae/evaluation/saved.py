"""A report of results in memory or in files: which is which is known by their variables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import xarray as xr

from pyro_vae.evaluation.calibration import Calibration
from pyro_vae.evaluation.comparison import Comparison
from pyro_vae.evaluation.coverage import Coverage
from pyro_vae.evaluation.model_comparison import ModelComparison
from pyro_vae.evaluation.outliers import Outliers
from pyro_vae.evaluation.repair import Repair
from pyro_vae.report import sections
from pyro_vae.report.page import Section, page

__all__ = ["report", "report_of_files"]

# Variables by which a dataset is known; the first kind that has all of its own.
_KINDS = {
    "comparison": {"elbo", "iwae_bound", "approximation_gap", "amortization_gap"},
    "repair": {"rung", "good", "tried", "seconds", "audited"},
    "sandwich": {"lower", "upper", "width", "untrusted"},
    "calibration": {"ranks", "ecdf_difference", "num_ranks", "spread"},
    "coverage": {"ranks", "expected_coverage"},
    "models": {"log_evidence", "good", "source"},
    "outliers": {"outlier", "p_value_of", "log_evidence"},
}
_WANTED = (
    "the dataset of a Comparison, ModelComparison, Repair, Sandwich, Calibration, Coverage or "
    "Outliers is needed, as result.dataset.to_netcdf() writes it"
)


def report(datasets: Mapping[str, xr.Dataset], title: str = "Report of posteriors") -> str:
    """Return one page of HTML that says what results say; needs the extra ``plots``.

    Args:
        datasets: by name, those of any of :class:`~pyro_vae.Comparison`,
            :class:`~pyro_vae.Repair`, :class:`~pyro_vae.Sandwich`,
            :class:`~pyro_vae.ModelComparison`, :class:`~pyro_vae.Calibration`,
            :class:`~pyro_vae.Coverage` and :class:`~pyro_vae.Outliers`.
            Comparisons named ``"train"`` and ``"test"`` are compared with each other as well.
        title: of the page.

    Returns:
        The page: no script, nothing from elsewhere.

    Raises:
        ValueError: for no dataset, one of another kind, or one that lacks what its kind has.
        ImportError: without Matplotlib.
    """
    kinds = {name: kind_of(dataset) for name, dataset in datasets.items()}
    if unknown := [name for name, kind in kinds.items() if kind is None]:
        raise ValueError(f"{', '.join(unknown)}: {_WANTED}")
    if not kinds:
        raise ValueError(f"nothing to report: {_WANTED}")
    try:
        return page(title, list(_sections(datasets, kinds)))
    except KeyError as error:  # of a file that was written in part, or by another version
        raise ValueError(f"{', '.join(datasets)}: {error.args[0]}; {_WANTED}") from error


def _sections(
    datasets: Mapping[str, xr.Dataset], kinds: Mapping[str, str | None]
) -> Iterator[Section]:
    compared = {name: datasets[name] for name, kind in kinds.items() if kind == "comparison"}
    if len(compared) == 1:
        compared = dict.fromkeys([""], *compared.values())
    if compared:
        tables = {name: Comparison(each, {}).summary() for name, each in compared.items()}
        yield sections.of_comparisons(compared, tables)
    for kind, section in _SECTIONS.items():
        some = {name: datasets[name] for name, each in kinds.items() if each == kind}
        for name, dataset in some.items():
            made = section(dataset)
            yield made if len(some) == 1 else replace(made, title=f"{made.title}: {name}")


# By kind, in the order of a page.
_SECTIONS: dict[str, Callable[[xr.Dataset], Section]] = {
    "repair": lambda dataset: sections.of_repair(dataset, Repair(dataset, {}).summary()),
    "sandwich": sections.of_sandwich,
    "calibration": lambda data: sections.of_calibration(data, Calibration(data).summary()),
    "coverage": lambda data: sections.of_coverage(data, Coverage(data).summary()),
    "models": lambda data: sections.of_models(data, ModelComparison(data).summary()),
    "outliers": lambda data: sections.of_outliers(data, Outliers(data).summary()),
}


def kind_of(dataset: xr.Dataset) -> str | None:
    """Return of which kind of result a dataset is, by its variables; None for another."""
    return next((kind for kind, names in _KINDS.items() if names <= set(dataset)), None)


def report_of_files(paths: Iterable[Path]) -> str:
    """Return the report of netCDF files, and of those in folders that are of results.

    Args:
        paths: files, or folders; of a folder files of other kinds are left out.

    Raises:
        ValueError: for a named file of another kind, and for a folder without any.
        OSError: for a file that cannot be read.
    """
    found: dict[str, xr.Dataset] = {}
    for path in paths:
        named = dict(_read([path]))
        if path.is_dir():
            named = {name: each for name, each in _read(sorted(path.glob("*.nc"))) if kind_of(each)}
            if not named:
                raise ValueError(f"{path}: no netCDF file (.nc) of a result in this folder")
        elif None in map(kind_of, named.values()):
            raise ValueError(f"{path}: {_WANTED}")
        for name, dataset in named.items():
            found[name if name not in found else str(path / name)] = dataset
    return report(found)


def _read(paths: Iterable[Path]) -> Iterator[tuple[str, xr.Dataset]]:
    """Yield the dataset of each file with its name: comparison-test.nc is "test"."""
    for path in paths:
        if path.is_dir():
            continue
        try:
            with xr.open_dataset(path, engine="h5netcdf") as dataset:
                yield path.stem.removeprefix("comparison-"), dataset.load()
        except FileNotFoundError:
            raise
        except OSError as error:  # which does not say of which file
            raise OSError(f"{path}: {error}") from error
