"""Each optimizer's rule for rows: what PyTorch's does to a parameter of that row alone."""

from __future__ import annotations

import functools

import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import nn, optim

from pyro_vae.training.row_rules import RULES, has_row_state, rule_of
from pyro_vae.training.table_rows import RowStep

N, SHAPE = 6, (2, 3)
ADAM = {"lr": 0.05, "betas": (0.8, 0.95)}
OPTIMIZERS = {
    "Adam": functools.partial(optim.Adam, lr=0.05),
    "Adam, settings": functools.partial(optim.Adam, **ADAM, eps=1e-3, weight_decay=0.1),
    "Adam, amsgrad": functools.partial(optim.Adam, lr=0.05, amsgrad=True),
    "Adam, maximize": functools.partial(optim.Adam, lr=0.05, maximize=True, weight_decay=0.1),
    "Adam, tensors": functools.partial(optim.Adam, lr=torch.tensor(0.05, dtype=torch.float64)),
    "Adam, fused": functools.partial(optim.Adam, lr=0.05, fused=True),
    "AdamW": functools.partial(optim.AdamW, lr=0.05, weight_decay=0.3),
    "SGD": functools.partial(optim.SGD, lr=0.05),
    "SGD, momentum": functools.partial(optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SGD, dampened": functools.partial(optim.SGD, lr=0.05, momentum=0.9, dampening=0.5),
    "SGD, Nesterov": functools.partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "SGD, maximize": functools.partial(optim.SGD, lr=0.05, momentum=0.9, maximize=True),
    "Adagrad": functools.partial(
        optim.Adagrad, lr=0.5, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.2
    ),
    "Adagrad, maximize": functools.partial(optim.Adagrad, lr=0.5, maximize=True),
    "ClippedAdam": functools.partial(
        ClippedAdam, lr=0.05, clip_norm=0.7, weight_decay=0.1, centered_variance=True
    ),
}


class Rows:
    """A table whose rows move by a rule, beside a parameter and an optimizer for each row."""

    def __init__(self, make, dtype=torch.float64):
        torch.manual_seed(0)
        self.table = torch.randn(N, *SHAPE, dtype=dtype)
        self.alone = [nn.Parameter(row.clone()) for row in self.table]
        self.singles = [make([row]) for row in self.alone]
        self.parameter = nn.Parameter(self.table)
        self.optimizer = make([self.parameter])
        self.rule, self.state = rule_of(self.optimizer), self.optimizer.state[self.parameter]
        (self.group,) = self.optimizer.param_groups

    def step(self, rows, failed=None):
        index = torch.tensor(rows)
        gradient = torch.randn(len(rows), *SHAPE, dtype=self.table.dtype)
        self.rule.prepare(self.group, self.parameter, self.state)
        step = RowStep(self.table, index, self.table[index], gradient)
        step.take(self.rule, self.group, self.state, failed)
        for row, slope in zip(rows, gradient, strict=True):
            self.alone[row].grad = slope.clone()
            self.singles[row].step()

    def same(self, rtol=1e-12):
        torch.testing.assert_close(self.table, torch.stack(list(self.alone)), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_moves_as_by_an_optimizer_of_its_own(name):
    """In float64 to rounding, over minibatches of several sizes; its rate changes on the way."""
    both = Rows(OPTIMIZERS[name])
    for number, rows in enumerate([[0, 3], [1], [3, 0, 5], [3], [4, 3, 2, 1], [0, 5]] * 3):
        if number == 9:
            for optimizer in (both.optimizer, *both.singles):
                group = optimizer.param_groups[0]
                group["lr"] = group["lr"] * 0.5
        both.step(rows)
        both.same()
    untouched = Rows(OPTIMIZERS[name])
    start = untouched.table.clone()
    untouched.step([2, 4])
    assert torch.equal(untouched.table[[0, 1, 3, 5]], start[[0, 1, 3, 5]])
    assert not torch.equal(untouched.table[2], start[2])


def test_a_sweep_of_all_optimizers_that_have_a_rule():
    assert {type(make([nn.Parameter(torch.zeros(1))])) for make in OPTIMIZERS.values()} == {*RULES}


def test_rounding_of_float32():
    both = Rows(OPTIMIZERS["Adam"], torch.float32)
    for _ in range(30):
        both.step([0, 1])
    both.same(rtol=1e-5)
    assert both.table.dtype == both.state["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("name", ["Adam", "SGD, momentum", "SGD, dampened", "Adagrad"])
def test_a_state_of_all_rows_is_that_of_each(name):
    """Steps of the optimizer itself, then some of rows."""
    both = Rows(OPTIMIZERS[name])
    for _ in range(3):
        gradient = torch.randn(N, *SHAPE, dtype=torch.float64)
        both.parameter.grad = gradient
        both.optimizer.step()
        for row, slope in enumerate(gradient):
            both.alone[row].grad = slope.clone()
            both.singles[row].step()
    both.same()
    assert not has_row_state(both.state)
    for rows in ([1, 4], [0], [4, 2]):
        both.step(rows)
    both.same()
    if name in ("Adam", "Adagrad"):  # SGD counts no steps: there was one, at least
        assert both.state["step"].tolist() == [4, 4, 4, 3, 5, 3]


@pytest.mark.parametrize("name", ["Adam", "SGD, dampened", "Adagrad", "ClippedAdam"])
def test_a_failed_step_moves_nothing(name):
    both = Rows(OPTIMIZERS[name])
    both.step([0, 1])
    table = both.table.clone()
    state = {key: value.clone() for key, value in both.state.items()}
    both.step([1, 2], failed=torch.ones(()))
    assert torch.equal(both.table, table)
    assert all(torch.equal(both.state[key], value) for key, value in state.items())
    both.step([1, 2], failed=torch.zeros(()))
    assert not torch.equal(both.table, table)


def test_optimizers_without_a_rule():
    class Mine(optim.Adam):
        pass

    parameter = nn.Parameter(torch.zeros(1))
    for make in (Mine, optim.RMSprop, functools.partial(optim.Adam, differentiable=True)):
        assert rule_of(make([parameter], lr=0.1)) is None


def test_adamw_decays_apart_where_its_groups_do_not_say_so():
    """As those of PyTorch before 2.7."""
    both = Rows(OPTIMIZERS["AdamW"])
    both.group = {n: v for n, v in both.group.items() if n != "decoupled_weight_decay"}
    for _ in range(3):
        both.step([1, 2])
    both.same()
