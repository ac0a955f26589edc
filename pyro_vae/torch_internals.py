"""Every private name of PyTorch that the package uses, each with what it stands for.

Private names change without notice. They stand here alone, below all other files of the package;
tests/test_torch_internals.py says of each what is gone where a version of PyTorch has changed it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.experimental import proxy_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

_aten = torch.ops.aten

Code: TypeAlias = Callable[..., Sequence[Tensor | None]]  # of a graph
# One overload of an operator, as torch.ops.aten.add.Tensor.
Operator = OpOverload
# A context whose __torch_dispatch__ sees every call of an operator, those of autograd included.
DispatchMode = TorchDispatchMode
# A context whose operators leave autograd out, though gradients may be recorded.
below_autograd = torch._C._AutoDispatchBelowAutograd
# A context whose operators are seen by no mode around it.
untraced = _disable_current_modes
# What all layers of batch normalization are, and all of dropout.
BatchNorm, Dropout = _BatchNorm, _DropoutNd

# --- operators

LINALG_CHECK: Operator = _aten._linalg_check_errors.default  # reads codes of errors on the host
PACK_SEQUENCE: Operator = _aten._pack_padded_sequence.default
PUT_UNCHECKED: Operator = _aten._index_put_impl_.default
READ_NUMBER: Operator = _aten._local_scalar_dense.default  # behind Tensor.item()
RESHAPE_ALIAS: Operator = _aten._reshape_alias.default
UNSAFE_VIEW: Operator = _aten._unsafe_view.default  # a view, though its schema does not say so
_SILENTLY_WRITTEN = {"running_mean", "running_var"}


def shares_memory(operator: Operator) -> bool:
    """Return whether a result lies in the memory of an argument, by the operator's schema."""
    return any(result.alias_info is not None for result in operator._schema.returns)


def returns_nothing(operator: Operator) -> bool:
    """Return whether an operator is called for what it does alone."""
    return not operator._schema.returns


def written_values(
    operator: Operator, args: Sequence[object], kwargs: Mapping[str, object], silently: bool = False
) -> Iterator[object]:
    """Yield the arguments of a call that the operator writes to.

    Args:
        operator: that is called.
        args: positional arguments of the call.
        kwargs: keyword arguments.
        silently: whether to yield those too of which the schema does not say that they are written
            to: the running statistics of batch normalization.
    """
    for i, argument in enumerate(operator._schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written or (silently and argument.name in _SILENTLY_WRITTEN):
            yield args[i] if i < len(args) else kwargs.get(argument.name)


def is_pure(operator: Operator) -> bool:
    """Return whether an operator neither writes to an argument nor draws random numbers."""
    if operator._schema.is_mutable or is_random(operator):
        return False
    return not any(a.name in _SILENTLY_WRITTEN for a in operator._schema.arguments)


def is_random(operator: Operator) -> bool:
    """Return whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in operator.tags


def draws_in_place(operator: Operator) -> bool:
    """Return whether an operator of random numbers writes them to its first argument."""
    alias = operator._schema.arguments[0].alias_info
    return alias is not None and alias.is_write


def schema_text(operator: Operator) -> tuple[str, str]:
    """Return an operator's arguments and results in words, as ``Tensor input`` and ``Tensor``."""
    arguments, results = str(operator._schema).partition("(")[2].split(") -> ")
    return arguments, results


def called_directly(operator: Operator) -> Callable[..., object]:
    """Return what an operator calls in C++: a layer of Python less at each call."""
    return operator._op


# --- tensors


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor's memory was written to."""
    return tensor._version


def storage_key(tensor: Tensor) -> int:
    """Return a number that two tensors share where they share memory."""
    return cast("int", tensor.untyped_storage()._cdata)


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors in nested containers."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def gradient_hooks_of(tensor: Tensor) -> list[dict[int, Callable[[Tensor], Tensor | None]]]:
    """Return a leaf's hooks on its gradient: those before it is added, and those after.

    The mappings of Tensor.register_hook and Tensor.register_post_accumulate_grad_hook, empty ones
    where there are none.
    """
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return [getattr(tensor, name, None) or {} for name in names]


def num_hooks_made() -> int:
    """Return a number that grows with every hook of a tensor or a module."""
    return RemovableHandle.next_id


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors into others, by one kernel."""
    torch._foreach_copy_(targets, sources)


def largest_magnitudes(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Return the largest magnitude in each of some tensors, by one kernel."""
    return torch._foreach_norm(tensors, math.inf)


# --- modules (those of TorchScript have mappings without get()), optimizers and distributions


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """Return the mapping in which a module holds its own parameters, by name."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """Return the mapping in which a module holds its own buffers, by name."""
    return module._buffers


def structure_of(module: nn.Module) -> list[Mapping[Any, object]]:
    """Return the mappings in which a module holds its children, and its hooks of each kind."""
    forward = [module._forward_pre_hooks, module._forward_hooks]
    return [module._modules, *forward, module._backward_pre_hooks, module._backward_hooks]


def step_hooks(optimizer: torch.optim.Optimizer) -> list[Callable[..., object]]:
    """Return the hooks on an optimizer's steps, which Python runs."""
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return [*before.values(), *after.values()]


@contextlib.contextmanager
def unchecked_samples() -> Iterator[None]:
    """Have no distribution look at the values that it scores, also those made with validation."""
    distribution: Any = torch.distributions.Distribution
    validate = distribution._validate_sample
    distribution._validate_sample = lambda self, value: None
    try:
        yield
    finally:
        distribution._validate_sample = validate


# --- tracing and compiling


def traced(function: Code, inputs: Iterable[Tensor]) -> fx.GraphModule:
    """Run a function once, and return all operators that it called as a module."""
    return proxy_tensor.make_fx(function)(*inputs)


def node_of(tensor: Tensor) -> fx.Node | None:
    """Return the node of a tensor in the trace that is under way; None for others."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None or not proxy_tensor.has_proxy_slot(tensor, mode.tracer):
        return None
    return proxy_tensor.get_proxy_slot(tensor, mode.tracer).proxy.node


def is_tracing() -> bool:
    """Return whether a trace is under way, modes that are disabled aside."""
    return proxy_tensor.get_proxy_mode() is not None


def compiled(module: fx.GraphModule, inputs: list[Tensor]) -> Code:
    """Return a module's code by TorchInductor, with PyTorch's own random numbers.

    PyTorch keeps it on disk, by the text of the module, the versions, the settings and the
    processor: what any process has compiled before is read and not compiled again.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # The code is for a number of threads, so these are part of what tells it from other code.
    options: dict[str, Any] = {"fallback_random": True, "cpp.threads": torch.get_num_threads()}
    if hasattr(config.cpp, "use_decompose_tanh"):  # a third of the time, and a rounding more
        options["cpp.use_decompose_tanh"] = True
    if "ignore_shape_env" not in inspect.signature(compile_fx).parameters:  # PyTorch before 2.7
        return cast("Code", compile_fx(module, [*inputs], config_patches=options))
    # Nothing is kept on disk without an environment of shapes, though all of them are fixed.
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
        code = compile_fx(module, [*inputs], config_patches=options, ignore_shape_env=True)
    return cast("Code", code)
