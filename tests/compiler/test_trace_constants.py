"""Constants of a trace: numbers that Python may read, because no input is in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyro_vae.compiler.tracing import UntraceableError, trace
from tests.compiler.graphs import checked, data

CONSTANTS = {
    "item": lambda x: torch.prod(torch.tensor(x.shape)).item(),
    "int": lambda x: int(torch.tensor(x.shape).sum()),
    "if": lambda x: 2.0 if torch.tensor([1.0, 3.0]).mean() > 1 else 3.0,
    "tolist": lambda x: sum(torch.arange(4).cumsum(0).tolist()),
    "numpy": lambda x: float(np.sum((torch.ones(3) * 2).numpy())),
    "like": lambda x: torch.ones_like(x).sum().item(),
    "a list": lambda x: torch.tensor([torch.tensor(2.0), torch.ones(()) * 3]).sum().item(),
    "written to": lambda x: torch.zeros(3).fill_(2.0)[0].item(),
}


@pytest.mark.parametrize("read", CONSTANTS.values(), ids=CONSTANTS)
def test_numbers_of_what_is_made_of_constants_may_be_read(read):
    checked(lambda x: [x * read(x)], data(6), others=[(data(6, seed=1),)])


def test_a_constant_that_an_input_is_written_to_is_none():
    def function(x):
        made = torch.zeros(6, dtype=x.dtype)
        made[2:].copy_(x[2:])
        return [x * float(made.sum())]

    with pytest.raises(UntraceableError, match="reads a number out"):
        trace(function, [data(6)])


def test_random_numbers_are_no_constants():
    with pytest.raises(UntraceableError, match="reads a number out"):
        trace(lambda x: [x * float(torch.rand(()))], [data(6)])


def test_one_hot_of_known_size():
    """What PyTorch gives; an index outside is an error of the replay too, compiled or not."""
    one_hot = torch.nn.functional.one_hot

    def function(i):
        return [one_hot(i, 3), one_hot(i[None], num_classes=4).float()]

    index = torch.tensor([0, 2, 1, 1])
    checked(function, index, others=[(index.flip(0),)])
    graph = trace(function, [index])
    with pytest.raises(RuntimeError, match="out of bounds"):
        graph(index + 2)
    with pytest.raises(UntraceableError):
        trace(lambda i: [one_hot(i)], [index])
