"""One launch for a step, and losses read once in a while: the logic, by a device of pretence.

The CPU plays the device. Capturing runs the kernels and undoes it; a launch runs them on the same
memory again. What CUDA itself does with a capture is for a machine that has it (the last tests).
"""

from __future__ import annotations

import logging
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.compiler import cuda_graph as cuda_graphs
from pyro_vae.compiler import graph as graphs
from pyro_vae.compiler.graph import Graph
from pyro_vae.compiler.tracing import trace
from pyro_vae.programs.state import random_state, set_random_state
from pyro_vae.schedules import LinearWarmup
from pyro_vae.training import steps as training_step
from pyro_vae.training.minibatches import TrainingData

LAUNCHED_ONE_BY_ONE = "launched one by one"


class Device:
    """Counts captures and launches; may fail, or give other numbers."""

    def __init__(self) -> None:
        self.captures = self.launches = 0
        self.fails = self.errs = False

    def is_capturable(self, tensors) -> bool:
        return {tensor.device.type for tensor in tensors} == {"cpu"}

    def capture(self, function, arguments):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        start = random_state()
        before = [tensor.detach().clone() for tensor in arguments]
        results = [None if r is None else r.clone() for r in function(*arguments)]
        with torch.inference_mode():
            for tensor, value in zip(arguments, before, strict=True):
                tensor.copy_(value)
        set_random_state(start)

        def launch() -> None:
            self.launches += 1
            with torch.no_grad():
                for own, new in zip(results, function(*arguments), strict=True):
                    if own is not None:
                        own.copy_(new + self.errs)

        return launch, results


@pytest.fixture
def device(monkeypatch) -> Device:
    device = Device()
    monkeypatch.setattr(graphs, "is_capturable", device.is_capturable)
    monkeypatch.setattr(cuda_graphs, "_capture", device.capture)
    monkeypatch.setattr(training_step, "_QUEUED", frozenset({"cpu"}))
    return device


class Model(nn.Module):
    """z ~ Normal(0, 1), x ~ Normal(net(z), noise)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.noise = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        pyro.module("model", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.noise.exp()).to_event(1), obs=x)


def make_data(num_data=30, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_data, 3, dtype=torch.float64, generator=generator)


def make_pair(seed=0):
    torch.manual_seed(seed)
    model = Model()
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    return model, pv.AmortizedGuide(model, encoder, example=make_data())


def parameters_of(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(one: list[Tensor], other: list[Tensor], tolerance=1e-10) -> bool:
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(one, other, strict=True)
    )


def fitted(x=None, **options):
    x = make_data() if x is None else x
    model, guide = make_pair()
    options = {"max_steps": 150, "epochs": 60, "batch_size": 8, "compile": "replay"} | options
    result = pv.fit(model, guide, x, progress=False, **options)
    return result, parameters_of(model, guide)


def stepped(compile, steps=20, **options):
    model, guide = make_pair()
    torch.manual_seed(1)
    svi = pv.CompiledSVI(
        model, guide, pyro.optim.Adam({"lr": 0.05}), pv.IWAE(3), compile=compile, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own compiler
        losses = [svi.step(make_data(size)) for size in [8, 8, 5] * (steps // 3)]
    return losses, parameters_of(model, guide), svi


# --- one launch


def traced(function, *inputs: Tensor) -> Graph:
    return trace(function, inputs)


def test_a_captured_graph_gives_what_the_function_gives(device):
    weight = torch.randn(3)
    graph = traced(lambda x: [weight * x, x.sum()], torch.zeros(3))
    graph.capture(torch.zeros(3))
    for x in (torch.ones(3), torch.arange(3.0)):
        found = graph(x)
        assert torch.equal(found[0], weight * x)
        assert found[1] == x.sum()
    assert device.launches == 2


def test_inputs_are_copied_and_stay_as_they_are(device):
    first, second = torch.ones(3), torch.full((3,), 2.0)
    graph = traced(lambda x: [x * 3], first)
    graph.capture(first)
    graph(second)
    assert torch.equal(first, torch.ones(3))
    assert torch.equal(second, torch.full((3,), 2.0))


def test_random_numbers_are_new_at_each_launch(device):
    graph = traced(lambda x: [torch.randn_like(x)], torch.zeros(5))
    graph.capture(torch.zeros(5))
    torch.manual_seed(3)
    draws = [graph(torch.zeros(5))[0].clone() for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(draws[0], torch.randn(5))
    assert torch.equal(draws[1], torch.randn(5))


def test_live_tensors_that_move_are_captured_anew(device):
    weight = torch.ones(3)
    graph = traced(lambda x: [weight * x], torch.ones(3))
    graph.capture(torch.ones(3))
    weight.data = torch.full((3,), 5.0)  # as Module.to() does
    assert torch.equal(graph(torch.ones(3))[0], torch.full((3,), 5.0))
    assert graph.capturable
    assert not graph.captured


def test_a_written_input_is_not_captured(device):
    graph = traced(lambda x: [x.add_(1)], torch.ones(3))
    with pytest.raises(RuntimeError, match="an input is written to"):
        graph.capture(torch.ones(3))


def test_an_expanded_input_is_not_captured(device):
    expanded = torch.ones(1).expand(3)
    graph = traced(lambda x: [x * 2], expanded)
    with pytest.raises(RuntimeError, match="not dense"):
        graph.capture(expanded)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [torch.multinomial(x.abs(), 1)],
        lambda x: [torch.linalg.inv(x + torch.eye(3))],
        lambda x: [x.index_put((x > 0,), torch.zeros(()))],
    ],
)
def test_what_waits_for_the_device_is_not_captured(device, function):
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    assert not traced(function, x).capturable
    assert traced(lambda x: [x.index_put((torch.tensor([0]),), x[1])], x).capturable


def test_a_large_constant_on_the_cpu_is_not_captured():
    graph = traced(lambda x: [x[:, torch.tensor([0, 2, 1])] * torch.tensor(2.0)], torch.ones(2, 3))
    constants = [tensor for tensor in graphs._tensors_of(graph._graph) if tensor.shape == (3,)]
    assert len(constants) == 1
    assert not any(tensor.ndim == 0 for tensor in graphs._tensors_of(graph._graph))


def test_what_moves_again_and_again_is_not_captured_for_ever(device):
    weight = torch.ones(3)
    graph = traced(lambda x: [weight * x], torch.ones(3))
    for i in range(20):
        if graph.capturable:
            graph.capture(torch.ones(3))
        weight.data = torch.full((3,), float(i))
        assert torch.equal(graph(torch.ones(3))[0], torch.full((3,), float(i)))
    assert device.captures == 8


def test_what_is_not_on_one_cuda_device_is_not_captured():
    graph = traced(lambda x: [x * 2], torch.ones(3))
    assert not graph.capturable
    assert not cuda_graphs.is_capturable([torch.ones(1), torch.ones(1, device="meta")])
    assert not cuda_graphs.is_capturable([])


@pytest.mark.parametrize("compile", ["replay", True])
def test_compiled_svi_is_launched_and_the_same(device, compile, caplog):
    losses, parameters, svi = stepped(compile)
    assert svi.mode == ("replayed" if compile == "replay" else "compiled")
    eager_losses, eager_parameters, _ = stepped(False)
    assert losses == pytest.approx(eager_losses, rel=1e-9)
    assert same(parameters, eager_parameters)
    assert device.captures >= 3  # two shapes of minibatches, and the update
    assert device.launches > 20
    assert LAUNCHED_ONE_BY_ONE not in caplog.text


def test_a_capture_that_fails_is_told_and_done_without(device, caplog):
    device.fails = True
    _, parameters, svi = stepped("replay")
    assert svi.mode == "replayed"
    assert same(parameters, stepped(False)[1])
    assert "operation not permitted when stream is capturing" in caplog.text
    told = [r for r in caplog.records if LAUNCHED_ONE_BY_ONE in r.message]
    assert {record.levelno for record in told} == {logging.WARNING}
    assert len(told) == 3


def test_a_capture_with_other_numbers_is_told_and_done_without(device, caplog):
    device.errs = True
    _, parameters, svi = stepped("replay")
    assert svi.mode == "replayed"
    assert same(parameters, stepped(False)[1])
    assert "launched one by one: launched at once, they do not agree: its loss is" in caplog.text


def test_an_update_with_other_numbers_is_told_and_done_without(device, caplog, monkeypatch):
    def capture(function, arguments):
        launch, results = device.capture(function, arguments)

        def wrong() -> None:
            launch()
            if not results:  # of the update, whose results are the parameters themselves
                with torch.inference_mode():
                    arguments[0].add_(1.0)

        return wrong, results

    monkeypatch.setattr(cuda_graphs, "_capture", capture)
    _, parameters, _ = stepped("replay")
    assert same(parameters, stepped(False)[1])
    assert "the kernels of the optimizer's step are launched one by one" in caplog.text


# --- losses that are read once in a while


@pytest.mark.parametrize("schedule", [None, LinearWarmup(100)])
def test_losses_that_gather_are_those_that_are_read_at_each_step(device, monkeypatch, schedule):
    x = make_data()
    options = {"schedule": schedule, "validation_data": make_data(10, seed=2)}
    queued, parameters = fitted(x, **options)
    assert device.launches > 100
    monkeypatch.setattr(training_step, "_QUEUED", frozenset())
    monkeypatch.setattr(graphs, "is_capturable", lambda tensors: False)
    read, wanted = fitted(x, **options)
    assert queued.steps == read.steps
    assert queued.stopped_by == read.stopped_by
    assert same(parameters, wanted)
    for name, column in read.history.items():
        assert queued.history[name] == pytest.approx(column, rel=1e-9, nan_ok=True), name


def test_losses_are_read_once_in_a_while(device, monkeypatch):
    lengths = []
    look = training_step.TrainingSteps._look

    def counted(self):
        lengths.append(len(self._unread))
        look(self)

    monkeypatch.setattr(training_step.TrainingSteps, "_look", counted)
    fitted(make_data(8 * 120), max_steps=240, epochs=2)
    # Of each epoch of 120 steps: 50, 50, and what is left at its end; the first is read at once.
    assert lengths == [50, 50, 19, 50, 50, 20]


class Breaks(nn.Module):
    """Model whose loss becomes NaN where a datum says so."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mean, 1.0))
            # log of a negative number, for data above 100
            pyro.sample("x", dist.Normal(z + (100.0 - x).log(), 1.0), obs=x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, None])


class SpoiltAt:
    """Data that are no good from one step on."""

    def __init__(self, source: Tensor, step: int) -> None:
        self.source, self.step = source, step
        self.taken = torch.zeros((), dtype=torch.float64)

    def draw(self, batch: Tensor) -> Tensor:
        return torch.where(self.taken >= self.step, batch + 200.0, batch)


def spoilt(monkeypatch, step):
    """A pair and data that are no good from a step on; and the parameters before each step."""
    torch.manual_seed(0)
    x = torch.linspace(0.0, 1.0, 30, dtype=torch.float64)
    model = Breaks()
    guide = pv.AmortizedGuide(model, Encoder(), example=x)
    data, before = SpoiltAt(x, step), []
    take = training_step.TrainingSteps.take

    def counted(self, index, batch):
        data.taken.add_(1)
        before.append(parameters_of(model, guide))
        take(self, index, batch)

    monkeypatch.setattr(training_step.TrainingSteps, "take", counted)
    return model, guide, data, before


# Ten steps an epoch: the seventeenth is read with those after it.
SPOILT = {"batch_size": 3, "max_steps": 200, "progress": False, "compile": "replay"}


def test_the_step_that_fails_is_told_though_read_later(device, monkeypatch):
    model, guide, data, before = spoilt(monkeypatch, 17)
    told = "of step 17 .*parameters of the step before"
    with pytest.raises(pv.NonFiniteLossError, match=told) as raised:
        pv.fit(model, guide, data, **SPOILT)
    assert raised.value.step == 17
    assert any("x" in site for site in raised.value.sites)
    assert same(parameters_of(model, guide), before[16], tolerance=0.0)
    # The device went on for some steps, none of which moved anything.
    assert len(before) > 17


def test_a_failure_is_not_lost_in_an_interrupted_wait(device, monkeypatch):
    """Ctrl-C comes where the host waits: for the numbers."""
    model, guide, data, _ = spoilt(monkeypatch, 17)
    tolist, interrupts = Tensor.tolist, []

    def interrupted(self):
        if self.ndim == 2 and not interrupts and data.taken >= 17:
            interrupts.append(True)
            raise KeyboardInterrupt
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", interrupted)
    with pytest.raises(pv.NonFiniteLossError, match="of step 17 "):
        pv.fit(model, guide, data, **SPOILT)
    assert interrupts


def test_a_failure_is_not_hidden_by_an_error_after_it(device, monkeypatch):
    model, guide, data, _ = spoilt(monkeypatch, 17)

    def schedule(step):
        return 1.0 if step < 20 else {}["no such step"]

    with pytest.raises(pv.NonFiniteLossError, match="of step 17 "):
        pv.fit(model, guide, data, schedule=schedule, **SPOILT)


def test_float64_as_the_default_dtype(device):
    """Fused kernels read the mark of a failure as float32, whatever the default."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        result, _ = fitted(max_steps=60, epochs=30)
    finally:
        torch.set_default_dtype(before)
    assert result.steps == 60


class Huge(pyro.nn.PyroModule):
    """A loss of moderate size with gradients that are finite, and whose sum is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("tilt", 2e37 * (self.a + self.b) * torch.ones(len(x)))


def huge_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_gradients_whose_sum_overflows_are_no_failure(device):
    model = Huge()
    result = pv.fit(
        *(model, huge_guide, torch.zeros(10)),
        loss=pyro.infer.Trace_ELBO(),
        optim=lambda parameters: torch.optim.SGD(parameters, lr=1e-40, fused=True),
        max_steps=4,
        progress=False,
        compile=False,
    )
    assert result.steps == 4
    assert model.a.tolist() == pytest.approx(0.08, rel=1e-3)


def test_a_loss_of_one_number_in_a_vector(device):
    """As a function of loss and gradients of one's own may return it."""
    model, guide = make_pair()
    steps = training_step.TrainingSteps(
        TrainingData(model, guide, make_data(), 8, None, None), pv.ELBO(), None, None, "replay"
    )
    loss_and_grads = steps._traced.loss_and_grads
    steps._traced.loss_and_grads = lambda *args: torch.as_tensor(loss_and_grads(*args)).reshape(1)
    for index, batch in steps.data.epoch():
        steps.take(index, batch)
    assert [elbo.size for elbo in steps.read()] == [8, 8, 8, 6]


def test_other_optimizers_are_read_at_each_step(device):
    model, guide = make_pair()
    steps = training_step.TrainingSteps(
        TrainingData(model, guide, make_data(), 8, None, None),
        pv.ELBO(),
        lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
        None,
        "replay",
    )
    assert steps.due


# --- on a machine that has it

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@cuda
@pytest.mark.parametrize("compile", ["replay", True])
def test_cuda_training_is_launched_and_as_eager(compile, caplog):
    x = make_data().cuda()

    def run(how):
        model, guide = make_pair()
        result = pv.fit(
            model, guide, x, device="cuda", batch_size=8, max_steps=300, progress=False, compile=how
        )
        return result.history["elbo"], parameters_of(model, guide)

    (elbos, parameters), (eager_elbos, eager_parameters) = run(compile), run(False)
    assert elbos == pytest.approx(eager_elbos, rel=1e-6)
    assert same(parameters, eager_parameters, tolerance=1e-6)
    assert LAUNCHED_ONE_BY_ONE not in caplog.text
