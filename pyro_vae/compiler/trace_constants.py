"""Tensors that a traced function makes from nothing but plain numbers: what Python may read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae import torch_internals
from pyro_vae.torch_internals import Operator, storage_key, tensors_in

_aten = torch.ops.aten
_LIFTS = {_aten.lift_fresh.default, _aten.lift_fresh_copy.default}
# Take nothing of their tensors but shape and kind.
LIKE: frozenset[Operator] = frozenset(
    {
        *(_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default),
        *(_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default),
    }
)


class TraceConstants:
    """The tensors of a trace that depend on no input.

    They are the same whenever the graph runs, so Python may read their numbers: sizes that a
    function works out by tensors, for one.
    """

    def __init__(self) -> None:
        # By their memory, which views share. It is kept, for its identity to stay its own.
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __contains__(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and storage_key(tensor) in self._storages

    def read(self, func: Callable[..., Any], *args: Any) -> Any:
        """Call a function that reads numbers out of a constant, untraced."""
        with torch_internals.untraced():
            return func(*args)

    def note(
        self, func: Operator, args: tuple[object, ...], kwargs: Mapping[str, object], result: object
    ) -> None:
        """Take note of what an operator did: whether its results, or what it wrote, are constant.

        Args:
            func: the operator.
            args: of the call.
            kwargs: of the call.
            result: of the call.
        """
        if self._is_constant(func, args, kwargs):
            for tensor in tensors_in(result):
                self._add(tensor)
        elif torch_internals.is_mutable(func):
            written = tuple(torch_internals.written_values(func, args, kwargs))
            for tensor in tensors_in(written):
                self._storages.pop(storage_key(tensor), None)

    def _is_constant(self, func: Operator, args: object, kwargs: object) -> bool:
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in str(func):
            return False
        if func in _LIFTS or func in LIKE:
            return True
        return all(value in self for value in tensors_in((args, kwargs)))

    def packed(self, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """Return what PyTorch's operator for packed sequences does, of lengths that are constant.

        Args:
            input: sequences, [N, T, ...] where batch_first, else [T, N, ...].
            lengths: of the sequences, [N].
            batch_first: which of the two comes first.
        """
        steps: list[int] = self.read(Tensor.tolist, lengths)
        rows = input.transpose(0, 1) if batch_first else input
        going_on = [sum(length > t for length in steps) for t in range(max(steps))]
        index = [t * len(steps) + i for t, count in enumerate(going_on) for i in range(count)]
        data = rows.flatten(0, 1).index_select(0, torch.tensor(index, device=input.device))
        sizes = torch.tensor(going_on)
        self._add(sizes)
        return data, sizes

    def _add(self, tensor: Tensor) -> None:
        self._storages[storage_key(tensor)] = tensor.untyped_storage()


def one_hot(index: Tensor, num_classes: int) -> Tensor:
    """Return what torch.nn.functional.one_hot does, which reads the numbers to check them.

    An index outside is an error here as well, of the operator that writes.
    """
    zeros = index.new_zeros((*index.shape, num_classes))
    return zeros.scatter(-1, index.unsqueeze(-1), 1)
