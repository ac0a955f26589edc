"""A table of eye colour by nationality: latent variables without an approximation.

A person's nationality is not seen, the colour of the eyes is. Log evidence and posterior are then
a sum and a ratio of the table's cells, and everything else must agree with them to rounding.
"""

from __future__ import annotations

import torch

import pyro_vae as pv

torch.manual_seed(0)
NATIONS, COLOURS = ("Finland", "Italy", "Japan"), ("blue", "green", "brown")
TABLE = torch.tensor([[75.0, 15.0, 10.0], [12.0, 18.0, 70.0], [1.0, 2.0, 97.0]]).double()


def main() -> None:
    model = pv.zoo.EyeColour(TABLE)
    colour = model.simulate(1000)
    print(pv.describe(model, colour))

    guide = pv.ExactGuide(model, example=colour)
    weights = pv.log_weights(model, guide, colour, num_particles=10, seed=0)
    exact = model.log_evidence(colour).detach()
    print(f"exact log p(x)          {float(exact.mean()):.6f}")
    print(f"mean of the log weights {float(weights.total.mean()):.6f}")
    print(f"largest difference      {float((weights.total - exact).abs().max()):.1e}")

    print("\nwhere a person is from, given the eyes (cells of the column over their sum)")
    posterior = guide.posterior(torch.arange(3))["nationality"]
    for name, row in zip(COLOURS, posterior, strict=True):
        shares = ", ".join(f"{n} {float(p):.3f}" for n, p in zip(NATIONS, row, strict=True))
        print(f"{name:6s} {shares}")

    # The shares of the colours are all that colours alone can teach: EM finds those of the sample.
    start = pv.zoo.EyeColour(torch.ones_like(TABLE))
    learner = pv.ExactGuide(start, example=colour)
    print()
    print(pv.em(start, learner, colour, progress=False))
    seen = torch.bincount(colour, minlength=3) / len(colour)
    learned = start.log_evidence(torch.arange(3)).detach().exp()
    print(f"largest error of a share {float((learned - seen).abs().max()):.1e}")


if __name__ == "__main__":
    main()
