"""Graphs of tensor operations: what they repeat, what is left out of them, what they refuse."""

from __future__ import annotations

import contextlib
import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from pyro_vae.compiler import formulas as graph_formulas
from pyro_vae.compiler import graph as graphs
from pyro_vae.compiler import nodes as graph_nodes
from pyro_vae.compiler import simplify as graph_simplification
from pyro_vae.compiler.graph import UntraceableError, trace
from pyro_vae.recording import is_recording

aten = torch.ops.aten


def data(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def operators(graph: graphs.Graph) -> list[str]:
    """The operators that a replay calls, in their order, without the namespace."""
    return [
        str(node.target).removeprefix("aten.")
        for node in graph._graph.nodes
        if node.op == "call_function"
    ]


def live(graph: graphs.Graph) -> list[int]:
    return [id(tensor) for tensor in graph._live]


def equal(found, wanted) -> None:
    """To the last bit."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if other is None:
            assert one is None
            continue
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)


def checked(function, *inputs: Tensor, others=()) -> graphs.Graph:
    """Trace a function, and compare replays with it on its inputs and on others."""
    graph = trace(function, inputs)
    for given in (inputs, *others):
        torch.manual_seed(3)
        wanted = [None if t is None else t.clone() for t in function(*given)]
        state = torch.get_rng_state()
        torch.manual_seed(3)
        found = graph(*given)
        assert torch.equal(torch.get_rng_state(), state)
        equal(found, wanted)
        equal(found, wanted)
    return graph


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
    assert small.pays(100_000, again=True)
    assert small.pays(10_000_000)
    large, slow = (
        trace(f, [data(500, 1000)]) for f in (lambda x: [(x + 1) * 2], lambda x: [(x + 1).tanh()])
    )
    assert not large.pays(10_000)
    assert slow.pays(10_000)


# --- what is left out ------------------------------------------------------------------


def test_constants_are_folded():
    def function(x):
        return [x * (torch.ones(3, dtype=x.dtype) * 2 + 1).exp()]

    assert operators(checked(function, data(3))) == ["mul.Tensor"]


def test_constants_of_python_are_folded():
    def function(x):
        return [x + torch.tensor([1.0, 2.0]).square()]

    assert operators(checked(function, torch.zeros(2))) == ["add.Tensor"]


def test_what_takes_only_a_shape_is_folded():
    def function(x):
        return [x + torch.ones_like(x).cumsum(0) + x.new_zeros(3).exp()]

    assert operators(checked(function, data(3))) == ["add.Tensor", "add.Tensor"]


def test_random_numbers_are_not_folded():
    def function(x):
        return [x + torch.rand(3).to(x) + torch.randn_like(torch.ones(3)).to(x)]

    names = operators(checked(function, data(3)))
    assert sum(name.startswith("rand") for name in names) == 2


def test_what_is_written_to_is_not_folded():
    """A folded constant would keep what the replay before left in it."""

    def function(x):
        total = torch.zeros(3, dtype=x.dtype)
        total.add_(x)
        total[:1].mul_(2)
        return [total * 1.5]

    graph = checked(function, data(3), others=[(data(3, seed=1),)])
    assert any(name.startswith("zeros") for name in operators(graph))


def test_large_constants_are_not_kept():
    """2**20 numbers are worked out ahead, and no more."""

    def of(size):
        return lambda x: [x + torch.zeros(size).sum()]

    assert operators(checked(of(2**20), torch.zeros(1))) == ["add.Tensor"]
    assert "zeros.default" in operators(checked(of(2**20 + 1), torch.zeros(1)))


def test_views_that_change_nothing_are_dropped():
    def function(x):
        return [x.reshape(2, 6).reshape(3, 4).unsqueeze(0).squeeze(0).expand(3, 4).T.T.exp()]

    assert operators(checked(function, data(3, 4))) == ["exp.default"]


def test_views_that_change_something_are_kept():
    x = data(3, 4)
    assert "permute.default" in operators(checked(lambda x: [x.T.exp() @ x], x))
    assert "view.default" in operators(checked(lambda x: [x.reshape(4, 3) @ x], x))
    # Of one shape, but another order in memory.
    square = data(3, 3)
    assert "permute.default" in operators(checked(lambda x: [x.T.exp()], square))


def test_a_view_that_comes_back_to_its_shape_at_another_place():
    """Column 1 of a column, then of a row: the same shape and strides, other numbers."""

    def function(x):
        pair = x.as_strided((2, 2), (2, 1))  # x[:4]
        return [pair[0].exp(), pair[1].exp()]

    checked(function, data(6), others=[(data(6, seed=1),)])

    def narrowed(x):
        first = x.narrow(0, 0, 2)
        return [first.exp(), x.narrow(0, 1, 2).exp(), x.narrow(0, 1, 3).narrow(0, 1, 2).exp()]

    checked(narrowed, data(4), others=[(data(4, seed=1),)])

    def by_stride(x):
        """From x[1:3] by way of all numbers to x[0:2]."""
        middle = x[1:3]
        return [middle.exp(), middle.as_strided((2,), (1,), 0).exp()]

    checked(by_stride, data(4), others=[(data(4, seed=1),)])


def test_a_conjugate_is_a_view_that_changes_numbers():
    """Lazily: of the same shape and strides, and the same memory."""

    def function(x):
        return [x.conj() * 2, x.conj().imag * 2]

    x = torch.complex(data(3), data(3, seed=1))
    equal(trace(function, [x])(x), function(x))


def test_a_column_of_one_row_is_no_row():
    """[4] -> [4, 1] -> [1] -> ...: chains that lose numbers on the way back to a shape."""

    def function(x):
        return [x[2:3].exp(), x[2:3].expand(4).exp(), x.flip(0)[:3][1:3].expand(2).exp()]

    checked(function, data(4), others=[(data(4, seed=1),)])


def test_multiplication_and_division_by_one_are_left_out():
    def function(x):
        one = torch.ones(3, dtype=x.dtype)
        return [(((x * 1.0) * one) / 1 * 1).exp(), (one * x).tanh()]

    assert operators(checked(function, data(3))) == ["exp.default", "tanh.default"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [1 / x],
        lambda x: [torch.ones(3, dtype=x.dtype) / x],
        lambda x: [x * torch.tensor([1.0, 1.0, 2.0], dtype=x.dtype)],
        lambda x: [x * torch.ones(2, 3, dtype=x.dtype)],
        lambda x: [x * torch.ones(2, 1, dtype=x.dtype)],
        lambda x: [x.to(torch.float32) * torch.ones(3, dtype=torch.float64)],
        lambda x: [x.long() / 1],
        lambda x: [torch.div(x, 1, rounding_mode="floor")],
    ],
    ids=["1 / x", "ones / x", "not all one", "wider", "wider, of one", "type", "long", "floor"],
)
def test_where_a_one_is_none(function):
    """Reciprocals; ones that make the result wider, or of another type."""
    names = operators(checked(function, data(3) * 3, others=[(data(3, seed=1) * 3,)]))
    assert any(name.startswith(("mul", "div", "reciprocal")) for name in names)


def test_a_product_with_one_that_is_written_to_is_kept():
    """Its memory is its own: what it was made of stays what it was."""

    def function(x):
        y = x.exp()
        z = y * 1.0
        z.add_(5)
        return [y + 0, z]

    graph = checked(function, data(3))
    assert "mul.Tensor" in operators(graph)

    def other(x):
        y = x.exp()
        z = y * 1.0
        y.add_(5)
        return [y, z]

    assert "mul.Tensor" in operators(checked(other, data(3)))


def test_a_product_of_a_buffer_with_one_is_a_copy():
    """Of what the buffer held before it was written to."""
    buffer = data(3)

    def function(x):
        before = buffer * 1.0
        buffer.add_(x)
        return [before, buffer - x]

    x = data(3, seed=1)
    graph = trace(function, [x])
    start = buffer.clone()
    found = graph(x)
    assert torch.equal(found[0], start)
    assert torch.equal(buffer, start + x)


def test_equal_operations_are_done_once():
    def function(x):
        return [x.exp().sum() + x.exp().max(), x.T.exp().sum(0), x.T.exp().sum(0) * 2]

    names = operators(checked(function, data(3, 4)))
    assert names.count("exp.default") == 2
    assert names.count("permute.default") == 1
    assert names.count("sum.dim_IntList") == 1


def test_operations_with_other_numbers_are_not_equal():
    """Also where Python takes them for one: 1, 1.0 and True."""

    def function(x):
        return [x + 1, x + 1.0, x + True, x.sum(0), x.sum(1), x.sum(0, keepdim=True)]

    checked(function, torch.arange(9).reshape(3, 3))
    checked(lambda x: [x - 0.0, x * -0.0, x * 0.0], data(3))
    checked(lambda x: [x.sum(0, dtype=torch.float32), x.sum(0)], data(3, 3))


def test_signs_of_zero_are_told_apart():
    """0.0 == -0.0 in Python; x * 0.0 and x * -0.0 have other signs."""

    def function(x):
        return [1 / (x * 0.0), 1 / (x * -0.0)]

    found = trace(function, [torch.ones(2)])(torch.ones(2))
    assert torch.equal(found[0], torch.full((2,), torch.inf))
    assert torch.equal(found[1], torch.full((2,), -torch.inf))


RANDOM = {
    "randn_like": torch.randn_like,
    "rand": lambda x: torch.rand(3),
    "randint": lambda x: torch.randint(1000, (9,)),
    "randperm": lambda x: torch.randperm(20),
    "normal": lambda x: torch.normal(x, 1.0),
    "normal of tensors": lambda x: torch.normal(x, x),
    "normal_": lambda x: torch.empty(3).normal_(),
    "exponential_": lambda x: torch.empty(3).exponential_(),
    "gamma": torch._standard_gamma,
    "Dirichlet": torch._sample_dirichlet,
    "Poisson": lambda x: torch.poisson(100 * x),
    "binomial": lambda x: torch.binomial(torch.full_like(x, 500.0), torch.full_like(x, 0.5)),
    "multinomial": lambda x: torch.multinomial(x, 6),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "rrelu": lambda x: nn.functional.rrelu(-x, training=True),
}


@pytest.mark.parametrize("draw", RANDOM.values(), ids=RANDOM)
def test_random_numbers_are_not_merged(draw):
    x = data(12).abs() + 0.1
    one, other = checked(lambda x: [draw(x), draw(x)], x)(x)
    assert not torch.equal(one, other)


def test_what_is_written_to_is_not_merged():
    """Equal before the writing; and equal operations on what has changed between them."""

    def function(x):
        one, other = x + 1, x + 1
        one.mul_(3)
        before = one.exp()
        one.add_(1)
        return [one, other, before, one.exp()]

    checked(function, data(3), others=[(data(3, seed=1),)])


def test_reads_of_a_buffer_between_its_writings_are_not_merged():
    buffer = torch.zeros(3, dtype=torch.float64)

    def function(x):
        first = buffer.view(3, 1).exp()
        buffer.add_(x)
        second = buffer.view(3, 1).exp()
        return [first, second]

    graph = trace(function, [data(3)])
    buffer.zero_()
    first, second = graph(data(3))
    assert torch.equal(first, torch.ones(3, 1, dtype=torch.float64))
    assert torch.equal(second, data(3).exp().unsqueeze(1))


def test_writing_through_a_view():
    def function(x):
        y = x.exp()
        z = x.exp()
        y[0].fill_(0)
        y.view(-1)[-1:].mul_(2)
        left, right = z.split(1)
        right.add_(1)
        return [y * 1, z * 1, left * 1, x.exp()]

    checked(function, data(2, 3), others=[(data(2, 3, seed=1),)])


def test_the_gradient_of_a_single_row_is_a_view():
    """select_backward of a dimension of size one fills nothing with zeros."""

    def of(size):
        def function(x):
            leaf = x.detach().requires_grad_()
            return list(torch.autograd.grad(leaf[0].exp().sum() + leaf[-1].sin().sum(), leaf))

        return checked(function, data(size, 3), others=[(data(size, 3, seed=1),)])

    assert not any(name.startswith("select_backward") for name in operators(of(1)))
    assert sum(name.startswith("select_backward") for name in operators(of(3))) == 2
    assert "stack.default" in operators(of(2))  # of the two rows' gradients


def test_the_gradient_of_a_single_column():
    """Along other dimensions, negative ones too."""

    def function(x):
        leaf = x.detach().requires_grad_()
        loss = leaf.select(-1, 0).exp().sum() + leaf.select(2, -1).sum()
        return list(torch.autograd.grad(loss, leaf))

    names = operators(checked(function, data(2, 3, 1), others=[(data(2, 3, 1, seed=1),)]))
    assert not any(name.startswith("select_backward") for name in names)


def sum_then_written(x):
    b = x + 0.5
    total = b.sum(0, keepdim=True)
    b.add_(1)
    return [total.view(-1), b]


def stacked_then_written(x):
    a, b = x[0, 0] + 1, x[0, 1] + 1
    stacked = torch.stack([a, b])
    a.add_(5)
    return [stacked.sum(), a]


def gradients_then_written(x):
    left, right = x[0] + 1, x[1] + 1
    sizes = [2, x.shape[1]]
    first = torch.ops.aten.select_backward(left, sizes, 0, 0)
    second = torch.ops.aten.select_backward(right, sizes, 0, 1)
    left.add_(5)
    return [first + second, left]


def row_then_written(x):
    g = x[0] + 1
    row = torch.ops.aten.select_backward(g, [1, x.shape[1]], 0, 0)
    g.mul_(2)
    return [row, g]


def row_written(x):
    g = x[0] + 1
    row = torch.ops.aten.select_backward(g, [1, x.shape[1]], 0, 0)
    row.mul_(2)
    return [row, g]


@pytest.mark.parametrize(
    "function",
    [
        sum_then_written,
        stacked_then_written,
        gradients_then_written,
        row_then_written,
        row_written,
    ],
)
def test_what_stands_for_several_operations_sees_no_later_write(function):
    checked(function, data(2, 3), others=[(data(2, 3, seed=1),)])


def test_the_gradient_of_a_single_row_that_is_transposed():
    """It lies in memory as rows do; a view of the transposed would not."""

    def function(w):
        leaf = w.detach().requires_grad_()
        factors = torch.arange(24.0, dtype=w.dtype).view(6, 4)
        (gradient,) = torch.autograd.grad((leaf[0] * factors.t()).sum(), leaf)
        return [gradient.view(-1), gradient]

    graph = checked(function, data(1, 4, 6), others=[(data(1, 4, 6, seed=1),)])
    assert graph(data(1, 4, 6))[1].is_contiguous()


@pytest.mark.parametrize("dim", [0, 1])
def test_the_sum_of_negatives_with_gaps_between_them(dim):
    """To the last bit: what neg gives has no gaps, and is summed in another order."""
    x = torch.randn(50, 3001, generator=torch.Generator().manual_seed(0))
    checked(lambda x: [(-x[:, ::2]).sum(dim)], x)


def test_code_for_another_default_dtype_is_not_found(monkeypatch):
    """Of integers, a quotient has the default dtype, which no operation names."""
    import torch._inductor as inductor

    compiled = []

    def compile(module, arguments, options):
        compiled.append(torch.get_default_dtype())
        return module

    monkeypatch.setattr(inductor, "compile", compile)
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


def test_what_is_not_used_is_left_out():
    def function(x):
        x.exp().sum()
        return [x.sin()]

    assert operators(checked(function, data(3))) == ["sin.default"]


def test_a_writing_is_never_left_out():
    buffer = torch.zeros(3)

    def function(x):
        buffer.copy_(x)
        return [x.sin()]

    x = torch.arange(3.0)
    trace(function, [x])(x + 1)
    assert torch.equal(buffer, x + 1)


def test_the_rules_leave_a_graph_that_is_simple():
    """A second pass finds nothing more to leave out."""
    layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))

    def function(x):
        loss = layer(x).square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(layer.parameters()))]

    graph = trace(function, [torch.randn(5, 3)])
    before = operators(graph)
    graph_simplification.simplify(graph._graph)
    assert [n for n in operators(graph) if n != "clone.default"] == [
        n for n in before if n != "clone.default"
    ]


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


# --- refusals --------------------------------------------------------------------------


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
        f"(test_graphs.py, line {line}: if x.sum() > 0:)"
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

    with pytest.raises(UntraceableError, match=r"reads a number out.*\(test_graphs\.py, line \d+"):
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
    assert message.startswith(f"Tensor.{name} reads numbers out of a tensor (test_graphs.py, line ")


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

    with pytest.raises(UntraceableError, match=r"KeyError: 'no such thing' \(test_graphs\.py"):
        trace(function, [data(3)])


# --- compiled --------------------------------------------------------------------------


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


# --- one operation in the place of several ---------------------------------------------


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda x: [x.sum(0).sum().unsqueeze(-1).sum()], ["sum.dim_IntList", "sum.default"]),
        (lambda x: [torch.stack([x.sum()]).sum()], ["sum.default"]),
        (lambda x: [torch.stack([x.sum(), x[0, 0]]).sum()], ["sum.default", "add.Tensor"]),
        (lambda x: [x.sum(0, keepdim=True).view(4)], ["sum.dim_IntList"]),
        (lambda x: [x.sum(-1, keepdim=True).view(3)], ["sum.dim_IntList"]),
        (lambda x: [x.exp().pow(1.0)], ["exp.default"]),
        (lambda x: [x.exp() - torch.zeros(3, 4, dtype=x.dtype)], ["exp.default"]),
        (lambda x: [(-x).sum()], ["neg.default", "sum.default"]),
        (lambda x: [(-x).sum(-1)], ["sum.dim_IntList", "neg.default"]),
    ],
)
def test_shorter(function, wanted):
    """And the same to the last bit."""
    graph = checked(function, data(3, 4), others=[(data(3, 4, seed=1),)])
    views = {"select.int", "view.default", "unsqueeze.default"}
    assert [name for name in operators(graph) if name not in views] == wanted


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [torch.stack([x[0, 0], x[0, 1], x[1, 0]]).sum()],
        lambda x: [torch.stack([x[0], x[1]]).sum()],
        lambda x: [s := x.sum(0, keepdim=True), s.view(4)],
        lambda x: [x.sum(0, keepdim=True).view(2, 2)],
        lambda x: [x.sum(keepdim=True, dim=(0, 1)).view(1)],
        lambda x: [x.exp() - torch.full((3, 4), -0.0, dtype=x.dtype)],
        lambda x: [(x > 0).sum().unsqueeze(0).sum(), x.float().sum(dtype=torch.float64)],
        lambda x: [x[0, 0].float().unsqueeze(0).sum(dtype=torch.float64)],
        lambda x: [torch.stack([x, x]).sum(0), torch.stack([x], 1), torch.stack([x], -1)],
    ],
)
def test_what_only_looks_like_it(function):
    checked(function, data(3, 4), others=[(data(3, 4, seed=1),)])


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: [x.sum(0, keepdim=True, dtype=torch.float64).view(-1)], data(3, 4).float()),
        (lambda x: [x.sum(0, keepdim=True, dtype=torch.int32).view(-1)], torch.ones(3, 4).long()),
        (lambda x: [torch.stack([x > 0, x > -1]).sum()], torch.tensor(1.0)),
        (
            lambda x: [torch.stack([x + 1, x + 2]).sum(0)],
            torch.tensor(2**31 - 3, dtype=torch.int32),
        ),
        (lambda x: [x.neg().sum(0)], torch.tensor([1, 2], dtype=torch.uint8)),
        (lambda x: [torch.stack([x.t()]).view(-1)], data(3, 4)),
        (lambda x: [torch.stack([x.t().exp()]).view(1, 12)], data(3, 4)),
        (lambda x: [x.sum(dim=None, keepdim=True).view(())], data(3, 4)),
        (lambda x: [x - torch.zeros(2, dtype=x.dtype)], torch.ones(2, dtype=torch.complex64)),
        (lambda x: [(torch.tensor(1 / 3) * x.exp())], torch.tensor([1.1, 0.3]).half()),
        (lambda x: [x * (x + 1).exp()], torch.tensor([0.3 + 2j, 1.7 - 0.1j] * 9)),
        (lambda x: [x.exp() * x[:, :1].expand(7, 3).sigmoid()], data(7, 3).float()),
    ],
)
def test_other_dtypes_and_layouts(function, x):
    """Rules that hold for float32 and float64 alone are left to these."""
    checked(function, x)


def test_gradients_by_columns_are_stacked():
    """Of either order, and of columns counted from the end."""
    for left, right in ((0, 1), (1, 0), (-1, 0), (0, -1), (1, -2)):

        def function(x, left=left, right=right):
            leaf = x.detach().requires_grad_()
            a, b = leaf.select(-1, left).exp(), leaf.select(-1, right).sin()
            return list(torch.autograd.grad((a + 2 * b).sum(), leaf))

        assert "stack.default" in operators(checked(function, data(3, 2)))

    def both_of_one(x):
        leaf = x.detach().requires_grad_()
        a, b = leaf.select(-1, 1).exp(), leaf.select(-1, -1).sin()
        return list(torch.autograd.grad((a + 2 * b).sum(), leaf))

    assert "stack.default" not in operators(checked(both_of_one, data(3, 2)))


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (lambda v, x: [x.exp() * -v], [3]),
        (lambda v, x: [x.exp() * v.log()], [12]),  # of which not all are rounded alike
        (lambda v, x: [x.exp() / (n := -v) + n], [3]),
        (lambda v, x: [-v], [12]),  # it is handed out
        (lambda v, x: [(-v).view(2, 6)], [12]),
        (lambda v, x: [-v * v], [12]),  # nothing here is whole
        (lambda v, x: [(n := -v) * n], [12]),
        (lambda v, x: [(-v).add_(x)], [12]),
    ],
)
def test_what_is_repeated_is_worked_out_once(function, sizes):
    def expanded(w, x):
        return function(w.unsqueeze(1).expand(3, 4), x)

    w = data(3).abs()
    graph = checked(expanded, w, data(3, 4), others=[(w + 1, data(3, 4, seed=1))])
    unary = [n for n in graph._graph.nodes if n.target in (aten.neg.default, aten.log.default)]
    assert [n.meta["val"].numel() for n in unary] == sizes


# --- results written over what nobody needs --------------------------------------------


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
    assert len(graph_simplification.in_place(graph._graph)) == count


# --- formulas for the compiler ---------------------------------------------------------


def log_bernoulli(logits: Tensor, x: Tensor) -> list[Tensor]:
    """As Pyro's Bernoulli(logits=...).to_event(1) makes it: [..., D] to [...]."""
    loss = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return [(-loss).sum(-1)]


@pytest.mark.parametrize(("size", "factors"), [(784, 49), (64, 4), (96, 6), (120, 5), (34, 2)])
def test_a_bernoulli_sum_by_products(size, factors):
    """Few logarithms, and the same number: near zero, and far out where a factor is one or two."""
    logits = data(5, 3, size) * torch.logspace(-3, 4, 5, dtype=torch.float64)[:, None, None]
    x = (data(5, 3, size, seed=1) > 0).double()
    graph = trace(log_bernoulli, [logits, x])
    before = operators(graph)
    module = graph_formulas.for_compiler(graph._graph)
    assert operators(graph) == before  # a replay goes on as it was
    shapes = [n.args[1] for n in module.graph.nodes if n.target is aten.reshape.default]
    assert shapes == [[5, 3, factors, size // factors]] * 2
    (found,) = module(logits, x)
    torch.testing.assert_close(found, *log_bernoulli(logits, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_product_is_finite(dtype):
    """All factors are two where all logits are zero: 2**64 is far below float32's largest."""
    logits, x = torch.zeros(2, 64 * 16, dtype=dtype), torch.ones(2, 64 * 16, dtype=dtype)
    module = graph_formulas.for_compiler(trace(log_bernoulli, [logits, x])._graph)
    (found,) = module(logits, x)
    torch.testing.assert_close(found, *log_bernoulli(logits, x))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 17), torch.float32), ((3, 16), torch.float32), ((3, 784), torch.bfloat16)],
)
def test_sums_that_stay_as_they_are(shape, dtype):
    """Without a divisor, too short for it, or in numbers whose products overflow."""
    logits, x = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    module = graph_formulas.for_compiler(trace(log_bernoulli, [logits, x])._graph)
    assert not any(n.target is aten.log.default for n in module.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_is_added_where_the_product_is_used(dtype):
    """And its gradient is what it was."""
    layer = nn.Linear(3, 5).to(dtype)

    def function(x):
        loss = layer(x).tanh().sum()
        return [loss, *torch.autograd.grad(loss, list(layer.parameters()))]

    x = data(7, 3).to(dtype)
    module = graph_formulas.for_compiler(trace(function, [x])._graph)
    targets = [node.target for node in module.graph.nodes]
    assert aten.addmm.default not in targets
    product = targets.index(aten.mm.default)
    assert targets[product + 1] is aten.add.Tensor
    parameters = list(trace(function, [x])._live)
    torch.testing.assert_close(list(module(*parameters, x)), [t.detach() for t in function(x)])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [torch.addmm(torch.ones(4, 4, dtype=x.dtype), x, x)],  # no bias but a matrix
        lambda x: [torch.addmm(torch.ones(4, dtype=x.dtype), x, x, alpha=2)],
        lambda x: [torch.addmm(torch.ones(4).bfloat16(), x.bfloat16(), x.bfloat16())],
    ],
)
def test_products_that_stay_as_they_are(function):
    x = data(4, 4)
    module = graph_formulas.for_compiler(trace(function, [x])._graph)
    assert any(node.target is aten.addmm.default for node in module.graph.nodes)
    torch.testing.assert_close(module(x)[0], function(x)[0])


# --- compiled code is kept -------------------------------------------------------------


def scaled(parameter: Tensor, factor: float):
    def function(x: Tensor) -> list[Tensor]:
        return [(x * parameter).sum() * factor + torch.tensor(factor, dtype=x.dtype)]

    return function


def test_equal_graphs_have_one_text():
    """The same operations on other tensors of the same kind."""
    one, other = (trace(scaled(data(4, seed=i), 2.0), [data(3, 4)]) for i in (1, 2))
    assert graph_nodes.text_of(one._graph) == graph_nodes.text_of(other._graph)


@pytest.mark.parametrize(
    "function",
    [
        scaled(data(4, seed=1), 3.0),
        lambda x: [(x * x).sum() * 2.0 + torch.tensor(2.0, dtype=x.dtype)],
        lambda x: [x.sum() * 2.0 + torch.tensor(2.0, dtype=x.dtype)],
    ],
)
def test_other_graphs_have_another_text(function):
    wanted = graph_nodes.text_of(trace(scaled(data(4, seed=1), 2.0), [data(3, 4)])._graph)
    assert graph_nodes.text_of(trace(function, [data(3, 4)])._graph) != wanted


def test_what_differs_in_a_constant_alone():
    def added(numbers: list[float]):
        return lambda x: [x + torch.tensor(numbers, dtype=x.dtype)]

    one, other = (trace(added([1.0, last]), [data(2)]) for last in (0.0, -0.0))
    assert graph_nodes.text_of(one._graph) != graph_nodes.text_of(other._graph)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.bfloat16])
def test_constants_of_any_layout_have_a_text(shape, dtype):
    for value in (0, 1):
        constant = torch.full((), value, dtype=dtype).expand(shape)
        one, other = fx.Graph(), fx.Graph()
        for graph, number in ((one, constant), (other, constant.clone())):
            graph.get_attr("constant").meta["constant"] = number
        same = constant.stride() == constant.clone().stride()
        assert (graph_nodes.text_of(one) == graph_nodes.text_of(other)) == same


@pytest.fixture
def compilations(monkeypatch) -> list[int]:
    """The number of graphs that went to the compiler, in a list of one; none is compiled."""
    import torch._inductor as inductor

    count = [0]

    def compile(module, arguments, **options):
        count[0] += 1
        return module

    monkeypatch.setattr(inductor, "compile", compile)
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
    monkeypatch.setattr(graphs, "_CODES", 2)
    for factor in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):  # the one used last is kept
        trace(scaled(data(4), factor), [data(3, 4)]).compile(data(3, 4))
    assert compilations == [4]
    assert len(graphs._code) == 2
