"""The models of the benchmarks as one writes them by hand: plain PyTorch, no Pyro.

Each is an nn.Module that a batch is given to, and returns the loss to minimise: the negative bound
in nats, summed over the batch, an analytic KL where there is one. Networks, sizes, activations and
likelihoods are those of the models of pyro_vae.zoo that the benchmarks set beside them, and
copy_parameters takes over the parameters of such a pair, so that both compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

__all__ = [
    "IWAE",
    "VAE",
    "Amortized",
    "DeepMarkovModel",
    "FactorAnalysis",
    "conv_decoder",
    "conv_encoder",
    "copied_gradients",
    "copy_parameters",
    "mlp",
]


def mlp(sizes: Sequence[int], *, activate_last: bool = False) -> nn.Sequential:
    """Return linear layers with tanh between them, and after the last where it is asked for."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*(layers if activate_last else layers[:-1]))


def conv_encoder(side: int, num_features: int, channels: tuple[int, int]) -> nn.Sequential:
    """Return features of images [N, 1, side, side]: two convolutions and a linear layer."""
    first, second = channels
    return nn.Sequential(
        nn.Conv2d(1, first, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(second * _quarter(side) ** 2, num_features),
        nn.SiLU(),
    )


def conv_decoder(side: int, num_latents: int, channels: tuple[int, int]) -> nn.Sequential:
    """Return logits [N, 1, side, side] of latents [N, L]: conv_encoder turned round."""
    first, second = channels
    quarter = _quarter(side)
    return nn.Sequential(
        nn.Linear(num_latents, first * quarter**2),
        nn.Unflatten(1, (first, quarter, quarter)),
        nn.SiLU(),
        nn.ConvTranspose2d(first, second, 3, stride=2, padding=1, output_padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(second, 1, 3, stride=2, padding=1, output_padding=1),
    )


def _quarter(side: int) -> int:
    if side % 4:
        raise ValueError(f"images of {side} pixels a side: a multiple of 4 is needed")
    return side // 4


class Amortized(nn.Module):
    """An encoder of a batch, and a linear head: locations and log scales of the latents."""

    def __init__(self, encoder: nn.Module, num_features: int, num_latents: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(num_features, 2 * num_latents)

    def posterior(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return locations and log scales, [N, L] each."""
        loc, log_scale = self.head(self.encoder(*batch)).chunk(2, -1)
        return loc, log_scale


class VAE(Amortized):
    """A Bernoulli VAE: one draw of the posterior, and the analytic KL from a standard normal.

    Args:
        encoder: from a batch x to features [N, num_features].
        num_features: width of the features.
        num_latents: L.
        decoder: from latents [N, L] to logits of the shape of x.
    """

    def __init__(
        self, encoder: nn.Module, num_features: int, num_latents: int, decoder: nn.Module
    ) -> None:
        super().__init__(encoder, num_features, num_latents)
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative ELBO of x [N, ...]."""
        loc, log_scale = self.posterior(x)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        nll = binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return nll + standard_kl(loc, log_scale)


class IWAE(VAE):
    """The same VAE, trained by the bound of K draws of each datum (Burda et al. 2016)."""

    def __init__(
        self,
        encoder: nn.Module,
        num_features: int,
        num_latents: int,
        decoder: nn.Module,
        num_particles: int,
    ) -> None:
        super().__init__(encoder, num_features, num_latents, decoder)
        self.num_particles = num_particles

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative IWAE bound of x [N, D]."""
        loc, log_scale = self.posterior(x)
        noise = torch.randn(self.num_particles, *loc.shape, dtype=loc.dtype, device=loc.device)
        z = loc + log_scale.exp() * noise
        logits = self.decoder(z)
        nll = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        # log N(z; 0, 1) - log N(z; loc, scale): the constants cancel.
        prior_over_guide = (0.5 * (noise.square() - z.square()) + log_scale).sum(-1)
        bounds = torch.logsumexp(prior_over_guide - nll.sum(-1), 0) - math.log(self.num_particles)
        return -bounds.sum()


class FactorAnalysis(Amortized):
    """Factor analysis with an encoder: a linear map of L latents, a noise scale per feature.

    Args:
        encoder: from data [N, D] to features [N, num_features].
        num_features: width of the features.
        num_latents: L.
        num_observed: D.
    """

    def __init__(
        self, encoder: nn.Module, num_features: int, num_latents: int, num_observed: int
    ) -> None:
        super().__init__(encoder, num_features, num_latents)
        self.loadings = nn.Parameter(torch.randn(num_observed, num_latents))
        self.mean = nn.Parameter(torch.zeros(num_observed))
        self.log_noise = nn.Parameter(torch.zeros(num_observed))

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative ELBO of x [N, D]."""
        loc, log_scale = self.posterior(x)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        nll = normal_nll(x, z @ self.loadings.T + self.mean, self.log_noise)
        return nll.sum() + standard_kl(loc, log_scale)


class DeepMarkovModel(Amortized):
    """A deep Markov model with independent proposals of the states given the sequence.

    Args:
        num_observed: D, of an observation.
        num_latents: L, of a state.
        hidden: width of the hidden layer of the transition's maps and of the emission.
        num_steps: T.
        encoder_hidden: units of the encoder, in each direction.
        unrolled: whether a Python loop runs over the steps, as the model is told. Without it all
            steps are computed at once, which independent proposals allow: every transition's
            input has been drawn before the first is needed.
    """

    def __init__(
        self,
        num_observed: int,
        num_latents: int,
        *,
        hidden: int,
        num_steps: int,
        encoder_hidden: int,
        unrolled: bool = True,
    ) -> None:
        width = 2 * num_steps * encoder_hidden
        encoder = _BidirectionalEncoder(num_observed, encoder_hidden)
        super().__init__(encoder, width, num_steps * num_latents)
        self.num_latents = num_latents
        self.unrolled = unrolled
        self.start = nn.Parameter(torch.zeros(num_latents))
        self.log_noise = nn.Parameter(torch.zeros(num_observed))
        self.gate = mlp([num_latents, hidden, num_latents])
        self.proposal = mlp([num_latents, hidden, num_latents])
        self.linear = nn.Linear(num_latents, num_latents)
        self.scale = nn.Linear(num_latents, num_latents)
        self.emission = mlp([num_latents, hidden, num_observed])

    def transition(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and scale of the next state."""
        gate, proposal = self.gate(state).sigmoid(), self.proposal(state)
        loc = (1 - gate) * self.linear(state) + gate * proposal
        return loc, softplus(self.scale(proposal.relu())) + 1e-3

    def forward(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        """Return the negative ELBO of sequences [N, T, D] of lengths [N]."""
        size, num_steps, _ = sequences.shape
        loc, log_scale = self.posterior(sequences, lengths)
        loc = loc.view(size, num_steps, self.num_latents)
        log_scale = log_scale.view(size, num_steps, self.num_latents)
        if not self.unrolled:
            return self._at_once(sequences, lengths, loc, log_scale)
        state: Tensor = self.start
        loss = loc.new_zeros(())
        for step in range(num_steps):
            step_loc, step_log_scale = loc[:, step], log_scale[:, step]
            kl_from = self.transition(state)
            state = step_loc + step_log_scale.exp() * torch.randn_like(step_loc)
            kl = normal_kl(step_loc, step_log_scale, *kl_from)
            nll = normal_nll(sequences[:, step], self.emission(state), self.log_noise)
            loss = loss + torch.where(lengths > step, kl.sum(-1) + nll.sum(-1), 0.0).sum()
        return loss

    def _at_once(
        self, sequences: Tensor, lengths: Tensor, loc: Tensor, log_scale: Tensor
    ) -> Tensor:
        states = loc + log_scale.exp() * torch.randn_like(loc)
        before = torch.cat([self.start.expand(len(loc), 1, -1), states[:, :-1]], 1)
        kl = normal_kl(loc, log_scale, *self.transition(before))
        nll = normal_nll(sequences, self.emission(states), self.log_noise)
        there = lengths.unsqueeze(-1) > torch.arange(loc.shape[1], device=loc.device)
        return torch.where(there, kl.sum(-1) + nll.sum(-1), 0.0).sum()


class _BidirectionalEncoder(nn.Module):
    """Features of each step from the past and from the future of its sequence, flattened."""

    def __init__(self, num_observed: int, hidden: int) -> None:
        super().__init__()
        self.past = nn.GRU(num_observed, hidden, batch_first=True)
        self.future = nn.GRU(num_observed, hidden, batch_first=True)

    def forward(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        """Map sequences [N, T, D] of lengths [N] to [N, 2 T hidden]."""
        steps = torch.arange(sequences.shape[1], device=sequences.device)
        # Turned round within its length: the padding stays behind, where no step sees it.
        turned = (lengths.unsqueeze(-1) - 1 - steps) % sequences.shape[1]
        rows = torch.arange(len(sequences), device=sequences.device).unsqueeze(-1)
        past, _ = self.past(sequences)
        future, _ = self.future(sequences[rows, turned])
        features = torch.cat([past, future[rows, turned]], -1)
        there = (steps < lengths.unsqueeze(-1)).unsqueeze(-1)
        return (features * there).flatten(1)


def standard_kl(loc: Tensor, log_scale: Tensor) -> Tensor:
    """Return the KL of normals from standard ones, summed."""
    return 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()


def normal_kl(loc: Tensor, log_scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
    """Return the KL of normals from others, each."""
    ratio = (log_scale.exp() / prior_scale).square()
    return 0.5 * (ratio + ((loc - prior_loc) / prior_scale).square() - 1 - ratio.log())


def normal_nll(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Return the negative log density of normals, each."""
    return 0.5 * ((x - loc) / log_scale.exp()).square() + log_scale + 0.5 * math.log(2 * math.pi)


def copy_parameters(by_hand: Amortized, model: nn.Module, guide: nn.Module) -> None:
    """Give a model by hand the parameters of a pair of the same architecture.

    Args:
        by_hand: one of the models of this file.
        model: the generative half of the pair.
        guide: the other half, with ``encoder`` and ``head``, a linear layer to location and log
            scale of each latent in turn.

    Raises:
        ValueError: where the parameters are not of the same number and shapes.
    """
    with torch.no_grad():
        for mine, theirs in _pairs(by_hand, model, guide, lambda parameter: parameter):
            mine.copy_(theirs)


def copied_gradients(
    by_hand: Amortized, model: nn.Module, guide: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return gradients of a model by hand beside those of a pair, after backward of both."""
    for mine, theirs in _pairs(by_hand, model, guide, _gradient):
        if mine.grad is not None:
            yield mine.grad, theirs


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _pairs(
    by_hand: Amortized, model: nn.Module, guide: nn.Module, take: Callable[[Tensor], Tensor]
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Return each parameter beside what is taken of the pair's, in the order of this file."""
    encoder, head = guide.encoder, guide.head
    if not isinstance(encoder, nn.Module) or not isinstance(head, nn.Linear):
        raise ValueError("the guide is to have an encoder, and a linear head")
    theirs = [take(parameter) for parameter in encoder.parameters()]
    # From location and log scale in turn to all locations before all log scales.
    for parameter in (head.weight, head.bias):
        theirs.append(take(parameter).unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1))
    theirs += [take(parameter) for parameter in model.parameters()]
    above = {id(parameter) for part in ("encoder", "head") for parameter in _of(by_hand, part)}
    mine = [*_of(by_hand, "encoder"), *_of(by_hand, "head")]
    mine += [parameter for parameter in by_hand.parameters() if id(parameter) not in above]
    shapes = [parameter.shape for parameter in mine], [parameter.shape for parameter in theirs]
    if shapes[0] != shapes[1]:
        raise ValueError(f"parameters of shapes {shapes[0]} cannot be those of {shapes[1]}")
    return zip(mine, theirs, strict=True)


def _of(module: nn.Module, part: str) -> list[nn.Parameter]:
    return list(module.get_submodule(part).parameters())
