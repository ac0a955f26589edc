"""Gaps between guides from log weights of their draws: arrays in, a dataset out.

A block of data is reduced at a time (:func:`reduce_block`); the blocks make the dataset, in which
log p(x) is the tightest of several lower bounds (:func:`gap_dataset`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.diagnostics.psis import psis
from pyro_vae.evaluation.comparison import mean_of_errors
from pyro_vae.particles.estimators import (
    Estimate,
    calibrated,
    effective_sample_size,
    iwae_bound,
    mixture_log_guide,
)


def reduce_block(
    log_joints: Sequence[Tensor],
    log_guides: Sequence[Tensor],
    names: Sequence[str],
    references: Mapping[str, str],
) -> dict[str, np.ndarray]:
    """Return the estimates of a block of data, with standard errors and skewnesses.

    Args:
        log_joints: log p(x, z) of each guide's draws, [K, n].
        log_guides: log q of the same draws under all guides, [G, K, n]; [1, K, n] under the one
            that drew them where they cannot be scored by the others.
        names: of the guides.
        references: name to the name of the refined guide that gaps are measured against.

    Returns:
        By name: of each guide, [G, n], elbo, iwae_bound, amortization_gap, pareto_k and ess; of
        each of E estimates of log p(x), [E, n], log_evidence with its pareto_k and ess; of both,
        [G, E, n], approximation_gap. E is G, or G + 1 where the last is that of the mixture of all
        guides. Estimates have ``<name>_se`` and ``<name>_skewness`` beside them.
    """
    raw = [
        joint - densities[i if len(densities) > 1 else 0]
        for i, (joint, densities) in enumerate(zip(log_joints, log_guides, strict=True))
    ]
    weights = [weight.double() for weight in raw]
    elbos = [Estimate.elbo(weight) for weight in weights]
    bounds = [Estimate.iwae(weight) for weight in weights]
    evidences = list(bounds)
    k_hats = [_pareto_k(weight) for weight in raw]
    sizes = [effective_sample_size(weight).cpu().numpy() for weight in weights]
    if len(log_guides[0]) > 1:
        mixed = _mixture_weights(log_joints, log_guides)
        evidences.append(_mixture_evidence(mixed))
        together = mixed.flatten(0, 1)
        k_hats.append(_pareto_k(together.to(raw[0].dtype)))
        sizes.append(effective_sample_size(together).cpu().numpy())
    unknown = Estimate(*(torch.full_like(elbos[0].value, math.nan),) * 2)
    bests = [
        elbos[names.index(references[name])] if name in references else unknown for name in names
    ]
    approximation = _columns(
        "approximation_gap", (evidence - best for best in bests for evidence in evidences)
    )
    return {
        **_columns("elbo", elbos),
        **_columns("iwae_bound", bounds),
        **_columns("log_evidence", evidences),
        **_columns(
            "amortization_gap", (best - own for best, own in zip(bests, elbos, strict=True))
        ),
        **{
            name: value.reshape(len(names), len(evidences), -1)
            for name, value in approximation.items()
        },
        "pareto_k": np.stack(k_hats[: len(names)]),
        "ess": np.stack(sizes[: len(names)]),
        "log_evidence_pareto_k": np.stack(k_hats),
        "log_evidence_ess": np.stack(sizes),
    }


def _mixture_weights(log_joints: Sequence[Tensor], log_guides: Sequence[Tensor]) -> Tensor:
    """Return the log weights of all guides' draws against their equal mixture, [G, K, n]."""
    return torch.stack(
        [
            joint.double() - mixture_log_guide(densities.double())
            for joint, densities in zip(log_joints, log_guides, strict=True)
        ]
    )


def _mixture_evidence(mixed: Tensor) -> Estimate:
    """Return log p(x) from log weights against the mixture, [G, K, n].

    One particle of it is one draw of every guide: common random numbers make those draws
    dependent, and the particles not.
    """
    value = iwae_bound(mixed.flatten(0, 1))
    return Estimate(value, torch.exp(mixed - value).mean(0) - 1.0)


def _columns(name: str, estimates: Iterable[Estimate]) -> dict[str, np.ndarray]:
    """Return values, calibrated standard errors and skewnesses of some estimates, [*, n] each."""
    rows = []
    for each in estimates:
        skewness = each.skewness
        error = calibrated(each.std_error, skewness, len(each.influence))
        rows.append((each.value, error, skewness))
    columns = (torch.stack(column).cpu().numpy() for column in zip(*rows, strict=True))
    return dict(zip((name, f"{name}_se", f"{name}_skewness"), columns, strict=True))


def _pareto_k(log_weights: Tensor) -> np.ndarray:
    """Return k-hat of log weights [K, n], for each datum."""
    return psis(log_weights.T.cpu().numpy())[1]


def gap_dataset(
    blocks: Sequence[Mapping[str, np.ndarray]],
    names: Sequence[str],
    references: Mapping[str, str],
    num_particles: int,
) -> xr.Dataset:
    """Return the dataset of a comparison, in nats, with the tightest bound as log p(x).

    Args:
        blocks: what :func:`reduce_block` returns of each block of data.
        names: of the guides.
        references: name to the name of the refined guide that gaps are measured against.
        num_particles: K of each guide.
    """
    arrays = {name: np.concatenate([block[name] for block in blocks], -1) for name in blocks[0]}
    errors = [
        mean_of_errors(error, skew, num_particles)
        for error, skew in zip(
            arrays["log_evidence_se"], arrays["log_evidence_skewness"], strict=True
        )
    ]
    mixture = len(names) if len(errors) > len(names) else None
    chosen = tightest(arrays["log_evidence"].mean(1), np.array(errors), mixture)
    if chosen == mixture:  # its particles are draws of every guide
        evidence_particles = num_particles * len(names)
        source = f"the mixture of {' and '.join(map(repr, names))}"
    else:
        evidence_particles, source = num_particles, repr(names[chosen])
    evidence = [name for name in arrays if name.startswith("log_evidence")]
    of_guides = {name: arrays[name] for name in sorted(arrays.keys() - evidence)}
    return xr.Dataset(
        {
            **{
                name: (("guide", "datum"), value if value.ndim == 2 else value[:, chosen])
                for name, value in of_guides.items()
            },
            **{name: ("datum", arrays[name][chosen]) for name in evidence},
        },
        coords={
            "guide": list(names),
            "datum": np.arange(arrays["elbo"].shape[1]),
            "reference": ("guide", [references.get(name, "") for name in names]),
        },
        attrs={
            "log_evidence_from": f"IWAE-{evidence_particles} through {source}",
            "log_evidence_num_particles": evidence_particles,
            "num_particles": num_particles,
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
