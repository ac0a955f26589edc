"""The formula for the compiler: the same to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pyro_vae.compiler import formulas as graph_formulas
from pyro_vae.compiler.tracing import trace
from tests.compiler.graphs import aten, data, operators


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
