"""Factor analysis, where the evidence and the posterior are known: what does the guide lose?

The posterior of factor analysis is Gaussian with one covariance for all data, and its mean is
linear in x. A mean-field guide with a linear encoder can then reach the mean exactly, and what it
loses to log p(x) is the correlation of the factors alone. Training by the ELBO takes that into
account: it turns the loadings until the posterior has none, as they are free to turn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pyro_vae as pv

torch.manual_seed(0)


def best_log_evidence(x: Tensor, num_latents: int) -> float:
    """log p(x) per datum at the parameters of maximum likelihood, from the exact evidence."""
    model = pv.zoo.FactorAnalysis(x.shape[1], num_latents).to(x)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -model.log_evidence(x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(model.log_evidence(x).mean().detach())


def main() -> None:
    truth = pv.zoo.FactorAnalysis(num_features=8, num_latents=2).double()
    with torch.no_grad():
        truth.log_noise.copy_(torch.linspace(-1.0, 0.5, 8))
    x = truth.simulate(1000)
    model = pv.zoo.FactorAnalysis(8, 2).double()
    print(pv.describe(model, x))

    guide = pv.AmortizedGuide(model, nn.Linear(8, 8).double(), example=x)
    for learning_rate in (0.03, 0.003):
        pv.fit(
            model,
            guide,
            x,
            optim=lambda parameters, lr=learning_rate: torch.optim.Adam(parameters, lr=lr),
            epochs=60,
            progress=False,
        )
    bound = pv.elbo(model, guide, x, num_particles=100, seed=0)
    exact = model.log_evidence(x).detach()
    print(f"ELBO                        {bound.mean:.4f} ± {bound.mean_std_error:.4f}")
    print(f"exact log p(x)              {float(exact.mean()):.4f}")
    print(f"best log p(x) of all models {best_log_evidence(x, 2):.4f}")
    print("noise, true   ", [round(value, 2) for value in truth.noise.tolist()])
    print("noise, learned", [round(value, 2) for value in model.noise.tolist()])


if __name__ == "__main__":
    main()
