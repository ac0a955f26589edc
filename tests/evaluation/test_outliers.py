"""Outliers: found where they are, called at the stated rate, refused by name."""

from __future__ import annotations

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics.conformal import Conformal
from pyro_vae.diagnostics.robust import RobustMoments
from tests.models import NormalModel

ask = functools.partial(pv.outliers, num_particles=200, seed=0, compile=False)


def drawn(num_data, seed):
    generator = torch.Generator().manual_seed(seed)
    return 2**0.5 * torch.randn(num_data, 2, generator=generator)


@pytest.fixture(scope="module")
def pair():
    model = NormalModel()
    torch.manual_seed(0)
    return model, pv.AmortizedGuide(model, nn.Sequential(nn.Linear(2, 3)), example=drawn(3, 0))


@pytest.fixture(scope="module")
def found(pair):
    new = torch.cat([drawn(200, 3), torch.tensor([[8.0, -8.0], [30.0, 0.0]])])
    statistics = {"first": lambda sites: sites["x"][:, 0]}
    asked = {"train": drawn(300, 1), "calibration": drawn(150, 2), "statistics": statistics}
    return ask(*pair, new, **asked)


def test_strange_data_are_outliers_and_few_others(found):
    assert found.outlier[-2:].all()
    assert found.outlier[:-2].mean() < 0.05 + 3 * (0.05 / 150 + 0.05 / 200) ** 0.5
    adjusted = found.dataset["adjusted_p_value"].values
    assert (adjusted >= found.dataset["p_value"].values - 1e-12).all()


def test_scores_are_ranked_among_those_of_calibration_data(found):
    data = found.dataset
    names = ["distance", "log_evidence", "predictive", "predictive_first"]
    assert data["score"].values.tolist() == names
    old = np.stack([data[f"calibration_{name}"].values for name in names], 1)
    new = np.stack([data[name].values for name in names], 1)
    ranked = Conformal.of(old, new, np.array([False, True, True, True]))
    np.testing.assert_array_equal(data["p_value"], ranked.combined)
    np.testing.assert_array_equal(data["p_value_of"], ranked.of_score)
    np.testing.assert_array_equal(found.outlier, ranked.combined <= 0.05)


def test_distances_are_those_of_the_encoders_features(pair, found):
    with torch.no_grad():
        train, old = (pair[1].encoder(drawn(*of)).double().numpy() for of in ((300, 1), (150, 2)))
    wanted = RobustMoments.of(train).distance(old)
    np.testing.assert_allclose(found.dataset["calibration_distance"], wanted, rtol=1e-5)


def test_log_evidence_and_replicas_are_of_the_model(pair, found):
    exact = pair[0].log_evidence(drawn(200, 3)).double().numpy()
    data = found.dataset.isel(datum=slice(200))
    good = data["log_evidence_good"].values
    errors = (data["log_evidence"].values - exact) / data["log_evidence_se"].values
    assert good.mean() > 0.5
    assert np.abs(errors[good]).max() < 5
    assert data["posterior_predictive_p"].values.min() >= 0
    assert data["posterior_predictive_p_first"].values.max() <= 1


def test_the_table_has_a_row_for_each_the_strangest_first(found):
    table = found.summary()
    assert len(table) == 202
    assert (table.loc[[200, 201], "p_value"] == table["p_value"].iloc[0]).all()
    assert table["p_value"].is_monotonic_increasing
    assert {"p_log_evidence", "distance", "predictive_first"} <= set(table.columns)
    count = int(found.outlier.sum())
    text = repr(found)
    assert f"{count} of 202 data are outliers at level 0.05 (10.1 expected" in text
    assert "150 calibration data" in text
    assert "false alarms are more" not in text


def test_training_data_are_no_calibration_data_and_it_says_so(pair):
    found = ask(*pair, drawn(20, 3), train=drawn(60, 1))
    assert (found.dataset.attrs["exact"], found.dataset.sizes["calibration"]) == (0, 60)
    assert "false alarms are more than the level" in repr(found)


def test_a_guide_without_a_known_encoder(pair):
    model = pair[0]
    new = torch.cat([drawn(20, 3), torch.full((1, 2), 9.0)])
    found = ask(model, model.posterior, new, calibration=drawn(60, 2))
    assert found.dataset["score"].values.tolist() == ["log_evidence", "predictive"]
    assert "no encoder that is known" in repr(found)
    assert found.outlier[-1]
    with_one = ask(
        *(model, model.posterior, new),
        train=drawn(60, 1),
        calibration=drawn(60, 2),
        features=lambda x: x,
    )
    assert with_one.dataset["score"].values[0] == "distance"


def test_one_datum_and_a_mapping(pair):
    one = {"x": torch.full((1, 2), 9.0)}
    found = ask(*pair, one, train={"x": drawn(60, 1)}, calibration={"x": drawn(60, 2)})
    assert found.outlier.tolist() == [True]


def test_global_latents_are_held_and_named():
    def model(x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    ordinary = 5 + 2**0.5 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    found = ask(
        model, guide, torch.tensor([5.0, -4.0]), calibration=ordinary, given={"w": 5.0}, level=0.1
    )
    assert found.outlier.tolist() == [False, True]
    assert "given w at the values passed" in repr(found)
    with pytest.raises(ValueError, match="needs them fixed"):
        ask(model, guide, ordinary, calibration=ordinary)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": 1.5}, "level=1.5: a number between 0 and 1"),
        ({}, "train= or calibration= is needed"),
        ({"calibration": drawn(18, 2)}, "train= is needed: features of new data"),
        ({"calibration": drawn(18, 2), "train": drawn(9, 1)}, "pass 19 or more, or a higher level"),
        ({"train": torch.zeros(0, 2)}, "the batch is empty"),
        ({"train": torch.full((30, 2), math.nan)}, "features of 30 data are not finite"),
    ],
)
def test_refuses(pair, options, says):
    with pytest.raises(ValueError, match=says):
        ask(*pair, drawn(3, 0), **options)


def test_refuses_a_guide_with_parameters_of_each_datum_for_others_of_the_same_number(pair):
    """AutoNormal takes them for those of the data that it was fitted to, row by row."""
    model, _ = pair
    guide = AutoNormal(model)
    guide(drawn(30, 1))
    with pytest.raises(ValueError, match="it has parameters for each of the data that it was"):
        ask(model, guide, drawn(30, 3), calibration=drawn(30, 2))
    local = pv.LocalGuide(model, num_data=30, example=drawn(30, 1))
    with pytest.raises(ValueError, match="a LocalGuide has parameters for its own data alone"):
        ask(model, local, drawn(30, 3), calibration=drawn(30, 2))


def test_refuses_statistics_that_are_no_functions(pair):
    with pytest.raises(TypeError, match="a mapping from names to functions is needed"):
        ask(*pair, drawn(3, 0), train=drawn(30, 1), statistics=[torch.sum])


@pytest.mark.slow
def test_ordinary_data_are_called_strange_at_the_stated_rate(pair):
    """Whatever the model: this encoder is not trained."""
    rates = []
    for seed in range(30):
        x = drawn(139, 100 + seed)
        asked = {"train": drawn(100, 1), "calibration": x[:99], "seed": seed}
        rates.append(ask(*pair, x[99:], **asked).outlier.mean())
    assert abs(np.mean(rates) - 0.05) < 3.5 * np.std(rates) / 30**0.5
