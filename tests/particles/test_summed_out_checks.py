"""Proposals beside latents that are summed out: what is refused by name."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from tests.losses.normal import X, mixed
from tests.models import MEANS, WEIGHTS, NormalModel

X3 = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)


def test_draws_of_a_sites_own_are_refused_by_name():
    def guide(x):
        with pyro.plate("data", len(x)):
            infer = {"enumerate": "parallel", "num_samples": 1000}
            pyro.sample("z", dist.Normal(x, 0.5), infer=infer)

    model = NormalModel(noise=0.2)

    for loss in (pv.ELBO(), pv.IWAE(2), pv.WakeSleep(2)):
        with pytest.raises(ValueError, match="'z' asks for 1000 draws .*num_particles=1000"):
            loss.loss(model, guide, X3)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_proposal_that_depends_on_one_summed_out_is_refused(num_particles):
    def guide(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(MEANS[c], 1.0))

    with pytest.raises(
        ValueError, match=r"site 'z' depends on \['c'\], which ask to be enumerated"
    ):
        pv.IWAE(num_particles).loss(mixed, guide, X)


@pytest.mark.usefixtures("float64")
def test_markov_proposals_that_share_dimensions_are_refused():
    table = torch.tensor([[0.7, 0.3], [0.2, 0.8]])

    def chain(x=None, infer=None):
        c = 0
        for t in pyro.markov(range(4)):
            c = pyro.sample(f"c{t}", dist.Categorical(table[c]), infer=infer or {})
            if x is not None:
                pyro.sample(f"x{t}", dist.Normal(c * 1.0, 1.0), obs=x[t])

    def model(x):
        chain(x)

    def guide(x):
        chain(infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match=r"dimensions that some share \(pyro.markov\)"):
        pv.ELBO().loss(model, guide, torch.zeros(4))
    # Left out of the guide, they are summed out: the forward algorithm.
    alpha = table[0] * torch.exp(dist.Normal(torch.arange(2.0), 1.0).log_prob(torch.tensor(0.0)))
    for _ in range(3):
        likelihood = dist.Normal(torch.arange(2.0), 1.0).log_prob(torch.tensor(0.0)).exp()
        alpha = (alpha @ table) * likelihood
    found = pv.ELBO(data_plate=False).loss(model, lambda x: None, torch.zeros(4))
    assert found == pytest.approx(-alpha.sum().log().item(), rel=1e-12)
