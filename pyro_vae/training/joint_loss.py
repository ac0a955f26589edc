"""The loss and the gradients of a minibatch that processes share: the sum over their parts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compiler.agreement import gradients_differ, losses_differ
from pyro_vae.losses.base import Objective
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.messages import text_of
from pyro_vae.programs.processes import Processes, Share
from pyro_vae.programs.state import (
    Look,
    as_in_training,
    batch_norms,
    preserved_rng,
    random_state,
    set_random_state,
)
from pyro_vae.programs.types import Program
from pyro_vae.torch_internals import copy_all
from pyro_vae.training.joint_draws import JointDraws
from pyro_vae.training.optimizers import drop_gradients

_NOTES = 2  # of a process on a step: it failed, it wants to stop
_MAX_SUMS = 4  # whose buffers are kept
_SAME = 1e-3  # parameters of processes may be apart by rounding, on different machines

Rows = Callable[[Tensor], contextlib.AbstractContextManager[None]]


class OtherProcessError(RuntimeError):
    """What was raised in another of the processes that share a step."""


@dataclass(frozen=True)
class Example:
    """Data that all processes have, to try on them what is to be shared.

    Attributes:
        batch: all of them.
        share: the part of this process.
        rows: a context in which a guide with a row per datum uses these.
    """

    batch: Batch
    share: Share
    rows: Rows

    @property
    def own(self) -> Batch:
        """The part of this process."""
        return self.batch.rows(self.share.rows)


class JointLoss:
    """A loss of a pair on this process's share of a minibatch, and its sum over all of them.

    Where the loss is the sum over a minibatch, so it is over the shares. Where it is scaled to all
    data, each share counts by its part of the minibatch, so that terms of latents that all data
    share count once.

    Args:
        processes: that share the work.
        function: from model, guide and arguments to the loss; it may add gradients.

    Attributes:
        state: the loss, where steps carry a state of it on; None by default.
        share: of the present minibatch.
        is_scaled: whether the loss of a part is scaled to all data.
        health: a number that is finite only if the sums of the last step are.
        skips: whether steps that are not finite are left out.
        stop_wanted: whether this process wants training to stop.
        stopped: whether one of them did at the last step.
    """

    def __init__(self, processes: Processes, function: Callable[..., Any]) -> None:
        self.processes, self._function = processes, function
        self.state: Objective | None = None
        self.is_scaled, self.skips, self.health = False, False, 0.0
        self.stop_wanted = self.stopped = False
        self._draws = JointDraws(processes)
        self._sums: dict[Hashable, _Sums] = {}  # by what has gradients
        self.share = Share(0, 1, 1)

    def __call__(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of this process's share."""
        with self:
            return self._function(model, guide, *args, **kwargs)

    def __enter__(self) -> None:
        self._draws.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._draws.__exit__(*raised)  # type: ignore[no-untyped-call]

    def use(self, share: Share) -> None:
        """Say which part of a minibatch the next calls are for."""
        self.share = share
        self._draws.use(share)

    @property
    def part(self) -> float:
        """The part of the minibatch that this process speaks for; the first, where all have all."""
        share = self.share
        return float(self.processes.is_first) if share.is_all else share.count / share.total

    @property
    def weight(self) -> float:
        """What this process's loss counts in the sum."""
        return self.part if self.is_scaled or self.share.is_all else 1.0

    def total(
        self, loss: Tensor | float | None, error: Exception | None, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, Exception | None]:
        """Return the loss of the whole minibatch, and give parameters its gradients.

        All processes call this at each step, whatever happened to them.

        Args:
            loss: of this share; None where there is an error.
            error: that was raised instead.
            parameters: that are trained.

        Returns:
            The loss, 0-dimensional, and an error: this process's, or that of another.
        """
        key = tuple(map(id, parameters))
        if key not in self._sums:
            while len(self._sums) >= _MAX_SUMS:
                del self._sums[next(iter(self._sums))]
            self._sums[key] = _Sums(parameters)
        sums = self._sums[key]
        sums(loss, (error is not None, self.stop_wanted), self.weight, self.processes)
        failed, self.stopped = sums.notes
        self.health = sums.health
        if failed:
            error = self._shared(error)
        elif self.state is not None:
            for baseline in self.state.carried:
                value = baseline * self.part if self.part else torch.zeros_like(baseline)
                baseline.copy_(self.processes.add(value))
        return sums.loss, error

    def _shared(self, error: Exception | None) -> Exception | None:
        """Return this process's error; where it has none, that of another."""
        text = "" if error is None else f"{type(error).__name__}: {text_of(error)}"
        texts = self.processes.gather(text)
        if error is not None or not any(texts):
            return error
        first = next(rank for rank, text in enumerate(texts) if text)
        return OtherProcessError(f"process {first}: {texts[first]}")

    def prepare(
        self, model: Program, guide: Program, example: Example, parameters: Sequence[Tensor]
    ) -> None:
        """Learn which numbers are drawn for which data; check that parts add up to the whole.

        Args:
            model: a Pyro model.
            guide: a Pyro guide.
            example: data that all processes have.
            parameters: that are trained; none where there are no gradients.

        Raises:
            ValueError: where the loss of some data is not the sum over parts of them.
        """
        share, draws, kept = example.share, self._draws, {}
        if self.state is not None:
            if what := self.state.coupling:
                raise ValueError(
                    f"loss: {what}, of which each process has a part alone. Take another loss, or "
                    "train in one process (distributed=False)"
                )
            kept = self.state.state_dict()
        error: Exception | None = None
        index = torch.arange(share.total)
        with preserved_rng(example.batch.device):
            start = random_state()

            def run(batch: Batch, index: Tensor) -> tuple[Tensor, list[Tensor | None]]:
                """Return loss and gradients of a run that leaves nothing behind."""
                set_random_state(start)
                drop_gradients(parameters)
                with as_in_training(()), example.rows(index):
                    loss = torch.as_tensor(self(model, guide, *batch.args, **batch.kwargs))
                if self.state is not None:
                    self.state.load_state_dict(kept)
                return loss.detach(), [parameter.grad for parameter in parameters]

            with Look() as look, batch_norms() as norms:
                draws.use(Share(0, share.total, share.total))
                run(example.batch, index)  # plans are made: what they draw is no part of a step
                draws.watch(share.total)
                wanted = run(example.batch, index)
            if self.skips and (look.error is not None or not bool(wanted[0].isfinite())):
                raise ValueError(
                    "on_nan='skip': the loss of the first rows is not finite, on which processes "
                    "try whether parts add up to the whole. Begin the data with other rows"
                ) from look.error
            if look.error is not None:
                return  # the first step says what is wrong
            draws.learn(share)
            loss: Tensor | None = None
            try:
                loss, _ = run(example.own, index[share.rows])
            except (ValueError, RuntimeError) as raised:
                error = raised
            self.use(share)
            found, error = self.total(loss, error, parameters)
        if error is not None:
            error.add_note("with the data split between processes; distributed=False takes one")
            raise error
        gradients = [parameter.grad for parameter in parameters]
        drop_gradients(parameters)
        reason = ""
        if losses_differ(wanted[0], found.to(wanted[0]), exact=False):
            reason = f"they give {float(found):.7g}, and the whole {float(wanted[0]):.7g}"
        elif gradients_differ(*wanted, gradients, exact=False):
            reason = "their gradients are not those of the whole"
        self._refuse(reason, list(norms))

    def align(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that processes are at one; give them what rounding has set apart.

        Args:
            tensors: parameters and buffers, by name.

        Raises:
            RuntimeError: where these differ, or other random numbers were drawn.
        """
        processes = self.processes
        if processes.named_difference(_random_states(tensors.values())) is not None:
            raise RuntimeError(
                "processes have drawn different random numbers in the steps of this epoch: how "
                "many a step draws depends on its data. Train in one process (distributed=False)"
            )
        if processes.named_difference(tensors) is None:
            return
        before = [tensor.detach().clone() for tensor in tensors.values()]
        processes.take_first(tensors.values())
        pairs = zip(tensors, before, tensors.values(), strict=True)
        far = [name for name, old, new in pairs if not torch.allclose(old, new, _SAME, _SAME)]
        if names := next((found for found in processes.gather(far) if found), None):
            raise RuntimeError(
                f"processes hold different values of {', '.join(names[:3])}: it depends on a "
                "process's own data, as a buffer that counts them, or was changed in one process "
                "alone. Train in one process (distributed=False)"
            )

    def draw_alike(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the first process's state of random numbers, after what may have drawn some."""
        states = _random_states(tensors.values())
        for device, state in self.processes.gather(states)[0].items():
            if device == "cpu":
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state)

    def _refuse(self, reason: str, norms: Iterable[str]) -> None:
        """Raise ValueError where parts do not add up, in any process."""
        reasons = [each for each in self.processes.gather(reason) if each]
        if not reasons:
            return
        who = "BatchNorm in training mode, free bits, a term between data of a minibatch"
        advice = "Use a loss that is a sum over data"
        if names := ", ".join(norms):
            who = f"{names} in training mode normalizes by the minibatch"
            advice = "Use torch.nn.LayerNorm or GroupNorm, or eval mode"
        raise ValueError(
            "the loss of a minibatch is not the sum of the losses of its parts, of which each "
            f"process takes one: {reasons[0]}. A cause: {who}. {advice}; or train in one process "
            "(distributed=False)"
        )


def _random_states(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the states of the generators that steps draw from."""
    states = {"cpu": torch.get_rng_state()}
    if any(tensor.is_cuda for tensor in tensors):
        states["cuda"] = torch.cuda.get_rng_state()
    return states


class _Sums:
    """A buffer of loss, flags and gradients, to be summed over processes by one call.

    Gradients of other dtypes or devices than the first one's have buffers of their own.

    Args:
        parameters: that are trained.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters, self.health = list(parameters), 0.0
        self.notes = [False] * _NOTES
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, parameter in enumerate(parameters):
            groups.setdefault((parameter.device, parameter.dtype), []).append(i)
        head = _NOTES + 1 + len(parameters)  # notes, the loss, which parameters had a gradient
        wide = max((k for k in groups), key=lambda k: torch.finfo(k[1]).bits, default=None)
        device, dtype = wide or (torch.device("cpu"), torch.float64)
        if torch.finfo(dtype).bits < 32:
            dtype = torch.float32
        groups = {(device, dtype): groups.pop((device, dtype), []), **groups}
        self._groups = list(groups.values())
        self._buffers: list[Tensor] = []
        self._views: dict[int, Tensor] = {}
        for at, ((place, kind), members) in enumerate(groups.items()):
            begin = 0 if at else head
            sizes = [parameters[i].numel() for i in members]
            buffer = torch.zeros(begin + sum(sizes), dtype=kind, device=place)
            self._buffers.append(buffer)
            for i, view in zip(members, buffer[begin:].split(sizes), strict=True):
                self._views[i] = view.view(parameters[i].shape)
        self._head = self._buffers[0][:head]

    @property
    def loss(self) -> Tensor:
        """The sum of the losses."""
        return self._head[_NOTES].clone()

    @torch.no_grad()
    def __call__(
        self,
        loss: Tensor | float | None,
        notes: tuple[bool, bool],
        weight: float,
        processes: Processes,
    ) -> None:
        """Sum, and give all parameters the sums.

        Args:
            loss: of this process.
            notes: whether it failed, and whether it wants to stop.
            weight: of its loss and gradients.
            processes: that do the same.
        """
        gradients = [parameter.grad for parameter in self._parameters]
        there = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        if notes[0] or not weight:  # also where what it has is not finite
            for buffer in self._buffers:
                buffer.zero_()
        else:
            for i in set(self._views) - set(there):
                self._views[i].zero_()
            dense = [each.to_dense() if each.is_sparse else each for each in there.values()]
            if dense:
                copy_all([self._views[i] for i in there], dense)
            has = [float(gradient is not None) for gradient in gradients]
            self._head.copy_(torch.tensor([0.0] * (_NOTES + 1) + has))
            self._head[_NOTES] = 0.0 if loss is None else loss
            if weight != 1.0:
                for buffer in self._buffers:
                    buffer.mul_(weight)
        self._head[:_NOTES] = torch.tensor(notes)
        for buffer in self._buffers:
            processes.add(buffer)
        numbers = self._head.tolist()
        self.notes = [number > 0 for number in numbers[:_NOTES]]
        self.health = math.fsum(float(buffer.sum()) for buffer in self._buffers)
        has = numbers[_NOTES + 1 :]
        for i, (parameter, some) in enumerate(zip(self._parameters, has, strict=True)):
            parameter.grad = self._views[i] if some else None
