"""Draws of a guide, and of chains, as pieces of blocks of data."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.export.draws import GivenDraws, GuideDraws
from pyro_vae.particles.evaluator import prepare
from tests.arviz_calls import groups
from tests.models import NormalModel, mixture

MODEL = NormalModel()


def evaluator(model, guide, *batch, data_plate=None):
    return prepare(model, guide, batch, None, data_plate, 0)[0]


def collected(draws):
    """All pieces, with how many draws of which data."""
    pieces = [piece for block in draws.blocks() for piece in block]
    return pieces, [(piece.rows, len(piece.values["z"])) for piece in pieces]


def test_draws_of_a_guide_are_those_of_log_weights():
    x = torch.randn(300, dtype=torch.float64)
    pieces, sizes = collected(GuideDraws(evaluator(MODEL, MODEL.posterior, x), 130, None))
    assert {rows.start for rows, _ in sizes} == {0, 150}
    weights = pv.log_weights(MODEL, MODEL.posterior, x, num_particles=130, seed=0)
    for name, wanted in {"log_weight": weights.total, "log_q": weights.log_guide}.items():
        found = torch.cat(
            [
                torch.cat([p.stats[name] for p in pieces if p.rows.start == start])
                for start in (0, 150)
            ],
            1,
        )
        torch.testing.assert_close(found, wanted)


def test_given_draws_are_scored_as_they_are():
    """log p(x, z) by hand, of draws in two blocks of data, whatever the guide."""
    x = torch.randn(300, dtype=torch.float64)
    z = torch.randn(250, 300, dtype=torch.float64)
    lp = torch.arange(250.0)[:, None] + torch.zeros(300)
    made = GivenDraws(evaluator(MODEL, MODEL.posterior, x), {"z": z}, 2, {"lp": lp})
    pieces, sizes = collected(made)
    assert sizes[0][1] < 250 and sum(n for rows, n in sizes if rows.start == 0) == 250
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    for piece in pieces:
        draws = slice(piece.start, piece.start + len(piece.values["z"]))
        np.testing.assert_array_equal(piece.values["z"].flatten(1), z[draws, piece.rows])
        torch.testing.assert_close(piece.stats["log_p"], log_p[draws, piece.rows])
        torch.testing.assert_close(piece.stats["lp"], lp[draws, piece.rows])
    assert made.attrs() == {} and made.constants() == {}


def test_given_draws_of_what_is_summed_out_count_once():
    """log p(x, z) sums the class out, as log_weights does, though draws have one."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
            z = pyro.sample("z", dist.Normal(3 * c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.tensor([0.5, 2.0], dtype=torch.float64)
    z, c = torch.randn(5, 2, dtype=torch.float64), torch.ones(5, 2, dtype=torch.float64)
    (piece,), _ = collected(GivenDraws(evaluator(model, guide, x), {"z": z, "c": c}))
    prior = 0.7 * dist.Normal(0.0, 1.0).log_prob(z).exp()
    prior = prior + 0.3 * dist.Normal(3.0, 1.0).log_prob(z).exp()
    torch.testing.assert_close(piece.stats["log_p"], prior.log() + dist.Normal(z, 1.0).log_prob(x))
    assert set(piece.values) == {"z", "c"}


def test_resampled_draws_keep_what_belongs_to_them():
    """Each block by its own weights; a shared variable that varies is dropped, once warned of."""
    x = torch.zeros(2, dtype=torch.float64)
    made = GuideDraws(evaluator(MODEL, MODEL.posterior, x), 100, "psis")
    rng = np.random.default_rng(0)
    for start in (0, 2):
        z, weight = rng.normal(size=(100, 2)), np.where(np.arange(100)[:, None] < 30, 0.0, -50.0)
        groups = {
            "posterior": {"z": z, "all": z[:, 0], "same": np.ones(100)},
            "log_prior": {"z": 2 * z},
            "unconstrained_posterior": {"z": 3 * z},
            "prior": {"z": z},
            "sample_stats": {"log_weight": np.repeat(weight, 2, 1)},
        }
        made.settle(slice(start, start + 2), groups, ["all", "same"])
        chosen = groups["posterior"]["z"]
        assert np.isin(chosen[:, 0], z[:30, 0]).all() and not (chosen == z).all()
        np.testing.assert_array_equal(groups["log_prior"]["z"], 2 * chosen)
        np.testing.assert_array_equal(groups["unconstrained_posterior"]["z"], 3 * chosen)
        np.testing.assert_array_equal(groups["prior"]["z"], z)
        assert set(groups["posterior"]) == {"z", "same"} and not groups["sample_stats"]
    assert made.constants()["ess"].shape == (4,)
    np.testing.assert_allclose(made.constants()["ess"], 30, rtol=0.1)


def test_what_is_discrete_alone_is_drawn():
    x = torch.zeros(4, dtype=torch.float64)
    guide = pv.ExactGuide(mixture, example=x)
    tree = pv.to_arviz(mixture, guide, x, num_draws=5, seed=0)
    assert len(tree["posterior"].data_vars) == 1
    with pytest.raises(KeyError):
        tree["unconstrained_posterior"]


@pytest.mark.parametrize("resample", [None, "psis"])
def test_a_model_without_latents_has_no_posterior(resample, tmp_path):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(len(x)), 1.0), obs=x)

    x = torch.tensor([0.5, -1.0])
    for file in (None, tmp_path / "none.nc"):
        options = {"num_draws": 5, "resample": resample, "file": file, "seed": 0}
        found = groups(pv.to_arviz(model, lambda x: None, x, **options))
        assert "posterior" not in found and "log_prior" not in found
        wanted = torch.distributions.Normal(0.0, 1.0).log_prob(x).expand(1, 5, 2)
        np.testing.assert_allclose(found["log_likelihood"]["x"], wanted, rtol=1e-6)
