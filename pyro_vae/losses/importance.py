"""What the losses of importance weights have in common: scales outside the logarithm."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.losses.base import Objective
from pyro_vae.particles.plan import device_of
from pyro_vae.particles.training_run import TrainingRun
from pyro_vae.programs.handlers import same_scale, scale_parts
from pyro_vae.programs.state import evaluation, preserved_rng
from pyro_vae.programs.types import Program


class ImportanceObjective(Objective):
    """What the objectives of one importance weight per datum have in common."""

    _data = "needed"
    _enumeration = "no"

    def explain(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
        """Return, for each latent site, that its part of the weight is sampled."""
        with torch.no_grad(), preserved_rng(device_of(args, kwargs)), evaluation(model, guide):
            run = self._run(model, guide, args, kwargs)
        told = dict.fromkeys(
            run.plan.summed_out, "summed out: discrete, and not proposed by the guide"
        )
        for name, _ in run.guide.latents():
            told[name] = "sampled: an importance weight has no analytic part"
        return told


# A scale in two parts: that of plates and poutine.scale, and the factor of a KL warm-up, a tensor
# whose number is not to be read.
_Parts = tuple[Any, Tensor | None]


def scales_of_weights(run: TrainingRun) -> tuple[Any, dict[str, _Parts], Any]:
    """Return the scale of each datum, the ratio to it of each site's, and the latents' ratio.

    The scale of a datum, [N] or a number, is that of its likelihood. The ratio of the latents is
    None where it is not one for all.
    """
    shared = _shared(run)
    parts = {
        name: _scale_parts(run, name, nodes[0])
        for name, nodes in run.model.sites()
        if name not in shared
    }
    observed = [parts[name] for name, _ in run.observed()]
    # Observed sites of different scales are tempered: what is left is what a datum counts for.
    alike = bool(observed) and all(_same_parts(s, observed[0]) for s in observed)
    scale = observed[0][0] if alike else run.plate_scale
    ratios = {
        name: (1.0 if same_scale(s, scale) else s / scale, factor)
        for name, (s, factor) in parts.items()
    }
    latent = [ratios[name] for name, _ in run.latents() if name not in shared]
    alike = not latent or all(_same_parts(r, latent[0]) for r in latent)
    return scale, ratios, None if not alike else _product(latent[0]) if latent else 1.0


def weighted_terms(
    run: TrainingRun, guide_terms: Mapping[str, Tensor], ratios: Mapping[str, _Parts], common: Any
) -> tuple[Tensor, Tensor]:
    """Return log p(x, z) and log q(z | x) of each datum, [K, N].

    A site of another scale than the datum's enters with the ratio of the two.
    """
    shared = _shared(run)
    log_joint = _sum(
        _times(_product(ratios[name]), term)
        for name, term in run.model_terms(scaled=False, skip=shared)
    )

    def ratio(name: str) -> Any:
        if name in ratios:
            return _product(ratios[name])
        if common is None:
            raise ValueError(
                f"the guide's auxiliary site {name!r} stands for latent sites of different "
                "scales; give them one scale"
            )
        return common

    proposed = [
        _times(ratio(name), term) for name, term in guide_terms.items() if name not in shared
    ]
    # Nothing is proposed where every latent is summed out.
    return log_joint, _sum(proposed) if proposed else torch.zeros_like(log_joint)


def _shared(run: TrainingRun) -> set[str]:
    """Return the latent sites of which all particles see one draw."""
    return set(_globals(run)) if run.plan.shares_globals else set()


def _scale_parts(run: TrainingRun, name: str, node: Any) -> _Parts:
    scale, factor = scale_parts(node)
    return run.datum_scale(name, {**node, "scale": scale}), factor


def _same_parts(a: _Parts, b: _Parts) -> bool:
    return a[1] is b[1] and same_scale(a[0], b[0])


def _product(parts: _Parts) -> Any:
    scale, factor = parts
    return scale if factor is None else scale * factor


def _times(ratio: Any, term: Tensor) -> Tensor:
    return term if isinstance(ratio, float) and ratio == 1.0 else ratio * term


def _globals(run: TrainingRun) -> list[str]:
    """Return the latent sites of model and guide outside the data plate."""
    nodes = {name: found[0] for name, found in (*run.guide.latents(), *run.latents())}
    return [name for name, node in nodes.items() if not run.is_local(name, node)]


def kl_of_globals(run: TrainingRun) -> Tensor:
    """Return log q - log p of the one draw of the global latents, scaled."""
    latents = dict(run.latents())
    terms = [
        sign * run.log_prob(name, found[name], scaled=True)[0].sum()
        for sign, found in ((1.0, dict(run.guide.latents())), (-1.0, latents))
        for name in _globals(run)
        if name in found
    ]
    return torch.stack(terms).sum()


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)
