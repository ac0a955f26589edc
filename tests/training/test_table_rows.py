"""Steps on the rows of a minibatch: each row as if it had an optimizer of its own, and no other."""

from __future__ import annotations

import copy
import functools
import logging

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.utils.data import Dataset

import pyro_vae as pv
from pyro_vae.torch_internals import DispatchMode
from pyro_vae.training.table_rows import TableRows
from tests.runs import some

N, LATENTS = 11, 2
ADAM = functools.partial(torch.optim.Adam, lr=0.1, fused=True)
HOW = {"eager": False, "replayed": "replay"}


def model(x):
    """z ~ Normal(0, 1), x ~ Normal(z, 1): at a point z, the slope of -log p(x, z) is 2 z - x."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def data(num_data=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_data, LATENTS, dtype=torch.float64, generator=generator)


def make(num_data=N, fn=model, family=None, **options):
    x = data(num_data)
    family = pv.families.Delta() if family is None else family
    return pv.LocalGuide(fn, num_data=num_data, example=x, family=family, **options), x


class Logged(Dataset):
    """Rows, and a list of those that were read since training began."""

    def __init__(self, x):
        self.x, self.read = x, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.read.append(int(index))
        return self.x[index]


class Singles:
    """A parameter for each row of a guide's table, with an optimizer each, stepped by hand."""

    def __init__(self, guide, x, optim):
        self.x = x
        self.rows = [nn.Parameter(row.detach().clone()) for row in guide.table]
        self.optims = [optim([row]) for row in self.rows]

    def step(self, index):
        for i in index:
            row = self.rows[i]
            row.grad = (2 * row.detach()[:, 0] - self.x[i]).unsqueeze(-1)
            self.optims[i].step()

    def check(self, guide, rtol=1e-12):
        rows = torch.stack(list(self.rows))
        torch.testing.assert_close(guide.table.detach(), rows, rtol=rtol, atol=rtol)


OPTIMS = {
    "Adam": ADAM,
    "Adam, not fused": functools.partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.2, fused=True),
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5, fused=True),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.3, fused=True),
}


FITS = [(optim, how, drop) for optim in OPTIMS for how in HOW for drop in (False, True)]
FAST = [("Adam", "replayed", False), ("Adam", "eager", True), ("SGD", "replayed", True)]
FAST += [(optim, "eager", False) for optim in ("Adam, not fused", "AdamW", "Adagrad")]


@pytest.mark.parametrize(
    ("optim", "how", "drop_last"),
    [pytest.param(*fit, marks=() if fit in FAST else pytest.mark.slow) for fit in FITS],
)
def test_fit_gives_each_row_an_optimizer_of_its_own(optim, how, drop_last):
    """To rounding in float64: 5 epochs of minibatches of 4, 4 and 3, or 4 and 4, of 11 rows."""
    guide, x = make()
    rows, singles = Logged(x), Singles(guide, x, OPTIMS[optim])
    options = {"batch_size": 4, "epochs": 5, "drop_last": drop_last, "compile": HOW[how]}
    made = []

    def begin(parameters):
        rows.read.clear()
        made.append(OPTIMS[optim](parameters))
        return made[0]

    pv.fit(model, guide, rows, optim=begin, progress=False, **options)
    sizes = [4, 4] if drop_last else [4, 4, 3]
    order = rows.read[: 5 * sum(sizes)]  # what is read later serves to know the data again
    for index in torch.tensor(order).split(sizes * 5):
        singles.step(index.tolist())
    singles.check(guide)
    if "Adam" in optim:
        counts = made[0].state[guide.table]["step"]
        assert torch.equal(counts, torch.bincount(torch.tensor(order), minlength=N).float())


def steps(svi, guide, x, indices):
    modes = []
    for index in indices:
        with guide.rows(torch.tensor(index)):
            svi.step(x[index])
        modes.append(svi.mode)
    return modes


MINIBATCHES = [[0, 3, 5], [3, 1, 2], [9, 0, 3], [4, 5, 6], [3, 0, 1], [10, 9]] * 2


@pytest.mark.parametrize("how", HOW)
def test_compiled_svi_takes_the_rows_of_the_context(how):
    guide, x = make()
    singles = Singles(guide, x, ADAM)
    svi = pv.CompiledSVI(model, guide, ADAM, pv.ELBO(), compile=HOW[how])
    modes = steps(svi, guide, x, MINIBATCHES)
    for index in MINIBATCHES:
        singles.step(index)
    singles.check(guide)
    assert modes[-3] == how
    assert guide.table.grad is None
    held = [p for group in svi.optimizer.param_groups for p in group["params"]]
    assert len(held) == 1
    assert held[0] is guide.table


def test_pyro_adam():
    guide, x = make()
    singles = Singles(guide, x, ADAM)
    optim = pyro.optim.Adam({"lr": 0.1})
    svi = pv.CompiledSVI(model, guide, optim, pv.ELBO(), compile="replay")
    steps(svi, guide, x, MINIBATCHES)
    for index in MINIBATCHES:
        singles.step(index)
    singles.check(guide)
    state = optim.optim_objs[guide.table].state[guide.table]
    assert state["step"].sum() == sum(map(len, MINIBATCHES))


def test_clipped_adam_whose_rate_falls_with_each_step_of_all():
    guide, x = make()
    one = functools.partial(pyro.optim.clipped_adam.ClippedAdam, clip_norm=0.5)
    singles = Singles(guide, x, one)
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9, "clip_norm": 0.5})
    svi = pv.CompiledSVI(model, guide, optim, pv.ELBO(), compile="replay")
    steps(svi, guide, x, MINIBATCHES)
    for number, index in enumerate(MINIBATCHES, 1):
        for optimizer in singles.optims:
            optimizer.param_groups[0]["lr"] = 0.1 * 0.9**number
        singles.step(index)
    singles.check(guide)


@pytest.mark.parametrize("how", HOW)
def test_gradients_of_a_row_that_is_there_twice_add_up(how):
    guide, x = make()
    (row,) = (nn.Parameter(guide.table[2].detach().clone()),)
    single = ADAM([row])
    svi = pv.CompiledSVI(model, guide, ADAM, pv.ELBO(), compile=HOW[how])
    index = [2, 7, 2, 2]
    for _ in range(4):
        steps(svi, guide, x, [index])
        row.grad = 3 * (2 * row.detach()[:, 0] - x[2]).unsqueeze(-1)
        single.step()
    torch.testing.assert_close(guide.table[2], row, rtol=1e-12, atol=1e-12)
    assert svi.optimizer.state[guide.table]["step"].tolist() == [0, 0, 4, 0, 0, 0, 0, 4, 0, 0, 0]


def test_as_many_rows_as_there_are_but_some_twice():
    """Rows that are not among them stay where they are."""
    guide, x = make()
    svi = pv.CompiledSVI(model, guide, ADAM, pv.ELBO())
    steps(svi, guide, x, [[9, 10]] * 3)
    before = guide.table.detach().clone()
    steps(svi, guide, x, [[0, 0, *range(9)]])
    assert torch.equal(guide.table[9:], before[9:])
    assert not torch.equal(guide.table[:9], before[:9])
    assert svi.optimizer.state[guide.table]["step"].tolist() == [1] * 9 + [3, 3]


def test_steps_of_all_rows_are_those_of_the_optimizer_itself():
    """To the bit: where each step takes all rows, whatever their order, nothing has changed."""
    guide, x = make(family=pv.families.Normal())
    parameter = nn.Parameter(guide.table.detach().clone())
    optimizer = ADAM([parameter])
    rows = Logged(x)
    gradients = []
    guide.table.register_hook(gradients.append)
    pv.fit(model, guide, x, optim=ADAM, batch_size=64, epochs=6, progress=False, compile=False)
    for gradient in gradients[-6:]:
        parameter.grad = gradient
        optimizer.step()
    assert torch.equal(guide.table, parameter)
    assert rows.read == []


def test_rows_after_steps_of_all_and_steps_of_all_after_rows():
    """Each row goes on from where it is; a step of all rows counts in each."""
    guide, x = make()
    singles = Singles(guide, x, ADAM)
    svi = pv.CompiledSVI(model, guide, ADAM, pv.ELBO(), compile="replay")
    everything = list(range(N))
    for index in [None, None, [0, 1], [1, 5], None, [5, 6], everything, None, [2, 3]]:
        if index is None:
            svi.step(x)
        else:
            steps(svi, guide, x, [index])
        singles.step(everything if index is None else index)
        singles.check(guide)


def test_other_parameters_take_the_optimizers_own_steps():
    """A location that all data share and the model holds moves at each step, the rows at theirs."""
    shift = nn.Parameter(torch.zeros(LATENTS, dtype=torch.float64))

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = shift

        def forward(self, x):
            pyro.module("shifted", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z + self.shift, 1.0).to_event(1), obs=x)

    fn = Shifted()
    guide, x = make(fn=fn)
    rows = [nn.Parameter(row.detach().clone()) for row in guide.table]
    optims = [ADAM([row]) for row in rows]
    mine = nn.Parameter(shift.detach().clone())
    own = ADAM([mine])
    svi = pv.CompiledSVI(fn, guide, ADAM, pv.ELBO(), compile="replay")
    for index in MINIBATCHES:
        steps(svi, guide, x, [index])
        off = {i: rows[i].detach()[:, 0] + mine.detach() - x[i] for i in index}
        for i in index:
            rows[i].grad = (rows[i].detach()[:, 0] + off[i]).unsqueeze(-1)
        mine.grad = sum(off.values())
        for optimizer in (own, *(optims[i] for i in index)):
            optimizer.step()
    torch.testing.assert_close(shift, mine, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(guide.table, torch.stack(list(rows)), rtol=1e-11, atol=1e-11)


def test_an_optimizer_without_a_rule_moves_the_whole_table_and_says_so(caplog):
    guide, x = make()
    parameter = nn.Parameter(guide.table.detach().clone())
    optim = functools.partial(torch.optim.NAdam, lr=0.1)
    optimizer = optim([parameter])
    svi = pv.CompiledSVI(model, guide, optim, pv.ELBO(), compile="replay")
    with caplog.at_level(logging.WARNING):
        steps(svi, guide, x, MINIBATCHES)
    (record,) = caplog.records
    assert "moves all 11 rows" in record.getMessage()
    assert "NAdam has no rule for rows by themselves" in record.getMessage()
    for index in MINIBATCHES:
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[index] = (2 * parameter.detach()[index, :, 0] - x[index]).unsqueeze(-1)
        optimizer.step()
    torch.testing.assert_close(guide.table, parameter, rtol=1e-12, atol=1e-12)


def test_hooks_on_the_table_see_the_whole_gradient(caplog):
    guide, x = make()
    seen = []
    guide.table.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    parameter = nn.Parameter(guide.table.detach().clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optim = functools.partial(torch.optim.SGD, lr=0.1)
    svi = pv.CompiledSVI(model, guide, optim, pv.ELBO(), compile=False)
    with caplog.at_level(logging.WARNING):
        steps(svi, guide, x, [[1, 3], [3, 5]])
    assert "it has gradient hooks" in caplog.text
    for index in ([1, 3], [3, 5]):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[index] = 2 * (2 * parameter.detach()[index, :, 0] - x[index]).unsqueeze(-1)
        optimizer.step()
    assert [gradient.shape for gradient in seen] == [guide.table.shape] * 2
    torch.testing.assert_close(guide.table, parameter, rtol=1e-12, atol=1e-12)


def test_a_loss_that_reads_the_whole_table_moves_the_whole_table():
    """A penalty on all rows has a gradient by all of them: it is added to that of the minibatch."""
    guide, x = make()
    parameter = nn.Parameter(guide.table.detach().clone())
    optimizer = ADAM([parameter])
    elbo = pv.ELBO()

    def loss(fn, its_guide, *args):
        return elbo.differentiable_loss(fn, its_guide, *args) + guide.table.square().sum()

    svi = pv.CompiledSVI(model, guide, ADAM, loss, compile="replay")
    for index in ([0, 3, 4], [3, 1, 2], [9, 0, 3], [3, 0, 1]):
        steps(svi, guide, x, [index])
        parameter.grad = 2 * parameter.detach()
        parameter.grad[index] += (2 * parameter.detach()[index, :, 0] - x[index]).unsqueeze(-1)
        optimizer.step()
        torch.testing.assert_close(guide.table, parameter, rtol=1e-12, atol=1e-12)


def test_a_frozen_table_stays():
    guide, x = make()
    guide.table.requires_grad_(False)
    guide.train(False)  # or Pyro warns
    start = guide.table.clone()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            pyro.module("scaled", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, self.scale.exp()).to_event(1), obs=x)

    fn = Scaled()
    svi = pv.CompiledSVI(fn, guide, ADAM, pv.ELBO(), compile="replay")
    steps(svi, guide, x, MINIBATCHES)
    assert torch.equal(guide.table, start)
    assert float(fn.scale.detach()) != 0


def test_the_optimizer_alone_is_refused_afterwards():
    guide, x = make()
    svi = pv.CompiledSVI(model, guide, ADAM, pv.ELBO(), compile=False)
    steps(svi, guide, x, [[1, 3]])
    guide.table.grad = torch.ones_like(guide.table)
    with pytest.raises(ValueError, match="a step count for each row of a table of 11 rows"):
        svi.optimizer.step()
    guide, x = make()
    optim = pyro.optim.Adam({"lr": 0.1})
    steps(pv.CompiledSVI(model, guide, optim, pv.ELBO(), compile=False), guide, x, [[1, 3]])
    with (
        guide.rows(torch.tensor([1, 3])),
        pytest.raises(ValueError, match="a step count for each row of a table of 11 rows"),
    ):
        SVI(model, guide, optim, loss=pv.ELBO()).step(x[[1, 3]])


def test_a_copy_goes_on_as_the_one_it_is_of():
    guide, x = make(family=pv.families.Normal())
    svi = pv.CompiledSVI(model, guide, ADAM, pv.ELBO(), compile="replay")
    steps(svi, guide, x, MINIBATCHES[:6])
    twin = copy.deepcopy(svi)
    for one in (svi, twin):
        torch.manual_seed(3)
        steps(one, one.guide, x, MINIBATCHES[6:])
    assert twin.guide is not guide
    assert torch.equal(twin.guide.table, guide.table)


# --- every loss and family: SGD has no state, so whole and rows are one and the same


class WholeSGD(torch.optim.SGD):
    """For which there is no rule."""


def several(x):
    """Two latents, one of them positive, a mask, a discrete latent and a minibatch's scale."""
    with pyro.plate("data", N, subsample=x):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(x.new_zeros(()), 0.5))
        with pyro.poutine.mask(mask=x[:, 1] > -1):
            pyro.sample("y", dist.Normal(z[..., 0] + c, s), obs=x[:, 1])
        pyro.sample("x", dist.Normal(z, s.unsqueeze(-1)).to_event(1), obs=x)


NORMAL, FULL = pv.families.Normal(), pv.families.FullRankNormal()
LOSSES = {
    "ELBO": (model, NORMAL, pv.ELBO(3)),
    "ELBO, sticking the landing": (model, FULL, pv.ELBO(2, kl="sample", estimator="stl")),
    "ELBO, score": (model, NORMAL, pv.ELBO(2, kl="sample", estimator="score")),
    "IWAE": (model, pv.families.LowRankNormal(1), pv.IWAE(4)),
    "IWAE, doubly reparameterized": (model, NORMAL, pv.IWAE(4, estimator="dreg")),
    "WakeSleep": (model, NORMAL, pv.WakeSleep(3)),
    "Annealed": (model, pv.families.Annealed(NORMAL, 2), pv.ELBO(2)),
    "Pyro's Trace_ELBO": (model, NORMAL, Trace_ELBO()),
    "Pyro's TraceMeanField_ELBO": (model, NORMAL, TraceMeanField_ELBO()),
    "several sites, ELBO": (several, NORMAL, pv.ELBO(2)),
    "several sites, IWAE": (several, FULL, pv.IWAE(3)),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", some(LOSSES, ["ELBO", "IWAE", "several sites, IWAE"]))
def test_every_loss_has_the_gradient_of_the_whole_table(case, how):
    """In float64, under one seed: to 1e-10."""
    fn, family, loss = case
    tables = []
    for optim in (torch.optim.SGD, WholeSGD):
        pyro.clear_param_store()
        guide, x = make(fn=fn, family=family)
        torch.manual_seed(2)
        made = functools.partial(optim, lr=0.01)
        svi = pv.CompiledSVI(fn, guide, made, copy.deepcopy(loss), compile=HOW[how])
        modes = steps(svi, guide, x, [[0, 3, 5], [3, 1, 2], [9, 0, 3], [4, 5, 6], [3, 0, 1]])
        tables.append(guide.table.detach())
        assert modes[-1] == how
    torch.testing.assert_close(*tables, rtol=1e-10, atol=1e-10)
    assert not torch.equal(tables[0], make(fn=fn, family=family)[0].table)


def test_the_state_is_saved_and_goes_on():
    """By the optimizer's state_dict, to the bit."""
    whole, x = make(family=pv.families.Normal())
    parts, _ = make(family=pv.families.Normal())
    runs = []
    for guide, split in ((whole, False), (parts, True)):
        torch.manual_seed(1)
        svi = pv.CompiledSVI(model, guide, ADAM, pv.ELBO(), compile="replay")
        steps(svi, guide, x, MINIBATCHES[:6])
        if split:
            state = svi.optimizer.state_dict()
            assert state["state"][0]["step"].shape == (N,)
            svi = pv.CompiledSVI(model, guide, ADAM([guide.table]), pv.ELBO(), compile="replay")
            svi.optim.load_state_dict(state)
        steps(svi, guide, x, MINIBATCHES[6:])
        runs.append(guide.table.detach())
    assert torch.equal(*runs)


def test_a_leaf_is_one_tensor_for_each_size():
    guide, _ = make()
    rows = TableRows(guide)
    leaves = []
    for index in ([0, 1], [3, 4], [1, 2, 3], [5, 6]):
        given = torch.tensor(index)
        with rows.taking(given):
            assert guide.num_data == len(index)
            assert torch.equal(guide.current_rows, torch.arange(len(index)))
            assert torch.equal(guide.in_force, guide.table[given])
        leaves.append(rows.leaf)
    assert leaves[0] is leaves[1] is leaves[3]
    assert guide.num_data == N
    with rows.taking(torch.tensor([0, 1])):
        guide.in_force.sum().backward()
    assert torch.equal(rows.gradient, torch.ones_like(rows.gradient))
    whole = torch.zeros_like(guide.table)
    whole[:2] = 1
    assert torch.equal(rows.whole_gradient(), whole)
    guide.double()
    rows.drop()
    assert rows.gradient is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_row_at_a_time(dtype):
    x = data().to(dtype)
    guide = pv.LocalGuide(model, num_data=N, example=x, family=pv.families.Delta())
    pv.fit(model, guide, x, optim=ADAM, batch_size=1, epochs=300, progress=False)
    torch.testing.assert_close(guide.table[..., 0].detach(), x / 2, rtol=0, atol=1e-2)


# --- what fit does around its steps


class Breaks(nn.Module):
    """A model whose likelihood has no finite density where a datum is large."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            bad = torch.where(x.abs() > 50, torch.inf, 0.0)
            pyro.factor("penalty", ((z - x).square() / -2 - bad).sum(-1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1).mask(x.abs().sum(-1) < 50), obs=x)


def broken(row):
    guide, x = make(fn=Breaks())
    x[row] = 100.0
    return guide, x


@pytest.mark.parametrize("how", HOW)
def test_a_bad_step_leaves_table_and_moments_as_they_were(how):
    guide, x = broken(7)
    made = []

    def begin(parameters):
        made.append(ADAM(parameters))
        return made[0]

    options = {"batch_size": 1, "epochs": 1, "progress": False, "compile": HOW[how]}
    with pytest.raises(pv.NonFiniteLossError, match="parameters of the step before") as error:
        pv.fit(Breaks(), guide, x, optim=begin, seed=1, **options)
    counts = made[0].state[guide.table]["step"]
    assert counts.sum() == error.value.step - 1 > 0
    assert counts[7] == 0
    assert bool(guide.table.isfinite().all())
    moved = counts > 0
    start, _ = make(fn=Breaks())
    steps_of_adam = (guide.table - start.table).abs().flatten(1)
    torch.testing.assert_close(steps_of_adam, 0.1 * moved.double()[:, None].expand(N, LATENTS))


def test_skipped_steps_move_no_row():
    guide, x = broken(7)
    start = guide.table.detach().clone()
    pv.fit(Breaks(), guide, x, optim=ADAM, batch_size=1, epochs=3, progress=False, on_nan="skip")
    assert torch.equal(guide.table[7], start[7])
    assert not bool((guide.table == start).flatten(1).all(1)[[0, 1, 2, 3, 4, 5, 6, 8, 9, 10]].any())


@pytest.mark.parametrize("how", HOW)
def test_a_scheduler_moves_the_rate_of_all_rows(how):
    guide, x = make()
    rows, made = Logged(x), []

    def begin(parameters):
        rows.read.clear()
        made.append(ADAM(parameters))
        return made[0]

    def lower(epoch):
        made[0].param_groups[0]["lr"] = 0.1 * 0.5**epoch.epoch

    options = {"batch_size": 4, "epochs": 4, "compile": HOW[how], "progress": False}
    pv.fit(model, guide, rows, optim=begin, callbacks=[lower], **options)
    singles = Singles(make()[0], x, ADAM)
    for number, index in enumerate(torch.tensor(rows.read[: 4 * N]).split([4, 4, 3] * 4)):
        for optimizer in singles.optims:
            optimizer.param_groups[0]["lr"] = 0.1 * 0.5 ** (number // 3)
        singles.step(index.tolist())
    singles.check(guide)


def test_clipped_gradients_are_of_the_minibatch():
    """By the norm of the rows that are there, beside those of an optimizer each."""
    guide, x = make()
    rows, bound = Logged(x), 0.8
    optim = functools.partial(torch.optim.SGD, lr=0.1)

    def begin(parameters):
        rows.read.clear()
        return optim(parameters)

    pv.fit(model, guide, rows, optim=begin, batch_size=4, epochs=3, clip_norm=bound, progress=False)
    table = make()[0].table.detach()
    for index in torch.tensor(rows.read[: 3 * N]).split([4, 4, 3] * 3):
        slope = 2 * table[index, :, 0] - x[index]
        table[index, :, 0] -= 0.1 * slope * min(1, bound / (float(slope.norm()) + 1e-6))
    torch.testing.assert_close(guide.table.detach(), table, rtol=1e-12, atol=1e-12)


def test_training_resumes_to_the_bit(tmp_path):
    options = {"optim": ADAM, "batch_size": 4, "progress": False, "compile": "replay"}
    normal = pv.families.Normal()
    whole, x = make(family=normal)
    pv.fit(model, whole, x, epochs=6, **options)
    first, _ = make(family=normal)
    pv.fit(model, first, x, epochs=3, checkpoint=tmp_path / "c", **options)
    second, _ = make(family=normal)
    pv.fit(model, second, x, epochs=6, checkpoint=tmp_path / "c", **options)
    assert torch.equal(second.table, whole.table)


def test_ctrl_c_keeps_the_rows_of_the_last_step(monkeypatch):
    guide, x = make()
    rows = Logged(x)

    def begin(parameters):
        rows.read.clear()
        return ADAM(parameters)

    def interrupt(epoch):
        raise KeyboardInterrupt

    result = pv.fit(
        model,
        guide,
        rows,
        optim=begin,
        batch_size=4,
        epochs=9,
        callbacks=[interrupt],
        progress=False,
    )
    assert result.stopped_by == "interrupted"
    assert result.steps == 3
    singles = Singles(make()[0], x, ADAM)
    singles.step(rows.read[:N])
    singles.check(guide)


def test_looks_and_steps_hold_no_copy_of_the_table():
    """By what PyTorch allocates: no step makes a tensor as large as the table."""
    num_data = 50_000
    guide, x = make(num_data, family=pv.families.Normal())
    sizes = []

    class Sizes(DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func._schema.is_mutable:
                sizes.append((out.numel(), str(func)))
            return out

    svi = pv.CompiledSVI(model, guide, ADAM, pv.ELBO(), compile=False)
    steps(svi, guide, x, [[0, 3, 5]])  # makes the moments
    with Sizes():
        steps(svi, guide, x, [[0, 3, 5], [2, 8, 9]])
    views = ("detach", "view", "alias", "t.default", "unbind", "select.int")
    large = [name for size, name in sizes if size >= num_data and not any(v in name for v in views)]
    assert sizes
    assert large == []


@pytest.mark.parametrize(
    "taken", [4, pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_training_resumes_within_an_epoch_to_the_bit(tmp_path, taken):
    """Epochs of 3 steps, of which the last is smaller; broken off after some steps."""
    options = {"optim": ADAM, "batch_size": 4, "progress": False, "compile": "replay"}
    normal = pv.families.Normal()
    whole, x = make(family=normal)
    pv.fit(model, whole, x, epochs=4, **options)

    class Interrupt:
        def on_step(self, step):
            if step.step == taken:
                raise KeyboardInterrupt

    kept = {"checkpoint": tmp_path / "c", "checkpoint_every": 1}
    first, _ = make(family=normal)
    result = pv.fit(model, first, x, epochs=4, callbacks=[Interrupt()], **kept, **options)
    assert result.stopped_by == "interrupted"
    second, _ = make(family=normal)
    pv.fit(model, second, x, epochs=4, **kept, **options)
    assert torch.equal(second.table, whole.table)


def test_rows_of_data_in_a_file_are_those_of_data_in_memory(tmp_path):
    """To the bit, data and table both memory-mapped."""
    inside, x = make(family=pv.families.Normal())
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    outside, _ = make(family=pv.families.Normal(), storage=tmp_path / "rows.npy")
    options = {"optim": ADAM, "batch_size": 4, "epochs": 3, "progress": False}
    pv.fit(model, inside, x, **options)
    pv.fit(model, outside, mapped, **options)
    assert torch.equal(outside.table, inside.table)
