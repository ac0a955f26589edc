"""Large counts in float32: bounds against quadrature in float64, and warnings of what is left."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td

from pyro_vae.programs.precision import widened


@pytest.mark.parametrize(
    ("fn", "value"),
    [
        (dist.Poisson(torch.tensor(3.3)), 4.0),
        (dist.NegativeBinomial(torch.tensor(5.0), logits=torch.tensor(0.3)), 4.0),
        (dist.GammaPoisson(torch.tensor(5.0), torch.tensor(0.3)), 4.0),
        (dist.BetaBinomial(torch.tensor(2.0), torch.tensor(3.0), 9), 4.0),
        (dist.ZeroInflatedPoisson(torch.tensor(3.0), gate=torch.tensor(0.5)), 4.0),
        (dist.Binomial(9, probs=torch.tensor(0.3)), 4.0),
        (dist.Normal(torch.tensor(3.3), torch.tensor(0.7)), 4.0),
        (dist.Normal(torch.tensor([3.3]), 0.7).mask(torch.tensor([True])).to_event(1), [4.0]),
        (dist.LogNormal(torch.tensor(3.3), torch.tensor(0.7)), 4.0),
        (dist.MultivariateNormal(torch.zeros(2), 0.3 + torch.eye(2)), [1.0, 2.0]),
        (dist.Multinomial(3, logits=torch.tensor([0.1, 0.2])), [1.0, 2.0]),
        (
            dist.MixtureSameFamily(
                dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.tensor([0.1, 2.2]), 1)
            ),
            1.0,
        ),
    ],
    ids=lambda fn: type(fn).__name__ if isinstance(fn, td.Distribution) else "",
)
def test_a_distribution_in_float64_is_the_same(fn, value):
    value = torch.tensor(value)
    before = fn.log_prob(value)
    found = widened(fn).log_prob(value.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), before, rtol=1e-5, atol=1e-5)
    assert fn.log_prob(value).dtype == torch.float32  # it is a copy


def test_a_distribution_made_of_a_network_stays_as_it_is():
    flow = dist.transforms.planar(2)
    assert widened(dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [flow])) is None
