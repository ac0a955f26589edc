"""Signatures of arguments: equal where one graph serves both, and tensors put back in order."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.compiler.arguments import VaryingNumbers, check_compile, form_of, layout_of, rebuilt
from tests.runs import data, replayed, vae, warned


class Pair(NamedTuple):
    x: torch.Tensor
    scale: float


def form(value):
    return form_of(value, [])


def test_layouts_tell_apart_all_but_the_numbers():
    x = torch.zeros(2, 3)
    assert layout_of(x) == layout_of(torch.ones(2, 3))
    others = [x.double(), x.T.contiguous().T, x[:1], x.clone().requires_grad_(), x[None]]
    assert all(layout_of(other) != layout_of(x) for other in others)


def test_a_size_beside_a_number_that_varies():
    """A torch.Size is one plain value: its numbers are not among those that vary."""
    numbers, x = VaryingNumbers(), torch.zeros(2, 3)
    for weight in (0.1, 0.2, 0.3, 0.4, 0.5):
        _, (size, found), varying = numbers.as_tensors((x.shape, weight), [x])
        assert type(size) is torch.Size and size == x.shape
        assert float(found) == pytest.approx(weight)
    assert varying == (0.5,)


def test_forms_are_of_layouts_and_plain_values():
    x = torch.zeros(2)
    assert form({"x": x, "n": 3}) == form({"x": x + 1, "n": 3})
    assert form((x, 1)) != form((x, 2))
    assert form((x, 1)) != form((x, 1.0))  # equal to Python, and another operation to torch
    assert form((x, 1)) != form([x, 1])
    assert form({"x": x}) != form({"y": x})


@pytest.mark.parametrize("value", [torch.zeros(2).to_sparse(), object(), {"x": object()}, [{1}]])
def test_what_no_graph_serves_has_none(value):
    assert form(value) is None


def test_tensors_are_collected_and_put_back_in_one_order():
    a, b, c = (torch.full((2,), float(i)) for i in range(3))
    value = {"pair": Pair(a, 0.5), "rest": [b, (c, "text")]}
    inputs = []
    form_of(value, inputs)
    assert [t is other for t, other in zip(inputs, (a, b, c), strict=True)] == [True] * 3
    again = rebuilt(value, iter([a + 10, b + 10, c + 10]))
    assert isinstance(again["pair"], Pair)
    assert again["pair"].scale == 0.5 and again["rest"][1][1] == "text"
    assert again["pair"].x.tolist() == [10.0, 10.0] and again["rest"][1][0].tolist() == [12.0] * 2


def test_other_values_can_be_replaced():
    found = rebuilt((1, [2.5, "a"]), iter("xy"), kinds=float)
    assert found == (1, ["x", "a"])


@pytest.mark.parametrize("compile", ["auto", "replay", True, False])
def test_ways_to_run(compile):
    check_compile(compile)


@pytest.mark.parametrize("compile", ["eager", None, 1])
def test_other_ways_are_refused(compile):
    with pytest.raises(ValueError, match=f"compile={compile!r}: 'auto', 'replay', True or False"):
        check_compile(compile)


# --- numbers among the arguments that differ from call to call: tensors of one graph, after a few


def calls(values, steps=3):
    return [
        (data(seed=i), value) for i, value in enumerate(v for v in values for _ in range(steps))
    ]


@pytest.mark.parametrize("loss", [Trace_ELBO, functools.partial(pv.ELBO, kl="sample")])
def test_a_warm_up_by_a_float(loss):
    """To the last bit, at every step; the fourth value is the last that is traced."""
    run = replayed(calls=calls([0.1 * (i + 1) for i in range(8)]), loss=loss)
    e, r = ["eager"], ["replayed"]
    assert run.modes == (e + r * 2) * 4 + r * 12


def scaled_alike():
    """One weight on the latent, in model and guide: the KL is analytic."""
    torch.manual_seed(0)
    decoder, encoder = nn.Linear(2, 3).double(), nn.Linear(3, 2).double()

    def model(x, beta):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x, beta):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)), poutine.scale(scale=beta):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize("loss", [pv.ELBO, TraceMeanField_ELBO])
def test_a_weight_of_model_and_guide(loss):
    """No number is read to know that the two scales are one."""
    run = replayed(scaled_alike, calls([0.1 * (i + 1) for i in range(8)]), loss=loss, rtol=1e-12)
    assert run.modes[-12:] == ["replayed"] * 12


def test_whole_numbers_and_floats_in_float32():
    """By the number of the epoch; in float32 to rounding."""

    def make():
        model, guide = vae()
        return model.float(), guide.float()

    given = [(data(seed=i).float(), 1 + i // 2) for i in range(20)]
    run = replayed(make, given, rtol=1e-5)
    assert run.modes[8:] == ["replayed"] * 12


def test_a_model_that_decides_by_the_number(caplog):
    """It has a graph for each value, as before; said once."""

    def make():
        model, guide = vae()
        forward = model.forward
        model.forward = lambda x, beta: forward(x, beta if beta < 0.5 else 0.5)
        return model, guide

    run = replayed(make, calls([0.1 * (i + 1) for i in range(8)], 4))
    assert run.modes[-4:] == ["eager"] + ["replayed"] * 3
    (message,) = warned(caplog)
    assert "differs from call to call, and steps are traced anew for each value" in message
    assert "if beta < 0.5 else 0.5" in message


@pytest.mark.slow
def test_numbers_that_are_traced_each_are_not_for_ever(caplog):
    """Ten steps for each of 40 values; the last one stays, and is traced after many steps."""

    def make():
        model, guide = vae()
        forward = model.forward
        model.forward = lambda x, beta: forward(x, max(beta, 0.1))
        return model, guide

    values = [0.2 + 0.01 * min(i, 40) for i in range(50)]
    run = replayed(make, calls(values, 10))
    traced = sum(a == "eager" and b == "replayed" for a, b in itertools.pairwise(run.modes))
    assert traced <= 20
    assert run.modes[330:400] == ["eager"] * 70
    assert run.modes[-30:] == ["replayed"] * 30
    assert any("differ every few steps" in text for text in warned(caplog))


def test_where_no_trace_succeeds_there_are_no_more_of_them(monkeypatch, caplog):
    """Three values, and the line that stops them all; one warning."""
    from pyro_vae.training import traced_loss

    traces = []
    original = traced_loss.trace
    monkeypatch.setattr(
        traced_loss, "trace", lambda *a, **k: (traces.append(1), original(*a, **k))[1]
    )

    def make():
        model, guide = vae()
        forward = model.forward

        def stopped(x, beta):
            assert float(x.abs().max()) < 100
            forward(x, beta)

        model.forward = stopped
        return model, guide

    run = replayed(make, calls([0.1 * (i + 1) for i in range(8)]))
    assert run.modes == ["eager"] * 24
    assert 3 <= len(traces) <= 5
    assert any("reads a number out of a tensor" in text for text in warned(caplog))


def test_numbers_that_stay_are_constants():
    numbers = VaryingNumbers()
    x = torch.ones(3, dtype=torch.float64)
    for value in range(5):
        given = (x, {"beta": 0.1 * value, "layers": 2, "on": True})
        _, (_, named), varying = numbers.as_tensors(given, [x])
        if value < 3:
            assert varying == ()
            assert named["beta"] == 0.1 * value
    assert named["layers"] == 2
    assert named["on"] is True
    assert named["beta"].dtype == torch.float64
    assert varying == (0.4,)
