"""Graphs of tensor operations: what they repeat, what is left out of them, what they refuse."""

from __future__ import annotations

import contextlib
import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.compiler import graph as graphs
from pyro_vae.compiler.tracing import UntraceableError, trace
from tests.compiler.graphs import checked, data, equal, live, operators, scaled

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
        f"(test_graph.py, line {line}: if x.sum() > 0:)"
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

    with pytest.raises(UntraceableError, match=r"reads a number out.*\(test_graph\.py, line \d+"):
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
    assert message.startswith(f"Tensor.{name} reads numbers out of a tensor (test_graph.py, line ")


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

    with pytest.raises(UntraceableError, match=r"KeyError: 'no such thing' \(test_graph\.py"):
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


# --- compiled code is kept -------------------------------------------------------------


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
    monkeypatch.setattr(graphs, "_MAX_CODES", 2)
    for factor in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):  # the one used last is kept
        trace(scaled(data(4), factor), [data(3, 4)]).compile(data(3, 4))
    assert compilations == [4]
    assert len(graphs._code) == 2


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
