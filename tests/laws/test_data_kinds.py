"""Data that are read in parts give the numbers of the same data in memory, whatever the model."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.on_demand import OnDemand, on_demand
from tests.arviz_calls import groups

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


def test_pieces_are_as_large_as_in_memory():
    """Memory is bounded by observed numbers of a datum, which all rows tell as the first ones."""
    wide = torch.ones(N, 3000)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            likelihood = dist.Normal(z.unsqueeze(-1), torch.ones(3000))
            pyro.sample("x", likelihood.to_event(1), obs=x)

    guide = pv.LocalGuide(model, num_data=N, example=wide[:3])
    found, wanted = (
        Evaluator(model, guide, batch, seed=0).chunk_pairs
        for batch in (on_demand(scipy.sparse.csr_matrix(wide.numpy())), as_batch(wide))
    )
    assert found == wanted < 8192


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


def test_rows_of_a_guide_that_were_fitted_to_other_data():
    """They are named by their number, in whatever block."""
    guide, x = guide_of(counts, local=True), COUNTS.clone()
    guide.remember(as_batch(COUNTS, SEEN))
    pv.elbo(counts, guide, scipy.sparse.csr_matrix(x.numpy()), SEEN, num_particles=2)
    x[431] += 5
    with pytest.raises(ValueError, match=r"rows 431 \(1 of 200\) of the batch are not the data"):
        pv.elbo(counts, guide, scipy.sparse.csr_matrix(x.numpy()), SEEN, num_particles=2)


def late(x, seen):
    """Whole numbers, of which a mask leaves some out, in the last block alone."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Poisson((z @ WEIGHTS).exp()).to_event(1), obs=x)


@pytest.mark.parametrize("file", [None, "posterior.nc", "posterior.zarr"])
def test_values_that_are_left_out_behind_the_first_rows_are_nan(file, tmp_path):
    x, seen = COUNTS.long(), torch.arange(N) < 500
    guide = guide_of(late)
    guide.encoder.forward = lambda x, seen: guide.encoder.net(x.float().log1p())
    options = {"num_draws": 3, "seed": 0, "file": None if file is None else tmp_path / file}
    data = pv.to_arviz(late, guide, scipy.sparse.csr_matrix(x.numpy()), seen, **options)
    observed = data["observed_data"]["x"].values
    np.testing.assert_array_equal(observed[:500], x[:500])
    assert np.isnan(observed[500:]).all()
    assert np.isnan(data["posterior_predictive"]["x"].values[:, :, 500:]).all()


class Seen(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(D, 8)

    def forward(self, x):
        return self.net(x.nan_to_num(0.0))


def test_missing_values_may_begin_behind_the_first_rows():
    def values(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHTS, 1.0).to_event(1), obs=x)

    model, x = pv.MissingData(values), COUNTS.clone()
    x[300:, 1] = np.nan
    guide = pv.AmortizedGuide(model, Seen(), example=x[:10])
    found, wanted = (
        pv.elbo(model, guide, data, num_particles=5, seed=0).value
        for data in (scipy.sparse.csr_matrix(x.numpy()), x)
    )
    assert torch.equal(found, wanted)


# --- comparisons, refined guides, mended posteriors, containers


@pytest.mark.parametrize("model", [counts, masked, mixture])
def test_comparisons(model):
    guides = {"encoder": guide_of(model), "rows": guide_of(model, local=True)}
    options = {"num_particles": 50, "reference": "rows", "seed": 1, "progress": False}
    found, wanted = (
        pv.compare(model, guides, x, SEEN, **options).dataset
        for x in (scipy.sparse.csr_matrix(COUNTS.numpy()), COUNTS)
    )
    xr.testing.assert_identical(found, wanted)


def normal(x, seen):
    """Whose posterior is Normal: E[z] = w'x / (1 + w'w)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * WEIGHTS[0], 1.0).to_event(1), obs=x)


def log_evidence(x):
    covariance = torch.eye(D) + torch.outer(WEIGHTS[0], WEIGHTS[0])
    return dist.MultivariateNormal(torch.zeros(D), covariance).log_prob(x).double()


class Known(nn.Module):
    def forward(self, x, seen):
        return normal(x, seen)

    def log_evidence(self, x, seen):
        return log_evidence(x)


@pytest.mark.slow
def test_refined_guides_are_at_the_optimum(monkeypatch):
    """In parts of 250 data; they remember which data they are for."""
    monkeypatch.setattr("pyro_vae.programs.on_demand._PART", 250)
    sparse = scipy.sparse.csr_matrix(COUNTS.numpy())
    start = pv.AmortizedGuide(normal, Encoder(), example=(COUNTS[:10], SEEN[:10]))
    guide = pv.refine(normal, start, sparse, SEEN, seed=0, progress=False)
    assert guide.num_data == N and bool(guide.converged.all())
    mean = COUNTS @ WEIGHTS[0] / (1 + WEIGHTS[0] @ WEIGHTS[0])
    torch.testing.assert_close(guide.table[:, 0, 0].detach(), mean, atol=0.02, rtol=0)
    bound = pv.elbo(normal, guide, sparse, SEEN, num_particles=50, seed=0)
    torch.testing.assert_close(bound.value, log_evidence(COUNTS), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="not the data that this LocalGuide's rows were fitted to"):
        pv.elbo(normal, guide, COUNTS.flip(0), SEEN)
    again = pv.refine(normal, guide, sparse, SEEN, seed=0, progress=False)
    assert bool(again.converged.all())


def test_a_comparison_refines_and_takes_exact_evidence(monkeypatch):
    monkeypatch.setattr("pyro_vae.programs.on_demand._PART", 300)
    sparse, model = scipy.sparse.csr_matrix(COUNTS.numpy()), Known()
    guide = pv.AmortizedGuide(model, Encoder(), example=(COUNTS[:10], SEEN[:10]))
    options = {"num_particles": 100, "evidence": "exact", "progress": False, "seed": 0}
    found = pv.compare(model, {"encoder": guide}, sparse, SEEN, **options).dataset
    np.testing.assert_allclose(found["log_evidence"], log_evidence(COUNTS), rtol=1e-6)
    best = found.sel(guide="Normal per datum")
    assert float(best["approximation_gap"].max()) < 0.02
    assert bool(best["converged"].all())


def test_repair():
    """Draws have the moments of the posterior."""
    sparse = scipy.sparse.csr_matrix(COUNTS[:300].numpy())
    guide = pv.AmortizedGuide(normal, Encoder(), example=(COUNTS[:10], SEEN[:10]))
    found = pv.repair(
        normal, guide, sparse, SEEN[:300], num_particles=1000, num_draws=400, seed=0, progress=False
    )
    assert found.good.all()
    mean = COUNTS[:300] @ WEIGHTS[0] / (1 + WEIGHTS[0] @ WEIGHTS[0])
    width = (1 + WEIGHTS[0] @ WEIGHTS[0]) ** -0.5
    assert ((found.draws["z"].mean(0) - mean) / width).abs().max() < 0.4  # of 300, by 400 draws
    tree = found.to_arviz(predictive=False)
    np.testing.assert_array_equal(tree["observed_data"]["x"], COUNTS[:300])


@pytest.mark.parametrize("file", [None, "posterior.nc", "posterior.zarr"])
@pytest.mark.parametrize(("model", "local"), [(counts, True), (masked, False), (mixture, False)])
def test_containers(model, local, file, tmp_path):
    """Every group of them: arguments, observed values, and what masks leave out."""
    guide = guide_of(model, local)
    sparse = scipy.sparse.csr_matrix(COUNTS.numpy())
    path = None if file is None else tmp_path / file
    options = {"num_draws": 3, "seed": 0}
    wanted = groups(pv.to_arviz(model, guide, COUNTS, SEEN, **options))
    found = groups(pv.to_arviz(model, guide, sparse, SEEN, file=path, **options))
    assert found.keys() == wanted.keys()
    for group, data in wanted.items():
        xr.testing.assert_equal(found[group], data)
        dtypes = [{n: v.dtype for n, v in each.items()} for each in (found[group], data)]
        assert dtypes[0] == dtypes[1]
