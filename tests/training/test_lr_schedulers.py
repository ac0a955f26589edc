"""Schedulers are found wherever callbacks hold them; test_resume has their state."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from pyro_vae.training.lr_schedulers import schedulers_of


def make():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def step(scheduler, epoch):
    scheduler.step()


def test_each_is_found_once():
    optimizer = make()
    scheduler = StepLR(optimizer, 3)
    holders = [scheduler, functools.partial(step, scheduler), lambda epoch: scheduler.step()]
    assert schedulers_of(holders, optimizer) == [scheduler]
    assert schedulers_of([{"deep": [scheduler]}], optimizer) == [scheduler]


def test_one_of_another_optimizer_is_none():
    assert schedulers_of([StepLR(make(), 3)], make()) == []


def test_one_that_no_callback_holds_is_refused():
    optimizer = make()
    kept = StepLR(optimizer, 3)
    with pytest.raises(ValueError, match="is in no callback"):
        schedulers_of([lambda epoch: None], optimizer)
    assert kept.optimizer is optimizer
