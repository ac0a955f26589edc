"""Every reference model goes through every function, and every family through the kinds of models.

In each, chunks change no result, and particles run together are particles run alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.particles.evaluator import Scorer
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.zoo import likelihoods

N = 6


@dataclass(frozen=True)
class Entry:
    """How to make a reference model, and what is special about it.

    Attributes:
        make: the model.
        encoder: arguments of make_encoder; None where there is nothing to propose.
        simulate: options of simulate.
        guide: options of the guide.
        missing: whether values may be missing.
    """

    make: Callable[[], Any]
    encoder: tuple[Any, ...] | None = ([5],)
    simulate: dict[str, Any] = field(default_factory=dict)
    guide: Callable[[Any], dict[str, Any]] = lambda model: {}
    missing: bool = True


def vae(likelihood: Any) -> Callable[[], Any]:
    return lambda: pv.zoo.VAE(4, 2, hidden=[3], likelihood=likelihood)


TABLE = torch.tensor([[4.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
ENTRIES = {
    "Bernoulli VAE": Entry(vae(likelihoods.Bernoulli())),
    "Binomial VAE": Entry(vae(likelihoods.Binomial(5))),
    "Gaussian VAE, sigma learned": Entry(vae(likelihoods.Gaussian())),
    "Gaussian VAE, sigma fixed": Entry(vae(likelihoods.Gaussian(0.5))),
    "categorical VAE": Entry(vae(likelihoods.Categorical(3))),
    "convolutional VAE": Entry(
        lambda: pv.zoo.ConvVAE((1, 4, 4), 2, channels=[3, 2], batch_norm=True), (5,)
    ),
    "two layers": Entry(lambda: pv.zoo.TwoLayerVAE(4, (2, 2), hidden=[3])),
    "two layers, top-down": Entry(
        lambda: pv.zoo.TwoLayerVAE(4, (2, 2), hidden=[3]), guide=lambda model: {"top_down": True}
    ),
    "conditional VAE": Entry(lambda: pv.zoo.ConditionalVAE(4, 2, 3, hidden=[3])),
    "mixture VAE": Entry(lambda: pv.zoo.MixtureVAE(4, 2, 3, hidden=[3])),
    "probabilistic PCA": Entry(lambda: pv.zoo.ProbabilisticPCA(4, 2)),
    "factor analysis": Entry(lambda: pv.zoo.FactorAnalysis(4, 2)),
    "topic model": Entry(
        lambda: pv.zoo.TopicModel(6, 3), simulate={"document_length": 20}, missing=False
    ),
    "single cells, size given": Entry(
        lambda: pv.zoo.SingleCellCounts(5, 2, hidden=[3], size_prior=(4.0, 0.5)),
        simulate={"size": torch.linspace(20.0, 90.0, N)},
    ),
    "single cells, size latent": Entry(
        lambda: pv.zoo.SingleCellCounts(5, 2, hidden=[3], size_prior=(4.0, 0.5))
    ),
    "deep Markov model": Entry(
        lambda: pv.zoo.DeepMarkovModel(3, 2, hidden=[3]), (3,), simulate={"num_steps": 3}
    ),
    "item response": Entry(
        lambda: pv.zoo.ItemResponse(5),
        guide=lambda model: {"global_guide": model.make_global_guide()},
    ),
    "eye colour": Entry(lambda: pv.zoo.EyeColour(TABLE), None, missing=False),
}
FAMILIES = {
    "full rank": pv.families.FullRankNormal(),
    "low rank": pv.families.LowRankNormal(1),
    "flow": pv.families.Flow(bins=3, hidden=2),
    "point": pv.families.Delta(),
}
# Of each kind of structure one: one site, a hierarchy, constrained supports, masked latents,
# a discrete latent summed out, global latents.
KINDS = [
    "Bernoulli VAE",
    "two layers",
    "topic model",
    "single cells, size latent",
    "deep Markov model",
    "mixture VAE",
    "item response",
]


class Filling(nn.Module):
    """An encoder, missing values filled in with zero."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *args: Any, seen: Tensor | None = None, **kwargs: Any) -> Tensor:
        filled = {key: torch.nan_to_num(value) for key, value in kwargs.items()}
        return self.encoder(*(torch.nan_to_num(a) for a in args), **filled)


def double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def pair(name: str, family: Any = None, *, missing: bool = False) -> tuple[Any, Any, Batch]:
    """Return a model, a guide and a batch, in float64."""
    entry = ENTRIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = entry.make().double()
        data = as_batch(model.simulate(N, seed=1, **entry.simulate))
        kwargs = {key: double(value) for key, value in data.kwargs.items()}
        batch = Batch(tuple(map(double, data.args)), kwargs)
        if entry.encoder is None:
            return model, pv.ExactGuide(model, example=batch), batch
        encoder = model.make_encoder(*entry.encoder).double()
        options = {"family": family, **entry.guide(model)}
        if not missing:
            return model, pv.AmortizedGuide(model, encoder, example=batch, **options), batch
        x = batch.args[0] if batch.args else kwargs["x"]
        seen = torch.ones_like(x, dtype=torch.bool)
        seen.reshape(N, -1)[::2, 0] = False
        if x.is_floating_point():
            x.masked_fill_(~seen, math.nan)
            whole = pv.MissingData(model)
        else:
            batch = Batch(batch.args, {**kwargs, "seen": seen})
            whole = pv.MissingData(model, mask="seen")
        guide = pv.AmortizedGuide(whole, Filling(encoder), example=batch, **options)
        return whole, guide, batch


every_model = pytest.mark.parametrize("name", ENTRIES)
every_amortized = pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if e.encoder])
every_family = pytest.mark.parametrize("family", FAMILIES)
every_kind = pytest.mark.parametrize("name", KINDS)


def check_log_weights(model: Any, guide: Any, batch: Batch) -> None:
    weights = pv.log_weights(model, guide, batch, num_particles=4, seed=0)
    assert weights.total.shape == (4, N)
    assert weights.total.dtype == torch.float64
    assert torch.isfinite(weights.total).all()
    chunked = pv.log_weights(model, guide, batch, num_particles=4, chunk_size=5, seed=0)
    for part in ("log_likelihood", "log_prior", "log_guide"):
        torch.testing.assert_close(getattr(chunked, part), getattr(weights, part))
    bound = pv.elbo(model, guide, batch, num_particles=4, seed=0)
    torch.testing.assert_close(bound.value, weights.total.mean(0))
    iwae = pv.iwae_bound(model, guide, batch, num_particles=4, seed=0)
    torch.testing.assert_close(iwae.value, weights.total.logsumexp(0) - math.log(4))


def check_vectorized(model: Any, guide: Any, batch: Batch) -> None:
    """The same draws, scored together and one by one."""
    if isinstance(guide, pv.AmortizedGuide) and guide.global_guide is not None:
        options: dict[str, Any] = {"data_plate": False}
        rows = slice(0, 1)
    else:
        options, rows = {}, slice(0, N)
    together = Scorer(model, guide, batch, seed=0, **options)
    alone = Scorer(model, guide, batch, particles="loop", seed=0, **options)
    assert "loop" not in together.modes.values()
    values, log_guide = alone.draw(rows, 3, (9,))
    torch.testing.assert_close(together.score_guide(rows, values), log_guide)
    for one, other in zip(
        together.score_model(rows, values), alone.score_model(rows, values), strict=True
    ):
        torch.testing.assert_close(one, other)


def check_training(model: Any, guide: Any, batch: Batch, loss: Any) -> None:
    modules = nn.ModuleList([model, guide])
    before = {n: p.detach().clone() for n, p in modules.named_parameters()}
    result = pv.fit(model, guide, batch, loss=loss, max_steps=4, progress=False)
    assert math.isfinite(result.history["elbo"][-1])
    after = dict(modules.named_parameters())
    still = [n for n, value in before.items() if torch.equal(value, after[n])]
    assert not still
    assert all(p.dtype == torch.float64 for p in after.values())


@every_model
def test_description(name):
    model, guide, batch = pair(name)
    described = pv.describe(model, batch)
    kinds = {row["site"]: row["kind"] for row in described.rows}
    assert described.data_plate is not None
    assert "observed" in kinds.values()
    if isinstance(guide, pv.AmortizedGuide):
        local = {c.name for c in guide.coordinates}
        assert local == {s for s, kind in kinds.items() if kind == "local latent"} - {"c"}


@every_model
def test_log_weights_and_bounds(name):
    check_log_weights(*pair(name))


@every_amortized
def test_particles_together_and_alone(name):
    check_vectorized(*pair(name))


@every_model
@pytest.mark.parametrize("loss", ["elbo", "iwae"])
def test_training(name, loss):
    check_training(*pair(name), pv.ELBO(2) if loss == "elbo" else pv.IWAE(3))


@every_amortized
def test_refine_compare_and_to_arviz(name):
    model, guide, batch = pair(name)
    local = pv.refine(model, guide, batch, max_steps=5, seed=0)
    assert local.table.shape[0] == N
    assert local.table.dtype == torch.float64
    options = {"num_particles": 30, "max_steps": 5, "seed": 0}
    found = pv.compare(model, {"encoder": guide}, batch, **options).dataset
    assert torch.isfinite(torch.as_tensor(found["elbo"].values)).all()
    tree = pv.to_arviz(model, guide, batch, num_draws=3, seed=0)
    for site in guide.coordinates:
        assert tree["posterior"][site.name].shape[:3] == (1, 3, N)
    assert tree["sample_stats"]["log_weight"].shape == (1, 3, N)


@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if e.missing])
def test_impute(name):
    model, guide, batch = pair(name, missing=True)
    check_log_weights(model, guide, batch)
    found = pv.impute(model, guide, batch, num_draws=5, num_particles=20, seed=0)
    assert len(found.sites) == 1
    (site,) = found.sites
    seen = found.dataset[f"{site}_observed"].values
    assert (~seen).sum() == N // 2
    draws = torch.as_tensor(found.dataset[site].values)
    assert torch.isfinite(draws[:, seen]).all()
    assert torch.isfinite(draws).all()


@every_kind
@every_family
def test_a_family_for_every_kind_of_model(name, family):
    model, guide, batch = pair(name, FAMILIES[family])
    if family != "point":
        check_vectorized(model, guide, batch)
        check_log_weights(model, guide, batch)
    result = pv.fit(model, guide, batch, loss=pv.ELBO(2), max_steps=2, progress=False)
    assert math.isfinite(result.history["elbo"][-1])
    local = pv.refine(model, guide, batch, max_steps=2, seed=0)
    assert local.family == FAMILIES[family]
    assert local.table.shape == guide.family_params(*batch.args, **batch.kwargs).shape
