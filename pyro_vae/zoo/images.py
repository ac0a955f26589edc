"""Variational autoencoders of images and other vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.nets import MLP, ConvDecoder, ConvEncoder
from pyro_vae.programs.handlers import Registered, register
from pyro_vae.programs.types import Distribution
from pyro_vae.zoo.likelihoods import Bernoulli, Binomial, Likelihood, OneHot, WithMask
from pyro_vae.zoo.simulation import draw, draw_integers


class _DecoderModel(Registered):
    """What the models share: a decoder network, and a likelihood of each feature."""

    num_latents: Any

    def __init__(
        self, data_shape: Sequence[int], decoder: nn.Module, observation: Likelihood
    ) -> None:
        super().__init__()
        self.data_shape = tuple(data_shape)
        self.decoder, self.observation = decoder, observation

    def forward(self, x: Tensor) -> Tensor:
        """Run the model on data, a datum per row; return the value of its observed site."""
        register(self)
        with pyro.plate("data", len(x)):
            return self._observe(self.likelihood(self._latents()), x)

    def _latents(self) -> Tensor:
        """Sample the latents; return what the decoder takes, [..., L]."""
        return pyro.sample("z", self._standard_normal(self.num_latents))

    def likelihood(self, z: Tensor) -> Distribution:
        """Return the distribution of each feature given what the decoder takes, [..., L]."""
        params = self.decoder(z).reshape(*z.shape[:-1], -1, *self.data_shape)
        return self.observation(params.movedim(-1 - len(self.data_shape), -1))

    def simulate(self, num_data: int, seed: int = 0) -> Any:
        """Draw data from the model; the global random state stays what it is.

        Args:
            num_data: N.
            seed: of the draw.

        Returns:
            A batch as the model takes it.

        Raises:
            ValueError: for num_data < 1.
        """
        if num_data < 1:
            raise ValueError(f"num_data={num_data}: at least 1 is needed")
        return self._draw(self._like.new_zeros(num_data, *self.data_shape), seed)

    def _draw(self, blank: Tensor, seed: int) -> Any:
        return draw(self, blank, seed=seed)

    @property
    def _like(self) -> Tensor:
        """A parameter, for its dtype and device: data may be whole numbers."""
        return next(self.decoder.parameters())

    def _standard_normal(self, num_latents: int) -> Distribution:
        return dist.Normal(self._like.new_zeros(num_latents), 1.0).to_event(1)

    def _observe(self, likelihood: Distribution, x: Tensor) -> Tensor:
        return pyro.sample("x", likelihood.to_event(len(self.data_shape)), obs=x)

    def _encoder_sizes(self, hidden: Sequence[int]) -> list[int]:
        return [math.prod(self.data_shape) * self.observation.inputs_per_feature, *hidden]


class _VectorModel(_DecoderModel):
    """A model of vectors [N, D] whose decoder is an MLP of the latents."""

    def __init__(
        self,
        num_features: int,
        num_inputs: int,
        hidden: Sequence[int],
        likelihood: Likelihood | None,
    ) -> None:
        observation = Bernoulli() if likelihood is None else likelihood
        sizes = [num_inputs, *hidden, num_features * observation.params_per_feature]
        super().__init__([num_features], MLP(sizes), observation)

    def make_encoder(
        self, hidden: Sequence[int] = (64,), *, missing: bool = False, **options: Any
    ) -> nn.Module:
        """Return a new encoder, from data [N, D] to features [N, hidden[-1]].

        Args:
            hidden: widths of its layers.
            missing: whether it is to be wrapped by :class:`pyro_vae.MissingEncoder`, which gives
                it the data and their mask, [N, 2 D].
            **options: of :class:`pyro_vae.nets.MLP`.
        """
        first, *others = self._encoder_sizes(hidden)
        first += self.data_shape[0] * missing
        network = MLP([first, *others], activate_last=True, **options)
        return nn.Sequential(self._make_input(missing), network).to(self._like)

    def _make_input(self, missing: bool) -> nn.Module:
        made = self.observation.make_input()
        return WithMask(made) if missing else made


class VAE(_VectorModel):
    r"""A variational autoencoder's generative half (Kingma & Welling 2014).

    .. math::
        z \sim \mathrm{Normal}(0, I_L), \quad
        x_d | z \sim \mathrm{likelihood}(\mathrm{decoder}_d(z))

    Binary data and counts need no more than ``num_trials``; other data a likelihood.

    Args:
        num_features: D, dimensions of a datum.
        num_latents: L.
        hidden: widths of the decoder's hidden layers.
        num_trials: 1 for binary data (a Bernoulli likelihood), or the largest count (Binomial).
        likelihood: another one, for example ``likelihoods.Gaussian()``.

    Raises:
        ValueError: for num_trials < 1, and for num_trials beside a likelihood.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> model = pv.zoo.VAE(64, 10, hidden=[32], num_trials=16)
        >>> pv.describe(model, torch.zeros(3, 64)).data_plate
        'data'
        >>> model = pv.zoo.VAE(5, 2, hidden=[32], likelihood=pv.zoo.likelihoods.Categorical(4))
        >>> model.simulate(3).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        num_features: int,
        num_latents: int,
        *,
        hidden: Sequence[int],
        num_trials: int = 1,
        likelihood: Likelihood | None = None,
    ) -> None:
        if num_trials != 1 and likelihood is not None:
            both = f"num_trials={num_trials} and likelihood={likelihood}"
            raise ValueError(f"{both}: give one of them")
        likelihood = Binomial(num_trials) if num_trials != 1 else likelihood
        super().__init__(num_features, num_latents, hidden, likelihood)
        self.num_latents = num_latents


class ConvVAE(_DecoderModel):
    r"""A variational autoencoder of images, with a convolutional decoder.

    .. math::
        z \sim \mathrm{Normal}(0, I_L), \quad
        x_{chw} | z \sim \mathrm{likelihood}(\mathrm{decoder}_{chw}(z))

    Args:
        shape: of an image: channels, height, width.
        num_latents: L.
        channels: of the decoder's hidden layers (see :class:`pyro_vae.nets.ConvDecoder`).
        likelihood: of a pixel; ``likelihoods.Bernoulli()`` by default.
        batch_norm: whether the decoder normalizes over the batch.
        dropout: the decoder's probability of a channel to be left out in training.

    Raises:
        ValueError: for a shape that is not three sizes, and no channels.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.zoo.ConvVAE((1, 8, 8), 5, channels=[8, 4])
        >>> model.simulate(3).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_latents: int,
        *,
        channels: Sequence[int] = (32, 16),
        likelihood: Likelihood | None = None,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        observation = Bernoulli() if likelihood is None else likelihood
        decoded = (shape[0] * observation.params_per_feature, *shape[1:])
        layers: dict[str, Any] = {"batch_norm": batch_norm, "dropout": dropout}
        decoder = ConvDecoder(num_latents, decoded, channels=channels, **layers)
        super().__init__(shape, decoder, observation)
        self.num_latents = num_latents

    def make_encoder(
        self, num_features: int = 64, *, missing: bool = False, **options: Any
    ) -> nn.Module:
        """Return a new encoder, from images [N, C, H, W] to features [N, num_features].

        Args:
            num_features: width of the output.
            missing: whether it is to be wrapped by ``pyro_vae.MissingEncoder(..., dim=1)``, which
                gives it the images and their masks, [N, 2 C, H, W].
            **options: of :class:`pyro_vae.nets.ConvEncoder`.
        """
        channels, height, width = self.data_shape
        inputs = channels * (self.observation.inputs_per_feature + missing)
        network = ConvEncoder((inputs, height, width), num_features, **options)
        made = self.observation.make_input()
        return nn.Sequential(WithMask(made, 1) if missing else made, network).to(self._like)


class TwoLayerVAE(_VectorModel):
    r"""A variational autoencoder with two stochastic layers (Rezende et al. 2014).

    .. math::
        z_2 \sim \mathrm{Normal}(0, I), \quad
        z_1 | z_2 \sim \mathrm{Normal}(\mu(z_2), \sigma(z_2)), \quad
        x_d | z_1 \sim \mathrm{likelihood}(\mathrm{decoder}_d(z_1))

    Args:
        num_features: D, dimensions of a datum.
        num_latents: dimensions of z1, next to the data, and of z2 above it.
        hidden: widths of the hidden layers, the same from z1 to x and from z2 to z1.
        likelihood: of a feature; ``likelihoods.Bernoulli()`` by default.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.zoo.TwoLayerVAE(20, (6, 2), hidden=[32])
        >>> x = model.simulate(3)
        >>> guide = pv.AmortizedGuide(model, model.make_encoder(), example=x)
        >>> list(guide(x))
        ['z2', 'z1']
    """

    def __init__(
        self,
        num_features: int,
        num_latents: tuple[int, int],
        *,
        hidden: Sequence[int],
        likelihood: Likelihood | None = None,
    ) -> None:
        lower, upper = num_latents
        super().__init__(num_features, lower, hidden, likelihood)
        self.num_latents = (lower, upper)
        self.prior = MLP([upper, *hidden, 2 * lower])

    def _latents(self) -> Tensor:
        z2 = pyro.sample("z2", self._standard_normal(self.num_latents[1]))
        location, log_scale = self.prior(z2).chunk(2, -1)
        return pyro.sample("z1", dist.Normal(location, log_scale.exp()).to_event(1))


class MixtureVAE(_VectorModel):
    r"""A variational autoencoder whose prior is a mixture of Gaussians (Jiang et al. 2017).

    .. math::
        c \sim \mathrm{Categorical}(\pi), \quad
        z | c \sim \mathrm{Normal}(\mu_c, \sigma_c), \quad
        x_d | z \sim \mathrm{likelihood}(\mathrm{decoder}_d(z))

    The component c is one of C; a guide that leaves it out has it summed out, exactly. All of
    :math:`\pi, \mu, \sigma` are learned. The components start where
    ``torch.randn`` puts their means, with scale one and equal weight.

    Args:
        num_features: D, dimensions of a datum.
        num_latents: L.
        num_components: C.
        hidden: widths of the decoder's hidden layers.
        likelihood: of a feature; ``likelihoods.Bernoulli()`` by default.

    Raises:
        ValueError: for fewer than one component.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.zoo.MixtureVAE(20, 2, 4, hidden=[32])
        >>> x = model.simulate(3)
        >>> guide = pv.AmortizedGuide(model, model.make_encoder(), example=x)
        >>> list(guide(x))
        ['z']
    """

    def __init__(
        self,
        num_features: int,
        num_latents: int,
        num_components: int,
        *,
        hidden: Sequence[int],
        likelihood: Likelihood | None = None,
    ) -> None:
        if num_components < 1:
            raise ValueError(f"num_components={num_components}: at least 1 is needed")
        super().__init__(num_features, num_latents, hidden, likelihood)
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.means = nn.Parameter(torch.randn(num_components, num_latents))
        self.log_scales = nn.Parameter(torch.zeros(num_components, num_latents))

    def _latents(self) -> Tensor:
        c = pyro.sample("c", dist.Categorical(logits=self.logits))
        prior = dist.Normal(self.means[c], self.log_scales[c].exp())
        return pyro.sample("z", prior.to_event(1))


class ConditionalVAE(_VectorModel):
    r"""A variational autoencoder of data given their class (Kingma et al. 2014; Sohn et al. 2015).

    .. math::
        z \sim \mathrm{Normal}(0, I_L), \quad
        x_d | z, y \sim \mathrm{likelihood}(\mathrm{decoder}_d(z, y))

    The class y is given and has no distribution: bounds are on log p(x | y). A batch is x and y,
    positional or by name.

    Args:
        num_features: D, dimensions of a datum.
        num_latents: L.
        num_classes: C; labels y are whole numbers [N] from 0.
        hidden: widths of the decoder's hidden layers.
        likelihood: of a feature; ``likelihoods.Bernoulli()`` by default.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.zoo.ConditionalVAE(20, 2, 10, hidden=[32])
        >>> batch = model.simulate(3)
        >>> guide = pv.AmortizedGuide(model, model.make_encoder(), example=batch)
        >>> guide(**batch)["z"].shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        num_features: int,
        num_latents: int,
        num_classes: int,
        *,
        hidden: Sequence[int],
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(num_features, num_latents + num_classes, hidden, likelihood)
        self.num_latents, self.num_classes = num_latents, num_classes
        self.one_hot = OneHot(num_classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """Run the model on data [N, D] of classes [N]; return the observed value."""
        register(self)
        with pyro.plate("data", len(x)):
            return self._observe(self.likelihood(self.decoder_inputs(self._latents(), y)), x)

    def decoder_inputs(self, z: Tensor, y: Tensor) -> Tensor:
        """Return latents [..., N, L] beside the indicators of classes [N]: [..., N, L + C]."""
        return torch.cat([z, self.one_hot(y).expand(*z.shape[:-1], -1)], -1)

    def make_encoder(
        self, hidden: Sequence[int] = (64,), *, missing: bool = False, **options: Any
    ) -> nn.Module:
        """Return a new encoder, from data [N, D] and classes [N] to features [N, hidden[-1]].

        Arguments as in :meth:`VAE.make_encoder`.
        """
        first, *others = self._encoder_sizes(hidden)
        first += self.num_classes + self.data_shape[0] * missing
        network = MLP([first, *others], activate_last=True, **options)
        make_input, one_hot = self._make_input(missing), OneHot(self.num_classes)
        return _ConditionalEncoder(make_input, one_hot, network).to(self._like)

    def _draw(self, blank: Tensor, seed: int) -> dict[str, Tensor]:
        # The classes have no distribution in the model: all alike.
        y, other_seed = draw_integers(0, self.num_classes, blank, seed)
        return {"x": draw(self, blank, y, seed=other_seed), "y": y}


class _ConditionalEncoder(nn.Module):
    """Features of a datum and its class."""

    def __init__(self, make_input: nn.Module, one_hot: OneHot, network: nn.Module) -> None:
        super().__init__()
        self.make_input, self.one_hot, self.network = make_input, one_hot, network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network(torch.cat([self.make_input(x), self.one_hot(y)], -1))
