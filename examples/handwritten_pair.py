"""A model and a guide written by hand, as plain functions: one line changes.

The networks live in Pyro's parameter store (pyro.module) and pyro.infer.SVI trains them, as in
Pyro's own VAE tutorial. The loss is pyro_vae's, and the pair is then compared as it is.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor, nn

import pyro_vae as pv

torch.manual_seed(0)
ENCODER = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
DECODER = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64))


def model(x: Tensor) -> None:
    pyro.module("decoder", DECODER)
    bias = pyro.param("bias", torch.zeros(64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Binomial(16, logits=DECODER(z) + bias).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    pyro.module("encoder", ENCODER)
    loc, log_scale = ENCODER(x / 16).chunk(2, dim=-1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def main() -> None:
    digits = pv.datasets.digits()
    train, test = digits.train.float(), digits.test[:32].float()
    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.003}),
        loss=pv.ELBO(),  # the one changed line; it was Trace_ELBO() or TraceMeanField_ELBO()
    )
    for epoch in range(1, 31):
        loss = sum(svi.step(batch) for batch in train[torch.randperm(len(train))].split(128))
        if epoch % 10 == 0:
            print(f"epoch {epoch}: ELBO {-loss / len(train):.2f} nats per digit")

    print(pv.explain(pv.ELBO(), model, guide, test))
    print(pv.compare(model, {"by hand": guide}, test, num_particles=1000, seed=0))
    k_hat = pv.pareto_k(pv.log_weights(model, guide, test, num_particles=1000, seed=0))
    print(f"{int((k_hat > 0.7).sum())} of {len(test)} digits have a k-hat above 0.7")


if __name__ == "__main__":
    main()
