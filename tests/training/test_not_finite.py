"""What a step that is not finite must not change is put back: compared with copies."""

import math

import pyro
import pyro.distributions as dist
import pytest
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


@pytest.mark.parametrize("compile", [False, "replay"])
def test_running_means_see_the_steps_that_were_taken_and_no_other(compile):
    """That the sites are found by one more run leaves nothing behind."""
    x = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 9.0  # of one minibatch in each epoch

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

        def forward(self, x):
            bad = torch.where(x[:, 0].max() > 8.0, math.nan, 0.0)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                loc = self.net(z + bad)
                pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False).to_event(1), obs=x)

    model = Model()
    guide = pv.AmortizedGuide(model, nn.Linear(2, 4), example=x)
    options = {"batch_size": 4, "epochs": 4, "progress": False, "on_nan": "skip"}
    result = pv.fit(model, guide, x, compile=compile, **options)
    assert (result.steps, result.skipped) == (24, 4)
    norm = model.net[1]
    assert int(norm.num_batches_tracked) == result.steps - result.skipped
    assert bool(norm.running_mean.isfinite().all() and norm.running_var.isfinite().all())


def test_the_error_knows_step_and_sites():
    error = NonFiniteLossError("text", 3, ["'z' of the guide"])
    assert (str(error), error.step, error.sites) == ("text", 3, ["'z' of the guide"])
