"""Graphs of tensor operations: what they repeat, what is left out of them, what they refuse."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from pyro_vae.compiler.graph import in_place
from pyro_vae.compiler.tracing import trace
from tests.compiler.graphs import checked, data, equal, live, operators

# --- a replay is the function ----------------------------------------------------------


def test_a_replay_is_the_function_on_other_numbers():
    def function(x, y):
        return [(x @ y).tanh().sum(-1), x.exp() / (1 + y.T.abs())]

    checked(function, data(3, 4), data(4, 3), others=[(data(3, 4, seed=7), data(4, 3, seed=8))])


def test_gradients_are_part_of_it():
    """Of parameters that the function finds outside, and of what it makes itself."""
    layer = nn.Linear(4, 3).double()

    def function(x):
        loss = layer(x).tanh().square().sum()
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(leaf).exp().sum(), leaf)
        return [loss.detach(), gradient, *torch.autograd.grad(loss, list(layer.parameters()))]

    graph = checked(function, data(5, 4), others=[(data(5, 4, seed=1),)])
    assert live(graph) == [id(layer.weight), id(layer.bias)]
    # Parameters are read where they are: after an update the replay has the new values.
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5)
    x = data(5, 4, seed=2)
    equal(graph(x), function(x))
    assert not any(t.requires_grad for t in graph(x))


def test_random_numbers_are_drawn_as_before():
    def function(x):
        noise = torch.randn_like(x)
        uniform = torch.rand(3, dtype=x.dtype)
        gamma = torch._standard_gamma(x.exp())
        kept = nn.functional.dropout(x, 0.5)
        return [x + noise, uniform, gamma, kept, torch.bernoulli(x.sigmoid())]

    graph = checked(function, data(4), others=[(data(4, seed=1),)])
    one, other = graph(data(4)), graph(data(4))
    assert not torch.equal(one[0], other[0])  # no constant


def test_random_numbers_that_are_not_used_are_drawn():
    """Those after them would be others."""

    def function(x):
        torch.randn(5)
        return [x + torch.randn(3)]

    graph = checked(function, torch.zeros(3))
    assert sum(name.startswith("randn") for name in operators(graph)) == 2


def test_buffers_are_written_in_place():
    total = torch.zeros(3, dtype=torch.float64)
    count = torch.zeros((), dtype=torch.long)

    def function(x):
        total.mul_(0.9).add_(x.sum(0), alpha=0.1)
        count.add_(1)
        return [total * count]

    x = data(2, 3)
    graph = trace(function, [x])
    total.zero_(), count.zero_()
    replayed = [graph(x + i)[0] for i in range(4)]
    after, number = total.clone(), int(count)
    total.zero_(), count.zero_()
    eager = [function(x + i)[0] for i in range(4)]
    equal(replayed, eager)
    assert number == 4
    assert torch.equal(after, total)


def test_batch_norm_keeps_its_running_statistics():
    def run(replayed):
        torch.manual_seed(0)
        layer = nn.BatchNorm1d(3).double()

        def function(x):
            loss = layer(x).square().sum()
            return [loss.detach(), *torch.autograd.grad(loss, list(layer.parameters()))]

        call = trace(function, [data(4, 3)]) if replayed else function
        layer.reset_running_stats()
        found = [list(call(data(4, 3, seed=i))) for i in range(5)]
        return found, {name: value.clone() for name, value in layer.named_buffers()}

    (found, buffers), (wanted, wanted_buffers) = run(True), run(False)
    for one, other in zip(found, wanted, strict=True):
        equal(one, other)
    assert int(buffers["num_batches_tracked"]) == 5
    equal(list(buffers.values()), list(wanted_buffers.values()))


def test_a_batch_norm_that_runs_twice_on_one_batch():
    """It returns the same again, but its statistics move at each run."""
    layer = nn.BatchNorm1d(3).double()
    x = data(4, 3)
    graph = trace(lambda x: [layer(x) + layer(x)], [x])
    layer.reset_running_stats()
    graph(x)
    found = {name: value.clone() for name, value in layer.named_buffers()}
    layer.reset_running_stats()
    layer(x), layer(x)
    equal(list(found.values()), list(layer.buffers()))


def test_a_batch_norm_whose_result_is_not_used():
    layer = nn.BatchNorm1d(3).double()
    x = data(4, 3)

    def function(x):
        layer(x)
        return [x + 1]

    graph = trace(function, [x])
    layer.reset_running_stats()
    graph(x)
    found = {name: value.clone() for name, value in layer.named_buffers()}
    layer.reset_running_stats()
    layer(x)
    equal(list(found.values()), list(layer.buffers()))


def test_what_it_makes_and_writes_to_starts_anew():
    """Constants of a graph stay what they are."""

    def function(x):
        total = torch.tensor([1.0, 2.0])
        total.add_(x)
        return [total * 1]

    graph = checked(function, torch.ones(2))
    equal(graph(torch.ones(2)), [torch.tensor([2.0, 3.0])])


def test_none_stays_none():
    graph = trace(lambda x: [x + 1, None], [data(2)])
    assert graph(data(2))[1] is None


def test_a_random_state_is_left_by_the_trace_as_by_a_run():
    """The trace runs the function once."""

    def function(x):
        return [x + torch.randn_like(x)]

    torch.manual_seed(0)
    function(data(3))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    trace(function, [data(3)])
    assert torch.equal(torch.get_rng_state(), state)


def test_item_is_answered_by_the_tensor():
    """Detached: what a number is, a replay works out anew."""
    found = []

    def function(x):
        leaf = x.detach().requires_grad_()
        number = (leaf**2).sum().item()
        found.append(number)
        (gradient,) = torch.autograd.grad((leaf * number).sum(), leaf)
        return [torch.as_tensor(number), gradient]

    x, y = data(3), data(3, seed=1)
    graph = trace(function, [x])
    assert isinstance(found[0], Tensor)
    assert not found[0].requires_grad
    equal(graph(y), [(y**2).sum(), (y**2).sum().expand(3)])


def test_what_it_counts():
    """A product, and a sum: [3, 2] and scalar."""
    graph = trace(lambda x, y: [(x @ y).sum()], [data(3, 4), data(4, 2)])
    assert operators(graph) == ["mm.default", "sum.default"]
    assert graph.num_operations == 2
    assert graph.num_elements == 3 * 2 + 1
    assert graph.num_slow_elements == 0
    assert not graph.compiled
    assert not graph.uncompilable
    assert trace(lambda x: [x.tanh() + 1], [data(3, 4)]).num_slow_elements == 12


def test_what_pays():
    """Some seconds for the compiler, less for the second time, and nothing for a slow formula."""
    small = trace(lambda x: [(x + 1).exp()], [data(3)])
    assert not small.pays(100_000)
    assert small.pays(100_000, compiled_before=True)
    assert small.pays(10_000_000)
    large, slow = (
        trace(f, [data(500, 1000)]) for f in (lambda x: [(x + 1) * 2], lambda x: [(x + 1).tanh()])
    )
    assert not large.pays(10_000)
    assert slow.pays(10_000)


_REPLAYS = """
import resource, torch
from pyro_vae.compiler.tracing import trace
x = torch.ones(1_000_000)
graph = trace(lambda x: [x.exp(), x.sin(), x.cos(), x.tan()], [x])
graph(x), graph(x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    graph(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators do otherwise")
def test_freed_memory_is_kept_for_the_next_replay():
    """Its pages are not asked for anew: 4 x 977 in each of ten replays."""
    done = subprocess.run([sys.executable, "-c", _REPLAYS], check=True, capture_output=True)
    assert int(done.stdout) < 4000


# --- results own their memory ----------------------------------------------------------


def memories(tensors) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tensors]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: [x, y],
        lambda x, y: [x.T, x.reshape(-1), x[0]],
        lambda x, y: [(z := x + y), z, z.T, z[0]],
        lambda x, y: [x * 1, x / 1, x.reshape(3, 2).reshape(2, 3)],
        lambda x, y: [x.exp(), x.exp()],
        lambda x, y: list((x + y).unbind()),
        lambda x, y: [torch.ones(2), torch.ones(2), torch.tensor([2.0, 3.0])],
    ],
    ids=["inputs", "views", "twice", "by one", "merged", "parts", "constants"],
)
def test_results_own_their_memory(function):
    """No one's is an input's, another result's, or a later replay's."""
    x, y = data(2, 3), data(2, 3, seed=1)
    graph = checked(function, x, y)
    one, other = graph(x, y), graph(x, y)
    places = memories([x, y, *one, *other])
    assert len(set(places)) == len(places)
    wanted = [t.clone() for t in other]
    with torch.inference_mode():
        for tensor in one:
            tensor.fill_(-7)
    equal(graph(x, y), wanted)
    equal(other, wanted)


def test_a_buffer_is_not_handed_out():
    buffer = torch.zeros(3)

    def function(x):
        buffer.add_(x)
        return [buffer, buffer.view(3, 1)]

    graph = trace(function, [torch.ones(3)])
    buffer.zero_()
    one = graph(torch.ones(3))
    graph(torch.ones(3))
    assert torch.equal(one[0], torch.ones(3))
    assert torch.equal(one[1], torch.ones(3, 1))
    assert torch.equal(buffer, torch.full((3,), 2.0))


def test_one_tensor_met_twice_is_one_input():
    """A parameter that two modules share."""
    weight = nn.Parameter(data(3))

    def function(x):
        loss = (weight * x).sum() + (weight**2).sum()
        return list(torch.autograd.grad(loss, weight))

    graph = checked(function, data(3))
    assert live(graph) == [id(weight)]


# --- results written over what no later operation reads --------------------------------


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: [(x + 1).exp().neg()], 2),
        (lambda x: [(1 - (x + 1).tanh()) * x], 2),
        (lambda x: [x * (x + 1)], 1),  # over its second argument
        (lambda x: [x - (x + 1)], 0),
        (lambda x: [(y := x + 1).exp(), y], 0),
        (lambda x: [(y := x + 1).exp() * y], 1),
        (lambda x: [(y := x + 1) - y.T], 0),
        (lambda x: [(y := x + 1) - y], 0),
        (lambda x: [(v := (y := x + 1).T), y.exp(), v * 2], 0),
        (lambda x: [(x + 1)[0].exp()], 0),
        (lambda x: [(x + 1)[:, :1] * x], 0),
        (lambda x: [x.sum(0) + (x + 1)], 1),
        (lambda x: [torch.tensor(3.0, dtype=x.dtype).exp() * x], 0),
        (lambda x: [x.long().mul(2).div(3)], 1),
        (lambda x: [(x + 1).mul(2.0).pow(2), x.add(x + 1, alpha=3)], 1),  # which is one x + 1
    ],
)
def test_in_place(function, count):
    """Where the argument is the function's own, whole, and not looked at again."""
    x = data(3, 3)
    before = x.clone()
    graph = checked(function, x, others=[(data(3, 3, seed=1),)])
    assert torch.equal(x, before)
    assert len(in_place(graph._graph)) == count
