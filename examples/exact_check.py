"""Check every number against algebra: factor analysis, where log p(x) is known.

x = W z + mu + noise with z ~ Normal(0, I) is Gaussian, and so is p(z | x), whose precision
P = I + W'W / s^2 is the same for every x. The best diagonal Gaussian has the variances 1 / P_ii,
and its KL to the posterior is (sum_i log P_ii - log det P) / 2: that is the approximation gap.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv

torch.manual_seed(0)
LOADINGS = torch.randn(6, 3, dtype=torch.float64)
MEAN = torch.randn(6, dtype=torch.float64)
NOISE = 0.5


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS.T + MEAN, NOISE).to_event(1), obs=x)


def exact_log_evidence(x: Tensor) -> Tensor:
    covariance = LOADINGS @ LOADINGS.T + NOISE**2 * torch.eye(6, dtype=x.dtype)
    return dist.MultivariateNormal(MEAN, covariance).log_prob(x)


def exact_mean_field_kl() -> float:
    precision = torch.eye(3, dtype=torch.float64) + LOADINGS.T @ LOADINGS / NOISE**2
    return float(0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)))


def main() -> None:
    draws = torch.randn(1000, 3, dtype=torch.float64) @ LOADINGS.T + MEAN
    x = draws + NOISE * torch.randn_like(draws)
    train, test = x[:950], x[950:]
    # Small on purpose, so that it leaves a gap: the exact posterior mean is linear in x.
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double()
    guide = pv.AmortizedGuide(model, encoder, example=train)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
    pv.fit(model, guide, train, optim=optimizer, epochs=100, progress=False)
    comparison = pv.compare(
        model,
        {"encoder": guide, "mean-field": pv.families.Normal()},
        test,
        num_particles=2000,
        seed=0,
    )
    print(comparison)

    found = comparison.summary().loc["encoder"]
    exact = float(exact_log_evidence(test).mean())
    gaps = found["approximation_gap"] + found["amortization_gap"]
    print(f"\nexact log p(x)                  {exact:.4f}")
    print(f"ELBO + both gaps                {found['elbo'] + gaps:.4f}")
    print(f"exact KL of the best mean field {exact_mean_field_kl():.4f}")
    print(
        f"approximation gap               {found['approximation_gap']:.4f} "
        f"± {found['approximation_gap_se']:.4f}"
    )
    assert abs(found["elbo"] + gaps - exact) < 4 * found["log_evidence_se"] + 0.005
    assert abs(found["approximation_gap"] - exact_mean_field_kl()) < 0.02


if __name__ == "__main__":
    main()
