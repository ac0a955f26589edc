"""Recurrent encoders and decoders: however steps run, they are the same steps."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyro_vae as pv
from pyro_vae.compiler import replacements
from pyro_vae.compiler.tracing import trace
from tests.compiler.graphs import data, operators
from tests.runs import Run, replayed, same, some, warned

aten = torch.ops.aten
T, F = 5, 2
LENGTHS = [5, 2, 4, 1, 3, 5]


def sequences(num_data=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_data, T, F, generator=generator).to(dtype)


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(F, 4)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class Recurrent(nn.Module):
    """The outputs' last step and the last states, of a layer whose options are its own."""

    def __init__(self, kind, lengths=None, **options):
        super().__init__()
        self.first = options.get("batch_first", False)
        self.layer = kind(F, 4, **options)
        self.lengths = lengths

    def forward(self, x):
        given = x if self.first else x.transpose(0, 1)
        if self.lengths is not None:
            given = pack_padded_sequence(given, self.lengths, self.first, enforce_sorted=False)
        out, state = self.layer(given)
        if self.lengths is not None:
            out, _ = pad_packed_sequence(out, self.first)
        out = out[:, -1] if self.first else out[-1]
        states = state if isinstance(state, tuple) else (state,)
        return torch.cat([out, *(s[-1] for s in states)], -1)


KINDS = {
    "LSTM": lambda: Recurrent(nn.LSTM, batch_first=True),
    "LSTM, time first": lambda: Recurrent(nn.LSTM),
    "LSTM, two ways": lambda: Recurrent(nn.LSTM, batch_first=True, bidirectional=True),
    "LSTM, two layers": lambda: Recurrent(nn.LSTM, num_layers=2),
    "LSTM, two layers, two ways": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "LSTM, dropout": lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.5),
    "LSTM, no bias": lambda: Recurrent(nn.LSTM, bias=False),
    "LSTM, projected": lambda: Recurrent(nn.LSTM, proj_size=3),
    "LSTM, packed": lambda: Recurrent(nn.LSTM, LENGTHS, batch_first=True),
    "GRU": lambda: Recurrent(nn.GRU, batch_first=True),
    "GRU, two ways": lambda: Recurrent(nn.GRU, bidirectional=True, num_layers=2),
    "GRU, packed": lambda: Recurrent(nn.GRU, LENGTHS),
    "RNN": lambda: Recurrent(nn.RNN, batch_first=True),
    "RNN, rectified": lambda: Recurrent(nn.RNN, nonlinearity="relu", num_layers=2),
    "LSTMCell": lambda: Cells(nn.LSTMCell),
    "GRUCell": lambda: Cells(nn.GRUCell),
    "RNNCell": lambda: Cells(nn.RNNCell),
}


class Decoder(nn.Module):
    """z ~ Normal(0, 1) [2]; x ~ Normal(an LSTM's outputs, z being its input at all times, 1)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(2, 3, batch_first=True)
        self.out = nn.Linear(3, F)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            shape = torch.broadcast_shapes(z.shape[:-1], x.shape[:1])
            inputs = z.unsqueeze(-2).expand(*shape, T, 2).reshape(-1, T, 2)
            mean = self.out(self.layer(inputs)[0]).reshape(*shape, T, F)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(2), obs=x)


def pair(kind, dtype=torch.float32):
    def make():
        torch.manual_seed(3)
        model = Decoder().to(dtype)
        encoder = kind().to(dtype)
        return model, pv.AmortizedGuide(model, encoder, example=sequences(dtype=dtype))

    return make


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


# oneDNN has LSTM layers in float32 alone.
CASES = {f"{name}, float64": (kind, torch.float64) for name, kind in KINDS.items()}
CASES |= {
    f"{name}, float32": (kind, torch.float32)
    for name, kind in KINDS.items()
    if name.startswith("LSTM,") or name in ("LSTM", "GRU")
}


@pytest.mark.parametrize(
    "case", some(CASES, ["LSTM, two layers, two ways, float32", "LSTM, float64"])
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_replayed_is_eager(case):
    """In float64 to the last bit. In float32 Python adds up a loss in more digits than a graph."""
    kind, dtype = case
    calls = [(sequences(seed=i, dtype=dtype),) for i in range(5)]
    rtol = 0.0 if dtype == torch.float64 else 1e-5
    run = replayed(pair(kind, dtype), calls, optim=adam, rtol=rtol)
    assert run.modes == ["eager"] + ["replayed"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LSTM, two ways", "LSTM, packed", "GRU"])
def test_compiled_is_eager(kind):
    calls = [(sequences(seed=i),) for i in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own compiler
        eager, run = (Run(how, pair(KINDS[kind]), calls, optim=adam) for how in (False, True))
    assert set(run.modes[3:]) == {"compiled"}
    same(run, eager, rtol=1e-4)


def test_lengths_that_are_an_argument_run_eagerly(caplog):
    """They decide how many steps each row takes: no graph is for all of them."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(F, 4, batch_first=True)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
            return self.layer(packed)[1][0][-1]

    def make():
        torch.manual_seed(3)
        decoder = Decoder()

        def model(x, lengths):
            pyro.module("decoder", decoder)
            decoder(x)

        example = sequences(), torch.tensor(LENGTHS)
        return model, pv.AmortizedGuide(model, Packed(), example=example)

    calls = [(sequences(seed=i), torch.tensor(LENGTHS).roll(i)) for i in range(5)]
    run = replayed(make, calls, optim=adam)
    assert run.modes == ["eager"] * 5
    (message,) = warned(caplog)
    assert "the lengths of packed sequences are numbers in a tensor" in message


@pytest.mark.slow
def test_fit_bounds_and_refine():
    """As eager: of a fit, to rounding; of bounds and a refined guide, likewise."""
    x, found = sequences(8), []
    for way in (False, "replay"):
        model, guide = pair(KINDS["LSTM"])()
        history = pv.fit(
            model, guide, x, batch_size=4, epochs=60, compile=way, progress=False
        ).history
        options = {"num_particles": 300, "chunk_size": 64, "seed": 0, "compile": way}
        bound = pv.iwae_bound(model, guide, x, **options)
        refined = pv.refine(model, guide, x, max_steps=40, seed=0, compile=way)
        scores = pv.elbo(model, refined, x, num_particles=64, seed=0)
        found.append((torch.tensor(history["elbo"]), bound.value, scores.value))
    for eager, value in zip(*found, strict=True):
        torch.testing.assert_close(value, eager, rtol=1e-3, atol=1e-3)


# --- for the compiler: draws as they are


def drawn(probabilities: Tensor) -> list[Tensor]:
    return [torch.bernoulli(probabilities), torch.bernoulli(probabilities.t()) + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_draws_are_those_of_an_eager_run(dtype):
    """The compiler's own formula for torch.bernoulli gives others in float64, and on CUDA."""
    p = data(50, 20).sigmoid().to(dtype)
    module = replacements.for_compiler(trace(drawn, [p])._graph)
    torch.manual_seed(0)
    wanted = drawn(p)
    torch.manual_seed(0)
    assert all(map(torch.equal, wanted, module(p)))
    # What PyTorch would put in the operator's place is not asked for.
    assert not any(n.target is aten.bernoulli.default for n in module.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_bernoulli_draws_are_those_of_an_eager_run(dtype):
    warnings.simplefilter("ignore")  # of PyTorch's own compiler
    p = data(50, 20).sigmoid().to(dtype)
    graph = trace(drawn, [p])
    graph.compile(p)
    torch.manual_seed(0)
    wanted = drawn(p)
    torch.manual_seed(0)
    assert all(map(torch.equal, wanted, graph(p)))


# --- the formula for the compiler: the same to rounding


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
    module = replacements.for_compiler(graph._graph)
    assert operators(graph) == before  # a replay goes on as it was
    shapes = [n.args[1] for n in module.graph.nodes if n.target is aten.reshape.default]
    assert shapes == [[5, 3, factors, size // factors]] * 2
    (found,) = module(logits, x)
    torch.testing.assert_close(found, *log_bernoulli(logits, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_product_is_finite(dtype):
    """All factors are two where all logits are zero: 2**64 is far below float32's largest."""
    logits, x = torch.zeros(2, 64 * 16, dtype=dtype), torch.ones(2, 64 * 16, dtype=dtype)
    module = replacements.for_compiler(trace(log_bernoulli, [logits, x])._graph)
    (found,) = module(logits, x)
    torch.testing.assert_close(found, *log_bernoulli(logits, x))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 17), torch.float32), ((3, 16), torch.float32), ((3, 784), torch.bfloat16)],
)
def test_sums_that_stay_as_they_are(shape, dtype):
    """Without a divisor, too short for it, or in numbers whose products overflow."""
    logits, x = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    module = replacements.for_compiler(trace(log_bernoulli, [logits, x])._graph)
    assert not any(n.target is aten.log.default for n in module.graph.nodes)
