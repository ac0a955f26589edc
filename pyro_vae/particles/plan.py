"""How the particles of a pair run in training, and where its data lie: looked at once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal, TypeAlias

from pyro import poutine
from torch import nn

from pyro_vae.particles import checks
from pyro_vae.particles.modes import MODES, Mode
from pyro_vae.particles.pair_runner import PairRunner
from pyro_vae.programs.enumeration import summed_out
from pyro_vae.programs.messages import text_of, warn_once
from pyro_vae.programs.nodes import batch_nesting, guide_factors, latent_nodes
from pyro_vae.programs.observed import check_repeated
from pyro_vae.programs.pair import Pair, Single
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import unwrapped
from pyro_vae.programs.structure import DataPlateError
from pyro_vae.programs.types import DataPlate, ModeName, Particles, Program
from pyro_vae.torch_internals import BatchNorm

logger = logging.getLogger(__name__)

DataNeed: TypeAlias = Literal["needed", "wanted", "no"]
Enumeration: TypeAlias = Literal["expectation", "sum", "no"]

# Over a plate of particles these would normalize another dimension than a datum's own.
_NORMALIZATIONS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True, eq=False)
class Plan:
    """How the particles of a pair run in training, and where its data lie.

    Attributes:
        mode: how particles run.
        structure: what :meth:`ModelLooks.structure` found; without sites where it
            was not needed.
        subsampled: whether the data plate keeps its full size as the batch grows.
        summed_out: discrete latents of the model that the guide does not propose.
        enumerated: discrete proposals of which all values are run, weighted by the guide.
        hidden: discrete proposals that are left to be summed out in the model.
        shares_globals: whether all particles of all data see one draw of the global latents.
        frozen: modules in eval mode, which in training mode may want another way to run.
    """

    mode: Mode
    structure: Structure
    subsampled: bool
    summed_out: tuple[str, ...]
    enumerated: tuple[str, ...]
    hidden: tuple[str, ...]
    shares_globals: bool
    frozen: tuple[nn.Module, ...] = ()

    @property
    def is_stale(self) -> bool:
        """Whether a module was put in training mode since."""
        return any(module.training for module in self.frozen)

    @property
    def draws_minibatch(self) -> bool:
        """Whether the model draws its own minibatch."""
        return self.structure.data_plate is not None and self.structure.data_plate.drawn


@dataclass(frozen=True, slots=True)
class Needs:
    """What a loss needs of a plan.

    Attributes:
        num_particles: K.
        particles: "auto", or "loop" where they may not run together.
        data_plate: as in :meth:`ModelLooks.structure`.
        data: "needed" where each datum has a weight of its own: the data plate must be found,
            and global latents are refused; "wanted" where the pair is one datum if there is
            no such plate; "no" if nothing depends on it.
        enumeration: what becomes of discrete proposals that ask to be enumerated
            (infer={"enumerate": "parallel"}): an "expectation" over the guide, a "sum" over
            the model instead, or "no" enumeration: they are drawn.
        share_globals: whether global latents, where each datum has a weight of its own, are
            drawn once for all particles; else they are refused.
    """

    num_particles: int
    particles: Particles
    data_plate: DataPlate
    data: DataNeed
    enumeration: Enumeration
    share_globals: bool = False


def plan(pair: Pair, needs: Needs) -> Plan:
    """Decide how the particles of a pair are run, by what looks at it have shown.

    Raises:
        ValueError: for what the particles, the plates or an enumeration cannot be done with.
    """
    single, needed = pair.single, needs.data == "needed"
    check_repeated(single.model_trace)
    checks.warn_of_coarse_loss(single.model_trace, (unwrapped(pair.model), unwrapped(pair.guide)))
    nesting = batch_nesting(single.model_trace, single.guide_trace)
    asked = checks.asking_enumeration(single.guide_trace)
    hidden = asked if needs.enumeration == "sum" else ()
    enumerated = asked if needs.enumeration == "expectation" else ()
    if hidden:
        checks.check_hidden(pair, hidden, nesting)
    factors = tuple(guide_factors(single.guide_trace))
    if factors and needed:
        raise ValueError(
            f"the guide has pyro.factor statements {list(factors)}, which have no place in an "
            "importance weight; train with pv.ELBO, or put them in the guide's distributions"
        )
    left_out = (*hidden, *factors)
    proposer = pair.with_guide(hide(pair.guide, left_out)) if left_out else pair
    structure, subsampled = Structure({}, None, nesting), False
    name: ModeName = "loop"
    frozen: tuple[nn.Module, ...] = ()
    if needs.num_particles > 1 or needs.data != "no":
        pair.batch.check_kinds()
        structure = _structure(pair, needs).drawing(single.drawn_by_guide)
        if needed and not needs.share_globals:
            structure.require_no_globals()
        plate = structure.data_plate
        subsampled = plate is not None and not plate.drawn and pair.looks.is_subsampled(plate)
        if needs.num_particles > 1 and needs.particles != "loop":
            name, frozen = _choose_mode(proposer, structure, single, needed=needed)
    plate = structure.data_plate
    nodes = {n: node for n, node in single.guide_trace.nodes.items() if n not in hidden}
    proposed, plate_name = SimpleNamespace(nodes=nodes), plate.name if plate else None
    found = Plan(
        MODES[name](nesting, structure.data_dim),
        structure,
        subsampled,
        summed_out(single.model_trace, proposed, data_plate=plate_name),
        enumerated,
        hidden,
        needs.share_globals and plate is not None and bool(structure.global_latents),
        frozen,
    )
    if needed and needs.num_particles > 1 and name == "loop" and plate:
        # Other modes are chosen by a PairRunner, which has looked.
        with pair.looking():
            checks.check_independent(proposer, single.model_trace, plate, nesting)
    if found.summed_out:
        trace, names, redrawn = single.model_trace, found.summed_out, found.draws_minibatch
        checks.check_summed_out(proposer, trace, names, nesting, redrawn=redrawn)
    if enumerated:
        checks.check_enumerated(pair, enumerated, nesting)
    return found


def hide(guide: Program, names: tuple[str, ...]) -> Program:
    """Return a guide without some of its proposals."""
    return poutine.block(guide, hide=list(names)) if names else guide


def _structure(pair: Pair, needs: Needs) -> Structure:
    if needs.data != "needed":
        with contextlib.suppress(DataPlateError):
            if (structure := pair.looks.structure(needs.data_plate)).local_latents:
                return structure
        return pair.looks.structure(False)
    structure = pair.looks.structure(needs.data_plate, latents_needed=False)
    structure.require_no_sequential()
    own = structure.data_plate.name if structure.data_plate else None
    for site in structure.sites.values():
        for plate in site.plates:
            if plate.name != own and plate.size != plate.full_size:
                raise ValueError(
                    f"site {site.name!r} is in plate {plate.name!r}, of which a datum sees "
                    f"{plate.size} of {plate.full_size} entries: its weight is an estimate, whose "
                    "logarithm bounds nothing. Subsample the data plate alone, or train with ELBO"
                )
    return structure


class _LoopError(Exception):
    """Particles run in a loop, for the reason that the message says."""


def _choose_mode(
    pair: Pair, structure: Structure, single: Single, *, needed: bool
) -> tuple[ModeName, tuple[nn.Module, ...]]:
    """Return the first mode that agrees with single particles, and modules in eval mode.

    Here ``single`` is the run with all proposals, those among them that the pair leaves out.
    """
    # The guide sees each datum once in a plate, unless its sites see particles' draws.
    dependent = len(list(latent_nodes(single.guide_trace))) > 1
    called = [*single.in_model.values(), *(single.in_guide.values() if dependent else ())]
    frozen = tuple(module for module in called if not module.training)
    try:
        _check_together(structure, called)
        name, runner = _agreeing(pair, structure, called, needed=needed)
        # Of the modules that only a guide calls that sees no draws, nothing depends on particles.
        alone = not dependent and name == "plate"  # repeated, the guide sees each datum K times
        aside = single.in_guide.keys() - single.in_model.keys() if alone else ()
        moody = any(m.training for key, m in single.mode_read_of.items() if key not in aside)
        if moody and not runner.agrees_in_training(single.called):
            raise _LoopError("in training mode, particles together are scored unlike each alone")
        return name, frozen
    except _LoopError as error:
        owners = unwrapped(pair.model), unwrapped(pair.guide)
        warn_once(logger, owners, "particles run in a loop, which is slow: %s", str(error))
        return "loop", frozen


def _check_together(structure: Structure, called: Collection[nn.Module]) -> None:
    """Raise _LoopError for what several particles in one run would change."""
    norms = [module for module in called if isinstance(module, BatchNorm)]
    if any(module.training or getattr(module, "running_mean", None) is None for module in norms):
        raise _LoopError("a module normalizes over the batch, each particle's its own")
    if any(plate.drawn for site in structure.sites.values() for plate in site.plates):
        raise _LoopError("model or guide draws its own minibatch, another at each run")
    if structure.sequential:
        raise _LoopError(f"the model draws a subsample of sequential plates {structure.sequential}")


def _agreeing(
    pair: Pair, structure: Structure, called: Collection[nn.Module], *, needed: bool
) -> tuple[ModeName, PairRunner]:
    """Return the mode, plate or repeat, that agrees with single particles; or raise _LoopError."""
    plate = structure.data_plate
    name: DataPlate = False if plate is None or structure.global_latents else plate.name
    modes: dict[str, ModeName] = {}
    if not any(isinstance(module, _NORMALIZATIONS) for module in called):
        try:
            runner = PairRunner(pair.evaluable(name), 0)
        except checks.UnnamedDrawsError as error:
            if needed:
                raise
            raise _LoopError("random numbers are drawn outside of sample statements") from error
        except ValueError:
            # Without a weight for each datum, the guide may be joint over the data.
            if needed or name is False:
                raise
            name, runner = False, PairRunner(pair.evaluable(False), 0)
        modes = runner.modes
        if set(modes.values()) == {"plate"}:
            return "plate", runner
    if name is False or pair.batch.size is None or "loop" in modes.values():
        raise _LoopError(f"modes are {modes}")
    try:
        return "repeat", PairRunner(pair.evaluable(name), 0, "repeat")
    except ValueError as error:
        raise _LoopError(
            f"they cannot run in a plate, nor with the batch repeated ({text_of(error)})"
        ) from error
