"""A pair looked at once: its facts, the runs that they take, and what is refused."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.pair import Pair
from tests.models import NormalModel, mixture

X = torch.tensor([0.3, -1.1, 2.0], dtype=torch.float64)


class Counted:
    def __init__(self, program):
        self.program, self.runs = program, 0

    def __call__(self, x):
        self.runs += 1
        return self.program(x)


def test_facts_of_a_pair():
    model, guide = Counted(NormalModel()), Counted(NormalModel().posterior)
    pair = Pair(model, guide, as_batch(X)).evaluable(None)
    assert (pair.structure.data_plate.name, pair.nesting) == ("data", 1)
    assert (pair.summed_out, pair.point_sites, pair.scorable) == ((), [], True)
    assert pair.guide_sites == {"z"}
    assert {name: (s.batch_ndim, s.event_ndim) for name, s in pair.shapes.items()} == {
        "z": (1, 0),
        "x": (1, 0),
    }
    # Under the prior, for stability, and with the guide's draws.
    assert (model.runs, guide.runs) == (3, 1)
    pair.evaluable(False)
    assert model.runs == 3


def test_draws_of_the_single_run_are_those_of_a_fixed_seed():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    values = [
        Pair(NormalModel(), NormalModel().posterior, as_batch(X)).single.guide_trace.nodes["z"][
            "value"
        ]
        for _ in range(2)
    ]
    assert torch.equal(*values)
    assert torch.equal(torch.get_rng_state(), state)


def test_discrete_latents_that_are_left_out():
    pair = Pair(mixture, lambda x: None, as_batch(X)).evaluable(None)
    assert pair.summed_out == ("c",)
    assert pair.user_guide is not pair.guide


def test_another_guide_shares_what_is_known_of_the_model():
    model = Counted(NormalModel())
    pair = Pair(model, NormalModel().posterior, as_batch(X))
    pair.evaluable(None)
    pair.with_guide(lambda x: NormalModel().posterior(x)).evaluable(None)
    assert model.runs == 4  # once more, with the other guide's draws


def test_rows_that_agree_in_another_order():
    pair = Pair(NormalModel(), NormalModel().posterior, as_batch(X)).evaluable(None)
    assert pair.part_agrees(pair.structure.data_plate)
    assert not pair.part_agrees(None)

    def by_place(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.arange(len(x)).to(x), 1.0))

    pair = pair.with_guide(by_place).evaluable(None)
    assert not pair.part_agrees(pair.structure.data_plate)


def test_refusals():
    def tilted(x):
        NormalModel().posterior(x)
        pyro.factor("tilt", torch.zeros(()))

    def drawing(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            NormalModel().sites(x[index])

    with pytest.raises(ValueError, match=r"pyro.factor statements \['tilt'\]"):
        Pair(NormalModel(), tilted, as_batch(X)).evaluable(None)
    with pytest.raises(ValueError, match="the model draws its own minibatch in plate 'data'"):
        Pair(drawing, NormalModel().posterior, as_batch(X)).evaluable(None)
