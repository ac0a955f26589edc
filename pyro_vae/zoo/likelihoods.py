"""Likelihoods of a datum's features, given the output of a decoder network."""

from __future__ import annotations

import math
from abc import abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.programs.types import Distribution

__all__ = ["Bernoulli", "Binomial", "Categorical", "Gaussian", "Likelihood", "OneHot"]


class Likelihood(nn.Module):
    """The distribution of features that are independent given the latents.

    To write one, give ``params_per_feature`` and :meth:`forward`; where an encoder should see
    the data in another form, :meth:`make_input` and ``inputs_per_feature`` too.

    Attributes:
        params_per_feature: numbers that the decoder gives for each feature.
        inputs_per_feature: numbers that an encoder sees of each feature.
    """

    params_per_feature: int = 1
    inputs_per_feature: int = 1

    @abstractmethod
    def forward(self, params: Tensor) -> Distribution:
        """Return the distribution of each feature, batch shape [...].

        Args:
            params: unconstrained, [..., params_per_feature].
        """

    def make_input(self) -> nn.Module:
        """Return a new module that makes an encoder's input of data.

        It maps [N, D, ...] to [N, D * inputs_per_feature, ...].
        """
        return nn.Identity()


class Bernoulli(Likelihood):
    r"""Binary features, 0 or 1.

    .. math:: x_d \sim \mathrm{Bernoulli}(\mathrm{logits}_d)

    Example:
        >>> Bernoulli()(torch.zeros(3, 1)).mean
        tensor([0.5000, 0.5000, 0.5000])
    """

    def forward(self, params: Tensor) -> Distribution:
        """Return Bernoulli(logits=params[..., 0])."""
        return dist.Bernoulli(logits=params[..., 0])


class Binomial(Likelihood):
    r"""Counts from 0 to a largest one, such as grey levels.

    .. math:: x_d \sim \mathrm{Binomial}(\mathrm{num\_trials}, \mathrm{logits}_d)

    Args:
        num_trials: the largest count.

    Raises:
        ValueError: for num_trials < 1.

    Example:
        >>> Binomial(16)(torch.zeros(2, 1)).mean
        tensor([8., 8.])
    """

    def __init__(self, num_trials: int) -> None:
        super().__init__()
        if num_trials < 1:
            raise ValueError(f"num_trials={num_trials}: at least 1 is needed")
        self.num_trials = num_trials

    def forward(self, params: Tensor) -> Distribution:
        """Return Binomial(num_trials, logits=params[..., 0])."""
        return dist.Binomial(self.num_trials, logits=params[..., 0])

    def make_input(self) -> nn.Module:
        """Return a module that divides counts by num_trials."""
        return _Divide(self.num_trials)


class Gaussian(Likelihood):
    r"""Real features, with one standard deviation for all.

    .. math:: x_d \sim \mathrm{Normal}(\mathrm{mean}_d, \sigma)

    A learned :math:`\sigma` is a parameter of the model, and starts at one (Rybkin et al. 2021,
    "Simple and effective VAE training with calibrated decoders").

    Args:
        sigma: the standard deviation, in units of the data; None to learn it.

    Raises:
        ValueError: for a sigma that is not positive and finite.

    Example:
        >>> Gaussian(0.1)(torch.zeros(2, 1)).stddev
        tensor([0.1000, 0.1000])
        >>> [name for name, _ in Gaussian().named_parameters()]
        ['log_sigma']
    """

    def __init__(self, sigma: float | None = None) -> None:
        super().__init__()
        if sigma is not None and not 0 < sigma < math.inf:
            raise ValueError(f"sigma={sigma}: a positive number is needed, or None to learn it")
        self.fixed_sigma = sigma
        if sigma is None:
            self.log_sigma = nn.Parameter(torch.zeros(()))

    @property
    def sigma(self) -> Tensor | float:
        """The standard deviation of a feature."""
        return self.log_sigma.exp() if self.fixed_sigma is None else self.fixed_sigma

    def forward(self, params: Tensor) -> Distribution:
        """Return Normal(params[..., 0], sigma)."""
        return dist.Normal(params[..., 0], self.sigma)


class Categorical(Likelihood):
    r"""Features that are one of C categories each, numbered from 0.

    .. math:: x_d \sim \mathrm{Categorical}(\mathrm{softmax}(\mathrm{logits}_{d, 1..C}))

    Args:
        num_categories: C.

    Raises:
        ValueError: for fewer than two categories.

    Example:
        >>> Categorical(4)(torch.zeros(3, 4)).probs.shape
        torch.Size([3, 4])
    """

    def __init__(self, num_categories: int) -> None:
        super().__init__()
        if num_categories < 2:
            raise ValueError(f"num_categories={num_categories}: at least 2 are needed")
        self.params_per_feature = self.inputs_per_feature = num_categories

    def forward(self, params: Tensor) -> Distribution:
        """Return Categorical(logits=params)."""
        return dist.Categorical(logits=params)

    def make_input(self) -> nn.Module:
        """Return a module that writes each category as an indicator vector."""
        return nn.Sequential(OneHot(self.params_per_feature), _CategoriesFirst())


class OneHot(nn.Module):
    """Categories as indicator vectors, in the dtype of the module.

    Args:
        num_categories: C.

    Raises:
        ValueError: when called, for a value that is none of them.

    Example:
        >>> OneHot(3)(torch.tensor([2, 0]))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """

    def __init__(self, num_categories: int) -> None:
        super().__init__()
        self.register_buffer("indicators", torch.eye(num_categories), persistent=False)

    indicators: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map whole numbers [...] to [..., C]."""
        try:
            return nn.functional.embedding(x.long(), self.indicators)
        except IndexError as error:
            raise ValueError(
                f"categories from 0 to {len(self.indicators) - 1} are needed, found values from "
                f"{x.min().item()} to {x.max().item()}"
            ) from error


class WithMask(nn.Module):
    """What an encoder sees of data whose mask stands beside them: the mask stays what it is.

    Args:
        make_input: of the data alone.
        dim: along which values and mask stand, half of it each.

    Example:
        >>> WithMask(_Divide(10.0))(torch.tensor([[5.0, 0.0, 1.0, 0.0]]))
        tensor([[0.5000, 0.0000, 1.0000, 0.0000]])
    """

    def __init__(self, make_input: nn.Module, dim: int = -1) -> None:
        super().__init__()
        self.make_input, self.dim = make_input, dim

    def forward(self, both: Tensor) -> Tensor:
        """Return the input made of the values, and the mask behind it."""
        values, seen = both.chunk(2, self.dim)
        return torch.cat([self.make_input(values), seen], self.dim)


class _CategoriesFirst(nn.Module):
    """Bring [N, D, ..., C] to [N, C * D, ...]: more channels, as a convolution wants them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1).flatten(1, 2)


class _Divide(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale
