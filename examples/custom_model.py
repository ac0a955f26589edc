"""Bring your own model: counts of events in bins, with an unknown tuning per trial.

x[n, d] ~ Poisson(exp(b_d + W_d z_n)): the log-linear model of neural population activity, a latent
state of two dimensions per trial. Train, compare, export, and believe the number.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv


class PopulationActivity(nn.Module):
    """A Pyro model as Pyro users write them; nothing here is pyro_vae's."""

    def __init__(self, num_neurons: int, num_latents: int) -> None:
        super().__init__()
        self.log_rate = nn.Linear(num_latents, num_neurons)

    def forward(self, counts: Tensor) -> None:
        pyro.module("population", self)
        with pyro.plate("trials", len(counts)):
            prior = dist.Normal(torch.zeros(self.log_rate.in_features), 1.0).to_event(1)
            state = pyro.sample("state", prior)
            rate = self.log_rate(state).clamp(max=10).exp()
            pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=counts)


class Encoder(nn.Sequential):
    def forward(self, counts: Tensor) -> Tensor:
        return super().forward(counts.log1p())


def simulate(num_trials: int, num_neurons: int) -> Tensor:
    state, loadings = torch.randn(num_trials, 2), torch.randn(num_neurons, 2)
    return torch.poisson((1.0 + 0.6 * state @ loadings.T).clamp(max=5).exp())


def main() -> None:
    torch.manual_seed(0)
    counts = simulate(1200, 15)
    train, validation, test = counts.split([960, 200, 40])
    model = PopulationActivity(num_neurons=15, num_latents=2)
    encoder = Encoder(nn.Linear(15, 32), nn.Tanh())
    guide = pv.AmortizedGuide(model, encoder, example=train[:5])
    print(pv.describe(model, train))

    result = pv.fit(
        model,
        guide,
        train,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        epochs=100,
        validation_data=validation,
        patience=20,
        progress=False,
    )
    print(result)
    print(pv.iwae_bound(model, guide, test, num_particles=1000, seed=0))
    comparison = pv.compare(
        model,
        {"encoder": guide, "mean-field": pv.families.Normal()},
        test,
        num_particles=1000,
        seed=0,
    )
    print(comparison)
    tree = pv.to_arviz(
        model, guide, test, num_draws=200, dims={"state": ["axis"], "counts": ["neuron"]}, seed=0
    )
    print(tree["posterior"]["state"].sizes)


if __name__ == "__main__":
    main()
