"""The matrix products of a program alone: what it has to pay, however little else it does.

A program runs once under a mode that sees its operators, those of gradients included; the
products among them (convolutions count) are then run by themselves, on numbers of the same
shapes and strides. The share of a program is their time over its own, in the same turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# The two factors of a product, by their place among the arguments.
_FACTORS = {
    **{op.default: (0, 1) for op in (_aten.mm, _aten.bmm, _aten.mv, _aten.dot)},
    **{op.default: (1, 2) for op in (_aten.addmm, _aten.baddbmm, _aten.addmv)},
}
_WHOLE = {_aten.convolution.default, _aten.convolution_backward.default}


class _Seen(TorchDispatchMode):
    """Notes the products that are called inside, as functions that run them again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], object]] = []
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] = {}
    ) -> Any:
        if func in _FACTORS:
            first, second = (_like(args[i]) for i in _FACTORS[func])
            result = torch.matmul(first, second)
            self.calls.append(lambda: torch.matmul(first, second, out=result))
            self.flops += 2 * result.numel() * first.shape[-1]
        elif func in _WHOLE:
            own = [_like(value) if isinstance(value, Tensor) else value for value in args]
            self.calls.append(lambda: func(*own))
        return func(*args, **kwargs)


def _like(tensor: Tensor) -> Tensor:
    """Return random numbers that lie in memory as a tensor's do."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format).normal_()


class Products:
    """The matrix products that a function calls, run by themselves.

    On a CUDA device they are launched as one graph, and waited for.

    Args:
        function: called once; what it does is no part of what is timed.
        device: where it runs.

    Attributes:
        count: products, convolutions included.
        flops: of the products, convolutions aside.
    """

    def __init__(self, function: Callable[[], object], device: str = "cpu") -> None:
        with _Seen() as seen:
            function()
        self.count, self.flops, self._calls, self._device = (
            len(seen.calls),
            seen.flops,
            seen.calls,
            device,
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.no_grad():
            if device == "cuda":
                self._all()
                torch.cuda.synchronize()
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._all()

    def _all(self) -> None:
        for call in self._calls:
            call()

    def run(self) -> float:
        """Run them all; return 0, the loss of a step that has none."""
        with torch.no_grad():
            if self._graph is None:
                self._all()
            else:
                self._graph.replay()
                torch.cuda.synchronize()
        return 0.0
