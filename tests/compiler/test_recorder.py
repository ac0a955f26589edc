"""Functions that are called again and again: when they run by a graph, and when they do not."""

from __future__ import annotations

import logging

import pytest
import torch

from pyro_vae.compiler import recorder
from pyro_vae.compiler.recorder import Recorder

X = torch.arange(6, dtype=torch.float64)
NAME = "pyro_vae.compiler.recorder"


class Doubled:
    """Twice its input, or what else it is told; it counts how often Python ran it."""

    def __init__(self, factor: float = 2.0, drift: float = 0.0) -> None:
        self.factor, self.drift, self.runs = factor, drift, 0

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.runs += 1
        self.factor += self.drift
        return [x * self.factor]


def called(record: Recorder, function, times: int, name: str = "doubled", **options) -> list[float]:
    """The first number of each call's result over that of its input, which differs."""
    found = []
    for i in range(times):
        (value,) = record((name,), function, [X + i + 1], 1000, **options)
        found.append(round(float(value[0]) / (i + 1), 9))
    return found


def test_the_second_call_is_recorded():
    """The first runs, the second runs to be traced and compared, and the others do not."""
    function = Doubled()
    assert called(Recorder("a test", "replay"), function, 5) == [2.0] * 5
    assert function.runs == 3


def test_never():
    function = Doubled()
    assert called(Recorder("a test", False), function, 4) == [2.0] * 4
    assert function.runs == 4


def test_auto_leaves_short_work_alone(monkeypatch):
    """A thousand calls of microseconds are no second."""
    function = Doubled()
    assert called(Recorder("a test", "auto"), function, 4) == [2.0] * 4
    assert function.runs == 4
    monkeypatch.setattr(recorder, "_SECONDS_TO_RECORD", 0.0)
    function = Doubled()
    assert called(Recorder("a test", "auto"), function, 5) == [2.0] * 5
    assert function.runs == 3


def test_a_graph_with_other_numbers_is_no_graph(caplog):
    """And no secret: what Python changes from run to run is no function of tensors."""
    function = Doubled(drift=1.0)
    record = Recorder("a test", "replay")
    with caplog.at_level(logging.WARNING, NAME):
        found = called(record, function, 4)
    assert found == [3.0, 4.0, 6.0, 7.0]  # the fifth was the trace's
    assert caplog.messages == [
        "a test runs eagerly, which is slower: its graph gives other numbers"
    ]
    other = Doubled()
    assert called(record, other, 5, "another") == [2.0] * 5
    assert other.runs == 3


def test_what_cannot_be_traced_runs_on(caplog):
    def function(x):
        return [x * (2.0 if float(x.sum()) > 0 else 3.0)]

    with caplog.at_level(logging.INFO, NAME):
        assert called(Recorder("a test", "replay"), function, 3) == [2.0] * 3
    (message,) = caplog.messages
    assert message.startswith("a test runs eagerly, which is slower: Python reads a number")


def test_a_graph_is_compared_with_another_function(caplog):
    """As with the one of the next block of data, which should be the same."""
    record = Recorder("a test", "replay")
    called(record, Doubled(), 3)
    equal = Doubled()
    assert called(record, equal, 2, check=True) == [2.0] * 2
    assert equal.runs == 2
    with caplog.at_level(logging.WARNING, NAME):
        assert called(record, Doubled(5.0), 2, check=True) == [5.0] * 2
    assert len(caplog.messages) == 1
    assert called(record, Doubled(5.0), 2) == [5.0] * 2


def test_the_random_state_is_that_of_one_run():
    def function(x):
        return [x + torch.randn(6, dtype=x.dtype)]

    results = []
    for how in (False, "replay"):
        torch.manual_seed(1)
        record = Recorder("a test", how)
        results.append([record(("noise",), function, [X], 10)[0] for _ in range(4)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_unknown_ways_are_refused():
    with pytest.raises(ValueError, match="compile='fast'"):
        Recorder("a test", "fast")
