"""The steps of several runs taken at once: parameters stacked, one program, one update."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, optim

from pyro_vae.compiler.agreement import gradients_differ, losses_differ
from pyro_vae.compiler.arguments import form_of
from pyro_vae.compiler.batched import Batched
from pyro_vae.compiler.tracing import UntraceableError
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.state import by_turns, one_thread, random_state, set_random_state
from pyro_vae.training.clipping import Clip
from pyro_vae.training.steps import TrainingSteps, taken_by
from pyro_vae.training.update import Update

logger = logging.getLogger(__name__)

# Move each number of a parameter by its own gradient and state, so that stacked ones move alike.
_BY_NUMBER = (
    *(optim.Adam, optim.AdamW, optim.SGD, optim.Adagrad, optim.RMSprop, optim.Adamax),
    *(optim.NAdam, optim.RAdam),
)
_ALONE = 2  # steps of each kind of minibatch that each run takes by itself
_COMPARED = frozenset({_ALONE, 8, 32, 128, 512, 2048, 8192, 32768})


class ApartError(RuntimeError):
    """Runs cannot take their steps at once."""


@dataclass
class Run:
    """A run that waits for its turn, in a thread of its own; never two go on at a time.

    Attributes:
        work: what it does.
        result: what that returned.
        error: what it raised.
        request: the step that it wants to take; None where it has ended.
    """

    work: Callable[[], Any]
    result: Any = None
    error: BaseException | None = None
    request: tuple[TrainingSteps, Tensor | None, Batch] | None = None
    refused: BaseException | None = None  # what becomes of the step
    random: Any = None
    interrupt: BaseException | None = None  # that came while it went on
    _mine: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _thread: threading.Thread | None = None

    def go_on(self) -> None:
        """Let it run, by its own random numbers, until it wants to take a step or ends."""
        if self.random is not None:
            set_random_state(self.random)
        self.request = None
        if self._thread is None:
            self._thread = threading.Thread(target=self._all, daemon=True)
            self._thread.start()
        else:
            self._mine.release()
        while True:
            try:
                self._back.acquire()
                break
            except KeyboardInterrupt as error:  # the thread goes on: it hears of it at its step
                self.interrupt = error
        self.random = random_state()

    def _all(self) -> None:
        taken_by.set(self._take)
        by_turns.set(True)
        try:
            self.result = self.work()
        except BaseException as error:  # noqa: BLE001 - it is the caller's, in another thread
            self.error = error
        self._back.release()

    def _take(self, steps: TrainingSteps, index: Tensor | None, batch: Batch) -> None:
        self.request, self.refused = (steps, index, batch), None
        self._back.release()
        self._mine.acquire()
        if self.refused is not None:
            raise self.refused

    def take_alone(self) -> None:
        """Take the step that it wants by itself."""
        if self.request is None:
            return
        set_random_state(self.random)
        steps, index, batch = self.request
        try:
            steps.take_alone(index, batch)
        except BaseException as error:  # noqa: BLE001 - raised where the run waits
            self.refused = error
        self.random = random_state()


def run_together(
    works: Sequence[Callable[[], Any]], clip: Clip | None, held: list[TrainingSteps | None]
) -> tuple[list[Run], str]:
    """Run several fits, whose steps are taken at once where that can be.

    Args:
        works: of the runs, each of which calls :func:`pyro_vae.fit` once.
        clip: how the gradients of each are clipped.
        held: where the steps of each run are put.

    Returns:
        The runs, which have ended, and why they went one by one; "" where they did not.
    """
    runs = [Run(work) for work in works]
    stacked = _Stacked(clip)
    before, live = random_state(), list(runs)
    try:
        with one_thread():
            while live:
                for run in live:
                    run.go_on()
                for number, run in enumerate(runs):
                    held[number] = run.request[0] if run.request else held[number]
                ended = [run for run in live if run.request is None]
                live = [run for run in live if run.request is not None]
                if ended:
                    stacked.release()
                refused = next((run.interrupt for run in live if run.interrupt), None)
                refused = refused or _shared([run.request[0] for run in live if run.request])
                try:
                    if refused is None:
                        stacked.step(live)
                except KeyboardInterrupt as error:
                    refused = error
                for run in live if refused is not None else ():
                    run.refused, run.interrupt = refused, None
    finally:
        stacked.release()
        set_random_state(before)
    return runs, stacked.why


class _Stacked:
    """Parameters, buffers and moments of runs in common memory, and the programs that move them."""

    def __init__(self, clip: Clip | None) -> None:
        self._clip = clip
        self.why = ""
        self._members: list[TrainingSteps] = []
        self._programs: dict[Any, _Program] = {}
        self._counts: dict[Any, int] = {}

    def release(self) -> None:
        """Give each run memory of its own again."""
        self._moved_apart()
        for steps in self._members:
            for tensor in _own(steps):
                tensor.data = tensor.data.clone()
            for state in steps.optimizer.state.values():
                state.update({n: v.clone() for n, v in state.items() if isinstance(v, Tensor)})
            steps.update.forget()
        self._members, self._programs = [], {}

    def step(self, runs: list[Run]) -> None:
        """Take a step of each run that is left."""
        if not runs:
            return
        key = None if self.why or len(runs) < 2 else self._key(runs)
        if key is None:
            for run in runs:
                run.take_alone()
            return
        count = self._counts[key] = self._counts.get(key, 0) + 1
        if count <= _ALONE:
            self._apart(runs)
            return
        try:
            self._at_once(runs, key, compared=count - 1 in _COMPARED)
        except (ApartError, UntraceableError, RuntimeError, NotImplementedError) as error:
            self._give_up(str(error).partition("\n")[0])
            for run in runs:
                run.take_alone()

    def _give_up(self, why: str) -> None:
        self.release()
        self.why = why
        logger.warning("each run takes its steps by itself: %s", why)

    def _key(self, runs: list[Run]) -> Any:
        """Return what the minibatches have in common; None where they differ."""
        forms = []
        for run in runs:
            if run.request is None:
                return None
            batch = run.request[2]
            forms.append(form_of((batch.args, batch.kwargs), []))
        return forms[0] if all(form == forms[0] for form in forms) else None

    def _apart(self, runs: list[Run]) -> None:
        """Let each run take its step; the first one traces, for all of them."""
        self._moved_apart()
        for number, run in enumerate(runs):
            if run.request is None:
                continue
            traced = run.request[0].traced
            how = traced.compile
            if number:
                traced.compile = False
            try:
                run.take_alone()
            finally:
                traced.compile = how
        self._moved_back()

    def _at_once(self, runs: list[Run], key: Any, *, compared: bool) -> None:
        requests = [run.request for run in runs if run.request is not None]
        members = [steps for steps, _, _ in requests]
        if not self._members:
            self._stack(members)
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = _Program(members[0], requests[0][2])
            compared = True
        for steps in members:
            steps.prepare_factor()
        batches = [batch for _, _, batch in requests]
        noise, after = program.draw(runs, batches)
        buffers = [buffer.clone() for buffer in self._buffers]  # where a step may write
        inputs = program.inputs(self._parameters, buffers, batches)
        losses, health, gradients = program(inputs, noise)
        if compared:
            self._compare(runs, losses, gradients, program)
            return
        if not bool(torch.isfinite(health).all()):
            raise ApartError("a loss or a gradient is not finite")
        self._move(gradients, program)
        for buffer, value in zip(self._buffers, buffers, strict=True):
            buffer.copy_(value)
        for run, state, loss, (steps, _, batch) in zip(
            runs, after, losses.tolist(), requests, strict=True
        ):
            run.random = state
            steps.took(loss, batch.size)

    def _compare(
        self, runs: list[Run], losses: Tensor, gradients: list[Tensor | None], program: _Program
    ) -> None:
        """Let each run take its step, and compare its loss and gradients with these."""
        reasons: list[str] = []
        self._moved_apart()
        for number, run in enumerate(runs):
            if run.request is None:
                continue
            steps = run.request[0]

            def seen(loss: Any, number: int = number, steps: TrainingSteps = steps) -> None:
                own = [steps.parameters.trained[i].grad for i in program.places]
                wanted = torch.as_tensor(loss).detach()
                mine = [None if g is None else g[number] for g in gradients]
                reason = losses_differ(wanted, losses[number], exact=False)
                reason = reason or gradients_differ(wanted, own, mine, exact=False)
                reasons.extend([reason] if reason else [])

            steps.seen = seen
            how = steps.traced.compile
            steps.traced.compile = how if number == 0 else False
            try:
                run.take_alone()
            finally:
                steps.seen, steps.traced.compile = None, how
        self._moved_back()
        if reasons:
            self._give_up(f"the program of all runs does not agree with theirs: {reasons[0]}")

    # --- memory

    def _stack(self, members: list[TrainingSteps]) -> None:
        """Put the parameters, buffers and moments of runs into common memory."""
        for steps in members:
            if isinstance(steps.guide, RowGuide):
                raise ApartError("a LocalGuide moves the rows of its minibatch alone")
            if type(steps.optimizer) not in _BY_NUMBER:
                raise ApartError(f"{type(steps.optimizer).__name__} may mix parameters")
        trained = [steps.parameters.trained for steps in members]
        _check_alike(trained)
        self._parameters = [torch.nn.Parameter(t) for t in _in_common(trained)]
        self._buffers = _in_common([_buffers_of(steps) for steps in members])
        first = members[0].optimizer
        places = {id(p): i for i, p in enumerate(trained[0])}
        groups = []
        for group in first.param_groups:
            if any(id(p) not in places for p in group["params"]):
                raise ApartError("the optimizer has parameters of its own")
            own = [self._parameters[places[id(p)]] for p in group["params"]]
            groups.append({**group, "params": own})
        kind: Any = type(first)
        optimizer: Any = kind(groups)
        for i, parameter in enumerate(self._parameters):
            states = [
                s.optimizer.state.get(own[i], {}) for s, own in zip(members, trained, strict=True)
            ]
            for name, value in states[0].items():
                if _is_moment(name, value, trained[0][i]):
                    common = torch.stack([state[name] for state in states])
                    for state, mine in zip(states, common, strict=True):
                        state[name] = mine
                else:
                    common = value.clone() if isinstance(value, Tensor) else value
                optimizer.state[parameter][name] = common
        for steps in members:
            steps.update.forget()
        self._optimizer, self._members = optimizer, members
        self._update = Update(optimizer)

    def _moved_apart(self) -> None:
        """Tell the optimizers of the runs how many steps were taken at once."""
        self._counts_between(to_runs=True)

    def _moved_back(self) -> None:
        self._counts_between(to_runs=False)

    def _counts_between(self, *, to_runs: bool) -> None:
        for steps in self._members:
            for i, parameter in enumerate(steps.parameters.trained):
                own = steps.optimizer.state.get(parameter, {})
                common = self._optimizer.state.get(self._parameters[i], {})
                source, target = (common, own) if to_runs else (own, common)
                for name, value in own.items():
                    if not _is_moment(name, value, parameter):
                        _copy_number(source, target, name)

    def _move(self, gradients: list[Tensor | None], program: _Program) -> None:
        """Update the stacked parameters."""
        for parameter in self._parameters:
            parameter.grad = None
        given = [g for g in gradients if g is not None]
        if self._clip and given:
            given = list(torch.func.vmap(lambda *own: tuple(self._clipped(own)))(*given))
        left = iter(given)
        for place, gradient in zip(program.places, gradients, strict=True):
            if gradient is not None:
                self._parameters[place].grad = next(left)
        self._update(traced=True)

    def _clipped(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        return list(gradients) if self._clip is None else self._clip(gradients)


class _Program:
    """Loss and gradients of all runs for one kind of minibatch."""

    def __init__(self, first: TrainingSteps, batch: Batch) -> None:
        found = first.traced.graph_of(*batch.args, **batch.kwargs)
        if found is None:
            raise ApartError("there is no graph of a step")
        graph, parameters = found
        trained = [id(p) for p in first.parameters.trained]
        self.places = [trained.index(id(p)) for p in parameters]
        _, live = graph.operations
        of_buffers = [id(b) for b in _buffers_of(first)]
        self._sources: list[tuple[str, Any]] = []
        for tensor in live:
            if id(tensor) in trained:
                self._sources.append(("parameter", trained.index(id(tensor))))
            elif id(tensor) in of_buffers:
                self._sources.append(("buffer", of_buffers.index(id(tensor))))
            else:
                self._sources.append(("common", tensor))
        inputs = _tensors_in(batch)
        count = len(live)
        own = {i for i, (kind, _) in enumerate(self._sources) if kind != "common"}
        common = {i for i, (kind, _) in enumerate(self._sources) if kind == "common"}
        self._whole = first.data.whole
        if not self._whole:
            own |= {count + i for i in range(len(inputs))}
        self._free = {i: t for i, (kind, t) in enumerate(self._sources) if kind == "common"}
        self._count = count
        free = frozenset(common | {count + i for i in range(len(inputs))})
        self._batched = Batched(graph, frozenset(own), free)

    def draw(self, runs: list[Run], batches: list[Batch]) -> tuple[list[Tensor], list[Any]]:
        """Return the random numbers of all runs, [R, ...], and their random states after it."""
        drawn, after = [], []
        for run, batch in zip(runs, batches, strict=True):
            set_random_state(run.random)
            own = dict(enumerate(_tensors_in(batch), self._count))
            drawn.append(self._batched.draw({**self._free, **own}))
            after.append(random_state())
        return [torch.stack(same) for same in zip(*drawn, strict=True)], after

    def inputs(
        self, parameters: list[Any], buffers: list[Tensor], batches: list[Batch]
    ) -> list[Tensor]:
        """Return all inputs."""
        own = {"parameter": [p.detach() for p in parameters], "buffer": buffers}
        found = [t if kind == "common" else own[kind][t] for kind, t in self._sources]
        tensors = [_tensors_in(batch) for batch in batches]
        if self._whole:
            return found + tensors[0]
        return found + [torch.stack(same) for same in zip(*tensors, strict=True)]

    def __call__(
        self, inputs: list[Tensor], noise: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Return losses [R], numbers that are finite only if all is, and gradients [R, ...]."""
        loss, health, *gradients = self._batched(inputs, noise)
        if loss is None:
            raise ApartError("there is no loss")
        return loss, loss if health is None else health, gradients


def _tensors_in(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    form_of((batch.args, batch.kwargs), found)
    return found


def _buffers_of(steps: TrainingSteps) -> list[Tensor]:
    carried = [] if steps.objective is None else steps.objective.carried
    return [*steps.parameters.buffers, *carried]


def _own(steps: TrainingSteps) -> list[Tensor]:
    return [*steps.parameters.trained, *_buffers_of(steps)]


def _shared(members: list[TrainingSteps]) -> ValueError | None:
    """Return an error where runs have parameters in common, as of pyro.param in a function."""
    owners: dict[int, TrainingSteps] = {}
    for steps in members:
        for parameter in steps.parameters.trained:
            if owners.setdefault(id(parameter), steps) is not steps:
                what = "share parameters in Pyro's store, where a name is one parameter for all"
                return ValueError(f"the runs {what}; make models and guides nn.Modules")
    return None


def _check_alike(trained: list[list[Tensor]]) -> None:
    """Raise ApartError where runs have other parameters than the first one."""
    kinds = [[(p.shape, p.dtype, p.device) for p in parameters] for parameters in trained]
    if any(kind != kinds[0] for kind in kinds):
        raise ApartError("runs have parameters of different shapes")
    if any(p.device.type != "cpu" for p in trained[0]):
        raise ApartError("they are not on the CPU")


def _in_common(tensors: list[list[Tensor]]) -> list[Tensor]:
    """Return tensors of all runs stacked, [R, ...], in which those of each run now lie."""
    found = []
    for same in zip(*tensors, strict=True):
        common = torch.stack([tensor.detach() for tensor in same])
        for number, tensor in enumerate(same):
            tensor.data = common[number]
        found.append(common)
    return found


def _is_moment(name: str, value: Any, parameter: Tensor) -> bool:
    """Return whether part of an optimizer's state has a number for each of a parameter."""
    return isinstance(value, Tensor) and name != "step" and value.shape == parameter.shape


def _copy_number(source: dict[str, Any], target: dict[str, Any], name: str) -> None:
    if isinstance(target[name], Tensor):
        target[name].copy_(source[name])
    else:
        target[name] = source[name]
