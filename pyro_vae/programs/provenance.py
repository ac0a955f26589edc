"""Which tensors of a run are computed from some given ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from pyro_vae.torch_internals import DispatchMode, storage_key, tensors_in


class Descendants(DispatchMode):
    """Follows what is computed from some tensors inside the context, through every operation.

    By memory, not by value: ``0 * z`` is computed from z. What an operation writes to counts
    with all views of the same memory.

    Args:
        sources: the tensors.

    Attributes:
        read: whether a number went from one of them to Python, which may decide by it.

    Example:
        >>> import torch
        >>> z = torch.zeros(2)
        >>> with Descendants([z]) as found:
        ...     positive, other = z > 0, torch.ones(2)
        >>> found.includes(positive), found.includes(other), found.read
        (True, False, False)
    """

    def __init__(self, sources: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read = False
        self._kept: list[Tensor] = []  # for memory that is freed may be another tensor's next
        self._memory: set[int] = set()
        for tensor in sources:
            self._add(tensor)

    def includes(self, value: Any) -> bool:
        """Return whether a value is a tensor that was computed from the sources."""
        return isinstance(value, Tensor) and storage_key(value) in self._memory

    def _add(self, tensor: Tensor) -> None:
        self._kept.append(tensor)
        self._memory.add(storage_key(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operation, and note what came of it."""
        result = func(*args, **(kwargs or {}))
        if any(map(self.includes, tensors_in((args, kwargs)))):
            made = tensors_in(result)
            self.read |= not made
            for tensor in made:
                self._add(tensor)
        return result
