"""A guide and a model run together: on some of the data only where they take some."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.particles.checks import DependentDataError
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.pair_runner import PairRunner, equal_step, round_down
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.pair import Pair
from tests.models import encoder, factor_analysis


@pytest.fixture
def exact():
    model = factor_analysis()
    torch.manual_seed(1)
    return model, model.data(7)


def test_scales_are_stripped_and_masks_kept(exact):
    model, x = exact
    plain = pv.log_weights(model, model.posterior, x, num_particles=3, seed=0)

    def scaled(x):
        with poutine.scale(scale=7.0):
            return model(x)

    def subsampled(x):
        with pyro.plate("data", 1000, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            location = z @ model.loadings.T + model.mean
            pyro.sample("x", dist.Normal(location, model.noise).to_event(1), obs=x)

    for other in (scaled, subsampled):
        found = pv.log_weights(other, model.posterior, x, num_particles=3, seed=0)
        torch.testing.assert_close(found.total, plain.total)

    mask = torch.tensor([True, False] * 3 + [True])

    def masked(x):
        with poutine.mask(mask=mask):
            return model(x)

    found = pv.log_weights(masked, model.posterior, x, num_particles=3, seed=0)
    assert (found.log_likelihood[:, ~mask] == 0).all() and (found.log_prior[:, ~mask] == 0).all()
    torch.testing.assert_close(found.total[:, mask], plain.total[:, mask])


def test_a_guide_of_another_size_is_refused(exact):
    model, x = exact
    guide = pv.LocalGuide(model, num_data=5, example=x)
    with pytest.raises(ValueError, match="a row for each of 5 data but the batch has 7"):
        pv.log_weights(model, guide, x, num_particles=2)


def test_a_plate_of_fixed_size_and_data_closed_over_are_not_cut():
    torch.manual_seed(0)
    covariate = torch.randn(300, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", 300):
            z = pyro.sample("z", dist.Normal(covariate, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def posterior(x):
        with pyro.plate("data", 300):
            pyro.sample("z", dist.Normal((x + covariate) / 2, 0.5**0.5))

    x = torch.randn(300, dtype=torch.float64)
    exact = torch.distributions.Normal(covariate, 2**0.5).log_prob(x)
    weights = pv.log_weights(model, posterior, x, num_particles=3, chunk_size=100)
    torch.testing.assert_close(weights.total, exact.expand(3, -1))


def test_data_closed_over_are_not_misaligned():
    """covariate[: len(x)] runs on any rows, and is wrong on all but the first."""
    covariate = torch.arange(300, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(covariate[: len(x)], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def posterior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + covariate[: len(x)]) / 2, 0.5**0.5))

    x = covariate + 1
    exact = torch.distributions.Normal(covariate, 2**0.5).log_prob(x)
    weights = pv.log_weights(model, posterior, x, num_particles=3)
    torch.testing.assert_close(weights.total, exact.expand(3, -1))
    refined = pv.refine(model, posterior, x, seed=0)
    bound = pv.elbo(model, refined, x, num_particles=10, seed=0)
    torch.testing.assert_close(bound.value, exact, rtol=0, atol=1e-3)


def test_many_data_and_a_network_that_takes_no_particles():
    """More data than a block: what looks for blocks must not need the particles' dimension."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if z.ndim != 2:
                raise ValueError("only matrices")
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.zeros(300, 2)
    guide = pv.LocalGuide(model, num_data=300, example=x)
    assert Evaluator(model, guide, as_batch(x)).modes["model"] == "repeat"


@pytest.mark.parametrize("num_data", [1, 2, 3, 5])
def test_the_modes_of_a_plain_pair_take_three_runs_of_the_model(num_data):
    model = factor_analysis()
    x = model.data(num_data)
    runs = []

    def counted(x):
        runs.append(len(x))
        return model(x)

    pair = Pair(counted, model.posterior, as_batch(x)).evaluable(None)
    runs.clear()
    runner = PairRunner(pair, 0)
    assert runs == [num_data] * 3  # two particles alone, and all together
    assert (runner.guide.mode.name, runner.model.mode.name) == ("plate", "plate")


def _standardized(x):
    y = (x - x.mean(0)) / x.std(0)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(y / 2, 0.7).to_event(1))


def _plain_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))


def _of_all(scale, loc):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale(x)).to_event(1))
            pyro.sample("x", dist.Normal(z + loc(x), 1.0).to_event(1), obs=x)

    return model


@pytest.mark.parametrize(
    ("scale", "loc", "guide", "wanted"),
    [
        (lambda x: 1.0, lambda x: 0.0, _plain_guide, True),
        (lambda x: 1.0, lambda x: 0.0, _standardized, False),
        (lambda x: (len(x) / 1000) ** 0.5, lambda x: 0.0, _plain_guide, False),
        (lambda x: 1.0, lambda x: x.mean(0), _plain_guide, False),
        (lambda x: 1.0 + x.sum(-1, True).softmax(0) * len(x), lambda x: 0.0, _plain_guide, False),
    ],
    ids=["rows alone", "a guide of means", "the number of rows", "a mean of rows", "a softmax"],
)
def test_what_depends_on_all_rows_a_little_is_not_cut_into_blocks(scale, loc, guide, wanted):
    x = torch.randn(1000, 2) + 1
    evaluator = Evaluator(_of_all(scale, loc), guide, as_batch(x), seed=0)
    assert evaluator.splittable == wanted


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "of_all",
    [lambda z: z / z.abs().max(), lambda z: z - z.max(), lambda z: z / z.reshape(-1).median()],
    ids=["scaled", "shifted", "median"],
)
def test_what_all_numbers_of_a_latent_share_is_no_datums_own(seed, of_all):
    """One particle may hold the maximum of all particles; the others are then wrong alike."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(of_all(z), 1.0).to_event(1), obs=x)

    x = torch.randn(257, 2)
    with pytest.raises(DependentDataError, match="depends on the latents of other data"):
        pv.elbo(model, _plain_guide, x, num_particles=5, seed=seed)


def _narrow(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1e-6).to_event(1))


@pytest.mark.parametrize(
    "broadcast",
    [
        lambda z, x: z if z.ndim == 2 else z[0].expand_as(z),
        lambda z, x: z.reshape(-1, len(x), 2).mean(0),
    ],
    ids=["the first particle", "a mean of particles"],
)
def test_a_guide_that_is_sure_of_itself_does_not_choose_the_mode_of_others(broadcast, caplog):
    """Its particles are equal, so that each broadcast over particles agrees."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(broadcast(z, x), 1.0).to_event(1), obs=x)

    x = torch.randn(20, 2)
    guides = {"narrow": _narrow, "wide": _plain_guide}
    found = pv.compare(model, guides, x, reference="wide", num_particles=200, seed=0)
    alone = pv.elbo(model, _plain_guide, x, num_particles=200, seed=0)
    wanted = float(alone.mean)
    assert float(found.dataset["elbo"].sel(guide="wide").mean()) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_a_seed_decides_alone_whatever_the_global_random_state(seed):
    """Terms of 60 z lie where some draws ask for float64, and others do not."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(60.0 * z, 1.0).to_event(1), obs=x)

    torch.manual_seed(5)
    x, found = torch.randn(20, 2), set()
    for state in range(8):
        torch.manual_seed(state)
        found.add(float(pv.elbo(model, _plain_guide, x, num_particles=5, seed=seed).mean))
    assert len(found) == 1


def test_a_table_of_densities_is_no_second_guide_of_a_model_of_masses():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def continuous(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def counts(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(2.0).expand([len(x)]))

    x = torch.randn(6)
    table = pv.LocalGuide(continuous, num_data=6, example=x)
    with pytest.raises(ValueError, match="has masses in the model"):
        pv.compare(model, {"counts": counts, "table": table}, x, reference="counts", seed=0)


# --- sizes of pieces: equal where they can be, and round


@pytest.mark.parametrize(
    ("num_data", "sizes"), [(256, {256}), (500, {250}), (10_000, {250}), (771, {193, 192})]
)
def test_blocks_of_data_are_equal(num_data, sizes):
    """So that they share a graph; the last may be a little smaller."""
    model = factor_analysis()
    x = model.data(num_data)
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    blocks = Evaluator(model, guide, as_batch(x)).data_blocks()
    assert [b.start for b in blocks[1:]] == [b.stop for b in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, num_data)
    assert {b.stop - b.start for b in blocks} == sizes


@pytest.mark.parametrize(
    ("count", "most", "step"), [(50, 21, 10), (50, 50, 50), (50, 80, 50), (13, 5, 5), (7, 1, 1)]
)
def test_pieces_are_equal_where_they_can_be(count, most, step):
    assert equal_step(count, most) == step


@pytest.mark.parametrize(
    ("number", "rounded"), [(1, 1), (4, 2), (9, 5), (65, 50), (128, 100), (16384, 10000)]
)
def test_draws_come_in_round_numbers(number, rounded):
    assert round_down(number) == rounded
