"""What data were simulated with: from the model's joint, refused where running it is not that."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from scipy import stats

import pyro_vae as pv
from pyro_vae.programs.batch import as_batch
from pyro_vae.sampling.exact_draws import Simulator, starts_of_latents, starts_of_samples
from tests.models import GammaPoisson, NormalModel
from tests.sampling.pairs import local, masked_model, prepared, two_sites

F64 = torch.float64


def simulated(model, *batch, num_data, dreamt=None, data_plate=None, seed=0):
    about = {"dreamt": dreamt, "data_plate": data_plate, "who": "a test", "remedy": "Or not"}
    return Simulator.of(model, as_batch(*batch), num_data, **about).draw(seed)


def blank(num_data, *shape):
    return torch.zeros(num_data, *shape, dtype=F64)


def test_latents_and_data_are_those_of_the_joint():
    """(z, x) is Gaussian with variances 1 and 2 and covariance 1; z given x is Normal(x / 2, .5)"""
    found = simulated(NormalModel(), blank(3), num_data=4000)
    (x,), z = found.batch.args, found.latents["z"]
    assert x.shape == z.shape == (4000,)
    assert stats.kstest(x / 2**0.5, "norm").pvalue > 1e-3
    assert stats.kstest((z - x / 2) * 2**0.5, "norm").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([x, z - x / 2]))[0, 1])) < 4 / 4000**0.5


def test_the_random_state_stays_and_modules_keep_their_mode():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x):
            seen.append(self.training)
            return NormalModel()(x)

    model = Model().train()
    state = torch.get_rng_state()
    simulated(model, blank(3), num_data=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and seen and not any(seen)


def test_coordinates_are_those_of_the_latents():
    """(m, z_1, z_2) of each datum; log of a rate."""
    x = blank(5, 2)
    found = simulated(two_sites, x, num_data=5)
    ready = prepared(two_sites, local(two_sites, x), found.batch)
    z = starts_of_latents(ready, found.latents, 3)
    expected = torch.cat([found.latents["m"].reshape(5, 1), found.latents["z"].reshape(5, 2)], 1)
    torch.testing.assert_close(z, expected.expand(3, 5, 3))
    model = GammaPoisson()
    found = simulated(model, blank(5), num_data=5)
    ready = prepared(model, local(model, blank(5)), found.batch)
    z = starts_of_latents(ready, found.latents, 2)
    torch.testing.assert_close(z[0, :, 0], found.latents["rate"].log())


def test_what_is_not_there_is_drawn_from_the_base_given_what_is():
    """w of a masked datum: the base's conditional given z, a Normal by algebra."""
    seen = torch.tensor([True, False])
    family = pv.families.FullRankNormal()
    guide = pv.LocalGuide(masked_model, num_data=2, example=(blank(2), seen), family=family)
    guide = guide.double()
    root = torch.tensor([[1.0, 0.0], [0.9, 0.5]], dtype=F64).expand(2, -1, -1)
    with torch.no_grad():
        guide.table.copy_(family.from_gaussian(blank(2, 2), root))
    found = simulated(masked_model, blank(2), seen, num_data=2)
    ready = prepared(masked_model, guide, found.batch)
    z = starts_of_latents(ready, found.latents, 4000)
    kept = found.latents["z"]
    assert (z[..., 0] == kept).all()
    torch.testing.assert_close(z[:, 0, 1], found.latents["w"][0].log().expand(4000))
    drawn = z[:, 1, 1]
    assert stats.kstest((drawn - 0.9 * kept[1]) / 0.5, "norm").pvalue > 1e-3


def test_draws_of_chains_are_taken_far_apart():
    model, x = GammaPoisson(), torch.tensor([0.0, 4.0], dtype=F64)
    guide = local(model, x)
    samples = pv.sample_posterior(
        model, guide, x, num_draws=50, num_warmup=50, seed=0, progress=False, compile=False
    )
    z = starts_of_samples(prepared(model, guide, x), samples, 4)
    rate = samples.draws["rate"]
    expected = torch.stack([rate[0, 0], rate[1, 16], rate[2, 33], rate[3, 49]]).log()
    torch.testing.assert_close(z[..., 0], expected)


def test_rows_of_inner_plates_keep_their_place():
    x = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=F64)
    guide = local(two_sites, x)
    samples = pv.sample_posterior(
        two_sites, guide, x, num_draws=50, num_warmup=50, seed=0, progress=False, compile=False
    )
    z = starts_of_samples(prepared(two_sites, guide, x), samples, 2)
    torch.testing.assert_close(z[0, :, 1:], samples.draws["z"][0, 0].reshape(2, 2))


def test_a_site_that_is_reparameterized_holds_no_data():
    @poutine.reparam(config={"z": LocScaleReparam(0.0)})
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(1.0), 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = simulated(model, torch.zeros(4000, dtype=F64), num_data=4000)
    assert list(found.latents) == ["z_decentered"]
    (x,) = found.batch.args
    assert abs(x.mean() - 1.0) < 4 * (5 / 4000) ** 0.5
    assert abs(x.var() - 5.0) < 4 * 5 * (2 / 4000) ** 0.5


# --- refusals


def test_models_that_running_does_not_simulate_are_refused():
    def with_factor(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("f", -z.square())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def looks_at_the_data(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.5 * x, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def own_minibatch(x):
        with pyro.plate("data", 10, subsample_size=5) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def twice(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 2.0), obs=x)

    x = torch.randn(10, dtype=F64)
    for model, message in (
        (with_factor, r"\['f'\] of the model are pyro.factor statements.* Or not"),
        (looks_at_the_data, "site 'z' has another density on the data that the model has drawn"),
        (own_minibatch, r"draws its own minibatch \(plate 'data'"),
        (twice, "a test cannot tell which argument .* observed site 'y'"),
    ):
        with pytest.raises(ValueError, match=message):
            simulated(model, x, num_data=10)

    def closed():
        return NormalModel()(x)

    with pytest.raises(ValueError, match="takes no tensor with a row per datum"):
        simulated(closed, num_data=10)


def test_a_dream_that_holds_other_values_is_refused():
    x = blank(10)
    with pytest.raises(ValueError, match="dream= returned arguments with 2 rows for 10 simulated"):
        simulated(NormalModel(), x, num_data=10, dreamt=lambda drawn: drawn["x"][:2])
    with pytest.raises(ValueError, match="dream= returned arguments with None rows"):
        simulated(NormalModel(), x, num_data=10, dreamt=lambda drawn: None)
    with pytest.raises(ValueError, match="site 'x' has another density .* or dream= does not put"):
        simulated(NormalModel(), x, num_data=10, dreamt=lambda drawn: drawn["x"].flip(0))


def test_likelihoods_without_draws_are_refused():
    class Undrawable(dist.Normal):
        def sample(self, *_):
            raise NotImplementedError

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", Undrawable(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="observed site 'x': its Undrawable .* cannot be drawn"):
        simulated(model, blank(3), num_data=3)


def test_draws_that_are_cut_off_are_refused():
    """Of Gamma(0.02) a sixth are below what float32 can hold; nearly none below float64's."""
    model = GammaPoisson(shape=0.02)
    with pytest.raises(ValueError, match=r"'rate' lie at the edge of what torch.float32 .*float64"):
        simulated(model, torch.zeros(100), num_data=100)
    assert simulated(model, blank(100), num_data=100).latents["rate"].min() > 0
