"""What a variational family is: parameters in, a distribution of one datum's latents out.

A family knows nothing of where its parameters come from: an encoder
(:class:`pyro_vae.AmortizedGuide`) or a table (:class:`pyro_vae.LocalGuide`). The
difference of two guides of one family is then the source of the parameters and
nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_vae.programs.types import Distribution


class Family(ABC):
    r"""Distributions over the D unconstrained coordinates of a datum, jointly.

    The coordinates of all latent sites of a datum lie side by side, in the order of the
    model. A guide samples site by site, each given those before it,

    .. math:: q(z) = \prod_s q(z_s | z_{<s}),

    so a family gives these conditionals; each is a distribution over real vectors, in which
    a site on real support is sampled as it is, and others are mapped to their support.

    To write a family whose coordinates are independent, subclass
    :class:`FactorizedFamily`, which asks for less. Parameters are unconstrained real numbers,
    of the shape :meth:`params_shape` for a datum; here it is written P. Families with equal
    options must be equal, and hashable (a frozen dataclass is).

    Attributes:
        has_density: whether a member is a distribution with a density; a point has none.
        anneals: whether :func:`pyro_vae.refine` begins with p(x, z) to a power that rises to one:
            a family of several modes would else settle in the nearest.
    """

    has_density: bool = True
    anneals: bool = False

    @abstractmethod
    def params_shape(self, size: int) -> tuple[int, ...]:
        """Return the shape of a datum's parameters for D = ``size`` coordinates."""

    def num_noise(self, size: int) -> int:
        """Return how many standard normal numbers :meth:`from_noise` makes a draw of."""
        return size

    @abstractmethod
    def initial(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return the parameters of independent coordinates with these moments.

        Args:
            mean: [..., D].
            std: [..., D].

        Returns:
            [..., P].
        """

    def from_gaussian(self, mean: Tensor, scale_tril: Tensor) -> Tensor:
        """Return parameters close to a Gaussian: where :func:`pyro_vae.refine` may begin.

        By default those of independent coordinates, each as wide as it is given all others:
        what a mean field makes of a correlated Gaussian.

        Args:
            mean: [..., D].
            scale_tril: the Cholesky factor of its covariance, [..., D, D].

        Returns:
            [..., P].
        """
        return self.initial(mean, precisions(scale_tril).rsqrt())

    @abstractmethod
    def conditional(
        self, params: Tensor, size: int, before: Tensor, columns: slice
    ) -> Distribution:
        """Return the distribution of some coordinates given all those before them.

        Args:
            params: [..., P].
            size: D.
            before: the coordinates before these, [..., columns.start].
            columns: which coordinates.

        Returns:
            A reparameterized distribution of batch shape [...] over real vectors, of event
            shape [columns.stop - columns.start]. A site with batch dimensions inside the datum
            (an inner plate) asks for the density of each coordinate given those before it: it
            must then be a MultivariateNormal, or have a method ``coordinate_log_prob(value)``.
        """

    @abstractmethod
    def from_noise(self, params: Tensor, size: int, noise: Tensor) -> Tensor:
        """Return draws made of standard normal noise, differentiable by the parameters.

        Args:
            params: [..., P].
            size: D.
            noise: [K, ..., num_noise(D)].

        Returns:
            [K, ..., D].
        """

    def is_resolved(self, params: Tensor, size: int) -> Tensor:
        """Return whether draws of the parameters' dtype have the density that they say, [...].

        A distribution that is far thinner along some direction than along the axes is not: what
        rounding adds to a draw has then no density. By default all are.

        Args:
            params: [..., P].
            size: D.
        """
        lead = params.shape[: params.ndim - len(self.params_shape(size))]
        return torch.ones(lead, dtype=torch.bool, device=params.device)

    def units(self, params: Tensor, size: int) -> Tensor:
        """Return how far each parameter moves the distribution by about its own width.

        An optimiser that steps in these units is at home in a posterior of any scale.

        Args:
            params: [..., P].
            size: D.

        Returns:
            Positive numbers of the same shape as the parameters.
        """
        return torch.ones_like(params)

    def shifted(self, params: Tensor, size: int, shift: Tensor) -> Tensor:
        """Return the parameters moved by a shift, in :meth:`units` by default.

        A family that can be thin along some direction moves in coordinates where it is not.

        Args:
            params: [..., P].
            size: D.
            shift: [..., P]; zero leaves the parameters as they are.
        """
        return params + self.units(params, size) * shift


def precisions(scale_tril: Tensor) -> Tensor:
    """Return a Gaussian's precision of each coordinate given all others, [..., D]."""
    eye = torch.eye(scale_tril.shape[-1], dtype=scale_tril.dtype, device=scale_tril.device)
    return torch.linalg.solve_triangular(scale_tril, eye, upper=False).square().sum(-2)


class FactorizedFamily(Family):
    """A family whose coordinates are independent given the parameters.

    To write one, give ``params_per_coordinate``, :meth:`marginal` and :meth:`from_moments`;
    :meth:`coordinate_units` too where a parameter is a length on the coordinate's scale; and
    :meth:`quantile` where the marginal has no ``icdf``. In these methods parameters have any
    leading shape and end in ``params_per_coordinate``.

    Attributes:
        params_per_coordinate: parameters of one coordinate.

    Example:
        >>> from dataclasses import dataclass
        >>> import pyro_vae as pv
        >>> @dataclass(frozen=True)
        ... class Laplace(pv.families.FactorizedFamily):
        ...     params_per_coordinate = 2
        ...     def marginal(self, params):
        ...         return dist.Laplace(params[..., 0], params[..., 1].exp())
        ...     def from_moments(self, mean, std):
        ...         return torch.stack([mean, (std / 2**0.5).log()], -1)
        >>> Laplace().params_shape(3)
        (3, 2)
    """

    params_per_coordinate: int

    @abstractmethod
    def marginal(self, params: Tensor) -> Distribution:
        """Return the distribution of each coordinate.

        Args:
            params: [..., params_per_coordinate].

        Returns:
            A reparameterized distribution over the reals of batch shape [...].
        """

    @abstractmethod
    def from_moments(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return the parameters, [..., params_per_coordinate], with these moments [...]."""

    def coordinate_units(self, params: Tensor) -> Tensor:
        """Return :meth:`units` of [..., params_per_coordinate] parameters; ones by default."""
        return torch.ones_like(params)

    def quantile(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return the marginal's quantile at the level that noise is of a standard normal.

        Args:
            params: [..., params_per_coordinate].
            noise: [K, ...].

        Returns:
            [K, ...].
        """
        return self.marginal(params).icdf(torch.special.ndtr(noise))

    def mapped(self, params: Tensor, transform: Transform) -> Distribution:
        """Return the distribution of the coordinates mapped to a site's support.

        Args:
            params: [..., params_per_coordinate].
            transform: a bijection from the reals to that support.
        """
        base = self.marginal(params).to_event(transform.domain.event_dim)
        return dist.TransformedDistribution(base, [transform])

    def params_shape(self, size: int) -> tuple[int, ...]:
        """Return (D, params_per_coordinate)."""
        return size, self.params_per_coordinate

    def initial(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return :meth:`from_moments`."""
        return self.from_moments(mean, std)

    def conditional(
        self, params: Tensor, size: int, before: Tensor, columns: slice
    ) -> Distribution:
        """Return the marginals of these coordinates, whatever comes before."""
        return self.marginal(params[..., columns, :]).to_event(1)

    def from_noise(self, params: Tensor, size: int, noise: Tensor) -> Tensor:
        """Return :meth:`quantile` of each coordinate."""
        return self.quantile(params, noise)

    def units(self, params: Tensor, size: int) -> Tensor:
        """Return :meth:`coordinate_units`."""
        return self.coordinate_units(params)
