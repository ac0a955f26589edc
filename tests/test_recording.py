"""Whether a graph is being recorded."""

from __future__ import annotations

import pytest

from pyro_vae.compiler.tracing import UntraceableError, trace
from pyro_vae.recording import is_recording
from tests.compiler.graphs import data


def test_is_recording_inside_alone():
    seen = []

    def function(x):
        seen.append(is_recording())
        return [x + 1]

    function(data(2))
    trace(function, [data(2)])
    assert seen == [False, True]
    assert not is_recording()
    with pytest.raises(UntraceableError):
        trace(lambda x: [x[x > 0]], [data(2)])
    assert not is_recording()
