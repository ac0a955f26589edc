"""A pyro.optim object stays alive and in step: shared, saved, loaded, its rates set."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_vae as pv

X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def model(x):
    w = pyro.param("w", torch.tensor(5.0, dtype=torch.float64))
    b = pyro.param("b", torch.tensor(1.0, dtype=torch.float64))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(w + b, 1.0), obs=x)


def model_aux(x):
    """Shares one parameter, and has one of its own."""
    w = pyro.param("w", torch.tensor(5.0, dtype=torch.float64))
    c = pyro.param("c", torch.tensor(0.3, dtype=torch.float64))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(w * c, 3.0), obs=x - 4)


def guide(x):
    pass


def compiled(how):
    return lambda *args: pv.CompiledSVI(*args, compile=how)


HOWS = [False, "replay"]
OPTIMS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.1}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99, "clip_norm": 1.0}),
    "SGD": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.01}),
}


def values():
    return {name: value.item() for name, value in pyro.get_param_store().items()}


def both(run, how):
    """What a run leaves in the store, by Pyro's SVI and by ours."""
    found = []
    for make in (SVI, compiled(how)):
        pyro.clear_param_store()
        returned = run(make)
        found.append((values(), returned))
    return found


def same(pyros, ours):
    assert ours[0] == pytest.approx(pyros[0], rel=1e-10)
    assert ours[1] == pytest.approx(pyros[1], rel=1e-10)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
def test_two_svis_share_one(optim, how):
    def run(make):
        adam = optim()
        one, other = (make(fn, guide, adam, Trace_ELBO()) for fn in (model, model_aux))
        return [svi.step(X) for _ in range(50) for svi in (one, other)]

    same(*both(run, how))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
def test_a_run_resumed_by_save_and_load(optim, how, tmp_path):
    """As Pyro's examples do it; and the whole run ends where the resumed one does."""

    def run(make, interrupted=True):
        adam = optim()
        svi = make(model, guide, adam, Trace_ELBO())
        losses = [svi.step(X) for _ in range(12)]
        if interrupted:
            adam.save(tmp_path / "optim")
            pyro.get_param_store().save(tmp_path / "params")
            assert set(adam.get_state()) == {"w", "b"}
            pyro.clear_param_store()
            pyro.get_param_store().load(tmp_path / "params")
            adam = optim()
            adam.load(tmp_path / "optim")
            svi = make(model, guide, adam, Trace_ELBO())
        return losses + [svi.step(X) for _ in range(50)]

    pyros, ours = both(run, how)
    same(pyros, ours)
    _, whole = both(lambda make: run(make, interrupted=False), how)
    same(whole, ours)


@pytest.mark.parametrize("how", HOWS)
def test_the_state_is_that_of_pyro(how):
    def run(make):
        adam = pyro.optim.Adam({"lr": 0.1})
        svi = make(model, guide, adam, Trace_ELBO())
        for _ in range(20):
            svi.step(X)
        state = {name: found["state"][0] for name, found in adam.get_state().items()}
        return [float(state[n][k]) for n in "wb" for k in ("step", "exp_avg", "exp_avg_sq")]

    same(*both(run, how))


@pytest.mark.parametrize("how", HOWS)
def test_rates_that_are_set(how):
    """In Pyro's object, for one parameter or for all."""

    def run(make):
        adam = pyro.optim.Adam({"lr": 0.1})
        svi, losses = make(model, guide, adam, Trace_ELBO()), []
        for step in range(40):
            losses.append(svi.step(X))
            if step == 10:
                for single in adam.optim_objs.values():
                    single.param_groups[0]["lr"] = 0.05
            if step == 20:
                w = pyro.param("w").unconstrained()
                adam.optim_objs[w].param_groups[0]["lr"] = 0.0
        return losses

    same(*both(run, how))


def test_a_rate_set_in_the_torch_optimizer_is_pyros():
    adam = pyro.optim.Adam({"lr": 0.1})
    svi = pv.CompiledSVI(model, guide, adam, Trace_ELBO())
    svi.step(X)
    svi.optimizer.param_groups[0]["lr"] = 0.0
    svi.step(X)
    before = values()
    svi.step(X)
    assert values() == before
    assert [s["param_groups"][0]["lr"] for s in adam.get_state().values()] == [0.0, 0.0]


@pytest.mark.parametrize("how", HOWS)
def test_svi_goes_on_where_the_other_stopped(how):
    """Steps of Pyro's SVI and of ours by turns, with one object, are Pyro's steps."""

    def run(make):
        adam = pyro.optim.Adam({"lr": 0.1})
        svis = [make(model, guide, adam, Trace_ELBO()), SVI(model, guide, adam, Trace_ELBO())]
        return [svis[step // 5 % 2].step(X) for step in range(40)]

    same(*both(run, how))


def test_a_state_dict_that_is_loaded_is_pyros():
    adam = pyro.optim.Adam({"lr": 0.1})
    svi = pv.CompiledSVI(model, guide, adam, Trace_ELBO(), compile="replay")
    for _ in range(5):
        svi.step(X)
    state = copy.deepcopy(svi.optimizer.state_dict())
    moment = float(state["state"][0]["exp_avg"])
    for _ in range(5):
        svi.step(X)
    svi.optimizer.load_state_dict(state)
    first = next(iter(svi.optimizer.param_groups[0]["params"]))
    assert float(adam.optim_objs[first].state[first]["exp_avg"]) == pytest.approx(moment)
    svi.step(X)
    assert float(adam.optim_objs[first].state[first]["step"]) == 6


def test_fit_leaves_its_state_in_the_object(tmp_path):
    """Adam's moments of a fit are there to be saved, and a checkpoint brings them back."""

    def latent(x):
        w = pyro.param("w", torch.tensor(0.3, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def proposal(x):
        m = pyro.param("m", torch.tensor(0.0, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, 1.0))

    found = []
    for parts in ([10], [5, 10]):
        for epochs in parts:
            pyro.clear_param_store()
            adam = pyro.optim.Adam({"lr": 0.1})
            path = tmp_path / str(len(parts))
            pv.fit(latent, proposal, X, optim=adam, epochs=epochs, checkpoint=path, progress=False)
        state = adam.get_state()
        assert set(state) == {"w", "m"}
        assert float(state["w"]["state"][0]["step"]) == 10
        found.append({n: float(s["state"][0]["exp_avg_sq"]) for n, s in state.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("how", HOWS)
def test_a_first_gradient_in_a_later_step(how):
    """Of one parameter of several, under momentum."""

    def late(x, both):
        w = pyro.param("w", torch.tensor(5.0, dtype=torch.float64))
        b = pyro.param("b", torch.tensor(1.0, dtype=torch.float64))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(w + (b if both else b.detach()), 1.0), obs=x)

    def run(make):
        sgd = pyro.optim.SGD({"lr": 0.01, "momentum": 0.9})
        svi = make(late, lambda x, both: None, sgd, Trace_ELBO())
        return [svi.step(X, step > 3) for step in range(20)]

    same(*both(run, how))


def _put_a_state_anew(optimizer):
    for parameter in list(optimizer.state):
        optimizer.state[parameter] = {
            k: v.clone() * 0 for k, v in optimizer.state[parameter].items()
        }


def _put_tensors_anew(optimizer):
    for state in optimizer.state.values():
        state.update({name: value.clone() * 0 for name, value in state.items()})


def _load(optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"].zero_()
    optimizer.load_state_dict(saved)


CHANGES = {
    "a rate": lambda optimizer: optimizer.param_groups[0].update(lr=0.01),
    "a setting": lambda optimizer: optimizer.param_groups[0].update(betas=(0.5, 0.9)),
    "the groups": lambda optimizer: optimizer.param_groups.__setitem__(
        slice(None), [{**group, "maximize": True} for group in optimizer.param_groups]
    ),
    "one parameter less": lambda optimizer: optimizer.state.pop(
        optimizer.param_groups[0]["params"].pop()
    ),
    "the state": _put_a_state_anew,
    "its tensors": _put_tensors_anew,
    "a state that is loaded": _load,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_in_an_optimizer_between_two_steps_counts(change):
    found = []
    for how in HOWS:
        pyro.clear_param_store()
        w, b = torch.tensor(4.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)

        def model(x, w=w, b=b):
            with pyro.plate("data", 3):
                pyro.sample("x", dist.Normal(w, b.exp()), obs=x)

        adam = torch.optim.Adam([w, b], lr=0.1, fused=True)
        svi = pv.CompiledSVI(model, guide, adam, pv.ELBO(), compile=how)
        hooked = []
        for step in range(40):
            if step == 12:
                change(adam)
            if step == 30:
                adam.register_step_post_hook(lambda *_, hooked=hooked: hooked.append(1))
            svi.step(X)
        assert (svi.mode == "replayed") == (how == "replay")
        found.append((w.item(), b.item(), len(hooked)))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[0][2] == 10
