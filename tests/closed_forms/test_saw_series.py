"""The saw series of Margossian & Blei (2024): amortization gaps that algebra gives, by encoder."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate

import pyro_vae as pv

pytestmark = pytest.mark.usefixtures("float64")

DECAY, THETA = 0.75, -0.8
VARIANCE = 1 / (1 + DECAY**2)  # of z_n given x_n and x_{n+1}
MEAN = DECAY * THETA / (1 - DECAY)  # of the series


def model(before, after):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("teeth", len(before)):
        z = pyro.sample("z", dist.Normal(before, 1.0))
        pyro.sample("after", dist.Normal(DECAY * (z + theta), 1.0), obs=after)


def series(num_teeth):
    x = [torch.tensor(MEAN)]
    for noise in VARIANCE**-0.5 * torch.randn(num_teeth + 100):
        x.append(DECAY * (x[-1] + THETA) + noise)
    values = torch.stack(x[100:])
    return values[:-1], values[1:]


def posterior_mean(before, after):
    return VARIANCE * (before + DECAY * (after - DECAY * THETA))


def best_of_after(before, after):
    return posterior_mean(MEAN + DECAY * (after - MEAN), after)


def guide_of(location, scale=VARIANCE**0.5):
    def guide(before, after):
        with pyro.plate("teeth", len(before)):
            pyro.sample("z", dist.Normal(location(before, after), scale))

    return guide


def gap_by_algebra(location, scale, before, after):
    """KL(Normal(location, scale), posterior) of each tooth."""
    ratio = scale**2 / VARIANCE
    shift = location(before, after) - posterior_mean(before, after)
    return 0.5 * (ratio - 1 - math.log(ratio)) + shift.square() / (2 * VARIANCE)


def test_the_posterior_is_that_of_quadrature():
    before, after = 0.3, 1.7

    def joint(z):
        return math.exp(-0.5 * (z - before) ** 2 - 0.5 * (after - DECAY * (z + THETA)) ** 2)

    moments = [integrate.quad(lambda z, k=k: z**k * joint(z), -20, 20)[0] for k in range(3)]
    mean = moments[1] / moments[0]
    assert float(posterior_mean(torch.tensor(before), torch.tensor(after))) == pytest.approx(mean)
    assert moments[2] / moments[0] - mean**2 == pytest.approx(VARIANCE)


def test_the_gap_of_an_encoder_is_what_it_does_not_see():
    before, after = series(60)
    locations = {
        "both": (posterior_mean, VARIANCE**0.5),
        "after": (best_of_after, VARIANCE**0.5),
        "before": (lambda before, after: before, 1.0),  # the prior
        "a wrong width": (posterior_mean, 0.5),
    }
    found = pv.compare(
        model,
        {name: guide_of(*pair) for name, pair in locations.items()},
        before,
        after,
        given={"theta": THETA},
        num_particles=2000,
        seed=0,
        progress=False,
    )
    data = found.dataset
    for name, (location, scale) in locations.items():
        exact = gap_by_algebra(location, scale, before, after).numpy()
        gap, error = (
            data[key].sel(guide=name).values for key in ("amortization_gap", "amortization_gap_se")
        )
        assert (abs(gap - exact) < 4.5 * error + 2e-4).all(), name
        row = found.summary().loc[name]
        assert abs(row["amortization_gap"] - exact.mean()) < 4 * row["amortization_gap_se"] + 2e-4
        assert abs(row["approximation_gap"]) < 2e-3
    residual = (before - MEAN - DECAY * (after - MEAN)) * VARIANCE**0.5
    by_hand = (residual.square() / 2).numpy()
    exact = gap_by_algebra(best_of_after, VARIANCE**0.5, before, after)
    np.testing.assert_allclose(exact, by_hand, rtol=1e-10)


def test_half_a_nat_is_the_least_that_an_encoder_of_the_next_value_loses():
    """Over a long series: the best encoder is the regression of the posterior mean on it."""
    before, after = series(20_000)
    exact = gap_by_algebra(best_of_after, VARIANCE**0.5, before, after)
    assert abs(float(exact.mean()) - 0.5) < 4 * 0.5**0.5 / 20_000**0.5
    target = posterior_mean(before, after).numpy()
    slope, intercept = np.polyfit(after.numpy(), target, 1)
    wanted = best_of_after(None, torch.tensor([0.0, 1.0]))
    assert intercept == pytest.approx(float(wanted[0]), abs=0.03)
    assert slope == pytest.approx(float(wanted[1] - wanted[0]), abs=0.02)
    for scale in (0.7, 0.9):
        assert gap_by_algebra(best_of_after, scale, before, after).mean() > exact.mean()


@pytest.mark.slow
def test_encoders_that_are_trained_reach_these_gaps():
    class Encoder(torch.nn.Module):
        def __init__(self, *seen: int) -> None:
            super().__init__()
            self.seen = seen

        def forward(self, *pair):
            return torch.stack([pair[index] for index in self.seen], -1)

    held = pyro.condition(model, data={"theta": torch.tensor(THETA)})
    given = pyro.poutine.block(held, hide=["theta"])
    data = series(1000)
    guides = {}
    for name, seen in (("both", (0, 1)), ("after", (1,))):
        torch.manual_seed(0)
        guide = pv.AmortizedGuide(given, Encoder(*seen).double(), example=data)
        for rate in (0.02, 0.002):
            pv.fit(
                given,
                guide,
                data,
                optim=lambda params, lr=rate: torch.optim.Adam(params, lr=lr),
                epochs=300,
                batch_size=1000,
                progress=False,
            )
        guides[name] = guide
    found = pv.compare(given, guides, *data, num_particles=500, seed=0, progress=False).summary()
    exact = float(gap_by_algebra(best_of_after, VARIANCE**0.5, *data).mean())
    assert found.loc["both", "amortization_gap"] < 0.005
    # The best affine encoder of these 1,000 teeth is a little better than that of the series.
    assert found.loc["after", "amortization_gap"] == pytest.approx(exact, abs=0.01)
