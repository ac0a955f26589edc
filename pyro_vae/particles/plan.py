"""How the particles of a pair run in training, and where its data lie: looked at once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.independence_check import check_independent
from pyro_vae.particles.mode_choice import UnnamedDrawsError
from pyro_vae.particles.modes import MODES, Mode
from pyro_vae.programs.absence_check import check_absent
from pyro_vae.programs.batch import Batch, arguments
from pyro_vae.programs.enumeration import enumerated, summed_out
from pyro_vae.programs.enumeration_check import check_values
from pyro_vae.programs.looks import check_sequential
from pyro_vae.programs.masks import lift_masks
from pyro_vae.programs.nodes import (
    batch_nesting,
    drawn_subsamples,
    guide_factors,
    is_enumerable,
    latent_nodes,
    sample_nodes,
)
from pyro_vae.programs.observed import check_repeated
from pyro_vae.programs.plain_errors import text_of, trace_of
from pyro_vae.programs.preimages import preimage_of
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import (
    FirstValues,
    Look,
    called_modules,
    evaluation,
    preserved_rng,
    unwrapped,
)
from pyro_vae.programs.structure import DataPlateError, inspect, is_subsampled
from pyro_vae.programs.supports import SameMeasure
from pyro_vae.programs.traces import GiveValues, site_log_prob, trace_guide, trace_model
from pyro_vae.programs.types import ModeName
from pyro_vae.programs.warned_once import warn_once
from pyro_vae.torch_internals import BatchNorm

__all__ = ["DataNeed", "Enumeration", "Plan", "device_of", "hide", "plan"]

# What a loss has to know of the data plate, and what it does with discrete proposals that ask to be
# enumerated: see :func:`plan`.
DataNeed: TypeAlias = Literal["needed", "wanted", "no"]
Enumeration: TypeAlias = Literal["expectation", "sum", "no"]

logger = logging.getLogger(__name__)

_MINIBATCHES = 8  # looked at, of a model that draws them itself
_ROUNDING = 0.05  # nats of a datum that a reported loss may be off by, before a warning

# Over a plate of particles these would normalize another dimension than a datum's own.
_NORMALIZATIONS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True, eq=False)
class Plan:
    """How the particles of a pair run in training, and where its data lie.

    Attributes:
        mode: how particles run.
        structure: what :func:`pyro_vae.programs.structure.inspect` found; None where it was not
            needed.
        subsampled: whether the data plate keeps its full size as the batch grows.
        summed_out: discrete latents of the model that the guide does not propose.
        enumerated: discrete proposals of which all values are run, weighted by the guide.
        hidden: discrete proposals that are left to be summed out in the model.
        shares_globals: whether all particles of all data see one draw of the global latents.
        frozen: modules in eval mode, which in training mode may want another way to run.
    """

    mode: Mode
    structure: Structure | None
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
    def first_summed_dim(self) -> int:
        """The first dimension left of those of the guide's enumerated proposals, negative."""
        return self.mode.first_enum_dim - len(self.enumerated)

    @property
    def draws_minibatch(self) -> bool:
        """Whether the model draws its own minibatch."""
        plate = None if self.structure is None else self.structure.data_plate
        return plate is not None and plate.drawn


def plan(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Any,
    kwargs: Any,
    *,
    num_particles: int,
    vectorize: bool,
    data_plate: str | bool | None,
    data: DataNeed,
    enumeration: Enumeration,
    share_globals: bool = False,
    first: FirstValues | None = None,
) -> Plan:
    """Look at a pair, and decide how its particles are run.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        args: their arguments.
        kwargs: their keyword arguments.
        num_particles: K.
        vectorize: whether particles may run together.
        data_plate: as in :func:`pyro_vae.programs.structure.inspect`.
        data: "needed" where each datum has a weight of its own: the data plate must be told,
            and global latents are refused; "wanted" where the pair is one datum if there is
            no such plate; "no" if nothing depends on it.
        enumeration: what becomes of discrete proposals that ask to be enumerated
            (infer={"enumerate": "parallel"}): an "expectation" over the guide, a "sum" over
            the model instead, or "no" enumeration: they are drawn.
        share_globals: whether global latents, where each datum has a weight of its own, are
            drawn once for all particles; else they are refused.
        first: first values of parameters for all that is looked at.

    Raises:
        ValueError: for what the particles, the plates or an enumeration cannot be done with.
    """
    with (
        torch.no_grad(),
        preserved_rng(device_of(args, kwargs)),
        evaluation(model, guide, first=first),
        poutine.block(),
    ):
        with called_modules() as in_guide, drawn_subsamples() as drawn:
            guide_trace = trace_guide(guide, args, kwargs)
        with called_modules() as in_model, SameMeasure(guide_trace):
            model_trace = trace_model(model, guide_trace, args, kwargs)
        check_absent(model, model_trace, args, kwargs)
    check_repeated(model_trace)
    _warn_of_rounding(model_trace, (unwrapped(model), unwrapped(guide)))
    nesting = batch_nesting(model_trace, guide_trace)
    structure, subsampled = None, False
    mode: ModeName = "loop"
    frozen: tuple[nn.Module, ...] = ()
    _check_local_samples(guide_trace)
    asked = () if enumeration == "no" else _asked(guide_trace)
    hidden, enumerated_sites = ((), asked) if enumeration == "expectation" else (asked, ())
    if hidden:
        _check_hidden(guide, guide_trace, hidden, nesting, args, kwargs)
    factors = tuple(guide_factors(guide_trace))
    if factors and data == "needed":
        raise ValueError(
            f"the guide has pyro.factor statements {list(factors)}, for which an importance weight "
            "has no place; train with pv.ELBO, or put them in the distribution that the guide "
            "samples from"
        )
    guide = hide(guide, (*hidden, *factors))
    if num_particles > 1 or data != "no":
        batch = arguments(args, kwargs)
        structure = _structure(model, batch, data_plate, needed=data == "needed")
        structure = structure.drawing(drawn)
        if data == "needed" and not share_globals:
            structure.require_no_globals()
        plate = structure.data_plate
        subsampled = plate is not None and not plate.drawn and is_subsampled(model, batch, plate)
        if num_particles > 1 and vectorize:
            # The guide sees each datum once in a plate, unless its sites see particles' draws.
            dependent = len(list(latent_nodes(guide_trace))) > 1
            called = [*in_model.values(), *(in_guide.values() if dependent else ())]
            frozen = tuple(module for module in called if not module.training)
            mode, reason = _choose_mode(
                model, guide, batch, structure, called, needed=data == "needed"
            )
            if reason:
                owners = unwrapped(model), unwrapped(guide)
                warn_once(logger, owners, "particles run in a loop, which is slow: %s", reason)
    plate = None if structure is None else structure.data_plate
    proposed = poutine.Trace()
    for name, node in guide_trace.nodes.items():
        if name not in hidden:
            proposed.add_node(name, **node)
    found = Plan(
        MODES[mode](nesting, None if structure is None else structure.data_dim),
        structure,
        subsampled,
        summed_out(model_trace, proposed, data_plate=None if plate is None else plate.name),
        enumerated_sites,
        hidden,
        share_globals and plate is not None and bool(structure and structure.global_latents),
        frozen,
    )
    if data == "needed" and num_particles > 1 and mode == "loop" and plate is not None:
        # Other modes are chosen by a scorer, which has looked.
        with preserved_rng(device_of(args, kwargs)), evaluation(model, guide, first=first):
            check_independent(model, guide, model_trace, plate, nesting, args, kwargs)
    if found.summed_out:
        traces = [model_trace]
        if found.draws_minibatch:
            traces += _minibatches(model, guide, args, kwargs)
        for trace in traces:
            _check_summed_out(model, trace, found.summed_out, nesting, args, kwargs)
    if names := found.enumerated:
        infer = {name: guide_trace.nodes[name]["infer"] for name in names}
        expand = tuple(name for name in names if infer[name].get("expand"))
        for fn, trace in ((model, model_trace), (guide, guide_trace)):
            _check_enumerated(fn, trace, names, nesting, args, kwargs, expand)
    return found


def _minibatches(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
) -> list[Any]:
    """Return traces of a model that draws its minibatch, with other data in each."""
    with (
        torch.no_grad(),
        preserved_rng(device_of(args, kwargs)),
        evaluation(model, guide),
        poutine.block(),
    ):
        return [
            trace_model(model, trace_guide(guide, args, kwargs), args, kwargs)
            for _ in range(_MINIBATCHES)
        ]


def _warn_of_rounding(model_trace: Any, owners: tuple[Any, ...]) -> None:
    """Say where float32 gives another loss: training goes on with it, for gradients mind less."""
    for name, node in sample_nodes(model_trace):
        if not node["is_observed"]:
            continue
        gap = 0.0
        # Where a distribution cannot be had in float64, nothing can be told.
        with Look(), torch.no_grad(), pyro.validation_enabled(False):
            narrow, wide = (
                site_log_prob(name, node, scaled=False, double=double) for double in (False, True)
            )
            gap = float((narrow.sum() - wide.sum()).abs()) / max((1, *narrow.shape[:1]))
        if gap > _ROUNDING:
            warn_once(
                logger,
                owners,
                "the loss is off by about %.2g nats for a datum: terms of the observed site %r are "
                "so large that float32 keeps too few of their digits. Its gradients are little "
                "hurt by it, and bounds (pv.elbo, pv.iwae_bound) score such sites in float64; for "
                "a loss to trust, give data, parameters and networks in float64",
                gap,
                name,
            )


def _asked(guide_trace: Any) -> tuple[str, ...]:
    """Return the proposals that ask to be enumerated."""
    return tuple(
        name
        for name, node in latent_nodes(guide_trace)
        if node["infer"].get("enumerate") == "parallel" and is_enumerable(node["fn"])
    )


def _check_local_samples(guide_trace: Any) -> None:
    """Raise ValueError for proposals that ask for several draws of their own."""
    for name, node in latent_nodes(guide_trace):
        count = node["infer"].get("num_samples")
        if count is not None and not is_enumerable(node["fn"]):
            raise ValueError(
                f"the guide's site {name!r} asks for {count} draws of its own "
                "(infer={'num_samples': ...}), which are for pyro.infer.TraceEnum_ELBO alone. "
                f"Leave it out, and give the loss num_particles={count}"
            )


def _check_hidden(
    guide: Callable[..., Any],
    guide_trace: Any,
    hidden: tuple[str, ...],
    nesting: int,
    args: Any,
    kwargs: Any,
) -> None:
    """Raise ValueError where a proposal depends on one that is to be summed out instead."""
    run = enumerated(guide, hidden, -1 - nesting)
    with (
        torch.no_grad(),
        preserved_rng(device_of(args, kwargs)),
        evaluation(guide),
        poutine.block(),
    ):
        trace = trace_guide(run, args, kwargs)
    for name, node in latent_nodes(trace):
        if name not in hidden and len(node["fn"].batch_shape) > nesting:
            raise ValueError(
                f"the guide's site {name!r} depends on {list(hidden)}, which ask to be "
                "enumerated; an importance weight sums them out in the model, and has no "
                "draw of them. Leave infer={'enumerate': ...} out in the guide, and they are drawn"
            )


def _check_summed_out(
    model: Callable[..., Any],
    model_trace: Any,
    names: tuple[str, ...],
    nesting: int,
    args: Any,
    kwargs: Any,
    expand: tuple[str, ...] = (),
) -> None:
    """Raise ValueError where the values of a site do not run together as each alone."""
    others = {  # the model's own minibatch among them
        name: node["value"]
        for name, node in model_trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and name not in names
    }
    kept = {name: preimage_of(model_trace.nodes[name]) for name in others}
    preimages = {name: preimage for name, preimage in kept.items() if preimage is not None}

    def run(fn: Callable[..., Any], values: Mapping[str, Tensor]) -> Any:
        return trace_of(GiveValues({**others, **values}, preimages)(fn), args, kwargs)

    with (
        torch.no_grad(),
        preserved_rng(device_of(args, kwargs)),
        evaluation(model),
        pyro.validation_enabled(False),
        poutine.block(),
    ):
        together = lift_masks(run(enumerated(model, names, -1 - nesting, expand), {}), names)

        def alone(values: dict[str, Tensor]) -> Any:
            shapes = {name: model_trace.nodes[name]["value"].ndim for name in names}
            return run(
                model, {n: v.reshape(v.shape[v.ndim - shapes[n] :]) for n, v in values.items()}
            )

        check_values(together, alone, nesting)


def _check_enumerated(
    fn: Callable[..., Any],
    trace: Any,
    names: tuple[str, ...],
    nesting: int,
    args: Any,
    kwargs: Any,
    expand: tuple[str, ...],
) -> None:
    """Raise ValueError where there is no expectation over a guide's values, entry by entry.

    The values are weighted as those that are summed out are, and must run together as those do.
    """
    try:
        _check_summed_out(fn, trace, names, nesting, args, kwargs, expand)
    except ValueError as error:
        raise ValueError(
            f"the guide enumerates {list(names)}, over which there is no expectation entry by "
            "entry. Leave infer={'enumerate': ...} out in the guide and they are drawn, with "
            f"pv.ELBO(estimator='score'). What was found: {error}"
        ) from error


def hide(guide: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """Return a guide without some of its proposals."""
    return poutine.block(guide, hide=list(names)) if names else guide


def _structure(
    model: Callable[..., Any], batch: Batch, data_plate: str | bool | None, *, needed: bool
) -> Structure:
    if not needed:
        try:
            structure = inspect(model, batch, data_plate=data_plate)
        except DataPlateError:
            return inspect(model, batch, data_plate=False)
        return structure if structure.local_latents else inspect(model, batch, data_plate=False)
    structure = inspect(model, batch, data_plate=data_plate, latents_needed=False)
    check_sequential(structure)
    for site in structure.sites.values():
        for plate in site.plates:
            own = structure.data_plate is not None and plate.name == structure.data_plate.name
            if not own and plate.size != plate.full_size:
                raise ValueError(
                    f"site {site.name!r} is in plate {plate.name!r}, of which a datum sees "
                    f"{plate.size} of {plate.full_size} entries: its weight would be an estimate, "
                    "whose logarithm bounds nothing. Subsample the data plate alone, or train "
                    "with ELBO"
                )
    return structure


def _normalizes_over_batch(module: nn.Module) -> bool:
    statistics = module.training or getattr(module, "running_mean", None) is None
    return isinstance(module, BatchNorm) and statistics


def _choose_mode(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    structure: Structure,
    called: Sequence[nn.Module],
    *,
    needed: bool,
) -> tuple[ModeName, str]:
    """Return the first mode that agrees with single particles, and why it is the loop.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: their arguments.
        structure: of the model.
        called: the modules that see the draws of particles.
        needed: whether each datum has a weight of its own.
    """
    if any(map(_normalizes_over_batch, called)):
        return "loop", "a module normalizes over the batch, each particle's its own"
    if any(plate.drawn for site in structure.sites.values() for plate in site.plates):
        return "loop", "model or guide draws its own minibatch, another at each run"
    if structure.sequential:
        return (
            "loop",
            f"the model draws a subsample of the sequential plates {structure.sequential}",
        )
    plate = structure.data_plate
    by_name = plate is not None and not structure.global_latents
    scorer = functools.partial(Evaluator, model, guide, batch, seed=0)
    together, modes = None, {}
    normalized = any(isinstance(module, _NORMALIZATIONS) for module in called)
    if not normalized:
        try:
            together = scorer(data_plate=plate.name if by_name and plate is not None else False)
        except UnnamedDrawsError:
            if needed:
                raise
            return "loop", "random numbers are drawn outside of sample statements"
        except ValueError:
            # Without a weight for each datum, the guide may be joint over the data.
            if needed or not by_name:
                raise
            by_name, together = False, scorer(data_plate=False)
        modes = together.modes
    mode: ModeName = (
        "plate" if together is not None and set(modes.values()) == {"plate"} else "repeat"
    )
    if mode == "repeat":
        if not by_name or plate is None or batch.size is None or "loop" in modes.values():
            return "loop", f"modes are {modes}"
        try:
            together = scorer(data_plate=plate.name, particles="repeat")
        except ValueError as error:
            return (
                "loop",
                f"they cannot run in a plate, nor with the batch repeated ({text_of(error)})",
            )
    if together is not None and not together.runner.agrees_in_training(called):
        return "loop", "in training mode, densities of particles together are not those of each"
    return mode, ""


def device_of(args: Any, kwargs: Any) -> torch.device:
    """Return the device of the first tensor among the arguments; the CPU where there is none."""
    tensors: Iterable[Any] = (*args, *kwargs.values())
    found = [value.device for value in tensors if isinstance(value, Tensor)]
    return found[0] if found else torch.device("cpu")
