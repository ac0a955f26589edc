r"""How wrong is a posterior, for which datum, and why: gaps between guides, in nats.

.. math::
    \log p(x) - \mathrm{ELBO}[q]
    = \underbrace{\log p(x) - \mathrm{ELBO}[q^*]}_{\text{approximation gap}}
    + \underbrace{\mathrm{ELBO}[q^*] - \mathrm{ELBO}[q]}_{\text{amortization gap}}

where :math:`q^*` is the refined guide, the best of the family for each datum (Cremer, Li & Duvenaud
2018). The first is the family's, the second the encoder's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.evaluation.comparison import Comparison, gap_dataset, reduce_block
from pyro_vae.evaluation.evidence import (
    Evidence,
    annealed,
    check_evidence,
    check_exact,
    exact,
    take,
)
from pyro_vae.families.base import Family
from pyro_vae.families.gaussian import Normal
from pyro_vae.guides.base import FamilyGuide, of_family
from pyro_vae.guides.coordinates import normal_moments
from pyro_vae.guides.exact import ExactGuide
from pyro_vae.guides.local import LocalGuide
from pyro_vae.particles.blocks import Chunk, worth_parts
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.global_latents import fix_globals, given_text
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.messages import as_count, as_seed
from pyro_vae.programs.on_demand import OnDemand, on_demand
from pyro_vae.programs.processes import processes
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import DataPlate, GivenValues, Program
from pyro_vae.refinement.refine import TOLERANCE, checked_steps, refine_scored


def compare(
    model: Program,
    guides: Mapping[str, Program | Family],
    *batch: Any,
    num_particles: int = 5000,
    reference: str | None = None,
    evidence: Evidence = "iwae",
    given: GivenValues | None = None,
    chunk_size: int | None = None,
    data_plate: DataPlate = None,
    max_steps: int = 4000,
    tolerance: float = TOLERANCE,
    seed: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare guides of one model on one batch, datum by datum.

    Every guide is drawn from on common random numbers, so that differences between
    guides have paired standard errors. log p(x) is the tightest lower bound at hand:
    importance sampling through one of the guides, or through the equal mixture of all
    of them (balance heuristic): of those whose mean over the data is not clearly below
    the best, the mixture if its standard error is not more than twice the smallest, else
    the one with the smallest. Where weights are not to be trusted
    (:mod:`pyro_vae.diagnostics.verdict`) the table says for how many data, and ``evidence="auto"``
    puts annealed chains in their place.

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
        evidence: where log p(x) is from. "iwae": importance weights for all data. "auto": the same,
            but for data whose weights are not to be trusted annealed importance sampling (see
            :func:`pyro_vae.ais`) from the guide with the highest ELBO, by 16 chains of 128 steps,
            of 512 where few chains carry the mean, and of 512 from the prior where they miss a
            mode. That is 12,000 gradients of log p(x, z) for such a datum, 50,000 more for each
            further try, and a few seconds to record them. Data for which the chains' bound is
            clearly lower keep that of the weights; ``evidence_from`` has steps and start. "ais":
            annealed chains for all data. "exact": the model's method ``log_evidence(*batch)``, or
            the sum over all values where every latent is discrete.
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
        ValueError: for what :func:`pyro_vae.log_weights` refuses, an empty mapping, a reference
            that is not in it, another ``evidence``; "ais" for what :func:`pyro_vae.ais` refuses;
            "exact" where no formula is known, and for one that gives less than an ELBO.
    """
    num_particles = as_count("num_particles", num_particles)
    max_steps = checked_steps(max_steps, tolerance)
    arguments = worth_parts(on_demand(*batch), data_plate)
    _check_guides(guides, reference)
    check_evidence(evidence)
    passed = model
    model, guides, fixed = fix_globals(model, guides, arguments, data_plate, given)
    seed = as_seed(seed)
    work = _Work(model, arguments, data_plate, seed, max_steps, tolerance, progress)
    compared, references = _with_references(work, guides, reference)
    evaluators = {name: work.evaluator(guide) for name, guide in compared.items()}
    for name, evaluator in evaluators.items():
        if points := evaluator.pair.point_sites:
            raise ValueError(
                f"guides[{name!r}] proposes one point for {points}: log p(x, z) there is the "
                "height of a density, no bound on log p(x), with no gap to it. Leave it out"
            )
    names = list(compared)
    reduced = _reduced(evaluators, references, num_particles, chunk_size, progress)
    dataset = gap_dataset(reduced, names, references, num_particles)
    dataset.attrs.update(given=given_text(fixed), evidence=evidence)
    if evidence == "exact":
        one = next(iter(evaluators.values()))
        source = exact(passed, arguments, one, data_plate, fixed=bool(fixed))
        check_exact(dataset, source)
        take(dataset, source, references, evidence)
    elif evidence != "iwae":
        # As they were passed: a table brings the globals that it was fitted at.
        _anneal(work, passed, dict(fixed) or None, dataset, compared, references, evidence)
    for name, evaluator in evaluators.items():
        infinite = torch.as_tensor(dataset["elbo"].sel(guide=name).values) == -math.inf
        evaluator.warn_of_outside(f"the ELBO of {name!r}", infinite)
    bests = (compared.get(references.get(name, "")) for name in names)
    every = torch.ones(dataset.sizes["datum"], dtype=torch.bool)  # where none was refined
    converged = [best.converged.cpu() if isinstance(best, LocalGuide) else every for best in bests]
    dataset["converged"] = (("guide", "datum"), torch.stack(converged).numpy())
    return Comparison(dataset, compared)


def _anneal(
    work: _Work,
    model: Program,
    given: GivenValues | None,
    dataset: xr.Dataset,
    guides: Mapping[str, Program],
    references: Mapping[str, str],
    evidence: Evidence,
) -> None:
    """Put bounds by annealed chains into a dataset: of all data, or of those with bad weights."""
    rows = np.arange(dataset.sizes["datum"])
    if evidence == "auto":
        rows = np.flatnonzero(~dataset["log_evidence_good"].values)
    if not rows.size:
        return
    able = [name for name, guide in guides.items() if not isinstance(guide, ExactGuide)]
    elbos = dataset["elbo"].mean("datum").fillna(-np.inf)
    name = str(elbos.sel(guide=able or list(guides)).idxmax("guide").item())
    numbers = torch.as_tensor(rows)
    try:
        source = annealed(
            model,
            (name, guides[name]),
            work.batch,
            numbers,
            given,
            work.data_plate,
            work.seed,
            work.progress,
        )
    except ValueError as error:
        if evidence == "ais":
            raise
        # Weights serve all the same; the table says why there are no chains.
        dataset.attrs["ais_refused"] = str(error)
        return
    take(dataset, source, references, evidence)


def _check_guides(guides: object, reference: str | None) -> None:
    """Raise for what is no mapping of guides, and for a reference that is not among them."""
    needed = "a mapping from names to guides or families is needed, such as {'amortized': guide}"
    if not isinstance(guides, Mapping):
        raise TypeError(f"guides={guides!r}: {needed}")
    if not guides:
        raise ValueError(f"guides is empty: {needed}")
    for name, guide in guides.items():
        if not isinstance(guide, Family) and (not callable(guide) or isinstance(guide, type)):
            raise TypeError(f"guides[{name!r}]: a guide or a family is needed, found {guide!r}")
    if reference is not None and reference not in guides:
        raise ValueError(f"reference={reference!r} is not among the guides {sorted(guides)}")


@dataclass(slots=True)
class _Work:
    """A model on a batch, with the limits of refining and the evaluator of each guide."""

    model: Program
    batch: Batch
    data_plate: DataPlate
    seed: int
    max_steps: int
    tolerance: float
    progress: bool
    made: dict[int, Evaluator] = field(default_factory=dict)  # by id: guides need no hash

    def evaluator(self, guide: Program) -> Evaluator:
        """Return the evaluator of a guide; what the first one knows of the model is shared."""
        if id(guide) not in self.made:
            like, plate = next(iter(self.made.values()), None), self.data_plate
            self.made[id(guide)] = Evaluator(
                self.model, guide, self.batch, data_plate=plate, seed=self.seed, like=like
            )
        return self.made[id(guide)]

    def refined(self, start: Program | None, family: Family) -> LocalGuide:
        """Return a guide of a family refined from another's answer, or from the prior."""
        model, batch, plate = self.model, self.batch, self.data_plate
        if start is None:
            num_data = batch.size or 1
            if not isinstance(batch, OnDemand):
                num_data = ModelLooks(model, batch).structure(plate).num_data
            start = LocalGuide(
                model, num_data=num_data, example=batch, family=family, data_plate=plate
            )
        evaluator, progress = self.evaluator(start), self.progress
        local = refine_scored(
            evaluator, family, plate, self.max_steps, self.tolerance, progress=progress
        )
        local.remember(batch)
        return local

    def family_of(self, guide: Program | Family) -> Family | None:
        """Return a guide's family: its own, or Normal for independent Normals written by hand."""
        if isinstance(guide, Family):
            return guide
        if isinstance(guide, FamilyGuide):
            return guide.family if of_family(guide) else None
        first, second = self.evaluator(guide).guide_runs(2)
        normal = all(normal_moments([first[name], second[name]]) is not None for name in first)
        return Normal() if normal else None


def _with_references(
    work: _Work, guides: Mapping[str, Program | Family], reference: str | None
) -> tuple[dict[str, Program], dict[str, str]]:
    """Return all guides of a comparison, and the name of each guide's reference.

    Families become guides refined on the batch; a guide whose family has none gets one.
    """
    start = next((guide for guide in guides.values() if not isinstance(guide, Family)), None)
    found = {
        name: work.refined(start, guide) if isinstance(guide, Family) else guide
        for name, guide in guides.items()
    }
    first = reversed(list(guides.items()))  # the first name of a family is the last to be written
    by_family = {guide: name for name, guide in first if isinstance(guide, Family)}
    if reference is not None:
        return found, dict.fromkeys(guides, reference)
    references: dict[str, str] = {}
    for name, guide in guides.items():
        family = work.family_of(guide)
        if family is None:
            continue
        if family not in by_family:
            added = _name_of(family, guides, references)
            found[added] = work.refined(start, family)
            by_family[family] = references[added] = added
        references[name] = name if isinstance(guide, Family) else by_family[family]
    return found, references


def _name_of(family: Family, guides: Container[str], references: Mapping[str, str]) -> str:
    """Return the name of a refined guide that the comparison adds; raise where it is taken."""
    name = f"{type(family).__name__} per datum"
    if name in references.values():  # of other options, such as another rank
        name = f"{family} per datum"
    if name in guides:
        raise ValueError(
            f"guides[{name!r}]: that is the name of the refined guide which the comparison adds; "
            "choose another, or give the family a name of its own"
        )
    return name


def _reduced(
    evaluators: Mapping[str, Evaluator],
    references: Mapping[str, str],
    num_particles: int,
    chunk_size: int | None,
    progress: bool,
) -> list[dict[str, np.ndarray]]:
    """Return what :func:`reduce_block` returns of each block of data."""
    names, several = list(evaluators), list(evaluators.values())
    crossed, here = _aligned(several), processes()
    total = num_particles * several[0].num_data
    look: dict[str, Any] = {"unit": "draw", "unit_scale": True, "delay": 1.0}
    with tqdm(total=total, desc="compare", disable=not (progress and here.is_first), **look) as bar:

        def reduced(blocks: Sequence[Iterator[Chunk]]) -> dict[str, np.ndarray]:
            scored = _scored(several, blocks, crossed, lambda count: bar.update(count * here.size))
            return reduce_block(scored, names, references)

        streams = (each.blocks(num_particles, chunk_size) for each in several)
        return list(here.by_turns(reduced, zip(*streams, strict=True)))


def _scored(
    evaluators: Sequence[Evaluator],
    blocks: Sequence[Iterator[Chunk]],
    crossed: bool,
    report: Callable[[int], object],
) -> list[tuple[Tensor, Tensor]]:
    """Return for a block of data, by guide, log p(x, z) of its draws and their log densities.

    The first are [K, n], the second [G, K, n], under every guide in turn; [1, K, n] under the one
    that drew them where another cannot score them.
    """
    scored: list[list[tuple[Tensor, Tensor]]] = [[] for _ in evaluators]
    for chunks in zip(*blocks, strict=True):
        for mine, chunk in enumerate(chunks):
            log_guides = _log_guides(evaluators, mine, chunk, crossed)
            scored[mine].append((chunk.weights.log_joint, log_guides))
        report(chunks[0].weights.total.numel())
    columns = (zip(*each, strict=True) for each in scored)
    return [(torch.cat(joints), torch.cat(guides, 1)) for joints, guides in columns]


def _aligned(evaluators: Sequence[Evaluator]) -> bool:
    """Let all cut the data alike, as the least divisible one does; return if each can score all."""
    for one, other in itertools.permutations(evaluators, 2):
        one.share_preimages(other)
    if len({len(evaluator.data_blocks()) for evaluator in evaluators}) > 1:
        for evaluator in evaluators:
            evaluator.splittable = False
    return all(one.can_score(other) for one in evaluators for other in evaluators)


def _log_guides(evaluators: Sequence[Evaluator], mine: int, chunk: Chunk, crossed: bool) -> Tensor:
    """Return log densities of one guide's draws, [G, k, n]: under all guides, or its own."""
    own, draws = chunk.weights.log_guide, (chunk.rows, chunk.values)
    guides = enumerate(evaluators) if crossed else [(mine, evaluators[mine])]
    return torch.stack([own if n == mine else one.score_guide(*draws) for n, one in guides])
