"""Models of sequences of different length."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.nets import MLP
from pyro_vae.programs.handlers import Registered, register
from pyro_vae.zoo.simulation import draw, draw_integers

# Below this a transition's scale would make its density overflow in float32.
_MIN_SCALE = 1e-3


class DeepMarkovModel(Registered):
    r"""A deep Markov model: a state space model whose maps are networks (Krishnan et al. 2017).

    .. math::
        z_t | z_{t-1} \sim \mathrm{Normal}(m(z_{t-1}), \mathrm{diag}\, s(z_{t-1})^2), \quad
        x_t | z_t \sim \mathrm{Normal}(f(z_t), \mathrm{diag}\, \psi^2), \quad t \le T_n

    The batch is ``(sequences, lengths)``: sequences [N, T, D], padded with any finite number
    after step :math:`T_n`, and lengths [N], whole numbers from 1 to T. Steps past a
    sequence's length are masked, latents and observations alike: they are not there. The
    latent sites are ``z_1`` to ``z_T``, the observed ones ``x_1`` to ``x_T``; a guide made from
    an example takes batches of its T.

    Args:
        num_features: D, dimensions of an observation.
        num_latents: L, dimensions of a state.
        hidden: widths of the hidden layers of the transition and of f.

    Example:
        >>> model = DeepMarkovModel(3, 2, hidden=[8])
        >>> sequences, lengths = model.simulate(5, num_steps=4)
        >>> sequences.shape, lengths.shape
        (torch.Size([5, 4, 3]), torch.Size([5]))
    """

    def __init__(self, num_features: int, num_latents: int, *, hidden: Sequence[int]) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(num_latents))
        self.transition = GatedTransition(num_latents, hidden)
        self.emission = MLP([num_latents, *hidden, num_features])
        self.log_noise = nn.Parameter(torch.zeros(num_features))

    @property
    def noise(self) -> Tensor:
        """Standard deviation of each feature about its mean f(z), [D]."""
        return self.log_noise.exp()

    def forward(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        """Run the model on sequences [N, T, D]; return the values of its observed sites."""
        register(self)
        state: Tensor = self.start
        values = []
        with pyro.plate("sequences", len(sequences)):
            for step in range(sequences.shape[1]):
                there = lengths > step
                prior = dist.Normal(*self.transition(state)).to_event(1).mask(there)
                state = pyro.sample(f"z_{step + 1}", prior)
                likelihood = dist.Normal(self.emission(state), self.noise).to_event(1).mask(there)
                values.append(pyro.sample(f"x_{step + 1}", likelihood, obs=sequences[:, step]))
        return torch.stack(values, -2)

    def make_encoder(self, hidden: int, *, missing: bool = False) -> nn.Module:
        """Return a new encoder of (sequences, lengths) to features [N, 2 T hidden].

        Recurrent in both directions, with ``hidden`` units each. A step's features depend on
        its own sequence alone, not on the padding. With ``missing`` sequences are [N, T, 2 D],
        as :class:`pyro_vae.MissingEncoder` gives them.
        """
        size = len(self.log_noise) * (1 + missing)
        return _BidirectionalEncoder(size, hidden).to(self.log_noise)

    def simulate(
        self, num_data: int, seed: int = 0, *, num_steps: int = 10
    ) -> tuple[Tensor, Tensor]:
        """Draw sequences [num_data, num_steps, D] and lengths [num_data] from the model.

        Lengths are uniform from half of num_steps to num_steps; the padding is zero.
        """
        blank = self.log_noise.new_zeros(num_data, num_steps, len(self.log_noise))
        lengths, other_seed = draw_integers((num_steps + 1) // 2, num_steps + 1, blank, seed)
        sequences = draw(self, blank, lengths, seed=other_seed)
        return sequences * _steps_there(sequences, lengths), lengths


class GatedTransition(nn.Module):
    r"""The transition of a deep Markov model: a gate between a linear and a nonlinear mean.

    .. math::
        m(z) = (1 - g(z)) \odot (A z + b) + g(z) \odot h(z), \quad
        s(z) = \mathrm{softplus}(C \, \mathrm{relu}(h(z)) + d)

    (Krishnan et al. 2017, section 5.) The linear part starts at the identity, so that
    states persist before anything is learned.

    Args:
        num_latents: L.
        hidden: widths of the hidden layers of g and h.
    """

    def __init__(self, num_latents: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.gate = MLP([num_latents, *hidden, num_latents])
        self.proposal = MLP([num_latents, *hidden, num_latents])
        self.linear = nn.Linear(num_latents, num_latents)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.scale = nn.Linear(num_latents, num_latents)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and scale of the next state, of the shape of this one."""
        gate, proposal = self.gate(state).sigmoid(), self.proposal(state)
        location = (1 - gate) * self.linear(state) + gate * proposal
        return location, softplus(self.scale(proposal.relu())) + _MIN_SCALE


class _BidirectionalEncoder(nn.Module):
    """Features of each step from the past and from the future of its sequence, flattened."""

    def __init__(self, num_features: int, hidden: int) -> None:
        super().__init__()
        self.past = nn.GRU(num_features, hidden, batch_first=True)
        self.future = nn.GRU(num_features, hidden, batch_first=True)

    def forward(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        # Turned round within its length: the padding stays behind, where no step sees it.
        steps = torch.arange(sequences.shape[1], device=sequences.device)
        turned = (lengths.unsqueeze(-1) - 1 - steps) % sequences.shape[1]
        rows = torch.arange(len(sequences), device=sequences.device).unsqueeze(-1)
        past, _ = self.past(sequences)
        future, _ = self.future(sequences[rows, turned])
        features = torch.cat([past, future[rows, turned]], -1)
        return (features * _steps_there(sequences, lengths)).flatten(1)


def _steps_there(sequences: Tensor, lengths: Tensor) -> Tensor:
    """Return which steps lie within their sequence's length, [N, T, 1]."""
    steps = torch.arange(sequences.shape[1], device=sequences.device)
    return (steps < lengths.unsqueeze(-1)).unsqueeze(-1)
