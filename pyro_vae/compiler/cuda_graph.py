"""Tensor operations on one CUDA device, captured once and launched as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pyro_vae.torch_internals import copy_all


def is_capturable(tensors: Iterable[Tensor]) -> bool:
    """Return whether operations with these arguments and results can be captured.

    All need to lie on one CUDA device: of a tensor on the CPU, a kernel would get the number that
    it had at the capture.
    """
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and all(device.type == "cuda" for device in devices)


class CudaGraph:
    """The kernels of a function, launched at once: no Python and no dispatcher in between.

    Kernels read their arguments where they lay at the capture. What a call hands in is copied
    there; results lie in the same memory after each call, and the next one writes over them.
    Random numbers are drawn anew at each launch, from PyTorch's generator of the device.

    Args:
        function: of the live tensors and the inputs, to tensors or None; it ran before, and
            reads no number on the host.
        live: tensors that are read, and may be written to, where they are.
        inputs: of a call.
        adopt: whether these very inputs are where kernels read: for those that every call hands
            in again.

    Raises:
        RuntimeError: for what CUDA cannot capture.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor | None]],
        live: list[Tensor],
        inputs: Sequence[Tensor],
        *,
        adopt: bool = False,
    ) -> None:
        if not adopt and not all(map(_is_plain, inputs)):
            raise RuntimeError("an input is not dense in memory (a slice, or expanded)")
        self._live = live
        self._places = _places(live)
        self._inputs = [tensor if adopt else tensor.clone() for tensor in inputs]
        self._launch, self._results = _capture(function, [*live, *self._inputs])

    def holds(self) -> bool:
        """Return whether the live tensors lie where they lay: kernels read there."""
        return _places(self._live) == self._places

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor | None]:
        """Queue the kernels; return the results, which lie where those of the last call lay."""
        pairs = zip(self._inputs, inputs, strict=True)
        if new := [(own, given) for own, given in pairs if own is not given]:
            with torch.inference_mode():  # which may have made them
                copy_all([own for own, _ in new], [given for _, given in new])
        self._launch()
        return self._results


def _is_plain(tensor: Tensor) -> bool:
    """Return whether each number has a place of its own, so that it can be written to."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _places(tensors: list[Tensor]) -> list[int]:
    """Return where tensors lie in memory."""
    return [tensor.data_ptr() for tensor in tensors]


def _capture(
    function: Callable[..., Sequence[Tensor | None]], arguments: list[Tensor]
) -> tuple[Callable[[], None], Sequence[Tensor | None]]:
    """Return what launches the kernels that a function queues, and where its results will lie."""
    if _broken:
        raise RuntimeError("an earlier capture failed, and may have left something behind")
    graph, device = torch.cuda.CUDAGraph(), arguments[0].device
    # A capture that fails does not come back from its stream; nor may memory that it has begun to
    # set apart be trusted.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        # Other threads may go on to use the device: those that load data, for one.
        capture = torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local")
        try:
            with capture:
                results = function(*arguments)
        except BaseException:
            _broken.append(True)
            raise
    return graph.replay, results


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for captures, because each has its own memory for matrix products."""
    return torch.cuda.Stream(device)


_broken: list[bool] = []  # whether a capture failed in this process
