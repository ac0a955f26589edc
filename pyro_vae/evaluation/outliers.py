"""Is a datum like those that a model was trained on? Three questions, and one p-value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from pyro_vae.diagnostics.conformal import Conformal, benjamini_hochberg
from pyro_vae.diagnostics.outlier_scores import (
    OutlierScores,
    Scorer,
    Statistic,
    encoder_of,
    features_of,
)
from pyro_vae.diagnostics.robust import RobustMoments
from pyro_vae.markup import result
from pyro_vae.particles.global_latents import given_text
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.messages import as_count, as_seed
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Program
from pyro_vae.report import choosing, sections
from pyro_vae.report.findings import Finding
from pyro_vae.report.page import page, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Outliers", "outliers"]

_PREFIX = "predictive_"  # of a statistic
_SHOWN = 10  # outliers in the text


@dataclass(frozen=True)
class Outliers:
    """The result of :func:`outliers`: a row per datum.

    Attributes:
        dataset: dims (datum, calibration, score). Of each datum ``p_value``, of all scores
            together; ``outlier``, whether that is at most the level; ``adjusted_p_value``, by
            Benjamini & Hochberg; ``p_value_of`` each score. The scores themselves, of the data and,
            as ``calibration_<name>``, of those that they are ranked among: ``distance`` of the
            encoder's features, where there is an encoder; ``log_evidence`` in nats, with
            ``log_evidence_se`` and ``log_evidence_good``, whether they are to be trusted;
            ``predictive`` of the log likelihood and ``predictive_<name>`` of each statistic, how
            many standard deviations the datum is above the posterior's replicas of it, and
            ``posterior_predictive_p`` likewise, the share of the replicas that are lower.
            Attributes: ``level``; ``exact``, whether calibration data were passed; ``given``.
    """

    dataset: xr.Dataset

    @property
    def outlier(self) -> np.ndarray:
        """Which data are outliers at the level, [N]."""
        return np.asarray(self.dataset["outlier"].values)

    def summary(self) -> pd.DataFrame:
        """Return a row per datum, the strangest first: p-values, verdict, scores.

        Columns ``p_<score>`` are the p-values of each score alone.
        """
        data = self.dataset
        table = {name: data[name].values for name in ("p_value", "adjusted_p_value", "outlier")}
        for score in map(str, data["score"].values):
            table[score] = data[score].values
            table[f"p_{score}"] = data["p_value_of"].sel(score=score).values
        frame = pd.DataFrame(table, index=pd.Index(data["datum"].values, name="datum"))
        return frame.sort_values("p_value", kind="stable")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw two scores of each datum over those of the calibration data; needs ``plots``."""
        from pyro_vae.plots.outliers import plot_outliers

        return plot_outliers(self.dataset, ax)

    def findings(self) -> list[Finding]:
        """Return what the numbers say in plain words, the worst first."""
        return choosing.of_outliers(self.dataset)

    def to_html(self, path: str | Path | None = None, title: str = "Outliers") -> str:
        """Return a page of findings, a table and a figure; needs the extra ``plots``.

        Args:
            path: a file to write it to as well.
            title: of the page.
        """
        section = sections.of_outliers(self.dataset, self.summary())
        return written(page(title, [section]), path)

    def __repr__(self) -> str:
        head, *notes = self._notes()
        found = int(self.outlier.sum())
        lines = [head]
        if found:
            lines.append(self.summary()[:found].head(_SHOWN).to_string(float_format="%.3f"))
            lines += [f"and {found - _SHOWN} more"] if found > _SHOWN else []
        return "\n".join([*lines, *notes])

    def _repr_html_(self) -> str:
        return result(self.summary().head(max(_SHOWN, int(self.outlier.sum()))), self._notes())

    def _notes(self) -> list[str]:
        """Return how many are outliers, and what is to be said of that."""
        data, found = self.dataset, int(self.outlier.sum())
        num_data, level = data.sizes["datum"], data.attrs["level"]
        kind = "calibration" if data.attrs["exact"] else "training"
        given = f"; given {data.attrs['given']}" if data.attrs["given"] else ""
        lines = [
            f"{found} of {num_data} data are outliers at level {level:g} ({level * num_data:.1f} "
            f"expected if all are like the {data.sizes['calibration']} {kind} data){given}"
        ]
        if not data.attrs["exact"]:
            lines.append(
                "ranked among training data, which the model was fitted to: ordinary new data look "
                "stranger than they are, and false alarms are more than the level. Pass "
                "calibration=, data that it was not fitted to"
            )
        if "distance" not in data:
            lines.append("the guide has no encoder that is known: no distance of features")
        return lines


def outliers(
    model: Program,
    guide: Program,
    *batch: Any,
    train: Any = None,
    calibration: Any = None,
    level: float = 0.05,
    statistics: Mapping[str, Statistic] | None = None,
    features: Program | None = None,
    num_particles: int = 1000,
    given: GivenValues | None = None,
    data_plate: DataPlate = None,
    seed: int | None = None,
    compile: Compile = "auto",
) -> Outliers:
    r"""Find the data that are not like those that a model was trained on.

    Three kinds of scores, because each is blind to something:

    - how far the encoder's features are from the middle of the training data's, in Mahalanobis
      distance with a robust covariance (:mod:`pyro_vae.diagnostics.robust`);
    - log p(x), by importance weights. It is two-sided: smooth images, for one, have a higher
      density than the data that a model was trained on (Nalisnick et al. 2019);
    - posterior predictive checks: replicas :math:`\tilde x` of the datum are drawn given latents of
      its own posterior, and T(x) compared with them, for the log likelihood given the same latents
      (Gelman, Meng & Stern 1996) and for statistics of yours. They ask whether the model can
      explain the datum at all. The posterior predictive p-value :math:`P(T(\tilde x) < T(x))` is
      in the dataset; the score is how many standard deviations T(x) is above the replicas, which
      still tells data apart where all of these are on one side. Two-sided too.

    None of these numbers has a known distribution, predictive p-values neither. So each is ranked
    among calibration data, which gives a conformal p-value, and the combined one ranks their Fisher
    sum in the same way (:class:`pyro_vae.diagnostics.conformal.Conformal`). Where the calibration
    data are exchangeable with new data that are no outliers, an ordinary datum has
    ``p_value <= level`` with probability at most ``level``, whatever the model: that is the rate of
    false alarms, over data and calibration data.

    Training data are no calibration data: model and encoder were fitted to them. Without
    ``calibration`` new data are ranked among them all the same, the result says that its p-values
    are too small, and ``exact`` is False.

    Args:
        model: a Pyro model.
        guide: an amortized guide; of one that has no encoder, scores of features are left out.
        *batch: the data in question: arguments of model and guide.
        train: data that model and guide were trained on, as the arguments of a batch: a tensor, a
            tuple or a mapping. Needed for features, and without ``calibration``.
        calibration: ordinary data that neither was trained on, likewise; at least
            1 / level - 1 of them.
        level: the probability that an ordinary datum is called an outlier.
        statistics: name to a function from observed values by site, ``{"x": [M, ...]}`` in float64,
            to a number of each, [M]. Values that are missing or masked are NaN.
        features: a function from a batch to features [N, F], in the place of the guide's encoder.
        num_particles: K, draws of each datum's posterior.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        data_plate: as in :func:`pyro_vae.log_weights`, but not False.
        seed: of the draws; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`.

    Returns:
        An :class:`Outliers`: a table with a row per datum.

    Raises:
        ValueError: for a guide with parameters of each datum (a LocalGuide, Pyro's AutoNormal),
            ``data_plate=False``, a level that so few calibration data cannot reach, training data
            that are needed and not passed, features or statistics of another shape or not finite,
            a likelihood that cannot be drawn from, and for what :func:`pyro_vae.log_weights`
            refuses.

    References:
        Bates, Candès, Lei, Romano & Sesia (2023). Testing for outliers with conformal p-values.
        Annals of Statistics 51(1).
        Gelman, Meng & Stern (1996). Posterior predictive assessment of model fitness via realized
        discrepancies. Statistica Sinica 6.
        Nalisnick, Matsukawa, Teh, Gorur & Lakshminarayanan (2019). Do deep generative models know
        what they don't know? ICLR.
        Vovk, Gammerman & Shafer (2005). Algorithmic learning in a random world. Springer.

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
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> ordinary = 2**0.5 * torch.randn(200, generator=torch.Generator().manual_seed(0))
        >>> found = pv.outliers(
        ...     model, guide, torch.tensor([0.5, 9.0]), calibration=ordinary, seed=0
        ... )
        >>> found.outlier.tolist()
        [False, True]
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level!r}: a number between 0 and 1 is needed")
    data, known = as_batch(*batch), None if train is None else as_batch(train)
    others = known if calibration is None else as_batch(calibration)
    if others is None:
        raise ValueError("train= or calibration= is needed: data that new ones are ranked among")
    scorer = Scorer(
        model,
        guide,
        as_count("num_particles", num_particles, 2),
        _checked(statistics),
        given,
        data_plate,
        compile,
    )
    seed = as_seed(seed)
    encoder = encoder_of(guide) if features is None else features
    distances = None if encoder is None else _distances(encoder, (data, others), known)
    scorer.check_guide(data, others)
    found, beside = scorer.score(data, seed), scorer.score(others, seed + 1)
    columns, others_columns = _columns(found), _columns(beside)
    if distances is not None:
        columns = {"distance": distances[0], **columns}
        others_columns = {"distance": distances[1], **others_columns}
    _check_level(level, len(beside.log_evidence))
    dataset = _dataset(columns, others_columns, found, level)
    dataset.attrs |= {
        "level": level,
        "exact": int(calibration is not None),  # netCDF has no truth values
        "num_particles": num_particles,
        "given": given_text(found.given),
    }
    return Outliers(dataset)


def _checked(statistics: object) -> Mapping[str, Statistic]:
    if statistics is None:
        return {}
    if not isinstance(statistics, Mapping) or not all(map(callable, statistics.values())):
        raise TypeError(
            f"statistics={statistics!r}: a mapping from names to functions is needed, such as "
            "{'sum': lambda sites: sites['x'].sum(-1)}"
        )
    return statistics


def _check_level(level: float, count: int) -> None:
    """Raise ValueError for a level that no rank among so many data is rare enough for."""
    if level * (count + 1) < 1:
        raise ValueError(
            f"level={level:g}: the smallest p-value that {count} calibration data can give is "
            f"{1 / (count + 1):.3g}; pass {math.ceil(1 / level) - 1} or more, or a higher level"
        )


def _distances(
    encoder: Program, batches: tuple[Batch, Batch], train: Batch | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return how far the features of two batches are from the middle of the training data's."""
    if train is None:
        raise ValueError(
            "train= is needed: features of new data are compared with those of the training data"
        )
    moments = RobustMoments.of(features_of(encoder, train))
    first, second = (moments.distance(features_of(encoder, batch)) for batch in batches)
    return first, second


def _columns(found: OutlierScores) -> dict[str, np.ndarray]:
    """Return the scores by name."""
    above = {_PREFIX + name: column for name, column in found.predictive.items()}
    above = {"predictive": above.pop(f"{_PREFIX}log_likelihood"), **above}
    return {"log_evidence": found.log_evidence, **above}


def _dataset(
    columns: Mapping[str, np.ndarray],
    beside: Mapping[str, np.ndarray],
    found: OutlierScores,
    level: float,
) -> xr.Dataset:
    names = list(columns)
    two_sided = np.array([name != "distance" for name in names])
    new, old = (np.stack([each[name] for name in names], 1) for each in (columns, beside))
    ranked = Conformal.of(old, new, two_sided)
    return xr.Dataset(
        {
            "p_value": ("datum", ranked.combined),
            "adjusted_p_value": ("datum", benjamini_hochberg(ranked.combined)),
            "outlier": ("datum", ranked.combined <= level),
            "p_value_of": (("datum", "score"), ranked.of_score),
            **{name: ("datum", column) for name, column in columns.items()},
            **{
                "posterior_predictive_p" + ("" if name == "log_likelihood" else f"_{name}"): (
                    "datum",
                    share,
                )
                for name, share in found.predictive_p.items()
            },
            "log_evidence_se": ("datum", found.std_error),
            "log_evidence_good": ("datum", found.good),
            **{f"calibration_{n}": ("calibration", column) for n, column in beside.items()},
        },
        coords={"datum": np.arange(len(new)), "score": names},
    )
