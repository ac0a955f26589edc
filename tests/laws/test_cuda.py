"""The reference models on a CUDA device: the same laws, and the CPU's answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from tests.laws.registry import FAMILIES, KINDS, every_amortized, every_model, pair

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE = "cuda"


def on_device(name: str, family=None):
    """Return the pair and the batch of `pair`, on the device."""
    model, guide, batch = pair(name, family)
    return model.to(DEVICE), guide.to(DEVICE), batch.to(DEVICE)


def globals_of(model, guide) -> dict[str, Tensor] | None:
    """Return values for the global latents, which bounds of each datum ask for."""
    if isinstance(model, pv.zoo.ItemResponse):
        return {name: value.detach() for name, value in guide.global_guide.median().items()}
    return None


@every_model
def test_bounds_are_those_of_the_cpu(name: str):
    model, guide, batch = pair(name)
    given = globals_of(model, guide)
    for bound in (pv.elbo, pv.iwae_bound):
        cpu = bound(model, guide, batch, given=given, num_particles=400, seed=1)
        there = on_device(name)
        moved = None if given is None else {k: v.to(DEVICE) for k, v in given.items()}
        cuda = bound(*there[:2], there[2], given=moved, num_particles=400, seed=2)
        assert cuda.value.device.type == DEVICE
        error = (cpu.std_error.square() + cuda.std_error.cpu().square()).sqrt()
        assert ((cpu.value - cuda.value.cpu()).abs() <= 5 * error + 1e-9).all()


@every_model
def test_a_seed_repeats_and_leaves_the_device_alone(name: str):
    model, guide, batch = on_device(name)
    given = globals_of(model, guide)
    before = torch.cuda.get_rng_state()

    def value() -> Tensor:
        return pv.iwae_bound(model, guide, batch, given=given, num_particles=8, seed=3).value

    assert torch.equal(value(), value())
    assert torch.equal(torch.cuda.get_rng_state(), before)


@every_model
def test_rates_are_those_of_the_cpu(name: str):
    model, guide, batch = pair(name)
    given = globals_of(model, guide)
    cpu = pv.rate_distortion(model, guide, batch, given=given, num_particles=400, seed=1).summary()
    there = on_device(name)
    moved = None if given is None else {k: v.to(DEVICE) for k, v in given.items()}
    cuda = pv.rate_distortion(*there[:2], there[2], given=moved, num_particles=400, seed=2)
    found = cuda.summary()
    error = (cpu["nats_se"] ** 2 + found["nats_se"] ** 2) ** 0.5
    assert ((cpu["nats"] - found["nats"]).abs() <= 5 * error + 1e-9).all()


@pytest.mark.parametrize("name", ["Bernoulli VAE", "two layers", "single cells, size latent"])
def test_units_over_the_data(name: str):
    model, guide, batch = on_device(name)
    args = [torch.cat([each, each]) for each in batch.args]
    units = pv.active_units(model, guide, *args, num_particles=4, seed=0).dataset
    assert units["activity"].notnull().all()
    tested = pv.aggregate_posterior(model, guide, *args, seed=0).dataset
    assert tested["unit"].values.tolist() == units["unit"].values.tolist()


@every_amortized
@pytest.mark.parametrize("loss", [pv.ELBO, lambda: pv.IWAE(3)], ids=["ELBO", "IWAE"])
def test_training(name: str, loss, caplog: pytest.LogCaptureFixture):
    model, guide, batch = pair(name)
    modules = nn.ModuleList([model, guide])
    pv.fit(
        model, guide, batch, loss=loss(), batch_size=4, max_steps=12, device=DEVICE, progress=False
    )
    assert all(p.device.type == DEVICE and p.isfinite().all() for p in modules.parameters())
    assert "launched one by one" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("compile", ["replay", True])
def test_training_with_a_factor_that_changes(compile, drawn, caplog: pytest.LogCaptureFixture):
    """A warm-up gives graphs a number that is another one at each step.

    Images that are drawn at each step are the same in eager and in compiled steps.
    """
    torch.manual_seed(0)
    model = pv.zoo.VAE(784, 50, hidden=[200, 200])
    x = (torch.rand(400, 784) < 0.3).float()
    guide = pv.AmortizedGuide(model, model.make_encoder([200, 200]), example=x)
    optim = torch.optim.Adam(nn.ModuleList([model, guide]).to(DEVICE).parameters(), lr=1e-3)
    options = {"schedule": pv.schedules.LinearWarmup(100), "compile": compile, "device": DEVICE}
    data = pv.datasets.StochasticBinarization(torch.rand(400, 784), 1) if drawn else x
    pv.fit(
        model, guide, data, optim=optim, batch_size=100, max_steps=100, progress=False, **options
    )
    assert "run eagerly" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in KINDS if n != "item response"])
def test_compare_and_export(name: str):
    model, guide, batch = on_device(name)
    guides = {"amortized": guide, "refined": pv.families.Normal()}
    found = pv.compare(model, guides, batch, num_particles=100, max_steps=400, progress=False)
    assert found.dataset["amortization_gap"].notnull().all()
    pv.to_arviz(model, guide, batch, num_draws=5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str):
    model, guide, batch = on_device("factor analysis", FAMILIES[family])
    if family != "point":
        assert pv.elbo(model, guide, *batch.args, num_particles=9).value.isfinite().all()
    pv.fit(model, guide, batch, max_steps=6, device=DEVICE, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in KINDS if n != "item response"])
def test_annealing_is_that_of_the_cpu(name: str):
    settings = {"num_steps": 40, "progress": False}
    cpu = pv.ais(*pair(name), seed=1, **settings)
    cuda = pv.ais(*on_device(name), seed=2, **settings)
    assert cuda.value.device.type == DEVICE
    error = (cpu.std_error.square() + cuda.std_error.cpu().square()).sqrt()
    assert ((cpu.value - cuda.value.cpu()).abs() <= 5 * error + 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in KINDS if n != "item response"])
def test_chains(name: str):
    found = pv.sample_posterior(*on_device(name), num_draws=100, num_warmup=50, progress=False)
    assert all(v.device.type == DEVICE and v.isfinite().all() for v in found.draws.values())
    found.to_arviz()


@pytest.mark.slow
def test_repair():
    model, guide, batch = on_device("factor analysis")
    for rung in ("importance", "full rank", "annealed", "chains"):
        found = pv.repair(model, guide, batch, rungs=(rung,), seed=0, progress=False)
        exact = model.log_evidence(*batch.args).detach().cpu().numpy()
        data = found.dataset
        off = (data["log_evidence"].values - exact)[found.good]
        assert (abs(off) <= 5 * data["log_evidence_se"].values[found.good] + 1e-4).all()
        found.to_arviz()
