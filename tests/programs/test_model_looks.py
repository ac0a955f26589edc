"""What is known of a model: each run that finds something out is made once."""

from __future__ import annotations

import torch

from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.model_looks import ModelLooks
from tests.models import NormalModel

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
