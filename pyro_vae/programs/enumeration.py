"""Discrete latents that no guide proposes, enumerated to be summed out exactly.

The model runs once with every value of these sites side by side, in dimensions left of the
plates (Pyro's parallel enumeration). Its log densities are then factors, from which the
sites are eliminated.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.infer_config_messenger import InferConfigMessenger
from torch import Tensor

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.elimination import Axis, Factor, Variable, eliminate, to_plates
from pyro_vae.programs.handlers import same_scale, scale_parts
from pyro_vae.programs.messages import text_of
from pyro_vae.programs.nodes import is_enumerable, latent_nodes, plain_distribution, sample_nodes
from pyro_vae.programs.pyro_internals import enumerate_dim, enumeration_apart, enumeration_ids
from pyro_vae.programs.sites import Plate
from pyro_vae.programs.types import Distribution, Node, Program, Trace


def summed_out(
    model_trace: Trace, guide_trace: Any | None = None, *, data_plate: str | None = None
) -> tuple[str, ...]:
    """Return the names of the model's latent sites that are summed out, in its order.

    They are the discrete sites of finite support that the guide does not propose.

    Args:
        model_trace: a run of the model, enumerated or not.
        guide_trace: a run of the guide; None for a guide that proposes nothing.
        data_plate: the plate of the data, where there is one.

    Raises:
        ValueError: for other sites that the guide does not propose, and for sites outside
            the data plate, which all data share.
    """
    sites = dict(latent_nodes(guide_trace)) if guide_trace is not None else {}
    proposed = {name for name, node in sites.items() if not node["infer"].get("is_auxiliary")}
    rest = {name: node for name, node in latent_nodes(model_trace) if name not in proposed}
    for name, node in rest.items():
        if not is_enumerable(node["fn"]):
            raise ValueError(
                f"no guide proposes the latent site {name!r} "
                f"({type(plain_distribution(node['fn'])).__name__}); only discrete sites of "
                "finite support are summed out"
            )
        plates = {frame.name for frame in _frames(node).values()}
        if data_plate is not None and data_plate not in plates:
            raise ValueError(
                f"no guide proposes the latent site {name!r}, and it lies outside the data plate "
                f"{data_plate!r}: summed out, it would couple all data. Condition the model on a "
                "value, propose it, or pass data_plate=False to treat the batch as one datum"
            )
    return tuple(rest)


def enumerated(
    model: Program, names: Iterable[str], first_available_dim: int, expand: Container[str] = ()
) -> Program:
    """Return the model with just these sites enumerated in parallel.

    Whatever the user wrote in ``infer={"enumerate": ...}`` does not count, but "expand". Sites
    that a replay gives a value must not be among the names. A replay goes outside of this
    (``replay(enumerated(model, ...), trace)``), a plate of particles inside.

    Args:
        model: a Pyro model.
        names: the sites to enumerate.
        first_available_dim: the first one left of all plates, the particles' too: -1 - nesting.
        expand: those whose values have the full shape of their plates, as those of which the
            program itself says so.
    """
    wanted = frozenset(names)

    def mark(site: Any) -> Any:
        chosen = site["name"] in wanted
        expanded = chosen and (site["name"] in expand or site["infer"].get("expand", False))
        how = "parallel" if chosen else None
        return {"enumerate": how, "expand": expanded, "num_samples": None, "tmc": None}

    @functools.wraps(model, assigned=(), updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        enumerate_values = EnumMessenger(first_available_dim)
        try:
            with enumeration_apart(), enumerate_values, InferConfigMessenger(mark):
                return model(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            # Not a note: Pyro's trace makes an exception of its own, of this type and text.
            raise type(error)(
                f"{text_of(error)}\nThis happened while {sorted(wanted)} are summed out: all their "
                "values run at once, in a dimension left of the plates, over which the model must "
                "broadcast (index with them; no Python if). Or propose them in the guide"
            ) from error

    return run


def with_placeholder(guide: Program, plate: Plate | None) -> Program:
    """Return a guide that proposes nothing, with an auxiliary site that is always zero.

    It gives each particle and datum (of the data plate, if any) a draw of density one.
    """

    @functools.wraps(guide, assigned=(), updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        result = guide(*args, **kwargs)
        batch = Batch(args, kwargs)
        data: Any = contextlib.nullcontext()
        if plate is not None:
            size = plate.size if batch.size is None else batch.size
            with poutine.block(hide=[plate.name]):
                data = pyro.plate(plate.name, size, dim=plate.dim)
        with data:
            nothing = dist.Delta(torch.zeros((), device=batch.device))
            pyro.sample("_no_proposal", nothing, infer={"is_auxiliary": True})
        return result

    return run


class EnumeratedRun:
    """A run of :func:`enumerated`: where the plates and the values of its sites lie.

    Args:
        trace: of the model.
        nesting: plate dimensions, the particles' too: those on the left are enumerated.
        given: sites whose values lie side by side too, and are not summed over (proposals that
            a guide enumerates), with their dimensions, which count among ``nesting``.

    Attributes:
        nodes: its sample statements, by name.
        variables: the enumerated sites, by axis, in the order in which they are drawn.
        dims: the dimension of each plate, and of the values that are not summed over.
    """

    def __init__(self, trace: Trace, nesting: int, given: Mapping[str, int] | None = None) -> None:
        self.nodes, self.nesting, self.given = dict(sample_nodes(trace)), nesting, given or {}
        self.dims: dict[Axis, int] = {
            ("plate", frame.name): dim
            for node in self.nodes.values()
            for dim, frame in _frames(node).items()
        }
        self.dims |= {("given", name): dim for name, dim in self.given.items()}
        found = [
            Variable(name, ("enum", enumeration_ids(node)[dim]), tuple(_frames(node).values()))
            for name, node in latent_nodes(trace)
            if (dim := self._own_dim(name)) is not None
        ]
        self.variables = {v.axis: v for v in sorted(found, key=lambda v: len(v.frames))}

    def _own_dim(self, name: str) -> int | None:
        return None if name in self.given else enumerate_dim(self.nodes[name])

    def factor(self, name: str, log_prob: Tensor) -> Factor:
        """Return a site's log density with its axes named.

        Batch dimensions in no plate are added up: without a plate they are one event.

        Raises:
            ValueError: for dimensions of no plate, and for a site outside of the plates of those
                that it depends on.
        """
        node, own, frames = self.nodes[name], self._own_dim(name), _frames(self.nodes[name])
        masked = node["mask"] is not None or isinstance(node["fn"], dist.MaskedDistribution)
        if own is not None and masked:
            log_prob = unmasked_log_prob(node)
        enum_axes: dict[int, Axis] = {d: ("enum", i) for d, i in enumeration_ids(node).items()}
        axis_at = {dim: axis for dim, axis in enum_axes.items() if axis in self.variables}
        axis_at |= {dim: ("given", site) for site, dim in self.given.items()}
        axis_at |= {dim: ("plate", frame.name) for dim, frame in frames.items()}
        depth = max(log_prob.ndim, -min(frames, default=0))
        tensor = log_prob.reshape((1,) * (depth - log_prob.ndim) + log_prob.shape)
        axes: list[Axis] = []
        shape, events = list(tensor.shape), []
        for place, size in enumerate(tensor.shape):
            dim = place - depth
            if dim in axis_at and (dim in frames or dim == own or size > 1):
                axes.append(axis_at[dim])
                if dim in frames and size == 1:
                    shape[place] = max(1, frames[dim].size)
            elif size == 1 or (dim >= -self.nesting and own is None):
                events.append(place)
            else:
                raise ValueError(
                    f"site {name!r}: its log density has shape {list(log_prob.shape)}, whose "
                    f"dimension {dim} of size {size} is no plate's. Put the site in a plate, or "
                    "make it one event with .to_event(...)"
                )
        tensor = tensor.expand(shape)
        factor = Factor(tuple(axes), tensor.sum(events) if events else tensor, frozenset([name]))
        for axis in factor.enum_axes:
            if outside := self.variables[axis].plates - factor.plates:
                raise ValueError(
                    f"site {name!r} depends on {self.variables[axis].name!r}, which lies in the "
                    f"plate {sorted(plate for _, plate in outside)} that {name!r} is not in: it "
                    "cannot be summed out. Propose it in the guide"
                )
        return factor

    def factors(self, log_probs: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return the factors of several sites."""
        return {name: self.factor(name, log_prob) for name, log_prob in log_probs.items()}


def _frames(node: Node) -> dict[int, CondIndepStackFrame]:
    """Return the plates of a site that have a dimension, by it."""
    return {frame.dim: frame for frame in node["cond_indep_stack"] if frame.vectorized}


def contract(
    trace: Trace,
    log_probs: Mapping[str, Tensor],
    nesting: int,
    given: Mapping[str, int] | None = None,
) -> dict[tuple[str, ...], Tensor]:
    r"""Sum the enumerated sites out of a trace's log densities, exactly.

    .. math:: \log \sum_c p(c) \prod_i p(x_i | c)

    Differentiable. A plate that every site of a group is in is kept, one that only some
    are in is a product inside the sum. A mask on an enumerated site counts for nothing:
    summed out, such a site is not there. So does a density of zero, for the gradient.

    Args:
        trace: of the model, run by :func:`enumerated`.
        log_probs: log densities of some of its sites, by name: masked, not scaled, as
            ``fn.log_prob(value)`` shapes them (enumerated dimensions left of the plates).
            With just the latent sites among them, the result is their marginal density.
        nesting: as in :class:`EnumeratedRun`.
        given: likewise.

    Returns:
        Groups of sites to tensors without enumerated dimensions, of at most ``nesting``
        dimensions, aligned at the right as the plates are. A site that no enumerated one
        touches is a group of its own, and its tensor is what was given; sites connected
        by enumerated ones are one group, among them those ones.

    Raises:
        ValueError: for a model whose sum is not a product over plates (sites in plates
            that are not nested), naming the sites.
    """
    run = EnumeratedRun(trace, nesting, given)
    factors = run.factors(log_probs)
    result: dict[tuple[str, ...], Tensor] = {}
    for name, log_prob in log_probs.items():
        if not factors[name].enum_axes:
            extra = max(0, log_prob.ndim - nesting)
            result[(name,)] = log_prob.reshape(log_prob.shape[extra:]) if extra else log_prob
    for factor in eliminate(factors.values(), run.variables)[0]:
        names = tuple(name for name in run.nodes if name in factor.sites)
        result[names] = to_plates(factor, run.dims)
    return result


def scaled_by(trace: Trace, group: Sequence[str], given: Container[str] = ()) -> str:
    """Return the site of a group whose scale (subsampling, poutine.scale) the group has.

    A discrete site that is summed out, and is not given as in :func:`contract`, has no term of its
    own to weigh, so KL warm-up (:class:`pyro_vae.programs.handlers.LatentScale`) may have left it
    with another scale than the rest.

    Raises:
        ValueError: where the scales differ else: the scale stands outside the sum over the
            discrete values, and so must be one for all.
    """
    nodes = {name: trace.nodes[name] for name in group}
    summed = {n for n in group if enumerate_dim(nodes[n]) is not None and n not in given}
    chosen = next((name for name in group if name not in summed), group[0])
    wanted, factor = scale_parts(nodes[chosen])
    for name, node in nodes.items():
        scale, own_factor = scale_parts(node)
        before = node["infer"].get("_unscaled", node["scale"])
        same = own_factor is factor and same_scale(scale, wanted)
        if not same and not (name in summed and factor is None and same_scale(before, wanted)):
            raise ValueError(
                f"the sites {list(group)} are connected by discrete latents that are summed out, "
                f"but their scales differ ({chosen!r}: {nodes[chosen]['scale']}, {name!r}: "
                f"{node['scale']}). Give them one poutine.scale, subsample only plates that hold "
                "them all, and warm up without such latents"
            )
    return chosen


def unmasked_log_prob(node: Node) -> Tensor:
    """Return the log density of a discrete site, as if no mask were on it."""
    fn = node["fn"]
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    return fn.log_prob(node["value"])


@dataclass(frozen=True)
class Conditional:
    """The exact posterior of one discrete site, given those before it and all else.

    Attributes:
        name: the site.
        node: its statement in the enumerated run: the model's distribution, scale and mask.
        frames: the plates it is in, as in Pyro's cond_indep_stack.
        parents: the sites before it that it depends on.
        logits: normalized, ``[*plates, *parents, values]``.
    """

    name: str
    node: Node
    frames: tuple[CondIndepStackFrame, ...]
    parents: tuple[str, ...]
    logits: Tensor

    def given(self, indices: Mapping[str, Tensor]) -> Tensor:
        """Return the logits for indices of its parents' values, which broadcast with the plates."""
        if not self.parents:
            return self.logits
        index = tuple(indices[parent].long() for parent in self.parents)
        return Vindex(self.logits)[(Ellipsis, *index, slice(None))]


def conditionals(
    trace: Trace, log_probs: Mapping[str, Tensor], nesting: int
) -> tuple[Conditional, ...]:
    """Return the posterior of the enumerated sites as a chain of conditionals.

    Sites of outer plates come first, then the model's order; their product is the joint
    posterior.

    The arguments, and what is raised, as in :func:`contract`, of all sites.
    """
    run = EnumeratedRun(trace, nesting)
    _, tables = eliminate(run.factors(log_probs).values(), run.variables, conditionals=True)
    order = list(run.variables)
    chain = []
    for variable, table in reversed(tables):
        parents = sorted(table.enum_axes - {variable.axis}, key=order.index)
        names = tuple(run.variables[axis].name for axis in parents)
        logits = to_plates(table, run.dims, (*parents, variable.axis))
        node = run.nodes[variable.name]
        chain.append(Conditional(variable.name, node, variable.frames, names, logits))
    return tuple(chain)


def draw(chain: Sequence[Conditional]) -> dict[str, Tensor]:
    """Draw the sites of a chain of conditionals jointly: by name, ``[*plates, *event]``."""
    indices: dict[str, Tensor] = {}
    values = {}
    for conditional in chain:
        logits = conditional.given(indices)
        index = torch.distributions.Categorical(logits=logits, validate_args=False).sample()
        indices[conditional.name] = index
        values[conditional.name] = support_of(conditional.node["fn"])[index]
    return values


def marginals(trace: Trace, log_probs: Mapping[str, Tensor], nesting: int) -> dict[str, Tensor]:
    """Return the posterior probabilities of each enumerated site, ``[*plates, values]``.

    They are the derivatives of the log evidence by the log prior of each value. The arguments, and
    what is raised, as in :func:`contract`, of all sites.
    """
    run = EnumeratedRun(trace, nesting)
    names = {variable.name: axis for axis, variable in run.variables.items()}
    factors = run.factors({name: log_prob.detach() for name, log_prob in log_probs.items()})
    with torch.enable_grad():
        # Contiguous leaves: an expanded one would hold several entries in one.
        leaves = [factors[name].tensor.detach().clone().requires_grad_() for name in names]
        for name, leaf in zip(names, leaves, strict=True):
            factors[name] = replace(factors[name], tensor=leaf)
        rest, _ = eliminate(factors.values(), run.variables)
        evidence = torch.stack([factor.tensor.sum() for factor in rest]).sum()
        gradients = torch.autograd.grad(evidence, leaves)
    result = {}
    for (name, own), gradient in zip(names.items(), gradients, strict=True):
        factor = replace(factors[name], tensor=gradient)
        for axis in factor.enum_axes - {own}:
            factor = factor.reduce(axis)
        result[name] = to_plates(factor, run.dims, (own,))
    return result


def support_of(fn: Distribution) -> Tensor:
    """Return the values of a discrete distribution, ``[values, *event]``."""
    values = fn.enumerate_support(expand=False)
    return values.reshape(values.shape[0], *fn.event_shape)
