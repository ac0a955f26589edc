"""Private names of PyTorch: a test for each says what is gone where a version has changed it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from pyro_vae import torch_internals as internals

aten = torch.ops.aten


@pytest.mark.parametrize(
    "name",
    [
        "LINALG_CHECK",
        "PACK_SEQUENCE",
        "PUT_UNCHECKED",
        "READ_NUMBER",
        "RESHAPE_ALIAS",
        "UNSAFE_VIEW",
    ],
)
def test_operators(name):
    assert isinstance(getattr(internals, name), internals.Operator)


def test_what_a_schema_says():
    assert internals.shares_memory(aten.view.default)
    assert not internals.shares_memory(aten.add.Tensor)
    assert internals.returns_nothing(internals.LINALG_CHECK)
    assert internals.schema_text(aten.neg.default) == ("Tensor self", "Tensor")


def test_what_a_call_writes_to():
    x, y = torch.zeros(1), torch.ones(1)
    assert list(internals.written_values(aten.add_.Tensor, (x, y), {})) == [x]
    assert list(internals.written_values(aten.add.out, (x, y), {"out": y})) == [y]
    batch_norm = aten.native_batch_norm.default
    args = (x, None, None, x, y, True, 0.1, 1e-5)
    assert list(internals.written_values(batch_norm, args, {})) == []
    assert len(list(internals.written_values(batch_norm, args, {}, silently=True))) == 2


@pytest.mark.parametrize(
    ("operator", "pure"),
    [
        (aten.add.Tensor, True),
        (aten.add_.Tensor, False),
        (aten.rand.default, False),
        (aten.native_batch_norm.default, False),
    ],
)
def test_what_is_pure(operator, pure):
    assert internals.is_pure(operator) == pure


def test_an_operator_called_directly():
    assert internals.called_directly(aten.add.Tensor)(torch.ones(1), 1).item() == 2.0


def test_below_autograd():
    x = torch.ones(1, requires_grad=True)
    with internals.below_autograd(), torch.enable_grad():
        assert not aten.neg.default(x).requires_grad


def test_a_write_is_counted():
    x = torch.zeros(1)
    before = internals.version_of(x)
    x.add_(1)
    assert internals.version_of(x) == before + 1


def test_views_share_their_memory():
    x = torch.zeros(2)
    assert internals.storage_key(x) == internals.storage_key(x[1:])
    assert internals.storage_key(x) != internals.storage_key(x.clone())


def test_tensors_in_containers():
    x, y = torch.zeros(1), torch.ones(1)
    assert internals.tensors_in(([x, 1], {"y": (y, None)})) == [x, y]


def test_hooks_on_a_gradient():
    x = torch.zeros(1, requires_grad=True)
    assert not any(internals.gradient_hooks_of(x))
    count = internals.num_hooks_made()
    one, other = (lambda gradient: None), (lambda parameter: None)
    x.register_hook(one)
    x.register_post_accumulate_grad_hook(other)
    before, after = internals.gradient_hooks_of(x)
    assert (list(before.values()), list(after.values())) == ([one], [other])
    assert internals.num_hooks_made() > count


def test_kernels_for_many_tensors():
    x, y = torch.zeros(2), torch.tensor([3.0, -4.0])
    internals.copy_all([x], [y])
    assert x.tolist() == y.tolist()
    assert [float(n) for n in internals.largest_magnitudes([y, y / 2])] == [4.0, 2.0]
    assert math.isinf(internals.largest_magnitudes([y / 0])[0])


def test_what_a_module_holds():
    module = nn.Sequential(nn.BatchNorm1d(2))
    (norm,) = internals.structure_of(module)[0].values()
    assert norm is module[0]
    assert set(internals.parameters_of(norm)) == {"weight", "bias"}
    assert set(internals.buffers_of(norm)) == {"running_mean", "running_var", "num_batches_tracked"}
    assert isinstance(norm, internals.BatchNorm)
    assert isinstance(nn.Dropout2d(), internals.Dropout)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_hooks_of_a_module(register):
    module = nn.Linear(1, 1)
    assert not any(internals.structure_of(module))
    getattr(module, register)(lambda *args: None)
    assert sum(map(len, internals.structure_of(module))) == 1


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_of_an_optimizer(register):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert internals.step_hooks(optimizer) == []
    getattr(optimizer, register)(lambda *args: None)
    assert len(internals.step_hooks(optimizer)) == 1


def test_samples_that_are_not_checked():
    normal = torch.distributions.Normal(0.0, 1.0, validate_args=True)
    bad = torch.tensor(math.nan)
    with internals.unchecked_samples():
        assert normal.log_prob(bad).isnan()
    with pytest.raises(ValueError, match="support"):
        normal.log_prob(bad)


def test_a_trace_and_what_it_says_of_tensors():
    seen: list[object] = []

    def function(x: Tensor) -> list[Tensor]:
        y = x.exp()
        node = internals.node_of(y)
        seen.extend([internals.is_tracing(), node is not None and node.target])
        with internals.untraced():
            seen.append(internals.is_tracing())
        return [y]

    graph = internals.traced(function, [torch.ones(2)]).graph
    assert seen == [True, aten.exp.default, False]
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [aten.exp.default]
    assert not internals.is_tracing()
    assert internals.node_of(torch.ones(2)) is None


def test_every_operator_is_seen():
    class Names(internals.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func)
            return func(*args, **(kwargs or {}))

    names: list[object] = []
    x = torch.ones(2, requires_grad=True)
    with Names():
        x.exp().sum().backward()
    assert aten.exp.default in names
    assert aten.mul.Tensor in names  # of autograd


@pytest.mark.slow
def test_compiled_code():
    x = torch.arange(3.0)
    module = internals.traced(lambda x: [x.exp() + 1], [x])
    warnings.simplefilter("ignore")  # of PyTorch's own compiler
    torch.testing.assert_close(internals.compiled(module, [x])(x)[0], x.exp() + 1)


_COMPILED_TWICE = """
import torch
from torch._dynamo.utils import counters
from pyro_vae import torch_internals as internals
x = torch.arange(3.0)
module = internals.traced(lambda x: [x.exp() + torch.rand(3)], [x])
torch.manual_seed(0)
(found,) = internals.compiled(module, [x])(x)
torch.manual_seed(0)
torch.testing.assert_close(found, x.exp() + torch.rand(3))
print(*(counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss", "bypass")))
"""


@pytest.mark.slow
def test_what_a_process_has_compiled_another_one_reads(tmp_path):
    """Neither text nor settings differ in the second; threads, which the code is for, in the third.

    Where nothing may be kept, the same code is compiled.
    """

    def counts(threads: int, **variables: str) -> str:
        own = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-W", "ignore", "-c", _COMPILED_TWICE]
        variables = {**os.environ, **own, **variables}
        return subprocess.run(
            command, env=variables, check=True, text=True, capture_output=True
        ).stdout.strip()

    assert counts(1) == "0 1 0"
    assert counts(1) == "1 0 0"
    assert counts(2) == "0 1 0"
    assert counts(1, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1") == "0 0 0"
