"""Sites that float32 is too coarse for: scored in float64, or warned of."""

from __future__ import annotations

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from tests.models import NormalModel

F64 = torch.float64
GENES = 2000


@pytest.fixture
def counts():
    """Counts to a million of two data, their base rates and loads, all exact in float32."""
    generator = torch.Generator().manual_seed(0)
    base = torch.exp(9 + 1.5 * torch.randn(GENES, generator=generator)).double()
    load = (0.2 * torch.randn(GENES, generator=generator)).double()
    x = torch.poisson(base * torch.exp(0.5 * load) + torch.zeros(2, 1), generator=generator)
    return base, load, x


def model_of(kind, base, load):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(base.new_zeros(()), 1.0)).unsqueeze(-1)
            mean = base * torch.exp(z * load)
            if kind == "NegativeBinomial":
                size = base.new_tensor(20.0)
                fn = dist.NegativeBinomial(size, logits=mean.log() - math.log(20.0))
            else:
                fn = dist.Poisson(mean)
            pyro.sample("x", fn.to_event(1), obs=x)

    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["NegativeBinomial", "Poisson"])
def test_bounds_of_large_counts_in_float32(kind, counts, caplog):
    base, load, x = counts
    grid = torch.linspace(-0.3, 1.3, 3201, dtype=F64)
    joint = torch.stack(
        [
            pyro.poutine.trace(pyro.condition(model_of(kind, base, load), {"z": z.expand(2)}))
            .get_trace(x)
            .nodes["x"]["fn"]
            .log_prob(x)
            + dist.Normal(0.0, 1.0).log_prob(z)
            for z in grid
        ]
    )
    mode = grid[joint.argmax(0)]
    wide = 0.06 if kind == "NegativeBinomial" else 0.003
    offsets = torch.linspace(-8 * wide, 8 * wide, 1601, dtype=F64)
    model = model_of(kind, base, load)
    fine = []
    for offset in offsets:
        z = mode + offset
        trace = pyro.poutine.trace(pyro.condition(model, {"z": z})).get_trace(x)
        fine.append(trace.nodes["x"]["fn"].log_prob(x) + dist.Normal(0.0, 1.0).log_prob(z))
    table = torch.stack(fine)
    exact = table.logsumexp(0) + (offsets[1] - offsets[0]).log()
    share = table.softmax(0)
    mean = (share * offsets.unsqueeze(1)).sum(0)
    sd = (share * (offsets.unsqueeze(1) - mean) ** 2).sum(0).sqrt()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((mode + mean).float(), (1.2 * sd).float()))

    narrow = model_of(kind, base.float(), load.float())
    found = pv.iwae_bound(narrow, guide, x.float(), num_particles=1000, seed=0)
    coarse = float(next((r.args[1] for r in caplog.records if "float32" in r.msg), 0.0))
    assert ((found.value - exact).abs() < 5 * found.std_error + 2 * coarse).all()
    assert ((found.value - exact).abs() < 0.2).all()  # 1 to 3 nats in float32


def test_a_loss_of_large_counts_says_that_it_is_off(counts, caplog):
    base, load, x = counts

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((len(x),), 0.5), 0.001))

    model = model_of("Poisson", base.float(), load.float())
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        pv.ELBO().loss(model, guide, x.float())
    assert (
        sum("loss is off by about" in r.message and "'x'" in r.message for r in caplog.records) == 1
    )
    caplog.clear()
    pv.ELBO().loss(model_of("Poisson", base, load), guide, x)
    assert not caplog.records


def test_parameters_that_are_too_coarse_are_warned_of(counts, caplog):
    """Where counts are twice their mean, a rounding of the mean counts to first order."""
    base, load, x = counts

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((len(x),), 0.5), 0.001))

    model = model_of("Poisson", base.float(), load.float())
    pv.elbo(model, guide, 2 * x.float(), num_particles=2, seed=0)
    (record,) = (r for r in caplog.records if "in float32: its rounding" in r.message)
    told = record.args[1]
    mean = base * torch.exp(0.5 * load)
    by_hand = (torch.finfo(torch.float32).eps / 2 * (2 * x - mean)).square().sum(1).sqrt().mean()
    assert told == pytest.approx(by_hand.item(), rel=0.2)
    caplog.clear()
    pv.elbo(model_of("Poisson", base, load), guide, 2 * x, num_particles=2, seed=0)
    assert not [r for r in caplog.records if "float32" in r.message]


def test_small_terms_stay_in_float32():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    weights = pv.log_weights(NormalModel(), guide, torch.ones(3, 2), num_particles=4, seed=0)
    assert weights.total.dtype == torch.float32
