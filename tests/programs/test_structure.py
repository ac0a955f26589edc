"""Structure of models: kinds of sites, the data plate, and what is refused by name."""

from __future__ import annotations

import re

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.structure import DataPlateError, ModelLooks
from tests.models import NormalModel, factor_analysis
from tests.runs import structure_of


def plain(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def outside(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.sample("total", dist.Normal(z.sum(), 1.0), obs=x.sum())


def no_observation(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def no_latent(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def fixed_size(x):
    with pyro.plate("data", 10, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(10))


def sequential(x):
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])


def ambiguous(x):
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 3, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with rows, columns:
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (outside, {}, "no vectorized plate holds every observed site ('x' is in ['data']; 'total'"),
        (outside, {"data_plate": "data"}, "observed sites ['total'] lie outside the data plate"),
        (no_observation, {}, "the model observes nothing"),
        (no_latent, {}, "the model has no latent site, only observed ones: ['x']"),
        (fixed_size, {}, "data plate 'data' has 10 entries but the batch has 3 rows"),
        (sequential, {}, "no vectorized plate holds every observed site"),
        (ambiguous, {}, "['columns', 'rows'] each hold every observed site and a latent one"),
        (plain, {"data_plate": "rows"}, "no vectorized plate of that name; it has ['data']"),
    ],
)
def test_a_data_plate_that_is_not_plain_is_refused(model, options, message):
    batch = torch.zeros(3, 3) if model is ambiguous else torch.zeros(3)
    with pytest.raises(pv.DataPlateError, match=re.escape(message)):
        structure_of(model, batch, **options)


def test_an_ambiguous_data_plate_can_be_named():
    structure = structure_of(ambiguous, torch.zeros(3, 3), data_plate="rows")
    assert [site.name for site in structure.local_latents] == ["a"]
    assert [site.name for site in structure.global_latents] == ["b"]


def bernoulli(x, validate_args=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z, validate_args=validate_args), obs=x)


def test_a_plate_without_a_size_has_that_of_its_data():
    def model(x):
        f = pyro.sample("f", dist.Beta(10.0, 10.0))
        with pyro.plate("data"):
            pyro.sample("x", dist.Bernoulli(f), obs=x)

    structure = structure_of(model, torch.tensor([1.0, 1.0, 0.0]), data_plate=False)
    assert structure.sites["x"].batch_shape == (3,)
    assert structure.sites["x"].plates[0].size == 3


def test_one_latent_in_a_plate_without_a_size_is_not_one_for_each_datum():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(DataPlateError, match=r"'z' has batch shape \[\], one value for the 4 data"):
        structure_of(model, torch.zeros(4))


def test_a_subsample_that_is_given_is_not_drawn():
    data = torch.arange(4.0)

    def model(index):
        with pyro.plate("data", 4, len(index), index) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[rows])

    plate = structure_of(model, torch.tensor([2, 0])).data_plate
    assert (plate.size, plate.full_size, plate.drawn) == (2, 4, False)


def test_sequential_plates_that_draw_are_refused_by_name():
    """Always, not for some seeds."""

    def model(x):
        for i in pyro.plate("rows", 4, subsample_size=2):
            pyro.sample(
                f"x_{i}", dist.Normal(pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)), 1.0), obs=x[i]
            )

    x = torch.zeros(4)
    for seed in range(5):
        torch.manual_seed(seed)
        structure = structure_of(model, x, data_plate=False)
        with pytest.raises(ValueError, match=r"subsample of the sequential plate 'rows'"):
            structure.require_no_sequential()


# --- looks: each run that finds something out is made once

X = torch.tensor([0.3, -1.1, 2.0])


class Counted:
    """The normal model, and how often it ran."""

    def __init__(self):
        self.runs, self._model = 0, NormalModel()

    def __call__(self, x):
        self.runs += 1
        self._model(x)


def test_structures_take_one_run():
    model = Counted()
    looks = ModelLooks(model, as_batch(X))
    first, one_datum = looks.structure(), looks.structure(False)
    assert model.runs == 1
    assert first.data_plate.name == "data"
    assert (first.num_data, one_datum.num_data) == (3, 1)
    assert one_datum.data_plate is None


def test_stability_is_looked_at_in_as_many_runs_as_were_asked_for():
    model = Counted()
    looks = ModelLooks(model, as_batch(X))
    structure = looks.structure()
    for wanted, runs in ((1, 2), (1, 2), (3, 4), (2, 4)):
        looks.check_stable(structure, wanted)
        assert model.runs == runs


def test_rows_share_what_is_no_matter_of_rows():
    model = Counted()
    looks = ModelLooks(model, as_batch(X))
    structure = looks.structure()
    looks.check_stable(structure, 2)
    assert not looks.is_subsampled(structure.data_plate)
    before = model.runs
    part = looks.on(as_batch(X[:2]))
    part.check_stable(structure, 2)
    assert not part.is_subsampled(structure.data_plate)
    assert model.runs == before
    assert part.structure().num_data == 2


def test_an_example_may_be_what_is_known():
    model = Counted()
    looks = ModelLooks(model, as_batch(X))
    assert ModelLooks.of(model, looks) is looks
    assert ModelLooks.of(Counted(), X).batch.size == 3


# --- runs


def test_inspection_leaves_the_random_state_and_the_modules_alone():
    model = factor_analysis()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    structure_of(model, torch.zeros(4, 6, dtype=torch.float64))
    assert torch.equal(torch.rand(2), expected)


def test_an_error_in_the_model_says_what_it_was_run_on():
    model = factor_analysis()
    with pytest.raises(ValueError, match="shape") as caught:
        structure_of(model, torch.zeros(5, 4, dtype=torch.float64))
    assert "its value has shape [5, 4]" in str(caught.value)

    def broken(x):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError) as other:
        structure_of(broken, torch.zeros(5, 4))
    assert other.value.__notes__ == [
        "while running the model on a batch of argument 0: torch.float32 of shape [5, 4]"
    ]
