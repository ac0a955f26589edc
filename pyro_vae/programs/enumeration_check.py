"""Whether all values of discrete latents at once are scored as each of them alone.

All values run side by side, so a model that broadcasts wrongly over them gives a number of the
right shape; and so does one in which an entry of a plate sees the values of other entries, of
which there is no sum entry by entry.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_vae.programs.answers import largest_gap
from pyro_vae.programs.elimination import Factor, Variable, to_plates
from pyro_vae.programs.enumeration import EnumeratedRun, support_of, unmasked_log_prob
from pyro_vae.programs.masks import lift_masks
from pyro_vae.programs.nodes import latent_nodes
from pyro_vae.programs.pyro_internals import is_deterministic
from pyro_vae.programs.traces import site_log_prob
from pyro_vae.programs.types import Node, Trace

_MOST_RUNS = 64
_GROUP_BITS = 3  # of entries of the largest plate


def check_values(
    together: Trace, alone: Callable[[dict[str, Tensor]], Trace], nesting: int
) -> None:
    """Raise ValueError where a site's density is another with all values at once.

    Any two entries of a plate are given different values in one of the runs, in either order,
    and all pairs of values as far as a bounded number of runs allows: the density of an entry
    must be that of its own value, whatever those of the others. (Of a site's largest plate,
    any two of eight neighbours, and others by chance.)

    Args:
        together: trace of the model, run by :func:`pyro_vae.programs.enumeration.enumerated`.
        alone: from values of the enumerated sites, ``[*plates, *event]``, to a trace of the
            model with all else as it was.
        nesting: plate dimensions; those on the left are enumerated.
    """
    run = EnumeratedRun(together, nesting)
    nodes, summed = run.nodes, {variable.name for variable in run.variables.values()}
    factors = run.factors(
        {n: _log_prob(n, node, summed) for n, node in nodes.items() if not is_deterministic(node)}
    )
    worst, where, found = 0.0, "", dict[str, Tensor]()
    sites = [_Entries(run, factors[v.name], v) for v in run.variables.values()]
    generator = torch.Generator().manual_seed(0)
    for turn in range(min(_MOST_RUNS, max(site.runs for site in sites))):
        indices = {site.name: site.indices(turn, generator, site is sites[0]) for site in sites}
        values = {name: support_of(nodes[name]["fn"])[index] for name, index in indices.items()}
        try:
            trace = lift_masks(alone(values))
        except (RuntimeError, ValueError, IndexError):
            continue  # values that never occur, which no code need be able to take
        for name, node in latent_nodes(trace):
            if name in nodes and name not in summed:
                node["mask"] = nodes[name]["mask"]  # one for all values
        single = EnumeratedRun(trace, nesting)
        for name, factor in factors.items():
            if name not in single.nodes:
                continue
            density = single.factor(name, _log_prob(name, single.nodes[name], summed))
            apart, among = to_plates(density, run.dims), _at(run, factor, indices)
            unknown = apart.isnan() | among.isnan()  # another error's
            gap = largest_gap(apart.masked_fill(unknown, 0.0), among.masked_fill(unknown, 0.0))
            if gap > worst:
                worst, where, found = gap, name, values
    if worst == 0:
        return
    runs = [_log_prob(where, alone(found).nodes[where], summed) for _ in range(2)]
    # Of a model that draws outside of sample statements nothing can be told by comparing.
    if torch.equal(*torch.broadcast_tensors(*runs)):
        raise ValueError(
            f"the model's log density with all values of {sorted(summed)} at once differs from "
            f"that of single values by {worst:.3g} nats, at site {where!r}: it broadcasts wrongly "
            "over dimensions left of the plates, where the values lie; or an entry of a plate "
            "depends on the values of others (their mean). Mend it, or propose them in the guide"
        )


def _log_prob(name: str, node: Node, summed: set[str]) -> Tensor:
    return unmasked_log_prob(node) if name in summed else site_log_prob(name, node)


def _at(run: EnumeratedRun, factor: Factor, indices: Mapping[str, Tensor]) -> Tensor:
    """Return a factor at given values of its discrete sites, laid out as the plates are."""
    axes = sorted(factor.enum_axes)
    table = to_plates(factor, run.dims, axes)
    if not axes:
        return table
    index = [indices[run.variables[axis].name] for axis in axes]
    lead = max(0, *(i.ndim - (table.ndim - len(axes)) for i in index))
    return Vindex(table.reshape((1,) * lead + table.shape))[(Ellipsis, *index)]


class _Entries:
    """The entries of a discrete site over its plates, and values to give them.

    Entries are told apart by the bits of their numbers: any two differ in one of them. Of the
    largest plate, groups of entries have values of their own instead of further bits.
    """

    def __init__(self, run: EnumeratedRun, factor: Factor, variable: Variable) -> None:
        self.name, self.device = variable.name, factor.tensor.device
        sizes = dict(zip(factor.axes, factor.tensor.shape, strict=True))
        shape = [1] * run.nesting
        for axis in factor.plates:
            shape[run.dims[axis]] = sizes[axis]
        pairs = list(itertools.permutations(range(sizes[variable.axis]), 2))
        self.pairs = torch.tensor(pairs or [(0, 0)])
        largest = max(range(run.nesting), key=shape.__getitem__, default=None)
        self.bits, self.group, groups = [], torch.zeros(shape, dtype=torch.long), 1
        for place, size in enumerate(shape):
            number = torch.arange(size).reshape(-1, *[1] * (len(shape) - 1 - place)).expand(shape)
            bits = (size - 1).bit_length()
            if place == largest:
                self.group, groups = number >> _GROUP_BITS, max(1, size >> _GROUP_BITS)
                bits = min(bits, _GROUP_BITS)
            self.bits += [(number >> bit) & 1 for bit in range(bits)]
        self.bits = self.bits or [torch.zeros(shape, dtype=torch.long)]
        self.runs = len(self.bits) * max(2, -(-len(self.pairs) // groups))

    def indices(self, run: int, generator: torch.Generator, first: bool) -> Tensor:
        """Return the index of a value for each entry.

        The first site has each pair of values in turn, in its first group of entries.
        """
        groups = int(self.group.max()) + 1
        turns = torch.randint(len(self.pairs), (groups,), generator=generator)
        if first:
            turns[0] = run // len(self.bits) % len(self.pairs)
        pair, bit = self.pairs[turns[self.group]], self.bits[run % len(self.bits)]
        return torch.where(bit == 1, pair[..., 1], pair[..., 0]).to(self.device)
