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

# Variables of the chosen estimate of log p(x), and their names as those of the guide it is through.
_EVIDENCE = {
    "log_evidence": "iwae_bound",
    "log_evidence_se": "iwae_bound_se",
    "log_evidence_skewness": "iwae_bound_skewness",
    "log_evidence_pareto_k": "pareto_k",
    "log_evidence_ess": "ess",
}


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
        By name: of each guide, [G, n], elbo and amortization_gap; of each of E estimates of
        log p(x), [E, n], iwae_bound with its pareto_k and ess; of both, [G * E, n],
        approximation_gap. E is G, or G + 1 where the last is that of the mixture of all
        guides. Estimates have ``<name>_se`` and ``<name>_skewness`` beside them.
    """
    raw = [
        joint - log_guides[i if len(log_guides) > 1 else 0]
        for i, (joint, log_guides) in enumerate(drawn)
    ]
    weights = [weight.double() for weight in raw]
    elbos = [Estimate.elbo(weight) for weight in weights]
    evidences = [Estimate.iwae(weight) for weight in weights]
    if len(drawn[0][1]) > 1:
        mixed = torch.stack([j.double() - mixture_log_guide(q.double()) for j, q in drawn])
        # One particle of the mixture is one draw of every guide: common random numbers make those
        # draws dependent, and the particles not.
        together = mixed.flatten(0, 1)
        value = iwae_bound(together)
        evidences.append(Estimate(value, torch.exp(mixed - value).mean(0) - 1.0))
        weights.append(together)
        raw.append(together.to(raw[0].dtype))
    unknown = Estimate(*(torch.full_like(elbos[0].value, math.nan),) * 2)
    bests = [
        elbos[names.index(references[name])] if name in references else unknown for name in names
    ]
    gaps = (best - own for best, own in zip(bests, elbos, strict=True))
    return {
        **_columns("elbo", elbos),
        **_columns("amortization_gap", gaps),
        **_columns("approximation_gap", (each - best for best in bests for each in evidences)),
        **_columns("iwae_bound", evidences),
        "pareto_k": np.stack([psis(each.T.cpu().numpy())[1] for each in raw]),
        "ess": np.stack([effective_sample_size(w).cpu().numpy() for w in weights]),
    }


def _columns(name: str, estimates: Iterable[Estimate]) -> dict[str, np.ndarray]:
    """Return values, calibrated standard errors and skewnesses of some estimates, [*, n] each."""
    rows = []
    for each in estimates:
        skewness = each.skewness
        error = calibrated(each.std_error, skewness, len(each.influence))
        rows.append((each.value, error, skewness))
    columns = (torch.stack(column).cpu().numpy() for column in zip(*rows, strict=True))
    return dict(zip((name, f"{name}_se", f"{name}_skewness"), columns, strict=True))


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
    both = zip(arrays["iwae_bound_se"], arrays["iwae_bound_skewness"], strict=True)
    errors = np.array([mean_of_errors(error, skew, num_particles) for error, skew in both])
    mixture = len(names) if len(errors) > len(names) else None
    chosen = tightest(arrays["iwae_bound"].mean(1), errors, mixture)
    for suffix in ("", "_se", "_skewness"):
        of_each = arrays[f"approximation_gap{suffix}"]
        arrays[f"approximation_gap{suffix}"] = of_each[chosen :: len(errors)]
    if chosen == mixture:  # its particles are draws of every guide
        evidence_particles = num_particles * len(names)
        source = f"the mixture of {' and '.join(map(repr, names))}"
    else:
        evidence_particles, source = num_particles, repr(names[chosen])
    return xr.Dataset(
        {
            **{name: (("guide", "datum"), arrays[name][: len(names)]) for name in sorted(arrays)},
            **{name: ("datum", arrays[own][chosen]) for name, own in _EVIDENCE.items()},
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
