"""Data that are read in parts give the numbers of the same data in memory, whatever the model."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae.programs.on_demand import OnDemand, on_demand

N, D = 600, 4  # three blocks of 200
COUNTS = torch.from_numpy(np.random.default_rng(0).poisson(1.0, (N, D)).astype("float32"))
SEEN = torch.arange(N) % 3 != 0
WEIGHTS = torch.randn(2, D, generator=torch.Generator().manual_seed(0)) / 2


def counts(x, seen):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson((z @ WEIGHTS).exp()).to_event(1), obs=x)


def masked(x, seen):
    """A latent that is there for some rows alone, by the data and by another draw."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.poutine.mask(mask=seen):
            more = pyro.sample("more", dist.Normal(torch.zeros(len(x)), 1.0))
        rate = (z @ WEIGHTS + (seen * more).unsqueeze(-1)).exp()
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


def mixture(x, seen):
    """A discrete latent, summed out, and two observed sites, one of them masked."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson((z @ WEIGHTS + c.unsqueeze(-1)).exp()).to_event(1), obs=x)
        with pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=x[..., 0])


def shared(x, seen):
    """With a global latent, in a plate that is subsampled."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample=x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson((z @ WEIGHTS + shift).exp()).to_event(1), obs=x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(D, 8)

    def forward(self, x, seen):
        return self.net(x.log1p())


def guide_of(model, local=False):
    torch.manual_seed(0)
    batch = COUNTS[:10], SEEN[:10]
    if local:
        guide = pv.LocalGuide(model, num_data=N, example=batch)
        with torch.no_grad():
            guide.table.add_(torch.randn_like(guide.table) / 4)
        return guide
    of_globals = None
    if model is shared:
        of_globals = AutoNormal(pyro.poutine.block(model, expose=["shift"]))
    guide = pv.AmortizedGuide(model, Encoder(), example=batch, global_guide=of_globals)
    with torch.no_grad():
        guide.head.weight.mul_(30.0)
    return guide


PAIRS = [(model, local) for model in (counts, masked, mixture, shared) for local in (False, True)]
PAIRS.remove((shared, True))


@pytest.mark.parametrize(("model", "local"), PAIRS)
def test_bounds(model, local):
    guide, sparse = guide_of(model, local), scipy.sparse.csr_matrix(COUNTS.numpy())
    assert isinstance(on_demand(sparse, SEEN), OnDemand)
    for bound in (pv.elbo, pv.iwae_bound):
        found, wanted = (
            bound(model, guide, x, SEEN, num_particles=7, seed=3) for x in (sparse, COUNTS)
        )
        assert torch.equal(found.value, wanted.value)
        assert torch.equal(found.std_error, wanted.std_error)
        assert found.given.keys() == wanted.given.keys()
    found, wanted = (
        pv.log_weights(model, guide, {"x": x, "seen": SEEN}, num_particles=3, seed=3)
        for x in (sparse, COUNTS)
    )
    for part in ("log_likelihood", "log_prior", "log_guide"):
        assert torch.equal(getattr(found, part), getattr(wanted, part))


def test_rows_of_a_guide_that_are_named():
    """Under guide.rows, batch and index are cut alike."""
    guide, order = guide_of(counts, local=True), torch.randperm(N)[:500]
    sparse = scipy.sparse.csr_matrix(COUNTS[order].numpy())
    with guide.rows(order):
        found, wanted = (
            pv.elbo(counts, guide, x, SEEN[order], num_particles=3, seed=0).value
            for x in (sparse, COUNTS[order])
        )
    assert torch.equal(found, wanted)


def test_no_more_is_read_than_a_block(monkeypatch):
    batch = on_demand(scipy.sparse.csr_matrix(COUNTS.numpy()), SEEN)
    rows, sizes = batch.args[0], []
    read = rows.read
    monkeypatch.setattr(rows, "read", lambda index: sizes.append(len(read(index))) or read(index))
    pv.iwae_bound(counts, guide_of(counts), batch, num_particles=500, chunk_size=1000)
    assert sizes == [200] * 3  # each once


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (np.nan, r"argument 0 of the batch holds NaN .* in rows 431 \(1 of 200\)"),
        (0.5, r"outside the support of its Poisson likelihood .* in rows 431 \(1 of 200\)"),
    ],
)
def test_bad_values_are_named_by_their_row(bad, told):
    x = COUNTS.clone()
    x[431, 1] = bad
    with pytest.raises(ValueError, match=told):
        pv.elbo(counts, guide_of(counts), scipy.sparse.csr_matrix(x.numpy()), SEEN, num_particles=2)


def fixed_size(x, seen):
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(torch.zeros(N, 2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson((z @ WEIGHTS).exp()).to_event(1), obs=x)


def centred(x, seen):
    return counts(x - x.mean() + 3, seen)


def test_what_takes_all_rows_at_once_is_refused():
    sparse = scipy.sparse.csr_matrix(COUNTS.numpy())
    for model in (fixed_size, AutoNormal(counts)):
        pair = (model, guide_of(counts)) if model is fixed_size else (counts, model)
        if model is not fixed_size:
            model(COUNTS, SEEN)
        with pytest.raises((ValueError, RuntimeError)) as error:
            pv.elbo(*pair, sparse, SEEN, num_particles=2)
        assert any("pass these in memory" in note for note in error.value.__notes__)


def test_all_data_as_one_datum_are_read_at_once():
    guide = pv.LocalGuide(counts, num_data=1, example=(COUNTS, SEEN), data_plate=False)
    found, wanted = (
        pv.elbo(counts, guide, x, SEEN, num_particles=3, seed=0, data_plate=False).value
        for x in (scipy.sparse.csr_matrix(COUNTS.numpy()), COUNTS)
    )
    assert torch.equal(found, wanted)


class OfBatch(nn.Module):
    """A global guide whose median is that of its batch."""

    def forward(self, x, seen):
        pyro.sample("shift", dist.Normal(x.mean(), 1.0))

    def median(self, x, seen):
        return {"shift": x.mean()}


def test_a_median_of_the_batch_is_refused():
    guide = pv.AmortizedGuide(
        shared, Encoder(), example=(COUNTS[:10], SEEN[:10]), global_guide=OfBatch()
    )
    with pytest.raises(ValueError, match=r"median of 'shift' depends on the rows .*read in parts"):
        pv.elbo(shared, guide, scipy.sparse.csr_matrix(COUNTS.numpy()), SEEN)
