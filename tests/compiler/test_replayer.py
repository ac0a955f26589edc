"""Compiled code of a graph: kept for graphs of one text, and not for ever."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn

from pyro_vae import torch_internals
from pyro_vae.compiler import graph as graphs
from pyro_vae.compiler.tracing import UntraceableError, trace
from tests.compiler.graphs import data, equal, scaled


def normalized(layer):
    def function(x):
        noise = torch.randn_like(x)
        loss = (layer(x + 0.1 * noise).tanh() ** 2).sum()
        return [loss.detach(), None, *torch.autograd.grad(loss, list(layer.parameters()))]

    return function


@pytest.mark.slow
def test_compiled_is_replayed():
    """With the same random numbers; sums in another order: float64 to 1e-12 of the largest."""

    def run(how):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
        graph = trace(normalized(layer), [data(5, 3)])
        layer[1].reset_running_stats()
        if how == "compiled":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PyTorch's own compiler
                graph.compile(data(5, 3))
            layer[1].reset_running_stats()
            assert graph.compiled
        assert not graph.uncompilable
        torch.manual_seed(1)
        found = [graph(data(5, 3, seed=i)) for i in range(3)]
        return found, [b.clone() for b in layer.buffers()], torch.get_rng_state()

    (found, buffers, state), (wanted, wanted_buffers, wanted_state) = run("compiled"), run("replay")
    for one, other in zip(found, wanted, strict=True):
        assert one[1] is None
        for a, b in zip(one, other, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(buffers, wanted_buffers, rtol=1e-12, atol=1e-12)
    assert torch.equal(state, wanted_state)


@contextlib.contextmanager
def without_a_compiler(tmp_path):
    """A machine without C++ compilers: none by the names that PyTorch tries."""
    from torch._inductor import config, cpp_builder

    forget = getattr(cpp_builder.get_cpp_compiler, "cache_clear", lambda: None)
    with pytest.MonkeyPatch.context() as patch, config.patch({"cpp.cxx": ("no-such-compiler",)}):
        patch.setenv("CXX", "no-such-compiler")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        forget()
        yield
    forget()


def test_without_a_compiler(tmp_path):
    layer = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7)).double()
    function = normalized(layer)
    graph = trace(function, [data(6, 3)])
    with without_a_compiler(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own compiler
        with pytest.raises(RuntimeError, match=r"^\w+: ") as caught:
            graph.compile(data(6, 3))
    assert not isinstance(caught.value, UntraceableError)
    assert graph.uncompilable
    assert not graph.compiled
    torch.manual_seed(3)
    wanted = function(data(6, 3))
    torch.manual_seed(3)
    equal(graph(data(6, 3)), wanted)


@pytest.fixture
def compilations(monkeypatch) -> list[int]:
    """The number of graphs that went to the compiler, in a list of one; none is compiled."""
    count = [0]

    def compile(module, arguments):
        count[0] += 1
        return module

    monkeypatch.setattr(torch_internals, "compiled", compile)
    monkeypatch.setattr(graphs, "_code", {})
    return count


def test_what_was_compiled_serves_again(compilations):
    """For equal graphs on tensors of the same layout; each reads its own parameter."""
    inputs = [data(3, 4)]
    for seed in (1, 2):
        parameter = data(4, seed=seed)
        graph = trace(scaled(parameter, 2.0), inputs)
        graph.compile(*inputs)
        assert graph.compiled
        torch.testing.assert_close(graph(*inputs), tuple(scaled(parameter, 2.0)(*inputs)))
    assert compilations == [1]
    turned = [data(4, 3).t()]
    trace(scaled(data(4), 2.0), turned).compile(*turned)
    assert compilations == [2]


def test_written_memory_that_is_shared_is_not_compiled(compilations):
    """The compiler would take it for granted where in the memory each lies."""
    memory = torch.arange(6.0)
    inputs = [memory[:4], memory[2:]]
    graph = trace(lambda a, b: [a.add_(1).sum() * 0 + b * 2], inputs)
    with pytest.raises(RuntimeError, match="shares its memory"):
        graph.compile(*inputs)
    assert graph.uncompilable
    assert compilations == [0]
    graph = trace(lambda a, b: [a + b], inputs)
    graph.compile(*inputs)
    assert graph.compiled


def test_compiled_code_is_not_kept_for_ever(compilations, monkeypatch):
    monkeypatch.setattr(graphs, "_MAX_CODES", 2)
    for factor in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):  # the one used last is kept
        trace(scaled(data(4), factor), [data(3, 4)]).compile(data(3, 4))
    assert compilations == [4]
    assert len(graphs._code) == 2


def test_code_for_another_default_dtype_is_not_found(monkeypatch):
    """Of integers, a quotient has the default dtype, which no operation names."""
    compiled = []

    def compile(module, arguments):
        compiled.append(torch.get_default_dtype())
        return module

    monkeypatch.setattr(torch_internals, "compiled", compile)
    monkeypatch.setattr(graphs, "_code", {})
    x = torch.arange(3)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            trace(lambda x: [x / 3], [x]).compile(x)
    finally:
        torch.set_default_dtype(before)
    assert compiled == [torch.float32, torch.float64]
