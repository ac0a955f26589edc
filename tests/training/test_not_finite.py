"""What a step that is not finite must not change is put back: compared with copies."""

import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.training.not_finite import Carried, NonFiniteLossError


class Holder:
    """What Carried asks of parameters."""

    def __init__(self):
        self.norm = nn.BatchNorm1d(3)
        self.buffers = list(self.norm.buffers())


def test_buffers_and_baselines_come_back():
    holder, loss = Holder(), pv.ELBO(estimator="score")
    loss.load_state_dict({"k": torch.tensor(2.0)})
    before = [buffer.clone() for buffer in holder.buffers]
    carried = Carried(holder, loss)
    holder.norm(torch.randn(5, 3))
    loss.load_state_dict({"k": torch.tensor(9.0), "new": torch.tensor(1.0)})
    carried.restore()
    assert all(torch.equal(a, b) for a, b in zip(holder.buffers, before, strict=True))
    assert loss.state_dict() == {"k": torch.tensor(2.0)}


def test_they_come_back_where_a_mark_says_so():
    holder = Holder()
    before = [buffer.clone() for buffer in holder.buffers]
    for mark in (0.0, 1.0):
        carried = Carried(holder, None)
        holder.norm(torch.randn(5, 3))
        carried.restore_where(torch.tensor(mark))
        if mark == 0.0:
            assert not torch.equal(holder.buffers[0], before[0])
            before = [buffer.clone() for buffer in holder.buffers]
    assert all(torch.equal(a, b) for a, b in zip(holder.buffers, before, strict=True))


def test_the_error_knows_step_and_sites():
    error = NonFiniteLossError("text", 3, ["'z' of the guide"])
    assert (str(error), error.step, error.sites) == ("text", 3, ["'z' of the guide"])
