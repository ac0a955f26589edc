"""A model, a guide and a batch, looked at once; what has no weight per datum is refused here."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.programs import state
from pyro_vae.programs.answers import Answers, largest_gap, shuffled
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.enumeration import summed_out, with_placeholder
from pyro_vae.programs.guide_kinds import RowGuide, check_per_datum, points, row_guide
from pyro_vae.programs.handlers import ParamStatements
from pyro_vae.programs.masks import mask_of, masked_proposals
from pyro_vae.programs.nodes import (
    batch_nesting,
    drawn_subsamples,
    guide_factors,
    is_point,
    latent_nodes,
    sample_nodes,
)
from pyro_vae.programs.preimages import Preimage, preimage_of
from pyro_vae.programs.pyro_internals import is_deterministic
from pyro_vae.programs.sites import Plate, SiteShape, Structure, site_shapes
from pyro_vae.programs.structure import ModelLooks, default_validation_told_apart
from pyro_vae.programs.supports import SameMeasure
from pyro_vae.programs.traces import (
    ReplaceDraws,
    check_proposals,
    site_log_prob,
    trace_given,
    trace_guide,
    trace_model,
)
from pyro_vae.programs.types import DataPlate, Node, Program, Trace, Values

_SEED = 8128517
# Of other draws than those of the guide, which may be the same function of the random state.
_ANEW_SEED = 5419351


@dataclass(frozen=True, slots=True)
class Single:
    """One run of guide and model on the whole batch, with a single particle.

    Attributes:
        guide_trace: of the guide, masked as the model masks its latents.
        model_trace: of the model, replayed with the guide's draws.
        drawn_by_guide: plates of which the guide drew a subsample.
        drawn: plates of which either did.
        in_guide: the modules that the guide called, by identity.
        in_model: the modules that the model called.
        mode_read_of: the modules whose mode, training or not, was read.
        statements: of parameters, in both.
    """

    guide_trace: Trace
    model_trace: Trace
    drawn_by_guide: set[str]
    drawn: set[str]
    in_guide: dict[int, nn.Module]
    in_model: dict[int, nn.Module]
    mode_read_of: dict[int, nn.Module]
    statements: ParamStatements

    @property
    def called(self) -> list[nn.Module]:
        """The modules that either called, each once."""
        return list((self.in_guide | self.in_model).values())

    @property
    def run(self) -> Structure:
        """What it shows of the model."""
        return Structure.of(self.model_trace, self.drawn)


class Pair:
    """A model, a guide and a batch, and what runs of them have shown; each run is made once.

    What a run is needed for is found out when it is asked for. :meth:`evaluable` refuses what has
    no weight for each datum, and gives the facts that scoring needs.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: their arguments.
        looks: what is known of the model on this batch already.
        first: first values of parameters that runs share with others.
        gradients: whether the single run is made with gradients by parameters, the draws detached.

    Attributes:
        user_guide: the guide, as it was passed.
        guide: the same; with an auxiliary site where it proposes nothing.
        structure: of the model; after :meth:`evaluable`, as the following.
        nesting: batch dimensions of model and guide.
        shapes: by site, and by preimage of its draws.
        summed_out: discrete latents that the guide does not propose.
        masked: sites of the guide, with the latent whose mask each has.
        point_sites: latents that the guide proposes a point for, whose density nothing carries.
        guide_sites: what the guide samples.
        scorable: whether the guide's density of another guide's draws is known.
        part: the model's structure on the part of the data that :meth:`part_agrees` runs; None
            where it was not run, or says something else.
        shared_trace: of the model under another guide's draws, where the single run takes it.
    """

    structure: Structure
    nesting: int
    shapes: dict[str, SiteShape]
    summed_out: tuple[str, ...]
    masked: dict[str, str]
    point_sites: list[str]
    guide_sites: frozenset[str]
    scorable: bool
    part: Structure | None = None
    shared_trace: Trace | None = None
    _agrees: bool | None = None  # once :meth:`part_agrees` has looked

    def __init__(
        self,
        model: Program,
        guide: Program,
        batch: Batch,
        *,
        looks: ModelLooks | None = None,
        first: state.FirstValues | None = None,
        gradients: bool = False,
    ) -> None:
        if not callable(guide) or isinstance(guide, type):
            raise TypeError(
                f"guide={guide!r} cannot be called with the batch: a Pyro guide is needed; a "
                "variational family becomes one in pyro_vae.LocalGuide or pyro_vae.AmortizedGuide"
            )
        self.model, self.guide, self.batch = model, guide, batch
        self.user_guide = guide
        self.looks, self.first = looks or ModelLooks(model, batch), first or state.FirstValues()
        self.gradients = gradients
        self._table = row_guide(guide)
        self._rows = None if self._table is None else self._table.given_rows

    # --- runs

    def its_rows(self) -> contextlib.AbstractContextManager[None]:
        """Use the rows of a guide with a row per datum that were in force at first."""
        if self._table is None or self._rows is None:
            return contextlib.nullcontext()
        return self._table.rows_as_given(self._rows)

    def looking(self, *, gradients: bool = False) -> contextlib.AbstractContextManager[None]:
        """Run model and guide in eval mode, unseen from outside; all is left as it was found."""
        fns, device = (self.model, self.user_guide), self.batch.device
        return state.looking(*fns, device=device, gradients=gradients, first=self.first)

    @contextlib.contextmanager
    def evaluating(self, *, gradients: bool = False) -> Iterator[None]:
        """Do the same without looking at each value of a distribution."""
        with self.looking(gradients=gradients), pyro.validation_enabled(False):
            yield

    @functools.cached_property
    def single(self) -> Single:
        """One run of the pair; the global random state stays as it was.

        Raises:
            ValueError: where the guide does not propose just the model's latent sites, or a
                density for a mass; where densities depend on a latent that is masked everywhere.
        """
        detached = ReplaceDraws(Tensor.detach) if self.gradients else contextlib.nullcontext()
        known, checked = self.shared_trace, self.gradients
        with self.looking(gradients=self.gradients), state.mode_reads() as read:
            with default_validation_told_apart(), ParamStatements(checked=checked) as statements:
                with state.called_modules() as in_guide, drawn_subsamples() as by_guide, detached:
                    guide_trace = trace_guide(self.guide, self.batch)
                measures = SameMeasure(guide_trace)
                with state.called_modules() as in_model, drawn_subsamples() as by_model, measures:
                    model_trace = known or trace_model(self.model, guide_trace, self.batch)
            if known is None:
                _check_absent(self.model, model_trace, self.batch)
            else:
                check_proposals(model_trace, guide_trace)
                for _, node in sample_nodes(model_trace):
                    measures.check(node)
        drawn = by_guide | by_model
        return Single(
            guide_trace, model_trace, by_guide, drawn, in_guide, in_model, read, statements
        )

    def part_agrees(self, plate: Plate | None) -> bool:
        """Return whether the data, fewer of them and in another order, are what they are among all.

        The pair is run once more, on half of the rows, permuted, with the draws of the single run.
        Terms of its sites are compared, and where there are gradients those by parameters. Half of
        them: what depends on the number of rows, or on a mean over them, changes by more than
        rounding then.

        Args:
            plate: the data plate.

        Returns:
            False also where runs say nothing: other runs then decide.
        """
        size = self.batch.size
        if plate is None or plate.drawn or size is None or size < 3:  # a row alone has no order
            return False
        if self._agrees is None:
            single, self._agrees = self.single, False
            with state.Look(), self.looking(gradients=self.gradients):
                answers = Answers.of(single.model_trace, single.guide_trace, plate, size)
                self._agrees = self._compare_part(answers, shuffled(size)[: (size + 1) // 2])
        return self._agrees

    def _compare_part(self, answers: Answers, index: Tensor) -> bool:
        if answers.sizes - {1, answers.size}:
            return False  # the guide answers for another number of data than it was given
        batch, plate, table = self.batch.rows(index), answers.plate, self._table
        rows: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if table is not None:
            rows = table.rows_as_given(table.current_rows.cpu()[index])
        with rows:
            part = answers.given(self.model, self.guide, batch, index)
            if answers.differs(part, index, gradients=self.gradients, slack=1.0):
                return False
            of_part = ModelLooks(self.model, batch)
            of_part.run = part.run
            self.part = of_part.structure(plate.name, latents_needed=False)
        self.looks.note_subsampled(plate, self.part)
        return True

    def guide_is_by_datum(self, plate: Plate) -> bool:
        """Return whether the guide says of a datum the same among other data, in another place.

        It is run once more on as many data: half of them, permuted, twice. What belongs to a place
        (a parameter of each datum), or to all of the batch (its mean), is another there.

        Args:
            plate: the data plate.

        Returns:
            True also where that run says nothing.
        """
        size, single = self.batch.size, self.single
        if size is None or size < 3:
            return True
        with state.Look(), self.looking(gradients=True):
            drawn = Answers.of(single.guide_trace, single.guide_trace, plate, size)
            index = shuffled(size)[: (size + 1) // 2].repeat(2)[:size]
            answers, others = (
                drawn.given(self.guide, self.guide, self.batch.rows(some), some)
                for some in (torch.arange(size), index)
            )
            # By gradients too: rows of a table may all be equal.
            return not answers.differs(others, index, slack=1.0)
        return True

    # --- other pairs

    def with_guide(self, guide: Program, looks: ModelLooks | None = None) -> Pair:
        """Return the pair of this model and another guide.

        A guide with a row per datum proposes what its family says: it alone is run, where the
        model masks nothing.

        Args:
            guide: a Pyro guide.
            looks: of the model on the batch of that pair; this one's by default.
        """
        looks = looks or self.looks
        pair = Pair(self.model, guide, looks.batch, looks=looks)
        if isinstance(guide, RowGuide) and not vars(self).get("masked", True):
            pair.shared_trace = self.single.model_trace
        return pair

    # --- what a weight for each datum needs

    def evaluable(self, data_plate: DataPlate) -> Pair:
        """Return this pair with what is needed to weigh each datum.

        Args:
            data_plate: as in :meth:`ModelLooks.structure`.

        Raises:
            ValueError: for what :func:`pyro_vae.log_weights` refuses of model and guide.
        """
        pair = copy.copy(self)
        with state.evaluation(self.model, self.user_guide, first=self.first):
            structure = self.looks.structure(data_plate, strict=True, latents_needed=False)
            if check := getattr(state.unwrapped(self.user_guide), "check_data", None):
                check(self.batch)
            structure.require_no_globals()
            self.looks.check_stable(structure, 1)
        pair.structure = structure
        pair._find_facts()
        return pair

    def _find_facts(self) -> None:
        plate = self.structure.data_plate
        if plate is not None and plate.drawn:
            how = "with pyro.plate(name, num_data, subsample=x)"
            raise _own_minibatch("model", plate.name, how)
        single = self.single
        if drawn := sorted(single.drawn):
            plates = (p for site in self.structure.sites.values() for p in site.plates)
            whose = "model" if any(p.drawn for p in plates) else "guide"
            raise _own_minibatch(whose, drawn[0], "and give the plate no subsample_size")
        guide_trace, model_trace = single.guide_trace, single.model_trace
        with self.looking():
            torch.manual_seed(_SEED)  # other random numbers than those of the single run
            self.point_sites = points(self.guide, self.batch, guide_trace)
            name = plate.name if plate else None
            self.summed_out = summed_out(model_trace, guide_trace, data_plate=name)
            if not list(latent_nodes(guide_trace)):
                self.guide = with_placeholder(self.guide, plate)
                guide_trace = trace_guide(self.guide, self.batch)
        if factors := guide_factors(guide_trace):
            raise ValueError(
                f"the guide has pyro.factor statements {factors}, which are no part of a density "
                f"q(z | x); pass pyro.poutine.block(guide, hide={factors}) if they serve training "
                "alone, else put them in the distribution that the guide samples from"
            )
        check_per_datum(self.structure, model_trace, guide_trace)
        self.nesting = batch_nesting(model_trace, guide_trace)
        proposals = dict(latent_nodes(guide_trace))
        self.guide_sites = frozenset(proposals)
        self.scorable = not any(
            node["infer"].get("is_auxiliary") or is_point(node["fn"]) for node in proposals.values()
        )
        self.shapes = site_shapes(model_trace, guide_trace)
        for site in self.structure.observed:  # a plate without a size does not expand them
            self.shapes[site.name] = SiteShape(len(site.batch_shape), len(site.event_shape))
        self.masked = masked_proposals(model_trace, guide_trace)


def _own_minibatch(whose: str, plate: str, how: str) -> ValueError:
    return ValueError(
        f"the {whose} draws its own minibatch in plate {plate!r} (subsample_size=...); a result "
        f"for each datum needs to know which. Pass the minibatch as the batch, {how}"
    )


# --- latents that are masked everywhere


def _check_absent(model: Program, model_trace: Trace, batch: Batch) -> None:
    """Raise ValueError where densities depend on a latent that the model masks everywhere.

    A masked latent counts as one that is not there, and its proposal's density is left out as
    well. That is right where nothing depends on the draw. A mask of all of a site on which
    something depends stands for an improper flat prior: the entropy of the proposal would be
    missing from the bound, and a guide that is trained by it would shrink to a point.
    """
    latents = dict(latent_nodes(model_trace))
    drawn = ((name, _drawn_anew(node)) for name, node in latents.items())
    changed = {name: value for name, value in drawn if value is not None}
    if not changed:
        return
    drawn_sites = model_trace.stochastic_nodes  # the subsamples of plates among them
    given = {name: model_trace.nodes[name]["value"] for name in drawn_sites}
    kept = {name: found for name, node in latents.items() if (found := preimage_of(node))}
    left = {name: preimage for name, preimage in kept.items() if name not in changed}

    def terms(values: Values, preimages: Mapping[str, Preimage]) -> dict[str, Tensor]:
        with state.preserved_rng(next(iter(given.values())).device):
            nodes = dict(sample_nodes(trace_given(model, values, batch, preimages)))
        shown = {name: node for name, node in nodes.items() if not is_deterministic(node)}
        return {n: site_log_prob(n, node) for n, node in shown.items()}

    with state.Look() as look, torch.no_grad(), pyro.validation_enabled(False), poutine.block():
        before, after = terms(given, kept), terms({**given, **changed}, left)
    if look.error is not None:
        return
    for name, one in before.items():
        other = after.get(name, one)
        if gap := largest_gap(one, other) if one.shape == other.shape else math.inf:
            raise ValueError(
                f"the density of site {name!r} depends on draws of {sorted(changed)} that the "
                f"model masks everywhere (it changes by {gap:.3g} nats). What is masked counts as "
                "not there, its proposal too; a mask for a flat prior has no evidence to bound. "
                "Give the site a proper prior, however wide; mask what depends on it as well; or "
                "train with pyro.infer.Trace_ELBO, which CompiledSVI takes"
            )


def _drawn_anew(node: Node) -> Tensor | None:
    """Return another draw of a latent that is masked everywhere; None for other latents."""
    mask = mask_of(node)
    if mask is None or bool(torch.as_tensor(mask).any()):
        return None
    value = node["value"]
    with state.Look() as look, torch.no_grad(), state.preserved_rng(value.device):
        torch.manual_seed(_ANEW_SEED)
        other = node["fn"].sample().expand_as(value)
    return None if look.error is not None or torch.equal(other, value) else other
