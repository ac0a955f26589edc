"""Normal numbers made ahead on several threads: those that a guide would have drawn itself."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.particles import noise
from pyro_vae.particles.noise import GivenNoise, NoiseAhead, OtherNoiseError, SeenNoise

X = torch.linspace(-1, 1, 30)
K = 1234  # not a multiple of the particles that are drawn at once


@pytest.fixture(params=[2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x[:, None].expand(-1, 2), 0.8).to_event(1))


def numbers() -> list[torch.Tensor]:
    doubles = torch.empty(5, dtype=torch.float64).normal_()
    made = torch.randn(7, 2, dtype=torch.float64), torch.randn(3), torch.randn_like(doubles)
    return [doubles, *made, torch.empty(3, 40).normal_()]


def test_numbers_are_those_of_each_stream():
    with SeenNoise() as seen:
        numbers()
    for seed, found in zip((3, 8), noise.from_streams(seen.found, [3, 8]), strict=True):
        torch.manual_seed(seed)
        assert all(map(torch.equal, numbers(), found))
        with GivenNoise(found):
            assert all(map(torch.equal, numbers(), found))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.empty(4).exponential_(),
        lambda: torch.bernoulli(torch.full((3,), 0.5)),
        lambda: torch.empty(4).normal_(0.0, 2.0),  # whose deviation may be another one later
        lambda: torch.empty(4, 6).t().normal_(),  # whose order in memory is another one
    ],
)
def test_other_numbers_are_not_had_ahead(draw):
    with SeenNoise() as seen:
        draw()
    assert seen.found is None


@pytest.mark.parametrize("count", [0, 2])
def test_more_or_less_than_before_is_an_error(count):
    def run():
        with GivenNoise([torch.zeros(3)]):
            for _ in range(count):
                torch.empty(3).normal_()

    with pytest.raises(OtherNoiseError):
        run()


def test_another_precision_is_an_error():
    with pytest.raises(OtherNoiseError), GivenNoise([torch.zeros(3)]):
        torch.empty(3, dtype=torch.float64).normal_()


def draws(guide, **options):
    return pv.log_weights(model, guide, X, num_particles=K, seed=5, **options)


@pytest.mark.parametrize("compile", [False, "replay"])
@pytest.mark.parametrize("kind", ["function", "amortized", "flow", "chunks"])
def test_log_weights_are_the_same_to_the_bit(kind, compile, threads, monkeypatch):
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 4))
    family = pv.families.Flow() if kind == "flow" else None
    some = guide
    if kind in ("amortized", "flow"):
        some = pv.AmortizedGuide(model, encoder, example=X[:2], family=family)
    monkeypatch.setattr("pyro_vae.particles.pair_runner._DRAW_PAIRS", 3000)  # 100 particles at once
    options = {"compile": compile, "chunk_size": 7000 if kind == "chunks" else None}
    made = []
    from_streams = noise.from_streams

    def counted(what, seeds):
        made.append(len(seeds))
        return from_streams(what, seeds)

    with monkeypatch.context() as patch:
        patch.setattr(noise, "from_streams", counted)
        found = draws(some, **options)
    assert sum(made) == 11  # of 13 draws, the first finds out, and the last has fewer particles
    assert max(made) == threads
    monkeypatch.setattr(NoiseAhead, "take", lambda *_: {})
    wanted = draws(some, **options)
    assert torch.equal(found.log_guide, wanted.log_guide)
    assert torch.equal(found.total, wanted.total)


def test_a_guide_that_draws_other_numbers_each_time(threads, monkeypatch):
    """It draws its own."""
    monkeypatch.setattr("pyro_vae.particles.pair_runner._DRAW_PAIRS", 3000)
    calls = []

    def changing(x):
        calls.append(x)
        for _ in range(len(calls) % 3):
            torch.empty(2).normal_()
        guide(x)

    found = draws(changing, compile=False, particles="plate")
    num_calls = len(calls)
    calls.clear()
    monkeypatch.setattr(NoiseAhead, "take", lambda *_: {})
    wanted = draws(changing, compile=False, particles="plate")
    assert num_calls > len(calls)  # one was taken again
    assert found.total.isfinite().all()
    assert found.total.shape == wanted.total.shape
