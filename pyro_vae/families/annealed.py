"""Annealed steps from a base family's draw towards the posterior, along the model's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.families.base import Family
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.types import Distribution

_FIRST_ANGLE = 0.2  # radians that a step turns at first
_FIRST_DAMPING = 0.9  # of the momentum that a step keeps at first
_MOST_KICK = 1.0  # widths of the base: a step that is too long for the posterior stays bounded


@dataclass(frozen=True)
class Steps:
    """The learned numbers of a datum's steps.

    Attributes:
        angle: by which a step turns noise and momentum, in radians, [..., M].
        power: of the posterior over the base, of each step, [..., T], rising to one.
        damping: the share of the momentum that the next step keeps, [..., 1]; None for one step.
    """

    angle: Tensor
    power: Tensor
    damping: Tensor | None


@dataclass(frozen=True)
class Annealed(Family):
    r"""A base family's draws, moved to the posterior by steps along the model's gradient.

    Differentiable annealed importance sampling (Zhang et al. 2021; Geffner & Domke 2021), in the
    noise that the base makes draws of, :math:`z = f(u)` with :math:`u \sim \mathrm{Normal}(0, I)`.
    With :math:`r(u) = \log p(x, f(u)) - \log q_0(f(u))`, a momentum :math:`v_0 \sim
    \mathrm{Normal}(0, I)` and T steps,

    .. math::
        (u', v') &= \mathrm{turn}_{\epsilon / 2}(u_{t-1}, v_{t-1}), \qquad
        a_t = b(\epsilon\, \beta_t \nabla r(u')), \\
        (u_t, \hat v_t) &= \mathrm{turn}_{\epsilon / 2}(u', v' + a_t), \qquad
        v_t = \gamma \hat v_t + \sqrt{1 - \gamma^2}\, \xi_t, \\
        \log w &= r(u_T) - \sum_t \bigl(v'_t \cdot a_t + \tfrac12 |a_t|^2\bigr).

    with :math:`b(a) = a / \sqrt{1 + a^2}`, that bounds a step. The mean of w is p(x), whatever
    :math:`\epsilon, \beta, \gamma` are: the ELBO over draws *and* momenta is a bound on log p(x),
    below the ELBO of the draws alone. Angles :math:`\epsilon` (one for each number of the noise),
    powers :math:`\beta` and damping :math:`\gamma` are parameters of the datum beside the base's,
    learned with them. Turning keeps the base exactly, so steps from the exact posterior lose
    nothing (splitting: Shahbaba et al. 2014); and they are at home in a base of any scale and
    correlation.

    Each draw costs T gradients of the model by the latents, and training differentiates them
    again: the model's operations need second derivatives. Where the gradient jumps (ReLU units,
    absolute values) the bound holds and the gradient that trains the steps is biased: take smooth
    units (SiLU, softplus, tanh). No step is accepted or rejected. There
    is no density of a draw but the one on its own way: guides of it cannot be scored at the draws
    of others, by "stl" and "dreg" gradients or by wake-sleep. As log q, results report the
    extended density, :math:`\log p(x, z) - \log w`.

    Args:
        base: the family that draws are from; any with a density.
        num_steps: T.

    Raises:
        TypeError: for a base that is no instance of Family.
        ValueError: for a base of points or of steps, and num_steps < 1.

    References:
        Zhang, Hsu, Li, Finn & Grosse (2021). Differentiable annealed importance sampling and the
        perils of gradient noise. NeurIPS.
        Geffner & Domke (2021). MCMC variational inference via uncorrected Hamiltonian annealing.
        NeurIPS.
        Shahbaba, Lan, Johnson & Neal (2014). Split Hamiltonian Monte Carlo. Statistics and
        Computing 24.

    Example:
        >>> import pyro_vae as pv
        >>> family = Annealed(pv.families.Normal(), num_steps=4)
        >>> family.params_shape(2)  # 4 of the base, 2 angles, 3 powers, the damping
        (10,)
    """

    base: Family
    num_steps: int
    anneals = True

    def __post_init__(self) -> None:
        if not isinstance(self.base, Family):
            raise TypeError(
                f"base={self.base!r}: an instance of a family is needed, such as Normal()"
            )
        if not self.base.has_density:
            raise ValueError(f"base={self.base!r} is a point: steps begin at draws of a density")
        if isinstance(self.base, Annealed):
            raise ValueError(f"base={self.base!r} has steps already: raise its num_steps")
        object.__setattr__(self, "num_steps", as_count("num_steps", self.num_steps))

    def params_shape(self, size: int) -> tuple[int, ...]:
        """Return (P,): the base's, an angle for each number of its noise, powers, the damping."""
        return (sum(self._sizes(size)),)

    def num_noise(self, size: int) -> int:
        """Return T + 1 times the base's: its noise, and momenta."""
        return (self.num_steps + 1) * self.base.num_noise(size)

    def base_params(self, params: Tensor, size: int) -> Tensor:
        """Return the base's parameters, [..., P of the base]."""
        own, _, _ = params.split(self._sizes(size), -1)
        return own.unflatten(-1, self.base.params_shape(size))

    def steps(self, params: Tensor, size: int) -> Steps:
        """Return the numbers of the steps."""
        _, angle, rest = params.split(self._sizes(size), -1)
        powers, damping = rest[..., : self.num_steps - 1], rest[..., self.num_steps - 1 :]
        powers = torch.cat([powers, torch.zeros_like(angle[..., :1])], -1)
        return Steps(
            math.pi / 2 * angle.sigmoid(),
            powers.softmax(-1).cumsum(-1),
            damping.sigmoid() if self.num_steps > 1 else None,
        )

    def initial(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return the base's, with short steps."""
        return self._with_steps(self.base.initial(mean, std), mean)

    def from_gaussian(self, mean: Tensor, scale_tril: Tensor) -> Tensor:
        """Return the base's, with short steps."""
        return self._with_steps(self.base.from_gaussian(mean, scale_tril), mean)

    def conditional(
        self, params: Tensor, size: int, before: Tensor, columns: slice
    ) -> Distribution:
        """Return the base's: what draws begin at, and a part of their density."""
        return self.base.conditional(self.base_params(params, size), size, before, columns)

    def from_noise(self, params: Tensor, size: int, noise: Tensor) -> Tensor:
        """Return the base's draws: where steps begin, which no family knows the end of."""
        own = noise[..., : self.base.num_noise(size)]
        return self.base.from_noise(self.base_params(params, size), size, own)

    def is_resolved(self, params: Tensor, size: int) -> Tensor:
        """Return whether the base is."""
        return self.base.is_resolved(self.base_params(params, size), size)

    def units(self, params: Tensor, size: int) -> Tensor:
        """Return the base's, and 1 for the steps."""
        own = self.base.units(self.base_params(params, size), size)
        rest = torch.ones_like(params[..., self._sizes(size)[0] :])
        return torch.cat([own.flatten(params.ndim - 1), rest], -1)

    def shifted(self, params: Tensor, size: int, shift: Tensor) -> Tensor:
        """Return the base moved as it moves, and the steps by the shift."""
        own = self.base_params(params, size), size, self.base_params(shift, size)
        moved, first = self.base.shifted(*own), self._sizes(size)[0]
        rest = params[..., first:] + shift[..., first:]
        return torch.cat([moved.flatten(rest.ndim - 1), rest], -1)

    def walk(
        self, params: Tensor, size: int, noise: Tensor, slope: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        r"""Return the noise of the base's draws after all steps, and what log w gained on the way.

        Args:
            params: [..., P].
            size: D.
            noise: [K, ..., num_noise(D)].
            slope: the gradient of r by the base's noise [K, ..., M], at any of it.

        Returns:
            [K, ..., M], and minus the sum of :math:`v' a + |a|^2 / 2`, [K, ...].
        """
        steps = self.steps(params, size)
        u, v, *fresh = noise.split(self.base.num_noise(size), -1)
        half = steps.angle / 2
        cos, sin = half.cos(), half.sin()
        gained = torch.zeros_like(u[..., 0])
        for t in range(self.num_steps):
            if t and steps.damping is not None:
                kept = steps.damping
                v = kept * v + (1 - kept.square()).sqrt() * fresh[t - 1]
            u, v = cos * u + sin * v, cos * v - sin * u
            kick = _bounded(steps.angle * steps.power[..., t : t + 1] * slope(u))
            gained = gained - (kick * (v + 0.5 * kick)).sum(-1)
            v = v + kick
            u, v = cos * u + sin * v, cos * v - sin * u
        return u, gained

    def _sizes(self, size: int) -> list[int]:
        powers_and_damping = self.num_steps if self.num_steps > 1 else 0
        own = math.prod(self.base.params_shape(size))
        return [own, self.base.num_noise(size), powers_and_damping]

    def _with_steps(self, own: Tensor, mean: Tensor) -> Tensor:
        size, lead = mean.shape[-1], mean.shape[:-1]
        _, angles, rest = self._sizes(size)
        share = 2 * _FIRST_ANGLE / math.pi
        angle = mean.new_full((*lead, angles), math.log(share / (1 - share)))
        last = mean.new_zeros(*lead, rest)
        last[..., self.num_steps - 1 :] = math.log(_FIRST_DAMPING / (1 - _FIRST_DAMPING))
        return torch.cat([own.flatten(len(lead)), angle, last], -1)


def _bounded(kick: Tensor) -> Tensor:
    """Return a change of the momentum, bounded smoothly; zero where it is no number."""
    kick = torch.where(kick.isfinite(), kick, 0.0)
    return kick / (1 + (kick / _MOST_KICK).square()).sqrt()
