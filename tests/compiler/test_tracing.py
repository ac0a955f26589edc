"""Tracing: what Python may not do to a function that becomes a graph."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from pyro_vae.compiler.tracing import UntraceableError, trace
from tests.compiler.graphs import checked, data, equal


def line_of(text: str) -> int:
    """The line of this file that holds a text (this function's caller aside), the first."""
    source = inspect.getsource(inspect.getmodule(line_of)).splitlines()
    return 1 + next(i for i, line in enumerate(source) if line.strip() == text)


def test_control_flow_on_numbers_names_the_line():
    def function(x):
        if x.sum() > 0:
            return [x]
        return [-x]

    line = line_of("if x.sum() > 0:")
    with pytest.raises(UntraceableError) as caught:
        trace(function, [data(3)])
    assert str(caught.value) == (
        "Python reads a number out of a tensor, which may decide what it does next "
        f"(test_tracing.py, line {line}: if x.sum() > 0:)"
    )


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: int(x.sum()),
        lambda x: float(x.sum()),
        lambda x: torch.zeros(x.argmax()),
        lambda x: list(range(x.argmax())),
        lambda x: 0 if x[0] in (1.0, 2.0) else 1,
    ],
    ids=["bool", "int", "float", "shape", "index", "in"],
)
def test_ways_to_numbers(read):
    def function(x):
        read(x)
        return [x]

    with pytest.raises(UntraceableError, match=r"reads a number out.*\(test_tracing\.py, line \d+"):
        trace(function, [data(3).abs()])


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: np.asarray(x), "__array__"),
    ],
)
def test_ways_to_numbers_that_leave_no_trace(read, name):
    def function(x):
        return [x + float(np.sum(read(x)))]

    with pytest.raises(UntraceableError) as caught:
        trace(function, [data(3)])
    message = str(caught.value)
    where = "(test_tracing.py, line "
    assert message.startswith(f"Tensor.{name} reads numbers out of a tensor {where}")


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: [x[x > 0].sum()], "aten.index.Tensor"),
        (lambda x: [x.nonzero()], "aten.nonzero.default"),
        (lambda x: [torch.masked_select(x, x > 0)], "aten.masked_select.default"),
        (lambda x: [torch.unique(x)], "aten._unique2.default"),
    ],
    ids=["mask", "nonzero", "masked_select", "unique"],
)
def test_changing_shapes_are_refused(function, operator):
    with pytest.raises(UntraceableError) as caught:
        trace(function, [data(6)])
    assert operator in str(caught.value) or "reads a number" in str(caught.value)


def test_a_mask_whose_shape_is_known_is_taken():
    """Writing by a mask, where(), and indices that are numbers."""
    index = torch.tensor([2, 0])

    def function(x):
        y = x.clone()
        y[x > 0] = 0.0
        return [y, torch.where(x > 0, x, -x), x[index], x.masked_fill(x < 0, 1.0)]

    checked(function, data(6), others=[(data(6, seed=1),)])


def test_a_number_in_a_tensor_that_is_no_input():
    """Of a parameter or a buffer, it may change as an input's may: no constant."""
    factor = torch.ones((), dtype=torch.float64)

    def function(x):
        return [x * float(factor)]

    with pytest.raises(UntraceableError, match="reads a number"):
        trace(function, [data(3)])

    def by_item(x):
        return [x * factor.item()]

    graph = trace(by_item, [data(3)])
    factor.fill_(5.0)
    equal(graph(data(3)), [5 * data(3)])


def test_an_error_of_the_function_is_told():
    def function(x):
        raise KeyError("no such thing")

    with pytest.raises(UntraceableError, match=r"KeyError: 'no such thing' \(test_tracing\.py"):
        trace(function, [data(3)])


# --- constants of a trace: numbers that Python may read, because no input is in them

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
