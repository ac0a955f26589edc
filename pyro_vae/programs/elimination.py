"""Factors over named axes, from which discrete variables are summed out one by one.

A variable's factors are multiplied and summed over its values: those of the innermost
plates first, and of one plate the last of the model first. A plate that a variable is not
in is a product over its entries, taken just before the variable is summed.

Sums are logsumexps of whole products. Pyro's own contraction multiplies two tensors after
scaling each by its own maximum, and underflows where their maxima lie apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

# ("plate", its name), ("enum", Pyro's number of an enumerated dimension), or ("given", a name) of
# values side by side that are not summed over.
Axis = tuple[str, str | int]


@dataclass(frozen=True)
class Variable:
    """An enumerated site.

    Attributes:
        name: the site.
        axis: that of its values.
        frames: the plates it is in, as in Pyro's cond_indep_stack.
    """

    name: str
    axis: Axis
    frames: tuple[CondIndepStackFrame, ...]

    @property
    def plates(self) -> frozenset[Axis]:
        """The axes of its plates."""
        return frozenset(("plate", frame.name) for frame in self.frames)


@dataclass(frozen=True)
class Factor:
    """A log density over named axes.

    Attributes:
        axes: of the tensor's dimensions.
        tensor: the log density.
        sites: whose densities went into it.
    """

    axes: tuple[Axis, ...]
    tensor: Tensor
    sites: frozenset[str]

    @property
    def plates(self) -> frozenset[Axis]:
        """Those of its axes that are plates."""
        return frozenset(axis for axis in self.axes if axis[0] == "plate")

    @property
    def enum_axes(self) -> frozenset[Axis]:
        """Those of its axes that are values of discrete sites."""
        return frozenset(axis for axis in self.axes if axis[0] == "enum")

    def reduce(self, axis: Axis, by: Callable[[Tensor, int], Tensor] = torch.sum) -> Factor:
        """Leave an axis out: add it up, which is the product over a plate, or by another rule."""
        place = self.axes.index(axis)
        axes = self.axes[:place] + self.axes[place + 1 :]
        return Factor(axes, by(self.tensor, place), self.sites)


def eliminate(
    factors: Iterable[Factor], variables: Mapping[Axis, Variable], *, conditionals: bool = False
) -> tuple[list[Factor], list[tuple[Variable, Factor]]]:
    """Sum out every variable, the last first.

    Args:
        factors: the log densities; those of no variable are left out.
        variables: by axis; outer plates first, and the order in which they are drawn.
        conditionals: whether to keep the distribution of each variable given those before.

    Returns:
        One factor for each connected group of what was given, without the variables; and
        (variable, log probabilities) of each variable eliminated, the last first.

    Raises:
        ValueError: for variables in plates that are not nested, with a factor in common.
    """
    rest, tables = [factor for factor in factors if factor.enum_axes], []
    for axis, variable in reversed(list(variables.items())):
        touching = [_within(f, variable, variables) for f in rest if axis in f.axes]
        if not touching:
            continue
        rest = [factor for factor in rest if axis not in factor.axes]
        joint = _product(touching)
        total = joint.reduce(axis, _logsumexp)
        rest.append(total)
        if conditionals:
            norm = total.tensor.unsqueeze(joint.axes.index(axis))
            dead = norm == -torch.inf  # impossible whatever the value: any conditional will do
            table = (joint.tensor - norm.masked_fill(dead, 0.0)).masked_fill(dead, 0.0)
            tables.append((variable, replace(joint, tensor=table)))
    return rest, tables


def _within(factor: Factor, variable: Variable, variables: Mapping[Axis, Variable]) -> Factor:
    """Multiply a factor over the plates that the variable is not in."""
    for axis in factor.enum_axes:
        if not variables[axis].plates <= variable.plates:
            raise ValueError(
                f"the discrete sites {variable.name!r} and {variables[axis].name!r} lie in plates "
                f"that are not nested, and {sorted(factor.sites)} depend on both: the sum over "
                "their values grows exponentially. Propose one of them in the guide"
            )
    for axis in factor.plates - variable.plates:
        factor = factor.reduce(axis)
    return factor


def _product(factors: Sequence[Factor]) -> Factor:
    axes = tuple(dict.fromkeys(axis for factor in factors for axis in factor.axes))
    tensor = functools.reduce(torch.add, (_aligned(factor, axes) for factor in factors))
    return Factor(axes, tensor, frozenset().union(*(factor.sites for factor in factors)))


def _aligned(factor: Factor, axes: Sequence[Axis]) -> Tensor:
    """Return a factor's tensor with its axes in this order, of size 1 where it has none."""
    order = [factor.axes.index(axis) for axis in axes if axis in factor.axes]
    index = tuple(slice(None) if axis in factor.axes else None for axis in axes)
    return factor.tensor.permute(order)[index]


def _logsumexp(tensor: Tensor, axis: int) -> Tensor:
    """Return the logsumexp, with a gradient of zero where every entry is -inf."""
    dead = (tensor == -torch.inf).all(axis)
    total = torch.logsumexp(tensor.masked_fill(dead.unsqueeze(axis), 0.0), axis)
    return total.masked_fill(dead, -torch.inf)


def to_plates(factor: Factor, dims: Mapping[Axis, int], trailing: Sequence[Axis] = ()) -> Tensor:
    """Lay a factor out by the dimensions of its axes, with those of values after them."""
    placed = sorted((axis for axis in factor.axes if axis[0] != "enum"), key=dims.__getitem__)
    tensor = _aligned(factor, (*placed, *trailing))
    shape = [1] * -min(map(dims.__getitem__, placed), default=0)
    for axis, size in zip(placed, tensor.shape, strict=False):
        shape[dims[axis]] = size
    return tensor.reshape([*shape, *tensor.shape[len(placed) :]])
