"""What users do beside training: pickle, threads, L-BFGS, sparse gradients."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from torch import nn

import pyro_vae as pv
from tests.models import NormalModel

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROWS = torch.arange(12) % 5


model = NormalModel()


def counted(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(0.3 * x.new_ones(())))
        pyro.sample("x", dist.Normal(c.unsqueeze(-1) * x.new_ones(3), 1.0).to_event(1), obs=x)


def amortized(**options):
    return pv.AmortizedGuide(model, nn.Linear(3, 4).double(), example=X, **options)


GUIDES = {
    "amortized": lambda: (model, amortized()),
    "low rank": lambda: (model, amortized(family=pv.families.LowRankNormal(1))),
    "local": lambda: (model, pv.LocalGuide(model, num_data=12, example=X)),
    "exact": lambda: (counted, pv.ExactGuide(counted, example=X)),
    "zoo": lambda: (
        zoo := pv.zoo.FactorAnalysis(3, 1).double(),
        pv.AmortizedGuide(zoo, nn.Linear(3, 2).double(), example=X),
    ),
}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_trained_pairs_can_be_pickled(make):
    """By pickle and torch.save, after Pyro has left its references on the parameters."""
    fn, guide = make()
    if list(guide.parameters()):
        pv.fit(fn, guide, X, max_steps=3, progress=False)
    svi = pv.CompiledSVI(fn, guide, pyro.optim.Adam({"lr": 0.01}), pv.ELBO())
    svi.step(X)
    wanted = pv.elbo(fn, guide, X, num_particles=3, seed=0).value
    file = io.BytesIO()
    torch.save((fn, guide), file)
    file.seek(0)
    for other_fn, other in (
        pickle.loads(pickle.dumps((fn, guide))),
        torch.load(file, weights_only=False),
        copy.deepcopy((fn, guide)),
    ):
        found = pv.elbo(other_fn, other, X, num_particles=3, seed=0).value
        assert torch.equal(found, wanted)
    svi.step(X)  # goes on


def test_results_can_be_pickled():
    guide = amortized()
    pv.fit(model, guide, X, max_steps=3, progress=False)
    comparison = pv.compare(
        model, {"encoder": guide}, X, num_particles=20, seed=0, reference="encoder"
    )
    other = pickle.loads(pickle.dumps(comparison))
    assert other.summary().equals(comparison.summary())
    bound = pv.elbo(model, guide, X, seed=0)
    assert torch.equal(pickle.loads(pickle.dumps(bound)).value, bound.value)
    refined = pickle.loads(pickle.dumps(pv.refine(model, guide, X, max_steps=2)))
    assert refined.table.shape == (12, 3, 2)


def test_compiled_svi_says_what_to_pickle_instead():
    svi = pv.CompiledSVI(model, amortized(), pyro.optim.Adam({"lr": 0.01}), pv.ELBO())
    svi.step(X)
    with pytest.raises(TypeError, match=r"CompiledSVI cannot be pickled.*state_dict\(\)"):
        pickle.dumps(svi)


# --- threads ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [
        lambda guide: pv.elbo(model, guide, X, num_particles=2, seed=0),
        lambda guide: pv.fit(model, guide, X, max_steps=2, progress=False),
        lambda guide: pv.CompiledSVI(model, guide, None, pv.ELBO()).step(X),
    ],
)
def test_a_second_thread_is_refused_by_name(work):
    """While fit is at work; and afterwards it may."""
    guide, other, told = amortized(), amortized(), []

    def in_a_thread():
        try:
            work(other)
        except RuntimeError as error:
            told.append(str(error))

    def beside(epoch):
        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()

    pv.fit(model, guide, X, epochs=1, callbacks=[beside], progress=False)
    (message,) = told
    assert "at work in another thread" in message
    assert "processes of their own" in message
    beside(None)
    assert len(told) == 1


# --- optimizers ------------------------------------------------------------------------


@pytest.mark.parametrize("how", [False, "replay"])
def test_lbfgs_is_refused_by_name(how):
    told = "a step of LBFGS evaluates the loss several times.*torch.optim.Adam"
    with pytest.raises(ValueError, match=told):
        pv.fit(model, amortized(), X, optim=torch.optim.LBFGS, compile=how, progress=False)
    svi = pv.CompiledSVI(model, amortized(), torch.optim.LBFGS, pv.ELBO(), compile=how)
    with pytest.raises(ValueError, match=told):
        svi.step(X)


class Rows(nn.Module):
    """A shift for each of some groups of data."""

    def __init__(self, sparse):
        super().__init__()
        self.shift = nn.Embedding(5, 3, sparse=sparse).double()

    def forward(self, x, rows):
        pyro.module("rows", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.shift(rows), 1.0).to_event(1), obs=x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4).double()

    def forward(self, x, rows):
        return self.net(x)


def with_rows(sparse):
    pyro.clear_param_store()
    torch.manual_seed(0)
    fn = Rows(sparse)
    return fn, pv.AmortizedGuide(fn, Encoder(), example=(X, ROWS))


@pytest.mark.parametrize(
    "optim",
    [
        lambda: lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}),
        lambda: pyro.optim.Adagrad({"lr": 0.01}),
    ],
)
def test_sparse_gradients_are_those_of_dense_ones(optim, caplog):
    found = []
    for sparse in (True, False):
        fn, guide = with_rows(sparse)
        torch.manual_seed(1)
        svi = pv.CompiledSVI(fn, guide, optim(), pv.ELBO(), compile="replay")
        losses = [svi.step(X, ROWS) for _ in range(40)]
        assert svi.mode == ("eager" if sparse else "replayed")
        fn, guide = with_rows(sparse)
        result = pv.fit(fn, guide, (X, ROWS), optim=optim(), epochs=20, progress=False)
        found.append(losses + result.history["elbo"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    (record,) = [r for r in caplog.records if "run eagerly" in r.getMessage()]
    assert "a gradient is sparse" in record.getMessage()


@pytest.mark.parametrize(
    ("optim", "told"),
    [
        (torch.optim.Adam, r"of shape \(5, 3\) is sparse .* and Adam takes dense ones alone"),
        (None, r"of shape \(5, 3\) is sparse .* and Adam takes dense ones alone"),
        (torch.optim.SparseAdam, "is dense .* and SparseAdam takes sparse ones alone"),
    ],
)
def test_what_takes_no_such_gradients_is_named(optim, told):
    fn, guide = with_rows(sparse=True)
    with pytest.raises(TypeError, match=told):
        pv.fit(fn, guide, (X, ROWS), optim=optim, max_steps=2, progress=False)
    svi = pv.CompiledSVI(fn, guide, optim, pv.ELBO())
    with pytest.raises(TypeError, match=told):
        svi.step(X, ROWS)
