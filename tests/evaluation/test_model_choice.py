"""Models compared by log p(x), against closed forms; what is refused, by name."""

from __future__ import annotations

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.refinement.climbing import Climber
from pyro_vae.sampling.annealing import Annealer
from pyro_vae.zoo import ProbabilisticPCA
from tests.models import NormalModel

quick = functools.partial(
    pv.compare_models, num_particles=1000, audit=0, seed=0, compile=False, progress=False
)


def pair(noise: float, scale: float = 1.0):
    """A model with a known log p(x), and its posterior, or one that is so much wider."""
    model = NormalModel(noise=noise)

    def guide(x: Tensor) -> None:
        exact = model.posterior_of(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.loc, scale * exact.scale))

    return model, guide


@pytest.fixture(scope="module")
def compared():
    x = 2**0.5 * torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    models = {"one": pair(1.0, 1.3), "two": pair(2.0), "again": pair(1.0)}
    return x, models, quick(models, x)


def test_log_evidence_is_that_of_the_formula(compared):
    x, models, found = compared
    exact = np.stack([model.log_evidence(x).double() for model, _ in models.values()])
    data = found.dataset
    assert bool(data["good"].all())
    errors = (data["log_evidence"].values - exact) / (data["log_evidence_se"].values + 1e-6)
    assert np.abs(errors).max() < 5
    assert (
        0.7 < np.sqrt((errors[0] ** 2).mean()) < 1.3
    )  # of the wide guide: errors are what is said


def test_differences_are_those_of_the_formula(compared):
    x, models, found = compared
    exact = [model.log_evidence(x).double() for model, _ in models.values()]
    row = found.summary("one").loc["two"]
    difference = exact[1] - exact[0]
    assert abs(row["difference"] - difference.mean()) < 4 * row["difference_se"]
    assert row["difference_se_new"] == pytest.approx(float(difference.std()) / 60**0.5, rel=0.05)
    # Of two equal models, by two guides: the Monte Carlo error is all there is.
    row = found.summary("one").loc["again"]
    assert abs(row["difference"]) < 4 * row["difference_se"]
    assert row["verdict"] in ("not distinguishable", "best")
    assert found.preferred == "one"
    assert "two" not in found.indistinguishable


def test_it_is_the_repair_of_each_model_with_the_bias_of_a_logarithm_taken_off():
    x, models = torch.tensor([-1.0, 2.0]), {"one": pair(1.0, 1.3), "two": pair(2.0)}
    found = quick(models, x)
    for number, (name, (model, guide)) in enumerate(models.items()):
        options = {"num_particles": 1000, "num_draws": 1, "audit": 0, "compile": False}
        mine = pv.repair(model, guide, x, seed=number, progress=False, **options).dataset
        wanted = mine["log_evidence"] + mine["log_evidence_se"] ** 2 / 2
        np.testing.assert_array_equal(found.dataset["log_evidence"].sel(model=name), wanted)


@pytest.mark.slow
def test_data_climb_where_the_guide_is_bad():
    x = torch.tensor([-1.0, 2.0])
    models = {"narrow": pair(1.0, 0.05), "exact": pair(1.0)}
    few = quick(models, x, rungs=("importance",), num_particles=1000)
    assert not few.dataset["good"].sel(model="narrow").any()
    found = quick(models, x, max_steps=200)
    assert set(found.dataset["source"].sel(model="narrow").values) == {"refined"}
    exact = models["exact"][0].log_evidence(x).double().numpy()
    near = found.dataset["log_evidence"].values - exact
    assert np.abs(near / (found.dataset["log_evidence_se"].values + 1e-6)).max() < 5


def test_a_source_of_no_good_verdict_is_that_of_the_highest_bound():
    x = torch.zeros(2)
    models = {"far": pair(1.0, 0.02), "exact": pair(1.0)}
    found = quick(models, x, rungs=("importance",))
    assert "may be far higher" in repr(found)
    mine = pv.repair(
        *models["far"],
        x,
        rungs=("importance",),
        num_particles=1000,
        num_draws=1,
        audit=0,
        compile=False,
        seed=0,
        progress=False,
    ).dataset
    np.testing.assert_array_equal(  # a bound, with nothing added
        found.dataset["log_evidence"].sel(model="far"), mine["log_evidence"]
    )


def discrete_pair(weight: float):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(weight)))
            pyro.sample("x", dist.Normal(3 * c, 1.0), obs=x)

    return model


def test_discrete_latents_that_are_summed_out_are_exact():
    x = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    models = {}
    for weight in (0.3, 0.6):
        model = discrete_pair(weight)
        models[f"{weight}"] = (model, pv.ExactGuide(model, example=x))
    models["no guide"] = (model, lambda x: None)
    found = quick(models, x)
    for name, weight in (("0.3", 0.3), ("0.6", 0.6), ("no guide", 0.6)):
        parts = [
            math.log(w) + dist.Normal(m, 1.0).log_prob(x)
            for w, m in ((weight, 3.0), (1 - weight, 0.0))
        ]
        exact = torch.logsumexp(torch.stack(parts), 0)
        np.testing.assert_allclose(found.dataset["log_evidence"].sel(model=name), exact)
    assert set(found.dataset["source"].values.ravel()) == {"exact"}
    assert not found.dataset["log_evidence_se"].any()


def shared_model(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def test_global_latents_at_values_passed():
    x = torch.tensor([0.0, 1.0, 4.0])
    models = {"shared": (shared_model, shared_guide), "zero": pair(1.0)}
    found = quick(models, x, given={"shared": {"w": 1.0}})
    exact = dist.Normal(1.0, 2**0.5).log_prob(x).double().numpy()
    data = found.dataset.sel(model="shared")
    assert np.abs((data["log_evidence"] - exact) / data["log_evidence_se"]).max() < 5
    assert found.dataset["given"].values.tolist() == ["w at the values passed", ""]
    with pytest.raises(ValueError, match="needs them fixed"):
        quick(models, x)
    twice = {"one": models["shared"], "two": models["shared"]}
    with pytest.raises(ValueError, match="given passes 'w' other values.*write it into the model"):
        quick(twice, x, given={"one": {"w": 1.0}, "two": {"w": 2.0}})


def test_all_as_one_datum():
    x = torch.tensor([0.0, 1.0])

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(x.mean() / 2, 0.6))
        shared_guide(x)

    found = quick({"w": (shared_model, guide), "none": pair(1.0)}, x, data_plate=False)
    covariance = torch.eye(2) * 2
    exact = [
        dist.MultivariateNormal(torch.zeros(2), covariance + shift).log_prob(x).item()
        for shift in (1.0, 0.0)
    ]
    data = found.dataset
    errors = (data["log_evidence"].values[:, 0] - exact) / data["log_evidence_se"].values[:, 0]
    assert np.abs(errors).max() < 5
    assert "one datum says nothing of new data" in repr(found)


def test_missing_values_are_left_out():
    x = torch.tensor([[0.0, 1.0], [2.0, math.nan], [math.nan, -1.0]])

    def observing(noise: float):
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)).unsqueeze(-1)
                likelihood = dist.Normal(z.expand(*z.shape[:-1], 2), noise)
                pyro.sample("x", likelihood.to_event(1), obs=x)

        return pv.MissingData(model), lambda x: guide(x.nansum(-1))

    def guide(total: Tensor) -> None:
        with pyro.plate("data", len(total)):
            pyro.sample("z", dist.Normal(total / 3, 0.8))

    found = quick({"one": observing(1.0), "two": observing(2.0)}, x)
    for name, noise in (("one", 1.0), ("two", 2.0)):
        alone = dist.Normal(0.0, math.hypot(1, noise)).log_prob(torch.tensor([2.0, -1.0]))
        covariance = torch.ones(2, 2) + noise**2 * torch.eye(2)
        first = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(x[0])
        exact = torch.cat([first[None], alone]).numpy()
        data = found.dataset.sel(model=name)
        assert np.abs((data["log_evidence"] - exact) / data["log_evidence_se"]).max() < 5


@pytest.mark.parametrize(
    ("models", "error", "says"),
    [
        ([pair(1.0)], TypeError, "a mapping from names to pairs is needed"),
        ({1: pair(1.0), 2: pair(2.0)}, TypeError, "models has the name 1, of type int"),
        ({"one": pair(1.0)[0]}, TypeError, r"models\['one'\]=.*a mapping from names to pairs"),
        ({"one": pair(1.0)}, ValueError, "1 entries, where two or more are needed"),
    ],
)
def test_refuses_what_is_no_mapping_of_pairs(models, error, says):
    with pytest.raises(error, match=says):
        quick(models, torch.zeros(2))


def test_refuses_given_of_no_model():
    models = {"one": pair(1.0), "two": pair(2.0)}
    with pytest.raises(ValueError, match=r"given names \['z'\]; the models are \['one', 'two'\]"):
        quick(models, torch.zeros(2), given={"z": 1.0})
    with pytest.raises(TypeError, match="a mapping from models to values by site"):
        quick(models, torch.zeros(2), given=[1.0])


def test_refuses_models_of_other_data_before_it_works():
    other = NormalModel(noise=0.1)
    models = {"x": pair(1.0), "x / 16": (lambda x: other(x / 16), pair(1.0)[1])}
    with pytest.raises(ValueError, match="in other units"):
        quick(models, torch.arange(3.0), num_particles=-1)


def test_an_error_says_of_which_model_it_is():
    with pytest.raises(ValueError, match="the batch is empty"):
        quick({"one": pair(1.0), "two": pair(2.0)}, torch.zeros(0))
    bad = (pair(1.0)[0], lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match="site 'z'") as caught:
        quick({"one": pair(1.0), "two": bad}, torch.zeros(2))
    assert "while comparing models['two']" in caught.value.__notes__


@pytest.mark.slow
def test_picks_the_dimension_that_the_data_have():
    """In 4 of 4 repetitions; benchmarks/model_choice.py counts 20."""
    for seed in range(4):
        torch.manual_seed(1000 + seed)
        truth = ProbabilisticPCA(8, 2)
        x, held_out = truth.simulate(1000, seed=2 * seed), truth.simulate(500, seed=2 * seed + 1)
        models = {}
        for count in (1, 2, 3):
            torch.manual_seed(seed)
            model = ProbabilisticPCA(8, count)
            guide = pv.AmortizedGuide(model, torch.nn.Identity(), example=x[:5])
            for rate, epochs in ((0.02, 120), (0.002, 30)):
                optim = functools.partial(torch.optim.Adam, lr=rate)
                options = {"epochs": epochs, "batch_size": 100, "progress": False}
                pv.fit(model, guide, x, optim=optim, **options)
            models[f"{count} latents"] = (model, guide)
        found = quick(models, held_out)
        assert found.preferred == "2 latents"
        for name, (model, _) in models.items():
            near = found.dataset["log_evidence"].sel(model=name).values.mean()
            exact = float(model.log_evidence(held_out).detach().double().mean())
            assert abs(near - exact) < 4 * found.summary().loc[name, "log_evidence_se"]


def test_data_that_a_model_does_not_allow_are_named_without_a_search(monkeypatch):
    """No cycle of refine, and no chain, where no draw has a density."""

    def bounded(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    for kind, name in ((Climber, "cycle"), (Annealer, "path")):
        monkeypatch.setattr(kind, name, lambda *rest, name=name: pytest.fail(name))
    x = torch.tensor([60.0, -50.0])
    found = pv.compare_models(
        {"bounded": (bounded, guide), "again": (bounded, guide)}, x, seed=0, progress=False
    )
    assert (found.dataset["log_evidence"] == -math.inf).all() and not found.dataset["good"].any()
    assert "bounded: no draw of its latents gives 2 of 2 data a density" in repr(found)
