r"""How wrong is a posterior, for which datum, and why: gaps between guides, in nats.

.. math::
    \log p(x) - \mathrm{ELBO}[q]
    = \underbrace{\log p(x) - \mathrm{ELBO}[q^*]}_{\text{approximation gap}}
    + \underbrace{\mathrm{ELBO}[q^*] - \mathrm{ELBO}[q]}_{\text{amortization gap}}

where :math:`q^*` is the refined guide, the best of the family for each datum

(Cremer, Li & Duvenaud 2018). The first is the family's, the second the encoder's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.diagnostics.pareto_k import PARETO_K_THRESHOLD
from pyro_vae.diagnostics.psis import psis
from pyro_vae.evaluation.comparison import Comparison, mean_of_errors
from pyro_vae.families.gaussian import Family, Normal
from pyro_vae.guides.base import FamilyGuide, of_family
from pyro_vae.guides.local import LocalGuide
from pyro_vae.guides.moments import normal_moments
from pyro_vae.particles.estimators import (
    calibrated,
    effective_sample_size,
    elbo,
    elbo_influence,
    iwae_bound,
    iwae_influence,
    mixture_log_guide,
    skewness,
    std_error,
)
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.global_latents import fix_globals, given_text
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.counts import as_count
from pyro_vae.programs.structure import inspect
from pyro_vae.refinement.refine import refine

__all__ = ["PARETO_K_THRESHOLD", "compare"]


def compare(
    model: Callable[..., Any],
    guides: Mapping[str, Any],
    *batch: Any,
    num_particles: int = 5000,
    reference: str | None = None,
    given: Mapping[str, Any] | None = None,
    chunk_size: int | None = None,
    data_plate: str | bool | None = None,
    max_steps: int = 4000,
    tolerance: float = 0.02,
    seed: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare guides of one model on one batch, datum by datum.

    Every guide is drawn from on common random numbers, so that differences between
    guides have paired standard errors. log p(x) is the tightest lower bound at hand:
    importance sampling through one of the guides, or through the equal mixture of all
    of them (balance heuristic): of those whose mean over the data is not clearly below
    the best, the mixture if its standard error is not more than twice the smallest, else
    the one with the smallest.

    Args:
        model: a Pyro model.
        guides: a name to a guide (amortized, local, hand-written), or to a family, for
            which a LocalGuide is refined on this batch, from the first guide's answer.
            For a guide whose family has no refined guide here, one is added, named
            "<family> per datum".
        *batch: arguments of model and guides.
        num_particles: K, draws of each guide for each datum.
        reference: the name that every guide's amortization gap is measured against; by
            default the refined guide of the guide's own family.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        chunk_size: pairs (particle, datum) scored at once; bounds memory only.
        data_plate: as in :func:`pyro_vae.log_weights`.
        max_steps: of refine.
        tolerance: of refine, in nats.
        seed: of the draws; None takes one from the global random state.
        progress: whether to show bars, of refining and of scoring, with the time that is left; they
            appear after a second.

    Returns:
        A Comparison. A guide of no family of ours (a hand-written one with other
        distributions than Normal) and without ``reference`` has gaps of nan.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses, an empty mapping, or
            a reference that is not in it.
    """
    num_particles = as_count("num_particles", num_particles)
    arguments = as_batch(*batch)
    if not isinstance(guides, Mapping):
        raise TypeError(
            f"guides={guides!r}: a mapping from names to guides or families is needed, such as "
            "{'amortized': guide}"
        )
    if not guides:
        raise ValueError("guides is empty: a mapping from names to guides or families is needed")
    if reference is not None and reference not in guides:
        raise ValueError(f"reference={reference!r} is not among the guides {sorted(guides)}")
    model, guides, fixed = fix_globals(model, guides, arguments, data_plate, given)
    seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
    options: dict[str, Any] = {"data_plate": data_plate, "seed": seed}
    budget = {"max_steps": max_steps, "tolerance": tolerance, "progress": progress}
    made, references = _with_references(model, guides, arguments, reference, {**options, **budget})
    scorers = {name: Evaluator(model, guide, arguments, **options) for name, guide in made.items()}
    for name, scorer in scorers.items():
        if scorer.pair.point_sites:
            raise ValueError(
                f"guides[{name!r}] proposes one point for {scorer.pair.point_sites}: log p(x, z) "
                "there is the height of a density, no bound on log p(x), with no gap to it. Leave "
                "it out"
            )
    blocks: dict[int, list[list[tuple[Tensor, Tensor]]]] = {}
    reduced = []
    for a, b in itertools.permutations(scorers.values(), 2):
        a.share_preimages(b)
    crossed = all(a.can_score(b) for a in scorers.values() for b in scorers.values())
    # Every scorer must cut the data and the particles alike: as the least divisible one does.
    if len({len(scorer.data_blocks()) for scorer in scorers.values()}) > 1:
        for scorer in scorers.values():
            scorer.splittable = False
    pairs = num_particles * next(iter(scorers.values())).num_data
    with tqdm(
        total=pairs, desc="compare", unit="draw", disable=not progress, delay=1.0, unit_scale=True
    ) as bar:
        for chunks in zip(
            *(s.chunks(num_particles, chunk_size) for s in scorers.values()), strict=True
        ):
            rows = chunks[0].rows
            per_guide = blocks.setdefault(rows.start, [[] for _ in scorers])
            for mine, chunk in enumerate(chunks):
                log_guides = [
                    chunk.weights.log_guide
                    if other == mine
                    else scorer.score_guide(rows, chunk.values)
                    for other, scorer in enumerate(scorers.values())
                    if crossed or other == mine
                ]
                per_guide[mine].append((chunk.weights.log_joint, torch.stack(log_guides)))
            drawn = chunks[0].particles.stop - chunks[0].particles.start
            bar.update(drawn * (rows.stop - rows.start))
            if chunks[0].particles.stop == num_particles:
                reduced.append(_reduce(blocks.pop(rows.start), list(made), references, crossed))
    dataset = _dataset(reduced, list(made), references, num_particles)
    dataset.attrs["given"] = given_text(fixed)
    for name, scorer in scorers.items():
        infinite = torch.as_tensor(dataset["elbo"].sel(guide=name).values) == -math.inf
        scorer.warn_of_outside(f"the ELBO of {name!r}", infinite)
    dataset["converged"] = (("guide", "datum"), _converged(made, references, dataset))
    return Comparison(dataset, made)


def _with_references(
    model: Callable[..., Any],
    guides: Mapping[str, Any],
    batch: Batch,
    reference: str | None,
    options: Mapping[str, Any],
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Refine what is asked for; return all guides, and each guide's reference by name."""
    hand = {n: g for n, g in guides.items() if not isinstance(g, Family)}
    for name, guide in hand.items():
        if not callable(guide) or isinstance(guide, type):
            raise TypeError(f"guides[{name!r}]: a guide or a family is needed, found {guide!r}")
    start = next(iter(hand.values()), None)
    made: dict[str, Callable[..., Any]] = {}
    by_family: dict[Family, str] = {}

    def add(name: str, family: Family) -> None:
        begin = start
        if begin is None:
            begin = LocalGuide(
                model,
                num_data=_size(model, batch, options["data_plate"]),
                example=batch,
                family=family,
                data_plate=options["data_plate"],
            )
        made[name] = refine(model, begin, batch, family=family, **options)
        by_family.setdefault(family, name)

    for name, guide in guides.items():
        if isinstance(guide, Family):
            add(name, guide)
        else:
            made[name] = guide
    references: dict[str, str] = {}
    for name in guides:
        if reference is not None:
            references[name] = reference
            continue
        if name not in hand:
            references[name] = name
            continue
        family = _family_of(model, hand[name], batch, options)
        if family is None:
            continue
        if family not in by_family:
            added = f"{type(family).__name__} per datum"
            if added in references.values():  # of other options, such as another rank
                added = f"{family} per datum"
            if added in guides:
                raise ValueError(
                    f"guides[{added!r}]: that is the name of the refined guide which the "
                    "comparison adds; choose another, or give the family a name of its own"
                )
            add(added, family)
            references[by_family[family]] = by_family[family]
        references[name] = by_family[family]
    return made, references


def _size(model: Callable[..., Any], batch: Batch, data_plate: str | bool | None) -> int:
    return inspect(model, batch, data_plate=data_plate).num_data


def _family_of(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    options: Mapping[str, Any],
) -> Family | None:
    """Return a guide's family: its own, or Normal for independent Normals written by hand."""
    if isinstance(guide, FamilyGuide):
        return guide.family if of_family(guide) else None
    scorer = Evaluator(model, guide, batch, data_plate=options["data_plate"], seed=options["seed"])
    runs = scorer.guide_runs(2)
    if all(normal_moments([run[name] for run in runs]) is not None for name in runs[0]):
        return Normal()
    return None


def _reduce(
    per_guide: list[list[tuple[Tensor, Tensor]]],
    names: list[str],
    references: Mapping[str, str],
    crossed: bool,
) -> dict[str, np.ndarray]:
    """Reduce one block's log weights, [K, n] of each guide, to numbers for each datum."""
    log_joint = [torch.cat([joint for joint, _ in chunks]) for chunks in per_guide]
    log_guides = [torch.cat([density for _, density in chunks], 1) for chunks in per_guide]
    own = [densities[i if crossed else 0] for i, densities in enumerate(log_guides)]
    raw = [joint - density for joint, density in zip(log_joint, own, strict=True)]
    weights = [weight.double() for weight in raw]
    elbos = [(elbo(w), elbo_influence(w)) for w in weights]
    bounds = [(iwae_bound(w), iwae_influence(w)) for w in weights]
    evidences = list(bounds)
    k_hats = [_pareto_k(w) for w in raw]
    sizes = [effective_sample_size(w) for w in weights]
    found = {"ess": torch.stack(sizes)}
    if crossed and len(names) > 1:
        mixed = torch.stack(
            [
                joint.double() - mixture_log_guide(densities.double())
                for joint, densities in zip(log_joint, log_guides, strict=True)
            ]
        )
        value = iwae_bound(mixed.flatten(0, 1))
        # One particle of the mixture estimate is one draw of every guide: common
        # random numbers make those draws dependent, and the particles not.
        evidences.append((value, torch.exp(mixed - value).mean(0) - 1.0))
        k_hats.append(_pareto_k(mixed.flatten(0, 1).to(raw[0].dtype)))
        sizes.append(effective_sample_size(mixed.flatten(0, 1)))
    nothing = torch.full_like(elbos[0][0], math.nan)
    influences = {
        "elbo": [influence for _, influence in elbos],
        "iwae_bound": [influence for _, influence in bounds],
        "evidence": [influence for _, influence in evidences],
        "amortization_gap": [],
        "approximation_gap": [],
    }
    amortization = []
    for name, (value, influence) in zip(names, elbos, strict=True):
        reference = names.index(references[name]) if name in references else None
        best, best_influence = (nothing, nothing) if reference is None else elbos[reference]
        amortization.append(best - value)
        influences["amortization_gap"].append(best_influence - influence)
        influences["approximation_gap"] += [other - best_influence for _, other in evidences]
    found |= {
        "elbo": torch.stack([value for value, _ in elbos]),
        "iwae_bound": torch.stack([value for value, _ in bounds]),
        "evidence": torch.stack([value for value, _ in evidences]),
        "evidence_ess": torch.stack(sizes),
        "amortization_gap": torch.stack(amortization),
    }
    for name, each in influences.items():
        found[f"{name}_se"], found[f"{name}_skewness"] = _errors(each)
    for key in ("approximation_gap_se", "approximation_gap_skewness"):
        found[key] = found[key].unflatten(0, (len(names), len(evidences)))
    arrays = {name: value.cpu().numpy() for name, value in found.items()}
    arrays["pareto_k"], arrays["evidence_pareto_k"] = np.stack(k_hats[: len(raw)]), np.stack(k_hats)
    return arrays


def _errors(influences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return calibrated standard errors and skewnesses of influences [K, n] each."""
    skewed = torch.stack([skewness(influence) for influence in influences])
    errors = torch.stack([std_error(influence) for influence in influences])
    return calibrated(errors, skewed, influences[0].shape[0]), skewed


def _pareto_k(weights: Tensor) -> np.ndarray:
    return psis(weights.T.cpu().numpy())[1]


def _dataset(
    reduced: list[dict[str, np.ndarray]],
    names: list[str],
    references: Mapping[str, str],
    num_particles: int,
) -> xr.Dataset:
    arrays = {
        name: np.concatenate([block[name] for block in reduced], axis=-1) for name in reduced[0]
    }
    evidences = {
        name: arrays.pop(f"evidence{name}")
        for name in ("", "_se", "_skewness", "_pareto_k", "_ess")
    }
    errors = [
        mean_of_errors(error, skew, num_particles)
        for error, skew in zip(evidences["_se"], evidences["_skewness"], strict=True)
    ]
    mixture = len(names) if len(errors) > len(names) else None
    chosen = _tightest(evidences[""].mean(1), np.array(errors), mixture)
    labels = [f"IWAE-{num_particles} through {name!r}" for name in names]
    labels.append(
        f"IWAE-{num_particles * len(names)} through the mixture of {' and '.join(map(repr, names))}"
    )
    log_evidence = evidences[""][chosen]
    reference_elbo = np.stack(
        [
            arrays["elbo"][names.index(references[name])]
            if name in references
            else np.full_like(log_evidence, np.nan)
            for name in names
        ]
    )
    arrays["approximation_gap"] = log_evidence - reference_elbo
    for name in ("approximation_gap_se", "approximation_gap_skewness"):
        arrays[name] = arrays[name][:, chosen]
    dims = ("guide", "datum")
    return xr.Dataset(
        {
            **{name: (dims, value) for name, value in sorted(arrays.items())},
            **{f"log_evidence{name}": ("datum", each[chosen]) for name, each in evidences.items()},
        },
        coords={
            "guide": names,
            "datum": np.arange(log_evidence.shape[0]),
            "reference": ("guide", [references.get(name, "") for name in names]),
        },
        attrs={
            "log_evidence_from": labels[chosen],
            # Those of the mixture are draws of every guide.
            "log_evidence_num_particles": num_particles * (len(names) if chosen == mixture else 1),
            "num_particles": num_particles,
            "units": "nats",
        },
    )


def _tightest(means: np.ndarray, errors: np.ndarray, mixture: int | None) -> int:
    """Return which of several lower bounds is the tightest, by their means over the data.

    Of those not clearly below the best, at two standard errors, the one with the smallest
    standard error: to first order a bound of this kind is low by half its variance. Choosing
    by the value alone would choose a heavy tail that happened to give a large weight; and by the
    error alone, one that happened to miss it. The mixture has the lightest tail: it is taken
    where its error is not more than twice the smallest.

    Args:
        means: of each bound.
        errors: of these.
        mixture: which of them is made from draws of all guides, if one is.
    """
    errors = np.nan_to_num(errors)
    plausible = means + 2 * errors >= (means - 2 * errors).max()
    least = int(np.argmin(np.where(plausible, errors, np.inf)))
    if mixture is not None and plausible[mixture] and errors[mixture] <= 2 * errors[least]:
        return mixture
    return least


def _converged(
    guides: Mapping[str, Callable[..., Any]], references: Mapping[str, str], dataset: xr.Dataset
) -> np.ndarray:
    """Return whether each guide's reference has converged; true where refine made none."""
    rows = []
    for name in dataset["guide"].values:
        best = guides.get(references.get(str(name), ""))
        rows.append(
            best.converged.cpu().numpy()
            if isinstance(best, LocalGuide)
            else np.ones(dataset.sizes["datum"], dtype=bool)
        )
    return np.stack(rows)
