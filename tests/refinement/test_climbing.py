"""Climbing: log weights by hand, slopes without noise at the optimum, gains with their errors."""

from __future__ import annotations

import pytest
import torch
from tqdm.auto import tqdm

from pyro_vae.refinement.climbing import Climber, _orthogonal_noise, log_weights, slope
from tests.models import NormalModel
from tests.refinement.guides import blocks_of

X = torch.tensor([0.3, -1.1, 2.0], dtype=torch.float64)
MODEL = NormalModel(noise=0.5)


def climber_and_block(**options):
    climber = Climber(blocks_of(MODEL, X), 1e-3, tqdm(disable=True), **options)
    return climber, climber.blocks.at(torch.arange(3))[0]


def table(location, scale):
    return torch.stack([location, scale.log().expand_as(location)], -1).unsqueeze(1)


def exact():
    posterior = MODEL.posterior_of(X)
    return table(posterior.loc, posterior.scale[0])


def off():
    return table(X, torch.tensor(1.0, dtype=torch.float64))


def test_log_weights_by_hand():
    climber, block = climber_and_block()
    _, noise = climber.noise(8)
    (found,) = log_weights(block.scored, off(), noise)
    z = X + noise
    normal = torch.distributions.Normal
    wanted = normal(0.0, 1.0).log_prob(z) + normal(z, 0.5).log_prob(X) - normal(X, 1.0).log_prob(z)
    torch.testing.assert_close(found, wanted)
    (evidence,) = log_weights(block.scored, exact(), noise)
    torch.testing.assert_close(evidence, MODEL.log_evidence(X).expand(8, 3))


def test_the_slope_has_no_noise_at_the_optimum():
    climber, block = climber_and_block()
    arguments = (torch.ones((), dtype=torch.float64), *climber.noise(8))
    (at_optimum,) = slope(block.scored, torch.zeros_like(exact()), exact(), *arguments)
    assert at_optimum.abs().max() < 1e-9
    (elsewhere,) = slope(block.scored, torch.zeros_like(off()), off(), *arguments)
    assert elsewhere.abs().max() > 0.1


def test_gains_are_differences_of_exact_elbos():
    climber, block = climber_and_block()
    gain, error = climber.gain(block, off(), exact(), 0)
    wanted = MODEL.log_evidence(X) - MODEL.elbo_of(X, X, torch.ones(3, dtype=torch.float64))
    assert ((gain - wanted).abs() < 4 * error + 1e-9).all()


def test_noise_is_standard_normal_under_its_weights():
    """Orthogonal pairs, and draws that reach into the tails: mean 0, variance 1, kurtosis 3."""
    for heavy in (False, True):
        climber, _ = climber_and_block(heavy=heavy)
        many = [climber.noise(512, (7, i)) for i in range(40)]
        values = torch.cat([noise[:, 0] for _, noise in many])
        weight = torch.cat([weight for weight, _ in many])
        assert abs(weight.mean() - 1) < 0.02
        for power, moment in ((1, 0.0), (2, 1.0), (4, 3.0)):
            terms = weight * values**power
            assert (terms.mean() - moment).abs() < 4 * terms.std() / len(terms) ** 0.5
        assert bool(values.abs().max() > 7) is heavy
        assert float(weight.max()) <= 2.0 + 1e-9


@pytest.mark.parametrize("size", [6, 300])
def test_noise_of_few_and_of_many_coordinates(size):
    """Mirrored pairs in orthogonal directions, exactly normal: a square norm is chi-squared."""
    found = torch.stack([_orthogonal_noise(8, size, (0, i)) for i in range(400)])
    assert found.shape == (400, 8, size) and torch.equal(found[:, 4:], -found[:, :4])
    angles = found[:, :4] @ found[:, :4].mT
    across = angles - torch.diag_embed(angles.diagonal(dim1=-2, dim2=-1))
    assert across.abs().max() < 1e-9 * size
    squares = found[:, :4].square().sum(-1)
    assert abs(float(squares.mean()) - size) < 4 * (2 * size / squares.numel()) ** 0.5
    first = found[:, :4, 0]  # one coordinate, of all directions alike
    assert abs(float(first.square().mean()) - 1) < 4 * (2 / first.numel()) ** 0.5


def test_a_cycle_ends_near_the_optimum():
    climber, block = climber_and_block()
    rate = torch.ones(3, dtype=torch.float64)
    cycle = climber.cycle(block, off(), 200, 0, rate)
    location, log_scale = cycle.after[:, 0].unbind(-1)
    gap = MODEL.log_evidence(X) - MODEL.elbo_of(X, location, log_scale.exp())
    assert gap.max() < 1e-3
