"""Pairs in files: what was saved comes back, to the bit, or is refused by what differs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae.programs.batch import as_batch
from pyro_vae.training import checkpoints, sealed
from tests.training.runs import KINDS, VALIDATION, Kind, X, discrete, everything, trained


def fitted(kind, **options):
    """Return a trained pair."""
    pairs = []

    def pair():
        pairs.append(kind.pair())
        return pairs[0]

    trained(Kind(pair, kind.data, kind.options, kind.more), epochs=2, **options)
    return pairs[0]


def fresh(kind, seed=9):
    """Return a pair of the same kind, in a process without Pyro's parameters."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    return kind.pair()


def bounds(model, guide):
    return pv.elbo(model, guide, X, num_particles=3, seed=1).value


PAIRS = ["plain", "local", "discrete", "store"]


@pytest.mark.parametrize("name", PAIRS)
def test_a_fresh_pair_has_the_same_bounds(name, tmp_path):
    kind, path, batch = KINDS[name], tmp_path / "pair", (X[:5],) if name == "store" else ()
    model, guide = fitted(kind)
    wanted, everything_saved = bounds(model, guide), everything(model, guide)
    pv.save(path, model, guide, *batch)
    model, guide = fresh(kind)
    assert not torch.equal(bounds(model, guide), wanted)
    model, guide = fresh(kind)
    pv.load(path, model, guide, *batch)
    assert torch.equal(bounds(model, guide), wanted)
    found = everything(model, guide)
    assert found.keys() == everything_saved.keys()
    for key, value in found.items():
        assert torch.equal(value, everything_saved[key]), key


@pytest.mark.parametrize("batch", [(), (X[:4],)])
@pytest.mark.parametrize("name", ["plain", "local"])
def test_nothing_has_to_be_trained(name, batch, tmp_path):
    model, guide = fresh(KINDS[name], 1)
    if name == "local":  # else two fresh tables are the same
        with torch.no_grad():
            guide.table.normal_()
    wanted = bounds(model, guide)
    pv.save(tmp_path / "pair", model, guide, *batch)
    other = fresh(KINDS[name], 2)
    pv.load(tmp_path / "pair", *other, *batch)
    assert torch.equal(bounds(*other), wanted)


def test_first_values_of_functions_are_saved_before_any_run(tmp_path):
    """Drawn in the first run: the file decides, not the next draw."""

    def model(x):
        mu = pyro.param("mu", lambda: torch.randn(3).double())
        scale = pyro.param("scale", torch.rand(()).double(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(mu + z, scale).to_event(1), obs=x)

    guide = pv.LocalGuide(model, num_data=len(X), example=X)
    pyro.clear_param_store()
    pv.save(tmp_path / "pair", model, guide, X[:3])
    wanted = pyro.param("mu").detach().clone()
    value = bounds(model, guide)
    pyro.clear_param_store()
    torch.manual_seed(123)
    pv.load(tmp_path / "pair", model, guide, X[:3])
    assert torch.equal(pyro.param("mu"), wanted)
    assert torch.equal(bounds(model, guide), value)


def test_an_autoguide_that_has_seen_no_data(tmp_path):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    path, guide = tmp_path / "pair", AutoNormal(model)
    pv.fit(model, guide, X, data_plate=False, epochs=5, progress=False)
    pv.save(path, model, guide, X)
    wanted = guide.median()["mu"]
    pyro.clear_param_store()
    other = AutoNormal(model)
    with pytest.raises(ValueError, match=r"here none.*is there with a batch, load\(path, model"):
        pv.load(path, model, other)
    pv.load(path, model, other, X)
    assert torch.equal(other.median()["mu"], wanted)


def test_a_table_remembers_what_its_rows_were_fitted_to(tmp_path):
    kind, path = KINDS["local"], tmp_path / "pair"
    model, guide = fitted(kind)
    with torch.no_grad():
        guide.converged[3] = True
    pv.save(path, model, guide)
    model, guide = fresh(kind)
    pv.load(path, model, guide)
    assert guide.converged.sum() == 1
    with pytest.raises(ValueError, match="are not the data that this LocalGuide's rows"):
        pv.elbo(model, guide, X.flip(0))


def test_values_that_rows_were_fitted_at(tmp_path):
    """They come and go with the file, whatever the guide had before."""
    kind, path = KINDS["local"], tmp_path / "pair"
    model, guide = fresh(kind)
    pv.save(tmp_path / "without", model, guide)
    guide.remember(as_batch(X), {"mu.a": torch.tensor(2.0)})
    pv.save(path, model, guide)
    model, guide = fresh(kind)
    pv.load(path, model, guide)
    assert guide.given == {"mu.a": torch.tensor(2.0)}
    pv.load(tmp_path / "without", model, guide)
    assert guide.given == {}


def test_a_checkpoint_gives_its_best_parameters(tmp_path):
    kind, path = KINDS["validation, warm-up"], tmp_path / "run"
    model, guide = fitted(kind, checkpoint=path)
    wanted = everything(model, guide)
    best = checkpoints.load(path)["best"]
    for options in ({}, {"batch": (VALIDATION,)}):
        model, guide = fresh(kind)
        pv.load(path, model, guide, *options.get("batch", ()))
        found = everything(model, guide)
        for key, value in found.items():
            assert torch.equal(value, wanted[key]), key
    assert torch.equal(best["model"]["net.weight"], model.net.weight)


def test_a_checkpoint_inside_an_epoch_gives_what_it_came_to(tmp_path):
    kind, path = KINDS["plain"], tmp_path / "run"
    trained(kind, max_steps=2, epochs=2, checkpoint=path)
    now = checkpoints.load(path)["now"]
    model, guide = fresh(kind)
    pv.load(path, model, guide)
    assert torch.equal(now["guide"]["head.weight"], guide.head.weight)


# --- refused --------------------------------------------------------------------------------


def wider():
    model, _ = KINDS["plain"].pair()
    return model, pv.AmortizedGuide(model, nn.Linear(3, 5).double(), example=X)


def other_family():
    """With parameters of the same shapes, which mean something else."""
    model, _ = KINDS["local"].pair()
    flat = Flat()
    return model, pv.LocalGuide(model, num_data=len(X), example=X, family=flat)


class Flat(pv.families.Normal):
    pass


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (KINDS["plain"].pair, wider, r"encoder.0.weight: saved \(4, 3\), here none.*more"),
        (KINDS["plain"].pair, KINDS["local"].pair, r"not this pair's: "),
        (KINDS["local"].pair, other_family, r"family: Normal\(\) there, .*Flat.* here"),
        (KINDS["plain"].pair, discrete, r"means: saved none, here \(2, 3\)"),
    ],
)
def test_another_pair_is_refused_by_what_differs(one, other, told, tmp_path):
    torch.manual_seed(1)
    pv.save(tmp_path / "pair", *one())
    pair = other()
    before = everything(*pair)
    with pytest.raises(ValueError, match=rf"pair: .*{told}"):
        pv.load(tmp_path / "pair", *pair)
    for key, value in everything(*pair).items():
        assert torch.equal(value, before[key]), key


def laplace():
    model, _ = KINDS["plain"].pair()

    class Other(type(model)):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Laplace(self.net(z), 0.5).to_event(1), obs=x)

    other = Other()
    return other, pv.AmortizedGuide(other, KINDS["plain"].pair()[1].encoder, example=X)


def test_other_sites_are_refused_where_both_are_known(tmp_path):
    pv.save(tmp_path / "pair", *KINDS["plain"].pair(), X[:5])
    with pytest.raises(ValueError, match="site 'x': observed Normal in data there, observed Lapl"):
        pv.load(tmp_path / "pair", *laplace(), X[:7])
    pv.load(tmp_path / "pair", *KINDS["plain"].pair(), X[:7])


def test_another_dtype_is_refused(tmp_path):
    pv.save(tmp_path / "pair", *KINDS["plain"].pair())
    model, guide = KINDS["plain"].pair()
    with pytest.raises(ValueError, match=r"saved torch.float64, here torch.float32"):
        pv.load(tmp_path / "pair", model.float(), guide.float())


def test_another_constraint_is_refused(tmp_path):
    """The store holds values on the reals: another constraint would make others of them."""

    def model_of(constraint):
        def model(x):
            scale = pyro.param("scale", torch.ones(()).double(), constraint=constraint)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

        return model, pv.LocalGuide(model, num_data=len(X), example=X)

    pv.save(tmp_path / "pair", *model_of(constraints.positive), X)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"constraint 'scale': GreaterThan\(.*there, SoftplusPos"):
        pv.load(tmp_path / "pair", *model_of(pyro.distributions.constraints.softplus_positive), X)


def test_a_run_is_asked_for_where_the_store_may_hold_parameters(tmp_path):
    path = tmp_path / "pair"
    model, guide = fitted(KINDS["store"])
    with pytest.raises(ValueError, match=r"holds .*'scale'.*save\(path, model, guide, x\[:9\]\)"):
        pv.save(path, model, guide)
    pv.save(path, model, guide, X)
    model, guide = fresh(KINDS["store"])
    with pytest.raises(ValueError, match=r"here none.*load\(path, model, guide, x\)"):
        pv.load(path, model, guide)
    # Guides of ours that live beside the pair are none of its parameters.
    pyro.clear_param_store()
    others = [fitted(KINDS["plain"]), fitted(KINDS["local"])]
    for pair in others:
        pv.save(path, *pair)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    pv.save(path, model, pv.LocalGuide(model, num_data=len(X), example=X))


def test_other_files_are_refused(tmp_path):
    pair = KINDS["plain"].pair()
    path = tmp_path / "pair"
    for content in (b"", b"a poem"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"pair is not a pair of pyro_vae.save or a check"):
            pv.load(path, *pair)
    torch.save(pair[0].state_dict(), path)
    with pytest.raises(ValueError, match=r"is not a pair of pyro_vae.save"):
        pv.load(path, *pair)
    sealed.write({"pyro_vae_pair": 2}, path)
    with pytest.raises(ValueError, match="written by a newer version of pyro_vae"):
        pv.load(path, *pair)
    for state in (3, {"model": 3}, {"model": {"net.weight": 3}}, {1: {}}, None):
        sealed.write({"pyro_vae_pair": 1, "parameters": state}, path)
        with pytest.raises(ValueError, match=r"holds something else than parameters|not this pair"):
            pv.load(path, *pair)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pv.load(tmp_path / "nowhere", *pair)
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        pv.save(tmp_path / "no" / "pair", *pair)
    for function in (pv.save, pv.load):
        with pytest.raises(
            TypeError, match=r"\(path, model, guide\): the path of a file is needed"
        ):
            function(*pair, path)
    pv.save(path, *pair)
    with pytest.raises(ValueError, match="is not a checkpoint of pyro_vae.fit"):
        trained(KINDS["plain"], epochs=1, checkpoint=path)


@pytest.mark.slow
def test_another_process_has_the_same_bounds(tmp_path):
    text = """
    import os, sys, torch, pyro_vae as pv
    from tests.training.runs import KINDS, X
    kind, path = KINDS[sys.argv[1]], sys.argv[2]
    batch = (X,) if sys.argv[1] == "store" else ()
    torch.manual_seed(int(sys.argv[3]))
    model, guide = kind.pair()
    if not os.path.exists(path):
        pv.fit(model, guide, X, epochs=2, batch_size=8, progress=False)
        pv.save(path, model, guide, *batch)
    else:
        pv.load(path, model, guide, *batch)
    print(pv.elbo(model, guide, X, seed=1).value.tolist())
    """
    for name in PAIRS:
        args = [name, os.fspath(tmp_path / name)]
        code = [sys.executable, "-c", textwrap.dedent(text), *args]
        told = [
            subprocess.run([*code, seed], check=True, capture_output=True, text=True).stdout
            for seed in ("1", "2")
        ]
        assert told[0] == told[1] != ""
