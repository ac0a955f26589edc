"""Laws of a loss, on a linear Gaussian pair of which everything is known."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast

import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.programs.types import Program
from pyro_vae.testing.laws import Checked, Laws, check, close, require

__all__ = ["check_loss"]

_N, _NOISE, _SCALE = 6, 0.7, 3.0
_REPEATS, _ERRORS = 200, 4.5  # standard errors that a mean of losses may be off
_SEEDS, _STEPS, _GAIN = 60, 12, 0.1


def check_loss(
    loss: pyro.infer.ELBO, expected_failures: Mapping[str, str] | None = None
) -> Checked:
    """Check that a loss is minus a lower bound on log p(x), and that its gradient is its own.

    On z ~ N(0, 1), x ~ N(z + mu, 0.7) with six data in float64: the values of ``loss``,
    ``differentiable_loss`` and ``loss_and_grads`` are one under one seed, and so are their
    gradients; a gradient reaches every parameter of model and guide; with the exact posterior as
    guide the loss is -log p(x), with another no less; its gradient is right in the mean, but for
    noise; a scale multiplies it; values that a mask leaves out do not change it; steps lower it.
    Some good losses follow another gradient on purpose (wake-sleep's of the guide): name the law in
    ``expected_failures``, and why.

    Args:
        loss: a :class:`pyro.infer.ELBO`, ours or your own.
        expected_failures: name of a law to why it cannot hold. It is an error if it holds.

    Returns:
        Which laws hold.

    Raises:
        LawError: with the name of each broken law and what was found.
        ValueError: for an expected failure of no law.

    Example:
        >>> import pyro_vae as pv
        >>> len(pv.testing.check_loss(pv.IWAE(5)).kept)
        7
    """
    return check(loss, laws_of(cast("_Loss", loss)), expected_failures)


def laws_of(loss: _Loss) -> Laws:
    """Return the laws of a loss."""
    laws: dict[str, Callable[[_Loss], None]] = {
        "values and gradients agree, and reach every parameter": _agrees,
        "at the exact posterior the loss is minus log p(x)": _exact,
        "elsewhere it is no less": _above,
        "the gradient is that of the loss in the mean": _gradient_of_mean,
        "a scale multiplies the loss": _scaled,
        "values that a mask leaves out do not matter": _masked,
        "steps lower the loss": _lowered,
    }
    return {name: partial(law, loss) for name, law in laws.items()}


class _Loss(Protocol):
    """What training asks of a loss; Pyro's base class does not say it."""

    def loss(self, model: Program, guide: Program, *args: Any) -> float: ...

    def differentiable_loss(self, model: Program, guide: Program, *args: Any) -> Tensor: ...

    def loss_and_grads(self, model: Program, guide: Program, *args: Any) -> float: ...


class _Model(nn.Module):
    """z ~ N(0, 1), x ~ N(z + mu, 0.7); data that are not seen are masked with their latents."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.mu = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def forward(self, x: Tensor, seen: Tensor) -> None:
        pyro.module("model", self)
        with _context(x, seen, self.scale):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + self.mu, _NOISE), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        return dist.Normal(self.mu.detach(), (1 + _NOISE**2) ** 0.5).log_prob(x)


class _Guide(nn.Module):
    """z ~ N(slope x + intercept, s): the exact posterior, or another."""

    def __init__(self, model: _Model, *, exact: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        slope = 1 / (1 + _NOISE**2)
        numbers = (slope, -slope * float(model.mu.detach()), math.log(_NOISE * slope**0.5))
        if not exact:
            numbers = (0.3, 1.0, -0.3)
        self.numbers = nn.Parameter(torch.tensor(numbers, dtype=torch.float64))

    def forward(self, x: Tensor, seen: Tensor) -> None:
        pyro.module("guide", self)
        slope, intercept, log_scale = self.numbers
        with _context(x, seen, self.scale):
            pyro.sample("z", dist.Normal(slope * x + intercept, log_scale.exp()))


@contextlib.contextmanager
def _context(x: Tensor, seen: Tensor, scale: float) -> Iterator[None]:
    masked = poutine.mask(mask=cast("torch.BoolTensor", seen))
    with pyro.plate("data", len(x)), poutine.scale(scale=scale), masked:
        yield


def _pair(
    *, exact: bool = False, scale: float = 1.0
) -> tuple[_Model, _Guide, tuple[Tensor, Tensor]]:
    pyro.clear_param_store()  # the store is this law's own
    model = _Model(scale)
    x = torch.linspace(-1.5, 2.0, _N, dtype=torch.float64)
    seen = torch.ones(_N, dtype=torch.bool)
    return model, _Guide(model, exact=exact, scale=scale), (x, seen)


def loss_agrees(
    loss: _Loss, model: Program, guide: Program, batch: Sequence[Any], trained: Sequence[Tensor]
) -> None:
    """Raise LawError where a loss and its gradients are not one, under one seed.

    Args:
        loss: the loss.
        model: a Pyro model.
        guide: its guide.
        batch: their arguments.
        trained: all parameters, in any order.
    """
    before = [parameter.detach().clone() for parameter in trained]
    torch.manual_seed(1)
    alone = loss.loss(model, guide, *batch)
    had = [p.grad for p in trained if p.grad is not None]
    require(not had, "loss() leaves gradients")
    torch.manual_seed(1)
    differentiable = loss.differentiable_loss(model, guide, *batch)
    shape = tuple(differentiable.shape)
    require(shape == (), f"differentiable_loss has shape {shape}, expected ()")
    value = float(differentiable.detach())
    require(math.isfinite(value), f"the loss is {value}")
    equal = partial(math.isclose, value, rel_tol=1e-9, abs_tol=1e-9)
    require(equal(alone), f"loss gives {alone}, differentiable_loss {value}")
    wanted = torch.autograd.grad(differentiable, list(trained), allow_unused=True)
    unused = sum(part is None or not bool((part != 0).any()) for part in wanted)
    require(not unused, f"no gradient reaches {unused} of {len(wanted)} parameters")
    torch.manual_seed(1)
    again = loss.loss_and_grads(model, guide, *batch)
    require(equal(again), f"loss_and_grads gives {again}, loss {value}")
    for parameter, gradient in zip(trained, wanted, strict=True):
        require(bool(gradient.isfinite().all()), "a gradient is not finite")
        found = parameter.grad
        require(found is not None, "loss_and_grads leaves no gradient")
        close(torch.as_tensor(found), gradient, "gradient of loss_and_grads")
    moved = [not torch.equal(a, b) for a, b in zip(before, trained, strict=True)]
    require(not any(moved), "a loss moves parameters")


def _agrees(loss: _Loss) -> None:
    model, guide, batch = _pair()
    loss_agrees(loss, model, guide, batch, [*model.parameters(), *guide.parameters()])


def _mean(loss: _Loss, *, exact: bool) -> tuple[float, float, float]:
    """Return the mean loss, its standard error, and minus log p(x)."""
    model, guide, batch = _pair(exact=exact)
    with torch.no_grad():
        found = [float(loss.loss(model, guide, *batch)) for _ in range(_REPEATS)]
    values = torch.tensor(found, dtype=torch.float64)
    error = float(values.std()) / math.sqrt(_REPEATS) + 1e-9
    return float(values.mean()), error, -float(model.log_evidence(batch[0]).sum())


def _exact(loss: _Loss) -> None:
    mean, error, wanted = _mean(loss, exact=True)
    text = f"it is {mean:.4f} ± {error:.4f} in the mean, and -log p(x) is {wanted:.4f}"
    require(abs(mean - wanted) < _ERRORS * error, text)


def _above(loss: _Loss) -> None:
    mean, error, wanted = _mean(loss, exact=False)
    text = f"it is {mean:.4f} ± {error:.4f} in the mean, and -log p(x) is {wanted:.4f}"
    require(mean > wanted - _ERRORS * error, text)


def _value_and_gradient(loss: _Loss, pair: tuple[_Model, _Guide, Any]) -> tuple[Tensor, Tensor]:
    model, guide, batch = pair
    torch.manual_seed(1)
    value = loss.loss_and_grads(model, guide, *batch)
    parts = [p.grad for p in (*model.parameters(), *guide.parameters())]
    require(all(part is not None for part in parts), "loss_and_grads leaves no gradient")
    gradient = torch.cat([part.flatten() for part in parts if part is not None])
    return torch.tensor(float(value), dtype=torch.float64), gradient


def _gradient_of_mean(loss: _Loss) -> None:
    """Along a direction it is that of differences of losses of the same seeds, within its noise."""
    model, guide, batch = _pair()
    for name, module in {"model": model, "guide": guide}.items():
        parameters = list(module.parameters())
        directions, step = [torch.randn_like(p) for p in parameters], 1e-4
        away = []
        for seed in range(_SEEDS):
            torch.manual_seed(seed)
            found = torch.autograd.grad(
                loss.differentiable_loss(model, guide, *batch), parameters, allow_unused=True
            )
            pairs = zip(found, directions, strict=True)
            slope = math.fsum(float((g * d).sum()) for g, d in pairs if g is not None)
            values = [
                _moved(loss, model, guide, batch, parameters, directions, sign * step, seed)
                for sign in (1, -1)
            ]
            away.append(slope - (values[0] - values[1]) / (2 * step))
        gaps = torch.tensor(away, dtype=torch.float64)
        mean, error = float(gaps.mean()), float(gaps.std()) / math.sqrt(_SEEDS) + 1e-5
        text = f"the slope by parameters of the {name} is {mean:.4f} ± {error:.4f} off in the mean"
        require(abs(mean) < _ERRORS * error, text)


def _moved(
    loss: _Loss,
    model: _Model,
    guide: _Guide,
    batch: Sequence[Any],
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    step: float,
    seed: int,
) -> float:
    """Return the loss of a seed with the parameters moved along a direction."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter += step * direction
        torch.manual_seed(seed)
        value = float(loss.loss(model, guide, *batch))
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
    return value


def _scaled(loss: _Loss) -> None:
    """Under one seed: of an importance-weighted bound the scale stands outside the logarithm."""
    value, gradient = _value_and_gradient(loss, _pair())
    scaled = _value_and_gradient(loss, _pair(scale=_SCALE))
    close(scaled[0], _SCALE * value, f"the loss at a scale of {_SCALE:g}")
    close(scaled[1], _SCALE * gradient, f"the gradient at a scale of {_SCALE:g}")


def _masked(loss: _Loss) -> None:
    found = []
    for hidden in (0.0, 100.0):
        model, guide, (x, seen) = _pair()
        seen[2], x[2] = False, hidden
        found.append(_value_and_gradient(loss, (model, guide, (x, seen))))
    close(found[1][0], found[0][0], "the loss with another value behind the mask")
    close(found[1][1], found[0][1], "the gradient with another value behind the mask")


def _lowered(loss: _Loss) -> None:
    model, guide, batch = _pair()

    def mean() -> float:
        torch.manual_seed(7)
        with torch.no_grad():
            return math.fsum(float(loss.loss(model, guide, *batch)) for _ in range(20)) / 20

    before = mean()
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=0.05)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss.loss_and_grads(model, guide, *batch)
        optimizer.step()
    after = mean()
    text = f"{before:.3f} before {_STEPS} steps of Adam, {after:.3f} after"
    require(after < before - _GAIN, text)
