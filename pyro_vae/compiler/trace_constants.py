"""Tensors that a traced function makes from nothing but plain numbers: what Python may read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["TraceConstants", "one_hot"]

_aten = torch.ops.aten
_LIFTS = {_aten.lift_fresh.default, _aten.lift_fresh_copy.default}
# Take nothing of their tensors but shape and kind.
_LIKE = {
    *(_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default),
    *(_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default),
}


class TraceConstants:
    """Keeps account of which tensors depend on no input, for the time of a trace.

    They are the same whenever the graph runs, so Python may read their numbers: sizes that a
    function works out by tensors, for one.
    """

    def __init__(self) -> None:
        # By their memory, which views share. It is kept, for its identity to stay its own.
        self._storages: dict[int, Any] = {}

    def __contains__(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and _key(tensor) in self._storages

    def read(self, func: Any, *args: Any) -> Any:
        """Call a function that reads numbers out of a constant, untraced."""
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes():
            return func(*args)

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Take note of what an operator did."""
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        constant = func in _LIFTS or func in _LIKE or all(value in self for value in given)
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in str(func):
            constant = False
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if func._schema.is_mutable and not constant:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tree_leaves(value):
                        if isinstance(tensor, Tensor):
                            self._storages.pop(_key(tensor), None)
        elif constant:
            for tensor in made:
                self._add(tensor)

    def packed(self, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """Do as PyTorch's operator for packed sequences, whose lengths are a constant."""
        steps: list[int] = self.read(Tensor.tolist, lengths)
        rows = input.transpose(0, 1) if batch_first else input
        going_on = [sum(length > t for length in steps) for t in range(max(steps))]
        index = [t * len(steps) + i for t, count in enumerate(going_on) for i in range(count)]
        data = rows.flatten(0, 1).index_select(0, torch.tensor(index, device=input.device))
        sizes = torch.tensor(going_on)
        self._add(sizes)
        return data, sizes

    def _add(self, tensor: Tensor) -> None:
        self._storages[_key(tensor)] = tensor.untyped_storage()


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def one_hot(index: Tensor, num_classes: int) -> Tensor:
    """Do as torch.nn.functional.one_hot, which looks at the numbers to check them.

    An index outside is an error here as well, of the operator that writes.
    """
    zeros = index.new_zeros((*index.shape, num_classes))
    return zeros.scatter(-1, index.unsqueeze(-1), 1)
