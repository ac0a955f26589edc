"""The saw series: what an encoder must see (Margossian & Blei 2024).

Each tooth of a series goes up by a latent z_n and down by a known factor, with an offset theta that
all teeth share:

    z_n ~ Normal(x_n, 1),    x_{n+1} ~ Normal(0.75 (z_n + theta), 1)

The posterior of z_n depends on both x_n and x_{n+1}. An encoder that sees both has no amortization
gap. One that sees x_{n+1} alone has one of half a nat, whatever its network and its training.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv

NUM_TEETH, DECAY, THETA = 2000, 0.75, 0.4
INNOVATION = (1 + DECAY**2) ** 0.5  # standard deviation of x_{n+1} given x_n


def model(before: Tensor, after: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("teeth", NUM_TEETH, subsample=before):
        z = pyro.sample("z", dist.Normal(before, 1.0))
        pyro.sample("after", dist.Normal(DECAY * (z + theta), 1.0), obs=after)


# The guide's head is linear, and so is the posterior mean.
class Both(nn.Module):
    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return torch.stack([before, after], -1)


class After(nn.Module):
    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return after.unsqueeze(-1)


def series(num_teeth: int) -> tuple[Tensor, Tensor]:
    """Pairs (x_n, x_{n+1}) of a stationary series, of mean 3 theta."""
    x = [torch.tensor(3 * THETA)]
    for noise in INNOVATION * torch.randn(num_teeth + 100):
        x.append(DECAY * (x[-1] + THETA) + noise)
    values = torch.stack(x[100:])
    return values[:-1], values[1:]


def main() -> None:
    torch.manual_seed(0)
    train, test = series(NUM_TEETH), series(200)
    guides = {}
    for name, encoder in {"sees both": Both(), "sees x_{n+1}": After()}.items():
        offset = pyro.infer.autoguide.AutoNormal(pyro.poutine.block(model, expose=["theta"]))
        guide = pv.AmortizedGuide(model, encoder, example=train, global_guide=offset)
        optim = {"optim": lambda params: torch.optim.Adam(params, lr=0.01)}
        pv.fit(model, guide, train, **optim, epochs=100, batch_size=500, progress=False)
        guides[name] = guide
    # A gap is a datum's own: theta, which all share, is held at the first guide's median.
    theta = float(guides["sees both"].global_guide.median(*train)["theta"])
    found = pv.compare(model, guides, test, num_particles=2000, seed=0, progress=False)
    print(found)

    before, after = test
    residual = (before - 3 * theta - DECAY * (after - 3 * theta)) / INNOVATION
    print(f"\ntheta, true and found       {THETA:.3f} {theta:.3f}")
    print(f"gap by algebra, these teeth {float(residual.square().mean()) / 2:.3f}")


if __name__ == "__main__":
    main()
