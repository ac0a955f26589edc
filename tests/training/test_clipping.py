"""Gradient clipping: the numbers of PyTorch's utilities, in every kind of step."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.training.clipping import Clip
from tests.runs import some
from tests.training.fits import make_data, make_guide, model, parameters_of, run, same

BOUNDS = {"norm": 0.5, "value": 0.05}


def by_torch(how, parameters):
    parameters = list(parameters)
    if how == "norm":
        return nn.utils.clip_grad_norm_(parameters, BOUNDS[how])
    nn.utils.clip_grad_value_(parameters, BOUNDS[how])
    return torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()


@pytest.mark.parametrize("how", BOUNDS)
@pytest.mark.parametrize("size", [3.0, 1e-4, 1e30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numbers_of_torch(how, size, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), (), (2, 0)]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
        parameter.grad = size * noise
    given, kept = ([parameter.grad.clone() for parameter in parameters] for _ in range(2))
    found = Clip(**{how: BOUNDS[how]})(given)
    by_torch(how, parameters)
    torch.testing.assert_close(found, [p.grad for p in parameters], rtol=1e-6, atol=0)
    assert all(f.dtype == dtype for f in found)
    assert all(torch.equal(*pair) for pair in zip(given, kept, strict=True)), "it stays as it is"


OPTIMIZERS = {
    "Adam": functools.partial(torch.optim.Adam, lr=0.05),
    "fused Adam": functools.partial(torch.optim.Adam, lr=0.05, fused=True),
    "SGD": functools.partial(torch.optim.SGD, lr=0.005, momentum=0.9),
    "fused SGD": functools.partial(torch.optim.SGD, lr=0.005, momentum=0.9, fused=True),
}


def hooked(how, make):
    """An optimizer that clips by torch's utility before each step; and the norms that it saw."""
    norms = []

    def optim(parameters):
        optimizer = make(parameters)
        hook = lambda *_: norms.append(by_torch(how, parameters))  # noqa: E731
        optimizer.register_step_pre_hook(hook)
        return optimizer

    return optim, norms


@pytest.mark.parametrize("how", BOUNDS)
@pytest.mark.parametrize("make", some(OPTIMIZERS, ["fused Adam", "SGD"]))
@pytest.mark.parametrize("compile", [False, "replay"])
def test_fit_clips_as_torch_does(how, make, compile):
    x, options = make_data(), {"epochs": 4, "compile": compile}
    optim, norms = hooked(how, make)
    wanted = run(x, optim=optim, **options)[1]
    _, found = run(x, optim=make, **{f"clip_{how}": BOUNDS[how]}, **options)
    torch.testing.assert_close(parameters_of(found), parameters_of(wanted), rtol=1e-9, atol=1e-12)
    assert how == "value" or max(norms) > BOUNDS["norm"], "some are clipped"
    free = run(x, optim=make, **options)[1]
    assert not same(parameters_of(found), parameters_of(free))


@pytest.mark.slow
def test_compiled_steps_clip():
    x = make_data()
    _, eager = run(x, compile=False, clip_norm=0.5, epochs=3)
    _, compiled = run(x, compile=True, clip_norm=0.5, epochs=3)
    torch.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("how", BOUNDS)
@pytest.mark.parametrize("compile", [False, "replay"])
def test_a_table_of_rows_is_clipped_with_the_rest(how, compile):
    """A step of SGD on 16 of 40 rows: the gradient of all parameters together is clipped."""
    x = make_data()
    start = pv.LocalGuide(model, num_data=40, example=x)
    before = parameters_of(start)
    moves = []
    for clip in ({}, {f"clip_{how}": BOUNDS[how]}):
        guide = pv.LocalGuide(model, num_data=40, example=x)
        sgd = functools.partial(torch.optim.SGD, lr=1e-3)
        options = {"max_steps": 1, "batch_size": 16, "compile": compile}
        run(x, guide, optim=sgd, epochs=None, **options, **clip)
        pairs = zip(parameters_of(guide), before, strict=True)
        moves.append([(old - new) / 1e-3 for new, old in pairs])
    parameters = [nn.Parameter(torch.zeros_like(move)) for move in moves[0]]
    for parameter, gradient in zip(parameters, moves[0], strict=True):
        parameter.grad = gradient.clone()
    norm = torch.cat([move.flatten() for move in moves[0]]).norm()
    assert norm > BOUNDS["norm"]
    by_torch(how, parameters)
    wanted = [parameter.grad for parameter in parameters]
    torch.testing.assert_close(moves[1], wanted, rtol=1e-6, atol=1e-9)


def test_gradients_that_are_not_finite_are_found_before_they_are_clipped():
    """Clipped by value, an infinite gradient would be a large step and no error."""

    class Infinite(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1).double()

        def forward(self, x):
            zero = self.net.weight.sum() - self.net.weight.sum()
            return self.net(x) + zero.sqrt()

    x = make_data()
    guide = pv.AmortizedGuide(model, Infinite(), example=x)
    with pytest.raises(pv.NonFiniteLossError, match="the gradient of step 1"):
        run(x, guide, clip_value=0.1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"clip_norm": 0.0}, r"clip_norm=0.0: a finite number above 0"),
        ({"clip_norm": -1}, r"clip_norm=-1"),
        ({"clip_value": math.inf}, r"clip_value=inf"),
        ({"clip_value": math.nan}, r"clip_value=nan"),
        ({"clip_norm": "1"}, r"clip_norm='1': a number is needed"),
        ({"clip_value": True}, r"clip_value=True: a number is needed"),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "clip_norm and clip_value: .* give one"),
    ],
)
def test_bounds_that_are_none(options, told):
    with pytest.raises(ValueError, match=told):
        run(make_data(), **options)


def test_a_sparse_gradient_is_refused():
    with pytest.raises(ValueError, match="a gradient is sparse"):
        Clip(norm=1.0)([torch.eye(2).to_sparse()])


def test_without_a_bound_nothing_changes():
    assert not Clip()
    guides = [make_guide(make_data()) for _ in range(2)]
    run(make_data(), guides[0])
    run(make_data(), guides[1], clip_norm=1e9)
    torch.testing.assert_close(*map(parameters_of, guides))
