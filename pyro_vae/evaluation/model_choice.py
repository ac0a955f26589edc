r"""Which of several models predicts held-out data best, and can these data tell?

.. math::
    \Delta = \frac{1}{N} \sum_n \log p_1(x_n) - \log p_2(x_n)

Its Monte Carlo error is that of the two log p(x_n), for these data. As an estimate of the expected
difference for new data it has the spread of the differences over data as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_vae.evaluation.model_comparison import ModelComparison
from pyro_vae.evaluation.repair import repair
from pyro_vae.evaluation.rungs import Rung
from pyro_vae.evaluation.same_data import check_same_data
from pyro_vae.guides.exact import ExactGuide
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.particles.global_latents import Given, given_text
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.messages import as_seed
from pyro_vae.programs.types import Compile, DataPlate, GivenValues, Program
from pyro_vae.refinement.refine import TOLERANCE

# All that give log p(x); long chains, which give a posterior as well, cost more than they tell.
EVIDENCE_RUNGS: tuple[Rung, ...] = ("importance", "refined", "full rank", "annealed")


def compare_models(
    models: Mapping[str, tuple[Program, Program]],
    *batch: Any,
    rungs: Sequence[Rung] = EVIDENCE_RUNGS,
    num_particles: int = 4000,
    given: Mapping[str, GivenValues] | None = None,
    audit: int = 8,
    max_steps: int = 4000,
    tolerance: float = TOLERANCE,
    data_plate: DataPlate = None,
    seed: int | None = None,
    compile: Compile = "auto",
    progress: bool = True,
) -> ModelComparison:
    r"""Compare models by log p(x) of held-out data, datum by datum.

    .. math::
        \Delta = \frac{1}{N} \sum_n \log p_1(x_n) - \log p_2(x_n)

    A better bound is no better model: an encoder's bound may be low by another amount for each
    model. So log p(x) of each datum climbs the rungs of :func:`pyro_vae.repair` until its verdict
    is good: importance weights of the guide's draws, of a guide refined for the datum, of one with
    a full covariance, and annealed chains from the prior, which find modes that the others miss.
    The dataset says where each is from, and whether it is to be trusted.

    The logarithm of a mean of weights is low, to first order by half of its squared error, and
    errors of N data cancel while this does not: it is added where the verdict is good.

    Differences are paired over the data and have two standard errors. ``difference_se`` is the
    Monte Carlo error, for these data; ``difference_se_new``, that of the expected difference for
    new data of the same kind, has the spread of the differences over these data as well, and is
    usually far larger. By the second, and 2 of it, models are told apart: only data that neither
    model was fitted to say how either predicts new ones (Vehtari & Ojanen 2012).

    Args:
        models: a name to a model and a guide of it, in the order of preference: those that you
            would take if they predicted equally well, such as the simplest, first.
        *batch: arguments of the models and guides: data that none of them was fitted to.
        rungs: as in :func:`pyro_vae.repair`. Without "annealed", modes that a guide misses are
            seen by the audit alone.
        num_particles: as in :func:`pyro_vae.repair`.
        given: model to the values of its global latent sites, by name; without them a
            ``global_guide``'s median is taken, as in :func:`pyro_vae.log_weights`. log p(x) is
            then that given these values: a prediction by a point, of that model.
        audit: as in :func:`pyro_vae.repair`, of each model.
        max_steps: as in :func:`pyro_vae.refine`.
        tolerance: as in :func:`pyro_vae.refine`.
        data_plate: as in :func:`pyro_vae.log_weights`, for all models.
        seed: of all random numbers; None takes one from the global random state.
        compile: as in :class:`pyro_vae.CompiledSVI`.
        progress: whether to show bars; they appear after a second.

    Returns:
        A :class:`ModelComparison`: log p(x) of each model and datum, a table of differences from
        the best one, which models the data cannot tell from it, and a figure.

    Raises:
        TypeError: for what is no mapping of names to pairs.
        ValueError: for fewer than two models; models that do not observe the same values for the
            same number of data, one with probabilities and the other with densities, or with
            values of global latents of one name that were passed and differ; and for what
            :func:`pyro_vae.repair` refuses.

    References:
        Burnham & Anderson (2002). Model selection and multimodel inference. Springer.
        Vehtari & Ojanen (2012). A survey of Bayesian predictive methods for model assessment,
        selection and comparison. Statistics Surveys 6.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def pair(noise):
        ...     def model(x):
        ...         with pyro.plate("data", len(x)):
        ...             z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...             pyro.sample("x", dist.Normal(z, noise), obs=x)
        ...     def guide(x):
        ...         scale = noise / (1 + noise**2) ** 0.5
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("z", dist.Normal(x / (1 + noise**2), scale))
        ...     return model, guide
        >>> x = 2**0.5 * torch.randn(200, generator=torch.Generator().manual_seed(0))
        >>> found = pv.compare_models(
        ...     {"noise 1": pair(1.0), "noise 4": pair(4.0)}, x, seed=0, progress=False
        ... )
        >>> found.best, found.indistinguishable
        ('noise 1', ('noise 1',))
    """
    _check_models(models, given)
    arguments = as_batch(*batch)
    seed = as_seed(seed)
    options: dict[str, Any] = {
        "rungs": rungs,
        "num_particles": num_particles,
        "num_draws": 1,
        "audit": audit,
        "max_steps": max_steps,
        "tolerance": tolerance,
        "progress": progress,
    }
    shared: dict[str, Any] = {"data_plate": data_plate, "compile": compile}
    prepared = {}
    for number, (name, (model, guide)) in enumerate(models.items()):
        with _naming(name):
            values = (given or {}).get(name)
            look = prepare(model, guide, (arguments,), values, data_plate, seed + number)
            prepared[name] = look
    check_same_data({name: evaluator.structure for name, (evaluator, _) in prepared.items()})
    _check_given({name: fixed for name, (_, fixed) in prepared.items()})
    columns = []
    for number, (name, (model, guide)) in enumerate(models.items()):
        # Draws of one model must not move with those of another: their errors add.
        own = {"given": (given or {}).get(name), "seed": seed + number, **shared, **options}
        with _naming(name):
            columns.append(_log_evidence(model, guide, arguments, prepared[name][0], own))
    names = list(models)
    stacked = {key: np.stack([each[key] for each in columns]) for key in columns[0]}
    dataset = xr.Dataset(
        {key: (("model", "datum"), value) for key, value in stacked.items()},
        coords={
            "model": names,
            "datum": np.arange(stacked["log_evidence"].shape[1]),
            "given": ("model", [given_text(prepared[name][1]) for name in names]),
        },
        attrs={"num_particles": num_particles, "units": "nats"},
    )
    return ModelComparison(dataset)


def _check_models(models: object, given: object) -> None:
    """Raise for what is no mapping to at least two pairs, and for values of models not in it."""
    needed = "a mapping from names to pairs is needed, such as {'2 latents': (model, guide), ...}"
    if not isinstance(models, Mapping):
        raise TypeError(f"models={models!r}: {needed}")
    for name, pair in models.items():
        if not isinstance(name, str):
            raise TypeError(
                f"models has the name {name!r}, of type {type(name).__name__}: {needed}"
            )
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(callable, pair)):
            raise TypeError(f"models[{name!r}]={pair!r}: {needed}")
    if len(models) < 2:
        raise ValueError(f"models has {len(models)} entries, where two or more are needed")
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"given={given!r}: a mapping from models to values by site is needed")
    if unknown := set(given or ()) - set(models):
        raise ValueError(f"given names {sorted(unknown)}; the models are {list(models)}")


def _check_given(fixed: Mapping[str, Given]) -> None:
    """Raise ValueError for values passed of one global latent that differ from model to model."""
    seen: dict[str, tuple[str, torch.Tensor]] = {}
    for name, values in fixed.items():
        for site in values.chosen & values.keys():
            first, value = seen.setdefault(site, (name, values[site]))
            mine = values[site]
            if value.shape == mine.shape and not torch.allclose(value, mine.to(value)):
                raise ValueError(
                    f"given passes {site!r} other values for models[{first!r}] and "
                    f"models[{name!r}]: p(x | {site}) at different values tells the values apart, "
                    "not the models. Pass the same; or, if each is what its model was fitted "
                    "with, write it into the model as a number"
                )


def _log_evidence(
    model: Program, guide: Program, batch: Batch, evaluator: Evaluator, options: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return log p(x) of each datum of a model, its error, whether that is good, and its source."""
    if isinstance(guide, ExactGuide) or not evaluator.pair.guide_sites & set(
        evaluator.structure.sites
    ):
        # Every latent is summed out: a single weight is p(x).
        weights = torch.cat([chunk.weights.total[0] for chunk in evaluator.chunks(1)])
        exact = weights.double().numpy(force=True)
        return {
            "log_evidence": exact,
            "log_evidence_se": np.zeros(len(exact)),
            "good": np.isfinite(exact),
            "source": np.full(len(exact), "exact", dtype=object),
        }
    found = repair(model, guide, batch, **options).dataset
    value, error = (found[f"log_evidence{end}"].values for end in ("", "_se"))
    good = found["good"].values & np.isfinite(value) & np.isfinite(error)
    rung = found["rung"].values
    # Where no verdict is good, the surest of the bounds stands, whichever rung it is of.
    same = (found["log_evidence_of_rung"] == found["log_evidence"]).argmax("rung_name").values
    rung = np.where(good, rung, found["rung_name"].values[same])
    return {
        "log_evidence": np.where(good, value + 0.5 * error**2, value),
        "log_evidence_se": error,
        "good": good,
        "source": rung.astype(object),
    }


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say of an error inside the context which model it is of."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while comparing models[{name!r}]")
        raise
