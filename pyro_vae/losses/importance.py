"""The base of losses of importance weights: scales stand outside the logarithm."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.losses.base import Objective
from pyro_vae.particles.plan import DataNeed
from pyro_vae.particles.training_run import TrainingRun
from pyro_vae.programs.handlers import same_scale, scale_parts
from pyro_vae.programs.types import Node


class ImportanceObjective(Objective):
    """The base of losses with one importance weight for each particle and datum.

    A subclass gives :meth:`_loss`, as a reduction of :class:`WeightedTerms`.
    """

    _data: DataNeed = "needed"
    _one_minibatch = True

    def _explained(self, run: TrainingRun) -> dict[str, str]:
        reason = "sampled: an importance weight has no analytic part"
        return {name: reason for name, _ in run.guide.latents()}


@dataclass(frozen=True, slots=True)
class _Scale:
    """A scale in two parts, whose product it is.

    Attributes:
        number: that of plates and poutine.scale: a number, a 0-dimensional tensor or [N].
        factor: of a KL warm-up, whose number is not to be read; None without one.
    """

    number: float | Tensor
    factor: Tensor | None = None

    @staticmethod
    def of(run: TrainingRun, name: str, node: Node) -> _Scale:
        """Return the scale of a datum at a site."""
        number, factor = scale_parts(node)
        return _Scale(run.datum_scale(name, {**node, "scale": number}), factor)

    def equals(self, other: _Scale) -> bool:
        """Return whether two scales are one, to rounding."""
        return self.factor is other.factor and same_scale(self.number, other.number)

    def over(self, number: float | Tensor) -> _Scale:
        """Return the ratio of this scale to a number."""
        same = same_scale(self.number, number)
        return _Scale(1.0 if same else self.number / number, self.factor)

    @property
    def product(self) -> float | Tensor:
        """The scale."""
        return self.number if self.factor is None else self.number * self.factor

    def times(self, term: Tensor) -> Tensor:
        """Return a term, scaled."""
        scale = self.product
        return term if isinstance(scale, float) and scale == 1.0 else scale * term


class WeightedTerms:
    """The two halves of a datum's log weight, [K, N], and the scale that stands outside of it.

    A site of another scale than the datum's enters with the ratio of the two.

    Args:
        run: of a pair.

    Attributes:
        scale: of a datum, which is that of its likelihood: a number, or [N].
        latent_ratio: of all latents' scales to the datum's; None where it is not one for all.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        # The latents of which all particles see one draw are no part of a weight.
        self._shared = set(_globals(run)) if run.plan.shares_globals else set()
        scales = {
            name: _Scale.of(run, name, nodes[0])
            for name, nodes in run.model.sites()
            if name not in self._shared
        }
        observed = [scales[name] for name, _ in run.observed()]
        # Observed sites of different scales are tempered: a datum has the plate's scale alone.
        alike = bool(observed) and all(scale.equals(observed[0]) for scale in observed)
        self.scale = observed[0].number if alike else run.plate_scale
        self._ratios = {name: scale.over(self.scale) for name, scale in scales.items()}
        of_latents = [self._ratios[name] for name, _ in run.latents() if name not in self._shared]
        of_latents = of_latents or [_Scale(1.0)]
        alike = all(ratio.equals(of_latents[0]) for ratio in of_latents)
        self._common = of_latents[0] if alike else None
        self.latent_ratio = of_latents[0].product if alike else None

    def log_joint(self) -> Tensor:
        """Return log p(x, z) of each datum, [K, N]."""
        terms = self._run.model_terms(scaled=False, skip=self._shared)
        return functools.reduce(torch.add, (self._ratios[n].times(term) for n, term in terms))

    def log_guide(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return log q(z | x) of each datum, [K, N]; a zero where every latent is summed out.

        Args:
            terms: of the proposals, [K, N] each.
        """
        proposed = []
        for name in (name for name in terms if name not in self._shared):
            ratio = self._ratios.get(name, self._common)
            if ratio is None:
                raise ValueError(
                    f"the guide's auxiliary site {name!r} stands for latent sites of different "
                    "scales; give them one scale"
                )
            proposed.append(ratio.times(terms[name]))
        return functools.reduce(torch.add, proposed) if proposed else torch.zeros(())


def _globals(run: TrainingRun) -> list[str]:
    """Return the latent sites of model and guide outside the data plate."""
    nodes = {name: found[0] for name, found in (*run.guide.latents(), *run.latents())}
    return [name for name, node in nodes.items() if not run.is_local(name, node)]


def kl_of_globals(run: TrainingRun) -> Tensor:
    """Return log q - log p of the one draw of the global latents, scaled."""
    proposals, latents = dict(run.guide.latents()), dict(run.latents())
    terms = [
        sign * run.log_prob(name, found[name], scaled=True)[0].sum()
        for sign, found in ((1.0, proposals), (-1.0, latents))
        for name in _globals(run)
        if name in found
    ]
    return torch.stack(terms).sum()
