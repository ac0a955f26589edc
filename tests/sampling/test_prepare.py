"""A pair made ready for chains: the base is the guide's answer, prior draws are the prior's."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.particles import pair_runner
from tests.models import GammaPoisson, NormalModel, encoder, factor_analysis
from tests.sampling.pairs import (
    chain_after_data,
    density_of,
    local,
    masked_model,
    normal_mixture,
    only_block,
    prepared,
    two_sites,
)

F64 = torch.float64
X = torch.tensor([-1.0, 0.5, 3.0], dtype=F64)


def within(found, exact, errors=4.5):
    """Whether means of draws [K, ...] are known numbers, to standard errors."""
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() < errors * error).all()


# --- the base


def test_the_base_is_the_own_answer_of_a_guide_of_a_family():
    model = factor_analysis()
    torch.manual_seed(0)
    x = model.data(4)
    guide = pv.AmortizedGuide(model, encoder(6), example=x, family=pv.families.FullRankNormal())
    made = prepared(model, guide, x)
    assert made.blocks.family == pv.families.FullRankNormal()
    torch.testing.assert_close(made.table, guide.family_params(x).detach())
    assert not made.table.requires_grad


def test_the_base_of_another_guide_has_its_moments():
    """The table of Normals that match a hand-written guide's draws: read off a Normal."""
    model = NormalModel()
    made = prepared(model, model.posterior, X)
    exact = model.posterior_of(X)
    torch.testing.assert_close(made.table[:, 0, 0], exact.loc)
    torch.testing.assert_close(made.table[:, 0, 1].exp(), exact.scale)


def test_the_base_of_points_is_as_wide_as_the_prior():
    model = NormalModel()
    guide = pv.LocalGuide(model, num_data=3, example=X, family=pv.families.Delta()).double()
    with torch.no_grad():
        guide.table.copy_(torch.tensor([[1.0], [2.0], [3.0]]).reshape(guide.table.shape))
    made = prepared(model, guide, X)
    assert made.blocks.family == pv.families.Normal()
    torch.testing.assert_close(made.table[:, 0, 0], torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    assert ((made.table[:, 0, 1].exp() - 1).abs() < 0.2).all()


def test_a_local_guide_of_other_data_is_a_start():
    """Rows that were fitted to other data are refused by bounds, not here."""
    model = NormalModel()
    guide = pv.refine(model, local(model, X), X, seed=0, max_steps=1, progress=False)
    made = prepared(model, guide, X.flip(0))
    torch.testing.assert_close(made.table, guide.table.detach())


@pytest.mark.parametrize(
    "family", [pv.families.Normal(), pv.families.FullRankNormal()], ids=["diagonal", "full"]
)
def test_draws_and_scale_of_the_base(family):
    model = factor_analysis()
    x = model.data(4)
    guide = local(model, x, family=family)
    made, rows, _ = only_block(model, guide, x)
    noise = torch.randn(20_000, 4, 3, dtype=F64)
    draws = made.base_draws(rows, noise)
    whole = family.conditional(guide.table.detach(), 3, draws[..., :0], slice(0, 3))
    within(draws, whole.mean)
    scale = whole.variance.sqrt()
    # 256 draws: a standard deviation is within 4.5 of its errors, 1 / sqrt(512).
    assert ((made.base_scale(rows) / scale - 1).abs() < 4.5 * 512**-0.5).all()
    part = made.base_draws(slice(1, 3), noise[:, 1:3])
    torch.testing.assert_close(part, draws[:, 1:3])


def test_coordinates_of_values_are_those_that_made_them():
    x = torch.randn(3, 2, dtype=F64)
    made, _, block = only_block(two_sites, local(two_sites, x), x)
    z = torch.randn(5, 3, 3, dtype=F64)
    values = made.evaluator.from_single(block.scored.guide.values_of(z))
    torch.testing.assert_close(made.coordinates_of(values), z)


def test_coordinates_of_a_mapped_site():
    model = GammaPoisson()
    x = torch.tensor([0.0, 3.0], dtype=F64)
    made = prepared(model, local(model, x), x)
    rate = torch.rand(4, 2, dtype=F64) + 0.1
    found = made.coordinates_of(made.evaluator.from_single({"rate": rate}))
    torch.testing.assert_close(found, rate.log().unsqueeze(-1))


# --- blocks


def test_blocks_cover_the_data_in_order(monkeypatch):
    monkeypatch.setattr(pair_runner, "_DRAW_DATA", 4)
    model = NormalModel()
    x = torch.randn(10, dtype=F64)
    found = list(prepared(model, local(model, x), x).each())
    assert [(rows.start, rows.stop) for rows, _ in found] == [(n, n + 2) for n in range(0, 10, 2)]
    assert torch.cat([block.rows for _, block in found]).tolist() == list(range(10))
    for rows, block in found:
        assert torch.equal(block.evaluator.batch.args[0], x[rows])


# --- draws of the prior


def test_draws_of_the_prior():
    """Of two sites and an inner plate: moments to 4.5 errors of 4,000 draws."""
    x = torch.randn(2, 2, dtype=F64)
    made, rows, _ = only_block(two_sites, local(two_sites, x), x)
    z = made.prior_draws(rows, 4000, (1,))
    assert z.shape == (4000, 2, 3)
    within(z, 0.0)
    within(z.square(), torch.tensor([4.0, 5.0, 5.0], dtype=F64))
    within(z[..., 0] * z[..., 1], 4.0)
    within(z[..., 1] * z[..., 2], 4.0)
    assert torch.equal(z, made.prior_draws(rows, 4000, (1,)))
    assert not torch.equal(z, made.prior_draws(rows, 4000, (2,)))


def test_draws_of_the_prior_of_a_mixture():
    """The discrete latent is drawn too, and left out."""
    made, rows, _ = only_block(normal_mixture, local(normal_mixture, X), X)
    z = made.prior_draws(rows, 4000, (1,))
    within(z, -2.0 * 0.3 + 1.5 * 0.7)
    within(z.square(), 1 + 4 * 0.3 + 2.25 * 0.7)


def test_draws_of_a_prior_that_depends_on_observed_values():
    """f_0 is scored given the first number of a datum, so it is drawn given it."""
    x = torch.tensor([[5.0, 5.5], [-4.0, -4.0]], dtype=F64)
    made, rows, _ = only_block(chain_after_data, local(chain_after_data, x), x)
    z = made.prior_draws(rows, 4000, (1,))
    within(z[..., 0], x[:, 0])
    within((z[..., 0] - x[:, 0]).square(), 1.0)
    base = density_of(chain_after_data, local(chain_after_data, x), x, start="prior")(z).base
    torch.testing.assert_close(base, dist.Normal(x[:, 0], 1.0).log_prob(z[..., 0]))


def test_draws_of_the_prior_leave_the_random_state():
    made, rows, _ = only_block(normal_mixture, local(normal_mixture, X), X)
    before = torch.get_rng_state()
    made.prior_draws(rows, 4, (1,))
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_leave_latents_without_a_prior():
    seen = torch.tensor([True, False, True])
    guide = pv.LocalGuide(masked_model, num_data=3, example=(X, seen)).double()
    made, rows, _ = only_block(masked_model, guide, X, seen)
    with pytest.raises(ValueError, match=r"start='prior': .* draws of \['w'\] out for some data"):
        made.prior_draws(rows, 4, (1,))


# --- what is refused, as everywhere


def with_a_global(x):
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_globals_are_given_or_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    def whole(x):
        pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        guide(x)

    with pytest.raises(ValueError, match="'mean'"):
        prepared(with_a_global, whole, X)
    value = torch.tensor(2.0, dtype=F64)
    made = prepared(with_a_global, whole, X, given={"mean": value})
    assert torch.equal(made.given["mean"], value) and made.table.shape == (3, 1, 2)


def test_what_no_density_is_known_of_is_refused():
    def other(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="'y'"):
        prepared(NormalModel(), other, X)
    with pytest.raises(ValueError, match="NaN"):
        prepared(NormalModel(), NormalModel().posterior, X.log())


# --- a guide without an answer for some data


def broken(kind: str, x):
    """A guide of a NormalModel that fails at the third of four data."""
    model = NormalModel()
    if kind == "family":
        guide = local(model, x)
        with torch.no_grad():
            guide.table[2, 0, 0] = math.nan
        return model, guide
    if kind == "family, scale of zero":
        guide = local(model, x)
        with torch.no_grad():
            guide.table[2, 0, 1] = -2000.0
        return model, guide
    third = torch.arange(4) == 2

    def by_hand(x):
        loc = x.masked_fill(third[: len(x)], math.nan) if kind == "by hand" else x
        scale = torch.ones_like(x)
        if kind == "by hand, scale of zero":
            scale = scale.masked_fill(third[: len(x)], 0.0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    return model, by_hand


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize(
    "kind", ["family", "family, scale of zero", "by hand", "by hand, scale of zero"]
)
def test_data_without_an_answer_start_from_the_prior(kind, validated, caplog):
    """The others keep theirs; the warning names guide and datum."""
    x = torch.tensor([-1.0, 0.5, 1.0, 3.0], dtype=F64)
    model, guide = broken(kind, x)
    whole = {"family": local, "family, scale of zero": local}.get(kind)
    with pyro.validation_enabled(validated):
        made = prepared(model, guide, x)
    assert made.table.isfinite().all()
    of_prior = pv.LocalGuide(model, num_data=4, example=x).double().table
    torch.testing.assert_close(made.table[2, :, 1], of_prior[2, :, 1])
    if whole is not None:
        torch.testing.assert_close(made.table[[0, 1, 3]], whole(model, x).table[[0, 1, 3]])
    else:
        torch.testing.assert_close(made.table[[0, 1, 3], 0, 0], x[[0, 1, 3]], rtol=0, atol=0.3)
    if validated or whole is not None:
        assert made.lost.tolist() == [False, False, True, False]
        assert "has no answer for data [2]" in caplog.text and made.stand_in is not None


def test_what_fails_for_another_cause_fails_as_before():
    model = NormalModel()

    def elsewhere(x):
        with pyro.plate("data", len(x)):
            pyro.sample("other", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="other"):
        prepared(model, elsewhere, X)


def test_a_guide_that_answers_is_no_stand_in(caplog):
    made = prepared(NormalModel(), local(NormalModel(), X), X)
    assert made.stand_in is None and not made.lost.any() and not caplog.records


def test_a_model_of_discrete_latents_alone_is_told_that_its_bounds_are_exact():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x):
        pass

    with pytest.raises(ValueError, match=r"discrete and summed out: .*elbo of this model and"):
        prepared(model, guide, X)
    parts = [math.log(p) + dist.Normal(m, 1.0).log_prob(X) for m, p in ((0.0, 0.7), (1.0, 0.3))]
    exact = torch.stack(parts).logsumexp(0)
    torch.testing.assert_close(pv.elbo(model, guide, X, num_particles=2).value, exact)
