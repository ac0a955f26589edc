"""Rates of sites and of their numbers, against sums written out by hand."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pyro_vae as pv
from pyro_vae.diagnostics.rates import in_common_mode, pieces_of, rates_of
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from tests.models import GammaPoisson, NormalModel, mixture

pytestmark = pytest.mark.usefixtures("float64")


def rates(model, guide, *batch, num_particles=4000, **options):
    """The rates of one piece, with its log weights."""
    evaluator = Evaluator(model, guide, as_batch(*batch), seed=0, compile=False, **options)
    (chunk,) = evaluator.chunks(num_particles, 10**7)
    pieces = list(pieces_of(evaluator, chunk))
    found = [rates_of(evaluator, piece) for piece in pieces]
    joined = {name: torch.cat([each[name].total for each in found]) for name in found[0]}
    units = {name: torch.cat([each[name].units for each in found]) for name in found[0]}
    return joined, units, found[0], chunk.weights


def chain(x: Tensor) -> None:
    """z ~ Normal(0, 1), y ~ Normal(z, 1), x ~ Normal(y, 1)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        y = pyro.sample("y", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(y, 1.0), obs=x)


def chain_guide(x: Tensor) -> None:
    """z ~ Normal(x / 3, 0.5), y ~ Normal(0.2 z + x / 2, 0.7)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x / 3, 0.5))
        pyro.sample("y", dist.Normal(0.2 * z + x / 2, 0.7))


def test_a_site_given_another_has_its_expected_kl():
    x = torch.tensor([-1.0, 0.5, 3.0])
    found, _, parts, _ = rates(chain, chain_guide, x)
    of_z = math.log(2) + (0.25 + (x / 3).square()) / 2 - 0.5
    torch.testing.assert_close(found["z"], of_z.expand(4000, 3), rtol=0, atol=1e-12)
    # KL(y | z) = -log t + (t^2 + (0.8 z - x / 2)^2) / 2 - 1/2, and z has mean x / 3, variance 1/4.
    shift = 0.8 * x / 3 - x / 2
    of_y = -math.log(0.7) + (0.49 + shift.square() + 0.64 * 0.25) / 2 - 0.5
    error = found["y"].std(0) / 4000**0.5
    assert ((found["y"].mean(0) - of_y).abs() < 4 * error).all()
    assert all(part.closed for part in parts.values())
    # Given z the closed form is of less variance than the draw: (0.8 z - x / 2)^2 / 2 alone.
    of_term = (0.64**2 * 0.25**2 / 2 + (0.8 * shift * 0.5).square()).sqrt()
    torch.testing.assert_close(found["y"].std(0), of_term, rtol=0.1, atol=0)


def test_what_has_no_closed_form_is_its_draw():
    model, x = GammaPoisson(), torch.tensor([0.0, 4.0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal((1 + x).log(), 0.5))

    found, units, parts, weights = rates(model, guide, x, num_particles=20)
    assert not parts["rate"].closed and parts["rate"].labels == ["rate"]
    torch.testing.assert_close(found["rate"], weights.log_guide - weights.log_prior)
    torch.testing.assert_close(units["rate"].squeeze(-1), found["rate"])


@pytest.mark.parametrize("kind", ["closed", "sampled"])
@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
def test_numbers_of_a_site_sum_to_it_in_every_mode(kind, particles):
    """Of a site with two numbers in an inner plate of three, in closed form and drawn."""
    x = torch.rand(4, 3)
    prior = dist.Gamma(2.0, 1.0) if kind == "closed" else dist.LogNormal(0.0, 1.0)

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", prior.expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1):
            shape = 1 + torch.stack([x, 2 * x], -1)
            pyro.sample("z", dist.Gamma(shape, 1.5).to_event(1))

    options = {"particles": particles, "data_plate": "data"}
    found, units, parts, weights = rates(model, guide, x, num_particles=5, **options)
    assert parts["z"].labels == [f"z[{i}, {j}]" for i in range(3) for j in range(2)]
    assert parts["z"].closed == (kind == "closed")
    torch.testing.assert_close(units["z"].sum(-1), found["z"])
    if kind == "closed":
        q = torch.distributions.Gamma(1 + torch.stack([x, 2 * x], -1), 1.5)
        kl = torch.distributions.kl_divergence(q, torch.distributions.Gamma(2.0, 1.0))
        torch.testing.assert_close(units["z"][0], kl.flatten(1))
    else:
        torch.testing.assert_close(found["z"], weights.log_guide - weights.log_prior)


def test_a_masked_latent_has_no_rate_and_is_not_there():
    torch.manual_seed(0)
    model = pv.zoo.DeepMarkovModel(3, 2, hidden=[4]).double()
    sequences, _ = model.simulate(5, num_steps=3)
    lengths = torch.tensor([1, 2, 3, 3, 1])
    batch = (sequences, lengths)
    guide = pv.AmortizedGuide(model, model.make_encoder(4), example=batch)
    found, units, parts, weights = rates(model, guide, batch, num_particles=2000)
    assert all(part.closed for part in parts.values())
    for step in range(3):
        name, there = f"z_{step + 1}", (lengths > step).to(torch.float64)
        assert (found[name] * (1 - there) == 0).all() and (found[name][:, there > 0] > 0).all()
        torch.testing.assert_close(units[name].sum(-1), found[name])
        torch.testing.assert_close(parts[name].there[0], there[:, None].expand(5, 2))
    drawn = weights.log_guide - weights.log_prior
    difference = sum(found.values()) - drawn
    assert (difference.mean(0).abs() < 4 * difference.std(0) / 2000**0.5 + 1e-12).all()


def test_a_site_that_does_not_factorize_is_one_unit():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            scale = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
            pyro.sample("z", dist.MultivariateNormal(torch.stack([x, -x], -1), scale_tril=scale))

    found, units, parts, _ = rates(model, guide, torch.tensor([0.0, 1.0]), num_particles=3)
    assert parts["z"].closed and parts["z"].labels == ["z"]
    # (tr S + m'm - 2 - log det S) / 2 with S = L L', tr S = 1 + 0.25 + 4, det S = 4.
    exact = (5.25 + torch.tensor([0.0, 2.0]) - 2 - math.log(4)) / 2
    torch.testing.assert_close(found["z"][0], exact)
    torch.testing.assert_close(units["z"].squeeze(-1), found["z"])


def test_the_helper_of_an_autoguide_belongs_to_its_site():
    model, x = GammaPoisson(), torch.tensor([1.0, 4.0, 2.0])
    guide = AutoNormal(model, create_plates=lambda x: pyro.plate("data", len(x)))
    guide(x)
    found, _, parts, weights = rates(model, guide, x, num_particles=10)
    assert list(found) == ["rate"] and parts["rate"].labels == ["rate"]
    torch.testing.assert_close(found["rate"], weights.log_guide - weights.log_prior)


class OnRows(torch.nn.Linear):
    """A network that takes rows alone, no particles beside them."""

    def forward(self, rows):
        assert rows.ndim == 2
        return super().forward(rows)


@pytest.mark.parametrize("loop", [False, True])
def test_guide_and_model_may_run_their_particles_in_other_modes(loop):
    """A decoder that takes rows alone; or takes as many as the batch has, and the guide less."""
    torch.manual_seed(0)
    decoder = OnRows(2, 3).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert not loop or z.shape == (4, 2)
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[..., :2], 0.5).to_event(1))

    x = torch.randn(4, 3)
    evaluator = Evaluator(model, guide, as_batch(x), seed=0)
    assert evaluator.modes == {"guide": "plate", "model": "loop" if loop else "repeat"}
    common = in_common_mode(evaluator)
    assert set(common.modes.values()) == {"loop" if loop else "repeat"}
    (chunk,) = evaluator.chunks(6)
    (piece,) = pieces_of(common, chunk)
    found = rates_of(common, piece)["z"]
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(x[:, :2], 0.5), normal(0.0, 1.0))
    torch.testing.assert_close(found.units, kl.expand(6, 4, 2))
    torch.testing.assert_close(found.total, kl.sum(-1).expand(6, 4))


def test_a_mode_in_which_densities_are_others_is_not_taken():
    """A guide that looks at the mean over its batch, which a batch repeated has too: so a count."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.ndim == 2
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            location = torch.stack([x, x], -1)
            pyro.sample("z", dist.Normal(location, 1.0 / len(x)).to_event(1))

    evaluator = Evaluator(model, guide, as_batch(torch.randn(4)), seed=0)
    assert evaluator.modes == {"guide": "plate", "model": "repeat"}
    assert set(in_common_mode(evaluator).modes.values()) == {"loop"}


def test_latents_that_are_functions_of_another_site_have_one_rate():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z * y, 1.0), obs=x)

    guide, x = AutoMultivariateNormal(model), torch.randn(3)
    guide(x)
    found, _, parts, weights = rates(model, guide, x, num_particles=6, data_plate=False)
    assert list(found) == ["z, y"] and parts["z, y"].labels == ["z, y"]
    torch.testing.assert_close(found["z, y"], weights.log_guide - weights.log_prior)


def test_where_latents_are_summed_out_the_others_have_one_rate():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(2 * c, 1.0))
            y = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    found, _, parts, weights = rates(model, chain_guide, torch.tensor([0.0, 2.0]), num_particles=9)
    assert list(found) == ["z, y"] and parts["z, y"].labels == ["z, y"]
    torch.testing.assert_close(found["z, y"], weights.log_guide - weights.log_prior)


def test_where_all_latents_are_summed_out_there_is_no_rate():
    def nothing(x):
        pass

    found, _, _, weights = rates(mixture, nothing, torch.tensor([0.0, 2.0]), num_particles=2)
    assert found == {}
    assert ((weights.log_guide - weights.log_prior).abs() < 1e-12).all()


def test_scales_of_training_change_no_rate():
    model, x = NormalModel(), torch.tensor([0.5, 1.0])
    scaled = pyro.poutine.scale(model.posterior, 0.1)
    found, _, parts, _ = rates(model, scaled, x, num_particles=2)
    assert parts["z"].closed
    torch.testing.assert_close(found["z"][0], math.log(2) / 2 - 0.25 + x.square() / 8)
