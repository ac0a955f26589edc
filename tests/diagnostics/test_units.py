"""Units of a datum's latents: their names, and what cannot be compared over the data."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.diagnostics.units import check_over_data, units_of
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from tests.models import NormalModel, mixture


def wide(x):
    """Data [N, 2] with three latents for each number; the inner plate lies left of the data's."""
    with pyro.plate("data", len(x), dim=-1), pyro.plate("inner", 2, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.T)


def evaluator_of(model, guide, *batch, **options):
    return Evaluator(model, guide, as_batch(*batch), seed=0, **options)


def test_numbers_of_inner_plates_and_events_have_names():
    x = torch.randn(4, 2)
    guide = pv.LocalGuide(wide, num_data=4, example=x, data_plate="data")
    evaluator = evaluator_of(wide, guide, x, data_plate="data")
    values, _ = evaluator.draw(slice(0, 4), 5, (0,))
    numbers, labels = units_of(evaluator, "z", values["z"], 5, 4)
    assert labels == [f"z[{i}, {j}]" for i in range(2) for j in range(3)]
    assert values["z"].shape == (5, 2, 4, 3)
    torch.testing.assert_close(numbers.unflatten(-1, (2, 3)), values["z"].movedim(2, 1))


def test_a_single_number_has_the_name_of_its_site():
    model, x = NormalModel(), torch.randn(4)
    evaluator = evaluator_of(model, model.posterior, x)
    values, _ = evaluator.draw(slice(0, 4), 5, (0,))
    numbers, labels = units_of(evaluator, "z", values["z"], 5, 4)
    assert labels == ["z"] and numbers.shape == (5, 4, 1)
    # What is the same for all particles and data has size 1.
    numbers, _ = units_of(evaluator, "z", torch.ones(1, 1), 5, 4)
    assert (numbers == torch.ones(5, 4, 1)).all()


def test_of_one_datum_all_numbers_are_units():
    model, x = NormalModel(), torch.randn(4)
    evaluator = evaluator_of(model, model.posterior, x, data_plate=False)
    values, _ = evaluator.draw(slice(0, 1), 5, (0,))
    numbers, labels = units_of(evaluator, "z", values["z"], 5, 1)
    assert labels == ["z[0]", "z[1]", "z[2]", "z[3]"]
    torch.testing.assert_close(numbers[:, 0], values["z"])
    with pytest.raises(ValueError, match="it asks is about how latents vary over the data"):
        check_over_data(evaluator, "it asks", 1)


def test_few_data_are_refused():
    model, x = NormalModel(), torch.randn(4)
    evaluator = evaluator_of(model, model.posterior, x)
    check_over_data(evaluator, "it", 4)
    with pytest.raises(ValueError, match="it needs at least 5 data.*found 4"):
        check_over_data(evaluator, "it", 5)


def test_guides_of_nothing_are_refused():
    def nothing(x):
        pass

    evaluator = evaluator_of(mixture, nothing, torch.randn(4).double())
    with pytest.raises(ValueError, match="it: the guide proposes no latent of the model"):
        check_over_data(evaluator, "it", 2)


def test_masked_latents_are_refused():
    def model(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([-1.0, 1.0, 2.0])
    guide = pv.LocalGuide(model, num_data=3, example=x)
    with pytest.raises(ValueError, match=r"leaves draws of \['z'\] out for some data"):
        check_over_data(evaluator_of(model, guide, x), "it", 2)
