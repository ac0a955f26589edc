"""Ranks by hand, simulated latents in their place, and settings."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation.simulations import Simulations, _ranks, _resampled
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.estimators import LogWeights
from tests.evaluation.test_calibration import joint_posterior, shared_mean
from tests.evaluation.test_rank_tests import settings
from tests.models import NormalModel
from tests.sampling.pairs import two_sites

F64 = torch.float64


def simulations(model, guide, *batch, num_simulations=20, **options):
    chosen = settings(19)
    for name, value in {"num_simulations": num_simulations, **options}.items():
        object.__setattr__(chosen, name, value)
    return Simulations(model, guide, batch, chosen.checked(batch))


def test_ranks_count_what_is_below():
    truth = torch.tensor([[[0.5, 2.0]]])
    drawn = [torch.tensor([[[0.0, 3.0]], [[0.4, 4.0]]]), torch.tensor([[[0.6, 1.0]]])]
    slack = torch.zeros(1, 2)
    found = _ranks(truth, iter(drawn), slack, np.random.default_rng(0))
    assert found.tolist() == [[2, 1]]


def test_ties_have_each_place_as_often():
    """Two below, three equal, one above: places 2, 3, 4, 5 in 4000 tries."""
    truth = torch.ones(1, 4000, 1)
    drawn = torch.tensor([0.0, 0.5, 1.0, 1.0 + 1e-6, 1.0 - 1e-6, 3.0]).reshape(6, 1, 1)
    rng = np.random.default_rng(0)
    found = _ranks(truth, [drawn.expand(6, 4000, 1)], torch.full((4000, 1), 1e-5), rng)
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == [2, 3, 4, 5]
    assert stats.chisquare(counts).pvalue > 1e-3
    exact = _ranks(truth, [drawn.expand(6, 4000, 1)], torch.zeros(4000, 1), rng)
    assert set(exact.flatten().tolist()) == {3, 4}  # without slack one of them is below


def test_what_is_computed_is_equal_but_for_rounding():
    """float32: 1 and 1 - 2e-7 are ties of a log density, and two values of a latent."""
    found = simulations(NormalModel(), NormalModel().posterior, torch.zeros(2))

    def nearly(chunk, numbers, there, index):
        return torch.full_like(numbers[..., :1], 1.0 - 2e-7 * (numbers.shape[0] > 1))

    ranks = found.ranks(nearly).ranks
    assert len(np.unique(ranks)) > 5
    assert (found.ranks(nearly, num_exact=1).ranks == 19).all()


def test_nan_is_refused():
    with pytest.raises(ValueError, match="draws of the guide are NaN"):
        _ranks(torch.ones(1, 1, 1), [torch.full((2, 1, 1), torch.nan)], torch.zeros(1, 1), None)


def test_resampling_goes_by_the_weights_of_each_datum():
    """All weight of the first datum is on particle 3, of the second on 0."""
    log_weights = torch.full((10, 2), -50.0)
    log_weights[3, 0] = log_weights[0, 1] = 0.0
    weights = LogWeights(log_weights, torch.zeros(10, 2), torch.zeros(10, 2))
    values = torch.arange(20.0).reshape(10, 2, 1)
    chunk = Chunk(slice(0, 2), slice(0, 10), {}, weights)
    found, look = _resampled([(chunk, values)], 5, 0, slice(0, 2))
    assert found.squeeze(-1).tolist() == [[6.0, 1.0]] * 5
    assert look.ess.tolist() == pytest.approx([1.0, 1.0])


def test_latents_keep_their_place_with_an_inner_plate():
    """m and z [2 in a plate], whose densities are scored with the data they were drawn with."""

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("m", dist.Normal(x.new_zeros(len(x), 1), 1.0))
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("z", dist.Normal(x.new_zeros(x.shape), 1.0))

    found = simulations(two_sites, guide, torch.zeros(3, 2, dtype=F64), data_plate="data")
    assert found.labels == ["m[0]", "z[0]", "z[1]"] or found.labels == ["m", "z[0]", "z[1]"]
    assert found.site_of == ["m", "z", "z"]
    assert found.latents["z"].shape[0] == 20
    (block,) = found.blocks(3)
    numbers, _, _ = found._units(block.truth.values, 20)
    z = found.latents["z"].reshape(20, 2)
    torch.testing.assert_close(numbers[0, :, 1:], z)


def test_each_data_set_has_data_and_random_numbers_of_its_own():
    x = torch.zeros(3, dtype=F64)
    found = simulations(shared_mean, joint_posterior, x, data_plate=False)
    assert len(found.batches) == 20 and found.latents["z"].shape == (20, 3)
    blocks = [(block, list(block.chunks)) for block in found.blocks(5)]
    for number, (block, (chunk,)) in enumerate(blocks):
        assert block.index == slice(number, number + 1)
        mu, z = (found.latents[name][number] for name in ("mu", "z"))
        (x,) = found.batches[number].args
        prior = dist.Normal(0.0, 2.0).log_prob(mu) + dist.Normal(mu, 1.0).log_prob(z).sum()
        torch.testing.assert_close(block.truth.weights.log_prior.squeeze(), prior)
        likelihood = dist.Normal(z, 1.0).log_prob(x).sum()
        torch.testing.assert_close(block.truth.weights.log_likelihood.squeeze(), likelihood)
        drawn = chunk.values
        log_x = dist.Normal(drawn["z"].reshape(5, 3), 1.0).log_prob(x).sum(1)
        torch.testing.assert_close(chunk.weights.log_likelihood[:, 0], log_x)
    precision = 1 / 4 + 3 / 2
    noise = [
        chunk.values["mu"].flatten() - found.batches[k].args[0].sum() / 2 / precision
        for k, (_, (chunk,)) in enumerate(blocks)
    ]
    assert len({round(float(each[0]), 6) for each in noise}) == 20


def test_other_simulations_are_others():
    found = simulations(NormalModel(), NormalModel().posterior, torch.zeros(2))
    batches, latents = found.others()
    assert latents["z"].shape == (20,) and len(batches) == 1
    assert not (latents["z"] == found.latents["z"]).any()
    assert not (batches[0].args[0] == found.batches[0].args[0]).any()


def batch_mean(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + 0.1 * x.mean()) / 2, 0.5**0.5))


def fixed_size(x):
    """Of 20 data and no other number: exact all the same."""
    with pyro.plate("data", 20):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def of_position(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + torch.linspace(0, 1, len(x)), 0.5**0.5))


def autonormal(**options):
    guide = AutoNormal(
        NormalModel(), create_plates=lambda x: pyro.plate("data", len(x), dim=-1), **options
    )
    guide(torch.zeros(20))
    return guide


@pytest.mark.parametrize(
    "guide", [autonormal(), batch_mean, of_position], ids=["autonormal", "batch mean", "position"]
)
def test_a_guide_that_does_not_answer_for_a_datum_alone_is_refused(guide):
    """Also a fresh AutoNormal, whose rows are all alike."""
    with pytest.raises(ValueError, match="depends on its place in the batch .* or on the other"):
        simulations(NormalModel(), guide, torch.zeros(20))
    with pytest.raises(ValueError, match="depends on its place in the batch"):
        pv.coverage(NormalModel(), guide, torch.zeros(20), num_simulations=20, num_draws=19)


def test_guides_that_do_are_taken():
    """Also one of a fixed number of data, and one with BatchNorm, in eval mode."""
    simulations(NormalModel(), fixed_size, torch.zeros(20))
    encoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    x = torch.zeros(20, 2)
    simulations(NormalModel(), pv.AmortizedGuide(NormalModel(), encoder, example=x), x)


def test_whole_batches_may_depend_on_all_of_their_data():
    simulations(NormalModel(), batch_mean, torch.zeros(5), data_plate=False)
