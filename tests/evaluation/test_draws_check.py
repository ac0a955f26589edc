"""The verdict on a guide's draws, against posteriors that are known by algebra."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.diagnostics.moments import Moments
from pyro_vae.evaluation.draws_check import _verdict

N, NOISE = 30, 1.0
F64 = torch.float64


def model(x: Tensor) -> None:
    """mu ~ N(0, 1), z_n ~ N(mu, 1), x_n ~ N(z_n, 1)."""
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def data() -> Tensor:
    return 0.5 + torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=F64)


def exact_draws(x: Tensor, shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """Draws of the joint posterior: mu given x, then each z_n given mu and x_n."""
    generator = torch.Generator().manual_seed(seed)
    precision = 1 + N / (1 + NOISE**2)
    mean = x.sum() / (1 + NOISE**2) / precision
    mu = mean + torch.randn(shape, generator=generator, dtype=F64) / math.sqrt(precision)
    gain = 1 / (1 + NOISE**-2)
    noise = torch.randn(*shape, N, generator=generator, dtype=F64)
    z = gain * (mu.unsqueeze(-1) + x / NOISE**2) + math.sqrt(gain) * noise
    return {"mu": mu, "z": z}


def samples(draws: dict[str, Tensor], num_data: int, whole: bool, good: bool = True):
    """Chains that have converged, or not, with these draws."""
    shape = next(iter(draws.values())).shape[:2]
    one = torch.ones(num_data, dtype=F64)
    return pv.PosteriorSamples(
        draws=draws,
        log_joint=torch.zeros(*shape, num_data, dtype=F64),
        rhat=one if good else 1.1 * one,
        ess=4000 * one,
        ess_tail=4000 * one,
        acceptance=0.8 * one,
        divergences=0 * one,
        step_size=one,
        num_steps=(10,),
        given={},
        is_whole=whole,
    )


def mean_field(x: Tensor, top_down: bool, mu_width: float = 1.0):
    """A hand-written guide: independent proposals, or z_n given mu; marginals of z_n are right."""
    precision = 1 + N / (1 + NOISE**2)
    mean, sd = x.sum() / (1 + NOISE**2) / precision, precision**-0.5
    gain = 1 / (1 + NOISE**-2)

    def guide(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(mean, mu_width * sd))
        seen, width = (mu, gain**0.5) if top_down else (mean, (gain + (gain * sd) ** 2) ** 0.5)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gain * (seen + x / NOISE**2), width))

    return guide


def check(guide, x: Tensor, posterior, **options):
    return pv.check_draws(model, guide, x, posterior=posterior, data_plate=False, **options)


def test_right_one_by_one_and_wrong_together():
    """Every marginal is right; sums of latents are not, which only a direction shows."""
    x = data()
    posterior = samples(exact_draws(x, (4, 1000), 0), 1, whole=True)
    joint = check(mean_field(x, top_down=True), x, posterior, seed=0)
    assert joint.good.tolist() == [True]
    apart = check(mean_field(x, top_down=False), x, posterior, seed=0)
    assert apart.good.tolist() == [False]
    found = apart.dataset.isel(datum=0)
    # The least ratio, by algebra: independent proposals against the joint covariance.
    sd2, gain = 1 / (1 + N / (1 + NOISE**2)), 1 / (1 + NOISE**-2)
    to = torch.full((N + 1, 1), gain, dtype=F64)
    to[0] = 1.0
    covariance = sd2 * to @ to.T + gain * torch.eye(N + 1, dtype=F64)
    covariance[0, 0] = sd2
    root = torch.linalg.inv(torch.linalg.cholesky(covariance))
    ratios = torch.linalg.eigvalsh(root @ covariance.diagonal().diag() @ root.T).sqrt()
    assert float(ratios[0]) < 0.75
    assert float(found.narrowest) == pytest.approx(
        float(ratios[0]), abs=4 * float(found.narrowest_se) + 0.03
    )
    assert "bad" in repr(apart) and "good" in repr(joint)
    assert apart.summary().loc["narrowest", "worst"] == float(found.narrowest)


def test_the_site_is_named():
    x = data()
    posterior = samples(exact_draws(x, (4, 1000), 0), 1, whole=True)
    found = check(mean_field(x, True, mu_width=0.5), x, posterior, seed=0).dataset
    assert found.narrowest_site.item() == "mu" and not found.good.item()


def per_datum(x: Tensor) -> None:
    """Rates of counts on a constrained support: the posterior is Gamma(2 + x, 2)."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_datum_has_a_verdict(dtype):
    """The exact Gamma posterior for all data but one, whose mean is off and one too narrow."""
    x = torch.tensor([0.0, 3.0, 9.0, 20.0], dtype=dtype)
    shape = 2 + x
    factor = torch.tensor([1.0, 1.0, 4.0, 1.0], dtype=dtype)
    shift = torch.tensor([1.0, 1.0, 1.0, 1.3], dtype=dtype)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(shape * factor * shift, 2.0 * factor))

    torch.manual_seed(0)
    draws = {"rate": dist.Gamma(shape, torch.full_like(x, 2.0)).sample((4, 1000))}
    posterior = samples(draws, 4, whole=False)
    found = pv.check_draws(per_datum, guide, x, posterior=posterior, seed=0)
    assert found.good.tolist() == [True, True, False, False]
    assert found.dataset.narrowest[2] == pytest.approx(0.5, abs=0.06)
    assert found.dataset["shift"][3] > 0.2
    assert "good for 50.0% of the data" in repr(found)
    assert found.plot().get_title(loc="left")
    doubted = pv.check_draws(
        per_datum, guide, x, posterior=samples(draws, 4, whole=False, good=False), seed=0
    )
    assert not doubted.good.any() and "have not converged" in repr(doubted)


def test_too_few_draws_are_no_good_verdict():
    x = data()
    posterior = samples(exact_draws(x, (4, 1000), 0), 1, whole=True)
    found = check(mean_field(x, top_down=True), x, posterior, num_draws=200, seed=0)
    assert found.good.tolist() == [False]


def test_refusals():
    x = data()
    draws = exact_draws(x, (4, 100), 0)
    guide = mean_field(x, top_down=True)
    with pytest.raises(ValueError, match="chains of 3 data, and the batch 1"):
        check(guide, x, samples(draws, 3, whole=True))
    with pytest.raises(ValueError, match=r"no draws of \['mu'\]"):
        check(guide, x, samples({"z": draws["z"]}, 1, whole=True))
    with pytest.raises(ValueError, match="num_draws"):
        check(guide, x, samples(draws, 1, whole=True), num_draws=10)


@pytest.mark.slow
def test_chains_of_our_own():
    """With sample_posterior in the place of exact draws, the verdicts are the same."""
    x = data()
    guide = mean_field(x, top_down=False)
    chains = pv.sample_posterior(model, guide, x, data_plate=False, seed=0, progress=False)
    assert chains.converged.all()
    assert not check(guide, x, chains, seed=0).good.any()
    assert check(mean_field(x, top_down=True), x, chains, seed=0).good.all()


@pytest.mark.parametrize(
    ("shift", "width", "good"),
    [(0.21, 1.0, True), (0.26, 1.0, False), (0.0, 0.89, True), (0.0, 0.84, False)],
)
def test_what_chance_explains_is_no_alarm(shift, width, good):
    """One axis and one direction: limits and 3.2 standard errors, normal's at 0.01 / 16."""
    one = np.ones(2)
    moments = Moments(np.ones((2, 1)), shift * one, 0.01 * one, width * one, 0.01 * one)
    assert _verdict(moments, np.array(["z"]), 0.2, 0.1)["good"] is good
    unsure = replace(moments, width_se=0.1 * one)
    assert _verdict(unsure, np.array(["z"]), 0.2, 0.1)["good"] is False
