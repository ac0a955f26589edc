"""Every reference model goes through every function, and every family through the kinds of models.

In each, chunks change no result, and particles run together are particles run alone.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import Batch
from pyro_vae.testing.guides import log_weights_hold, particles_agree
from tests.laws.registry import (
    ENTRIES,
    FAMILIES,
    N,
    every_amortized,
    every_family,
    every_kind,
    every_model,
    pair,
)


def check_log_weights(model: Any, guide: Any, batch: Batch) -> None:
    weights = pv.log_weights(model, guide, batch, num_particles=4, seed=0)
    assert weights.total.shape == (4, N)
    assert weights.total.dtype == torch.float64
    log_weights_hold(model, guide, batch)


def check_vectorized(model: Any, guide: Any, batch: Batch) -> None:
    """The same draws, scored together and one by one."""
    whole = isinstance(guide, pv.AmortizedGuide) and guide.global_guide is not None
    plate = False if whole else None
    together = Evaluator(model, guide, batch, seed=0, data_plate=plate)
    assert "loop" not in together.modes.values()
    particles_agree(model, guide, batch, plate)


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


@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if e.missing])
def test_an_encoder_that_sees_what_is_missing(name):
    """It trains on data with holes; bounds are finite, and the mask reaches the features."""
    model, guide, batch = pair(name, missing=True, sees_mask=True)
    check_training(model, guide, batch, pv.ELBO(2))
    assert torch.isfinite(pv.iwae_bound(model, guide, batch, num_particles=20, seed=0).value).all()
    if "seen" in batch.kwargs:
        return
    filled = Batch(
        tuple(map(torch.nan_to_num, batch.args)),
        {name: torch.nan_to_num(value) for name, value in batch.kwargs.items()},
    )  # as the encoder fills them in: the mask alone is another
    with torch.no_grad():
        one, other = (guide.encoder(*b.args, **b.kwargs) for b in (batch, filled))
    assert not torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_an_encoder_of_documents_sees_a_mask_too():
    """Counts of a document are one joint event, of which no part can be missing."""
    model, _, batch = pair("topic model")
    counts = batch.args[0]
    encoder = pv.MissingEncoder(model.make_encoder([5], missing=True).double())
    assert encoder(counts).shape == (N, 5)
    counts = counts.clone()
    counts[0, 0] = math.nan
    with pytest.raises(ValueError, match="The batch has missing values"):
        pv.fit(pv.MissingData(model), pv.AmortizedGuide(model, encoder, example=batch), counts)


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
