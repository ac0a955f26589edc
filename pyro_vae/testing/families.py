"""Laws of a variational family: its methods describe one and the same distribution."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.families.base import FactorizedFamily, Family
from pyro_vae.programs.types import Distribution
from pyro_vae.testing.laws import Checked, Laws, check, close, require

__all__ = ["check_family"]

D = 4  # coordinates
_DRAWS, _SCORES = 50_000, 10_000
_ERRORS = 4.5  # standard errors that a mean of draws may be off, one in 150,000
_SUPPORTS = {
    "the reals": constraints.real,
    "positive numbers": constraints.positive,
    "probabilities": constraints.unit_interval,
    "the simplex": constraints.simplex,
}


def check_family(family: Family, expected_failures: Mapping[str, str] | None = None) -> Checked:
    """Check that a family's methods describe one distribution, which gradients reach.

    The laws of the package's own families, in float64: shapes; moments; data do not mix; the
    density of all coordinates is the product of the conditionals, integrates to one, and is that of
    its draws; draws of noise follow it; a gradient reaches every parameter and is right; units are
    positive and a shift of zero moves nothing; float64 stays; equal options make equal families.
    Of a :class:`pyro_vae.families.FactorizedFamily` also quantiles, and what the coordinates are
    when mapped to other supports.

    Args:
        family: an instance.
        expected_failures: name of a law to why it cannot hold. It is an error if it holds.

    Returns:
        Which laws hold.

    Raises:
        LawError: with the name of each broken law and what was found.
        ValueError: for an expected failure of no law.

    Example:
        >>> import pyro_vae as pv
        >>> checked = pv.testing.check_family(pv.families.Normal())
        >>> "the density integrates to one" in checked.kept
        True
    """
    return check(family, laws_of(family), expected_failures)


def laws_of(family: Family) -> Laws:
    """Return the laws that a family of its kind has."""
    laws: dict[str, Callable[[Family], None]] = {
        "all coordinates have the right shapes": _shapes,
        "moments come back": _moments,
        "each datum is its own": _each_its_own,
        "a gradient reaches every parameter": _gradients,
        "gradients are right": _differences,
        "units are positive": _units,
        "equal options make equal families": _equal,
    }
    if family.has_density:
        laws |= {
            "the conditionals make the joint": _conditionals,
            "the density integrates to one": _integral,
            "draws of noise have the density": _noise_density,
            "draws of conditionals follow draws of noise": _same_draws,
            "the score of draws has mean zero": _score,
            "float64 stays": _float64,
        }
    found = {name: partial(law, family) for name, law in laws.items()}
    if isinstance(family, FactorizedFamily):
        if family.has_density:
            found["draws of noise are quantiles of the marginal"] = partial(_quantiles, family)
        for name, support in _SUPPORTS.items():
            found[f"coordinates map to {name}"] = partial(_mapped, family, support)
    return found


def some_params(family: Family, *lead: int, size: int = D) -> Tensor:
    """Return parameters of no special kind, ``[*lead, *P]``, in float64."""
    return 0.7 * torch.randn(*lead, *family.params_shape(size), dtype=torch.float64)


def whole(family: Family, params: Tensor, size: int = D) -> Distribution:
    """Return the joint distribution of all coordinates."""
    lead = params.shape[: params.ndim - len(family.params_shape(size))]
    return family.conditional(params, size, params.new_zeros(*lead, 0), slice(0, size))


def _noise(family: Family, count: int, size: int = D) -> Tensor:
    return torch.randn(count, family.num_noise(size), dtype=torch.float64)


# --- any family


def _shapes(family: Family) -> None:
    found = whole(family, some_params(family, 3))
    shapes = tuple(found.batch_shape), tuple(found.event_shape)
    require(shapes == ((3,), (D,)), f"batch and event shape {shapes}, expected ((3,), ({D},))")
    require(found.has_rsample, "its draws carry no gradient (has_rsample is False)")
    drawn = tuple(found.rsample(torch.Size((2,))).shape)
    require(drawn == (2, 3, D), f"draws of shape {drawn}, expected {(2, 3, D)}")
    params, noise = some_params(family, 3), torch.randn(2, 3, family.num_noise(D)).double()
    drawn = tuple(family.from_noise(params, D, noise).shape)
    require(drawn == (2, 3, D), f"draws of noise of shape {drawn}, expected {(2, 3, D)}")
    resolved = family.is_resolved(params, D)
    shape = tuple(resolved.shape)
    require(shape == (3,), f"is_resolved of shape {shape}, expected (3,)")
    require(resolved.all(), "is_resolved is False of ordinary parameters in float64")


def _each_its_own(family: Family) -> None:
    """Draws of noise and densities of several data are those of each alone."""
    params, noise = some_params(family, 3), _noise(family, 3)
    together = family.from_noise(params, D, noise.unsqueeze(0))[0]
    alone = torch.stack(
        [family.from_noise(params[i], D, noise[i : i + 1])[0] for i in range(len(params))]
    )
    close(together, alone, "draws of noise for several data, against those of each alone")
    if family.has_density:
        found = whole(family, params).log_prob(together)
        wanted = torch.stack([whole(family, params[i]).log_prob(alone[i]) for i in range(3)])
        close(found, wanted, "log densities of several data, against those of each alone")


def _moments(family: Family) -> None:
    mean, std = torch.randn(D, dtype=torch.float64), torch.rand(D, dtype=torch.float64) + 0.1
    starts = {
        "initial": family.initial(mean, std),
        "from_gaussian": family.from_gaussian(mean, std.diag()),
    }
    wanted_shape, noise = tuple(family.params_shape(D)), _noise(family, 4 * _DRAWS)
    for name, params in starts.items():
        shape = tuple(params.shape)
        require(shape == wanted_shape, f"{name} gives {shape}, params_shape says {wanted_shape}")
        draws = family.from_noise(params, D, noise)
        spread = draws.std(0)
        # A heavy tail has an error of its own.
        error = (draws - draws.mean(0)).square().std(0) / (2 * spread * math.sqrt(len(draws)))
        room = 0.02 * std + _ERRORS * error.nan_to_num()
        wanted = std if family.has_density else torch.zeros_like(std)
        text = f"{name}: standard deviations of draws are {spread}, expected {wanted}"
        require(((spread - wanted).abs() <= room).all(), text)
        text = f"{name}: means of draws are {draws.mean(0)}, expected {mean}"
        require(((draws.mean(0) - mean).abs() <= 0.02 * std).all(), text)


def _gradients(family: Family) -> None:
    """Draws of noise, draws of the distribution and its density depend on all parameters alike."""
    params = some_params(family).requires_grad_()
    value = family.from_noise(params, D, _noise(family, 256))
    ways = {"draws of noise": value.square().sum()}
    if family.has_density:
        joint = whole(family, params)
        ways["draws of rsample"] = joint.rsample(torch.Size((256,))).square().sum()
        near = value.detach()
        ways["the density"] = joint.log_prob(torch.cat([near, 3 * near])).square().sum()
    reached = {}
    for way, total in ways.items():
        require(total.requires_grad, f"{way}: no gradient")
        (gradient,) = torch.autograd.grad(total, params, retain_graph=True)
        reached[way] = gradient != 0
    every = torch.stack(list(reached.values())).any(0)
    for way, some in reached.items():
        lost = int((every & ~some).sum())
        require(not lost, f"{way}: no gradient reaches {lost} parameters that others depend on")
    unused = int((~every).sum())
    require(not unused, f"{unused} of {params.numel()} parameters have a gradient of zero")


def _differences(family: Family) -> None:
    """Gradients by parameters are differences, along a direction; those of rsample in the mean."""
    params, noise = some_params(family), _noise(family, 32)
    direction, step = torch.randn_like(params), 1e-5
    near = family.from_noise(params, D, noise)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "draws of noise": lambda p: family.from_noise(p, D, noise).sin().sum()
    }
    if family.has_density:
        ways["the density"] = lambda p: whole(family, p).log_prob(near.detach()).sum()
    for way, function in ways.items():
        leaf = params.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf)
        found, wanted = (gradient * direction).sum(), function(params + step * direction)
        wanted = (wanted - function(params - step * direction)) / (2 * step)
        close(found, wanted.detach(), f"the gradient of {way}", rtol=1e-4, atol=1e-4)
    if not family.has_density:
        return
    every = params.expand(_SCORES, *params.shape).clone().requires_grad_()
    draws = (
        whole(family, every).rsample(),
        family.from_noise(every, D, _noise(family, _SCORES).unsqueeze(0))[0],
    )
    gradients = [torch.autograd.grad(drawn.sin().sum(), every)[0] for drawn in draws]
    one, other = (gradient.flatten(1) for gradient in gradients)
    error = ((one.var(0) + other.var(0)) / _SCORES).sqrt().clamp_min(1e-12)
    worst = float(((one.mean(0) - other.mean(0)).abs() / error).max())
    require(
        worst < _ERRORS + 1,  # of the largest of many parameters
        f"gradients of rsample and of draws of noise are {worst:.1f} standard errors apart",
    )


def _units(family: Family) -> None:
    params = some_params(family, 3)
    still = family.shifted(params, D, torch.zeros_like(params))
    close(still, params, "parameters that are shifted by zero")
    units = family.units(params, D)
    shapes = tuple(units.shape), tuple(params.shape)
    require(shapes[0] == shapes[1], f"shape {shapes[0]}, expected {shapes[1]}")
    require((units > 0).all(), f"the smallest is {float(units.min()):.3g}")


def _equal(family: Family) -> None:
    other = copy.deepcopy(family)
    require(family == other, "a copy is not equal")
    require(hash(family) == hash(other), "a copy has another hash")


# --- families with a density


def _conditionals(family: Family) -> None:
    params = some_params(family, 3)
    z = whole(family, params).sample()
    parts = [
        family.conditional(params, D, z[..., :start], slice(start, stop)).log_prob(z[:, start:stop])
        for start, stop in ((0, 1), (1, 3), (3, D))
    ]
    what = "log densities of the conditionals in sum, against the joint's"
    close(torch.stack(parts).sum(0), whole(family, params).log_prob(z), what)


def _integral(family: Family) -> None:
    """Of one coordinate, and of another given those before it, by the trapezoidal rule."""
    # The step grows with the distance, so that heavy tails are in it.
    grid = torch.linspace(-16.0, 16.0, 40_001, dtype=torch.float64).sinh()
    for size, column in ((1, 0), (D, D - 1)):
        params = some_params(family, size=size)
        before = whole(family, params, size).sample()[:column]
        every = params.expand(len(grid), *params.shape)
        given = family.conditional(
            every, size, before.expand(len(grid), -1), slice(column, column + 1)
        )
        mass = float(torch.trapezoid(given.log_prob(grid.unsqueeze(-1)).exp(), grid))
        require(abs(mass - 1) < 1e-3, f"coordinate {column} of {size}: it integrates to {mass:.4g}")


def _noise_density(family: Family) -> None:
    """By change of variables, or the covariance of a linear map."""
    params = some_params(family)
    noise = torch.randn(family.num_noise(D), dtype=torch.float64)
    # By differences: draws need be differentiable by parameters alone.
    steps = 1e-5 * torch.eye(len(noise), dtype=torch.float64)
    above, below = (family.from_noise(params, D, noise + sign * steps) for sign in (1, -1))
    jacobian = ((above - below) / 2e-5).T.detach()
    z = family.from_noise(params, D, noise.unsqueeze(0))[0]
    found = whole(family, params)
    if family.num_noise(D) != D:
        what = "covariance of draws of noise, against that of the distribution"
        close(jacobian @ jacobian.T, found.covariance_matrix, what, rtol=1e-5, atol=1e-5)
        return
    normal = dist.Normal(0.0, 1.0).log_prob(noise).sum()
    wanted = normal - torch.linalg.slogdet(jacobian)[1]
    what = "log density of a draw of noise, by change of variables"
    close(found.log_prob(z), wanted, what, rtol=1e-5, atol=1e-5)


def _same_draws(family: Family) -> None:
    """Draws of the conditionals, one after the other, have the moments of draws of noise."""
    params = some_params(family)
    every = params.expand(_DRAWS, *params.shape)
    a = family.conditional(every, D, every.new_zeros(_DRAWS, 0), slice(0, 2)).sample()
    b = family.conditional(every, D, a, slice(2, D)).sample()
    drawn = torch.cat([a, b], -1)
    _same_moments(drawn, family.from_noise(params, D, _noise(family, _DRAWS)))


def _score(family: Family) -> None:
    """The mean of the score over draws of the distribution itself is zero."""
    params = some_params(family).expand(_SCORES, *family.params_shape(D)).clone().requires_grad_()
    joint = whole(family, params)
    (score,) = torch.autograd.grad(joint.log_prob(joint.sample()).sum(), params)
    error = score.std(0) / math.sqrt(_SCORES)
    worst = float((score.mean(0).abs() / error.clamp_min(1e-12)).max())
    require(
        worst < _ERRORS + 1,  # of the largest of many parameters
        f"the gradient of the log density over draws is {worst:.1f} standard errors from zero",
    )


def _same_moments(one: Tensor, other: Tensor) -> None:
    for power in (1, 2):
        gap = (one**power).mean(0) - (other**power).mean(0)
        error = (((one**power).var(0) + (other**power).var(0)) / len(one)).sqrt()
        worst = float((gap.abs() / error).max())
        name = {1: "means", 2: "mean squares"}[power]
        require(worst < _ERRORS, f"{name} are {worst:.1f} standard errors apart")
    products = [(z[:, 0] * z[:, -1] - z[:, 0].mean() * z[:, -1].mean()) for z in (one, other)]
    spread = math.sqrt(sum(float(p.var()) for p in products) / len(one))
    away = abs(float(products[0].mean() - products[1].mean())) / spread
    require(away < _ERRORS, f"covariances are {away:.1f} standard errors apart")


def _float64(family: Family) -> None:
    found = whole(family, some_params(family, 2))
    types = found.rsample().dtype, found.log_prob(torch.zeros(D, dtype=torch.float64)).dtype
    require(set(types) == {torch.float64}, f"draws and densities of float64 are {types}")


# --- factorized families


def _quantiles(family: FactorizedFamily) -> None:
    """Standard normal noise at a level gives the marginal's quantile: so much density is below."""
    params = some_params(family)
    levels = torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=torch.float64).unsqueeze(-1).expand(-1, D)
    drawn = family.from_noise(params, D, dist.Normal(0.0, 1.0).icdf(levels))
    grid = torch.linspace(-16.0, 0.0, 20_001, dtype=torch.float64).sinh().reshape(-1, 1, 1)
    below = torch.trapezoid(family.marginal(params).log_prob(drawn + grid).exp(), grid, dim=0)
    close(below, levels, "levels of draws of noise", rtol=0.0, atol=1e-3)


def _mapped(family: FactorizedFamily, support: constraints.Constraint) -> None:
    """Draws lie in the support and have the density that the change of variables gives."""
    transform = biject_to(support)
    params = some_params(family, 3)
    mapped = family.mapped(params, transform)
    value = mapped.sample()
    require(support.check(value).all(), "draws lie outside")
    if not family.has_density:
        close(value, transform(params[..., 0]), "the point", rtol=0.0, atol=0.0)
        require((mapped.log_prob(value) == 0).all(), "a point has a log density other than 0")
        return
    base = family.marginal(params).to_event(transform.domain.event_dim)
    z = transform.inv(value)
    wanted = base.log_prob(z) - transform.log_abs_det_jacobian(z, value)
    close(mapped.log_prob(value), wanted, "log density by change of variables")
