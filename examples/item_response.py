"""Item response theory: how hard are the questions of a test, and how well do they tell?

Abilities belong to persons and come from an encoder of their answers; difficulty and discrimination
belong to items, and have a Gaussian each in a guide of their own. Both are trained at once. These
Gaussians are independent, and so narrower than the posterior: their intervals miss the truth more
often than they should.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyro_vae as pv

torch.manual_seed(0)
NUM_ITEMS, NUM_PERSONS = 20, 2000


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def main() -> None:
    items = {
        "difficulty": torch.linspace(-2, 2, NUM_ITEMS),
        "discrimination": torch.tensor([0.5, 1.0, 1.5, 2.0]).repeat(NUM_ITEMS // 4),
    }
    model = pv.zoo.ItemResponse(NUM_ITEMS, num_persons=NUM_PERSONS)
    responses = model.simulate(NUM_PERSONS, items=items)
    print(pv.describe(model, responses))

    item_guide = model.make_global_guide()
    guide = pv.AmortizedGuide(
        model, model.make_encoder([32]), example=responses, global_guide=item_guide
    )
    result = pv.fit(
        model,
        guide,
        responses,
        loss=pv.ELBO(),
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        batch_size=250,
        epochs=40,
        progress=False,
    )
    print(result)
    with torch.no_grad():
        found = item_guide.median(responses)
        low, high = item_guide.quantiles([0.025, 0.975], responses)["difficulty"]
    inside = (low < items["difficulty"]) & (items["difficulty"] < high)
    error = (found["difficulty"] - items["difficulty"]).abs().mean()
    print("item   difficulty: true, found   discrimination: true, found")
    for j in range(0, NUM_ITEMS, 5):
        row = [t[j] for name in items for t in (items[name], found[name])]
        print(f"{j:4d} {row[0]:15.2f} {row[1]:7.2f} {row[2]:20.2f} {row[3]:7.2f}")
    print(f"mean error of difficulty      {float(error):.3f}")
    print(f"truth in the 95% interval     {float(inside.float().mean()):.2f}")
    told = correlation(items["discrimination"], found["discrimination"])
    print(f"correlation of discrimination {told:.3f}")
    # Of each person, given the items at their medians: who answers as no ability explains?
    bound = pv.iwae_bound(model, guide, responses[:200], num_particles=500, seed=0)
    print(bound)
    print(f"least expected answers: person {int(bound.value.argmin())}")


if __name__ == "__main__":
    main()
