"""What a step starts from: random numbers, buffers, arguments, the store, a loss's own state."""

from __future__ import annotations

import pyro
import torch
from torch import nn

from pyro_vae.compiler.watched import Watched
from pyro_vae.training.step_state import StepState


class Carried:
    """A loss that keeps a running mean."""

    def __init__(self):
        self.mean = torch.zeros(())

    @property
    def carried(self):
        return [self.mean]

    def state_dict(self):
        return {"mean": self.mean.clone()}

    def load_state_dict(self, state):
        self.mean.copy_(state["mean"])


def test_all_of_it_goes_back():
    norm, argument, loss = nn.BatchNorm1d(2), torch.zeros(3), Carried()
    norm.calls = 0
    watched = Watched([], [norm], [], modes=True)
    torch.manual_seed(3)
    state = StepState(watched, [argument], loss)
    assert [id(t) for t in state.writable][-2:] == [id(argument), id(loss.mean)]
    first = torch.randn(4)
    norm(torch.randn(5, 2))
    norm.calls += 1
    argument += 1
    loss.mean += 2
    pyro.param("late", torch.zeros(()))
    state.restore(values=True)
    assert torch.equal(torch.randn(4), first)
    assert norm.running_mean.tolist() == [0.0, 0.0] and int(norm.num_batches_tracked) == 0
    assert norm.calls == 0
    assert argument.tolist() == [0.0] * 3 and loss.mean.item() == 0.0
    assert "late" not in pyro.get_param_store()


def test_after_a_step_values_of_python_stay():
    norm = nn.BatchNorm1d(2)
    norm.calls = 0
    state = StepState(Watched([], [norm], [], modes=True), [], None)
    norm.calls += 1
    pyro.param("late", torch.zeros(()))
    state.restore()
    assert norm.calls == 1 and "late" in pyro.get_param_store()
