"""Proposals of single sites: entries of a batch inside a datum have the joint's density."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def nested(x):
    """Three entries z inside each datum, and u beside them."""
    with pyro.plate("data", len(x), dim=-2):
        u = pyro.sample("u", dist.Gamma(x.new_ones(()), 1.0))
        with pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z * u, 1.0), obs=x)


@pytest.mark.parametrize(
    "family", [pv.families.FullRankNormal(), pv.families.LowRankNormal(2)], ids=repr
)
def test_the_sum_over_entries_is_the_joint_density(family):
    guide = pv.LocalGuide(nested, num_data=4, example=X, family=family)
    with torch.no_grad():
        guide.table.add_(0.3 * torch.randn_like(guide.table))
    trace = poutine.trace(guide).get_trace(X)
    trace.compute_log_prob()
    u, z = trace.nodes["u"], trace.nodes["z"]
    assert z["log_prob"].shape == (4, 3)
    whole = family.conditional(guide.table, 4, guide.table.new_zeros(4, 0), slice(0, 4))
    log_u = u["value"].log()
    coordinates = torch.cat([log_u, z["value"]], -1)
    # Of u itself the density has the slope of the logarithm.
    wanted = whole.log_prob(coordinates) - log_u[:, 0]
    found = u["log_prob"][:, 0] + z["log_prob"].sum(-1)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-9, atol=1e-9, check_dtype=False)


def test_a_family_without_a_density_of_each_coordinate_is_refused():
    class Whole(pv.families.FullRankNormal):
        def conditional(self, params, size, before, columns):
            joint = super().conditional(params, size, before, columns)
            return dist.TransformedDistribution(joint, [dist.transforms.AffineTransform(0.0, 1.0)])

    guide = pv.LocalGuide(nested, num_data=4, example=X, family=Whole())
    with pytest.raises(
        ValueError, match=r"'z' has batch dimensions inside a datum.*coordinate_log"
    ):
        guide(X)
