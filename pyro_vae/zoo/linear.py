"""Linear Gaussian models: factor analysis and probabilistic PCA, with exact answers."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.nets import MLP
from pyro_vae.programs.handlers import Registered, register
from pyro_vae.zoo.simulation import draw


class FactorAnalysis(Registered):
    r"""Factor analysis: a linear map of few latents, and a noise scale for each feature.

    .. math::
        z \sim \mathrm{Normal}(0, I_L), \quad
        x | z \sim \mathrm{Normal}(W z + \mu, \mathrm{diag}(\psi_1^2, \dots, \psi_D^2))

    All of it is Gaussian, so that evidence and posterior are known (Rubin & Thayer 1982):

    .. math::
        x \sim \mathrm{Normal}(\mu, W W^\top + \Psi), \quad
        z | x \sim \mathrm{Normal}(P^{-1} W^\top \Psi^{-1} (x - \mu), P^{-1}), \quad
        P = I + W^\top \Psi^{-1} W

    The posterior is the same for every rotation of the loadings, and diagonal for some only.

    Args:
        num_features: D, dimensions of a datum.
        num_latents: L, at most D.

    Raises:
        ValueError: for num_latents below 1 or above num_features.

    Example:
        >>> import torch
        >>> model = FactorAnalysis(6, 2)
        >>> x = model.simulate(5)
        >>> model.log_evidence(x).shape, model.posterior(x).event_shape
        (torch.Size([5]), torch.Size([2]))
    """

    def __init__(self, num_features: int, num_latents: int) -> None:
        super().__init__()
        if not 1 <= num_latents <= num_features:
            raise ValueError(
                f"num_latents={num_latents}: between 1 and num_features={num_features} are needed"
            )
        self.loadings = nn.Parameter(torch.randn(num_features, num_latents))
        self.mean = nn.Parameter(torch.zeros(num_features))
        self.log_noise = nn.Parameter(torch.zeros(num_features))

    @property
    def noise(self) -> Tensor:
        """Standard deviation of the noise of each feature, [D]."""
        return self.log_noise.exp().expand(self.mean.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Run the model on data [N, D]; return the value of its observed site."""
        register(self)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(self.mean.new_zeros(self.loadings.shape[1]), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            location = z @ self.loadings.T + self.mean
            return pyro.sample("x", dist.Normal(location, self.noise).to_event(1), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Return log p(x) of data [N, D], [N]."""
        # By Bayes' rule at the posterior mean: the quadratic form of the marginal is a difference
        # of large numbers where the noise is small.
        posterior = self.posterior(x)
        z = posterior.mean
        prior = dist.Normal(torch.zeros_like(z), 1.0).to_event(1)
        likelihood = dist.Normal(z @ self.loadings.T + self.mean, self.noise).to_event(1)
        return likelihood.log_prob(x) + prior.log_prob(z) - posterior.log_prob(z)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Return p(z | x) of data [N, D], of batch shape [N] and event shape [L]."""
        weighted = self.loadings / self.noise.unsqueeze(-1) ** 2
        identity = torch.eye(weighted.shape[1], dtype=weighted.dtype, device=weighted.device)
        precision = identity + self.loadings.T @ weighted
        location = torch.linalg.solve(precision, (x - self.mean) @ weighted, left=False)
        return dist.MultivariateNormal(location, precision_matrix=precision)

    def make_encoder(self, hidden: Sequence[int], *, missing: bool = False) -> nn.Module:
        """Return a new encoder of x [N, D] to features [N, hidden[-1]].

        With ``missing`` of [N, 2 D], as :class:`pyro_vae.MissingEncoder` gives it.
        """
        sizes = [len(self.mean) * (1 + missing), *hidden]
        return MLP(sizes, activate_last=True).to(self.mean)

    def simulate(self, num_data: int, seed: int = 0) -> Tensor:
        """Draw data [num_data, D] from the model."""
        return draw(self, self.mean.new_zeros(num_data, len(self.mean)), seed=seed)


class ProbabilisticPCA(FactorAnalysis):
    r"""Probabilistic PCA: factor analysis whose features share one noise scale.

    .. math::
        z \sim \mathrm{Normal}(0, I_L), \quad
        x | z \sim \mathrm{Normal}(W z + \mu, \sigma^2 I_D)

    The loadings of highest likelihood span the principal subspace (Tipping & Bishop 1999,
    eq. 7). Arguments, evidence and posterior are those of :class:`FactorAnalysis`.

    Example:
        >>> import torch
        >>> model = ProbabilisticPCA(6, 2)
        >>> model.noise
        tensor([1., 1., 1., 1., 1., 1.], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, num_features: int, num_latents: int) -> None:
        super().__init__(num_features, num_latents)
        self.log_noise = nn.Parameter(torch.zeros(1))
