"""A pair looked at once: its facts, the runs that they take, and what is refused."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv
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


@pytest.mark.parametrize("guide", [pv.families.Normal(), AutoNormal, None])
def test_what_is_no_guide_is_refused_by_name(guide):
    with pytest.raises(TypeError, match="a Pyro guide is needed"):
        Pair(NormalModel(), guide, as_batch(X))
    with pytest.raises(TypeError, match="a Pyro guide is needed"):
        pv.repair(NormalModel(), guide, X, progress=False)


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


# --- a latent that is masked everywhere is not there, or its mask is a flat prior: refused

FIVE = torch.linspace(-1, 1, 5, dtype=torch.float64)
ZERO = torch.zeros(5, dtype=torch.float64)
MESSAGE = "'x' depends on draws of \\['z'\\] that the model masks everywhere"


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def flat(x):
    """A mask that stands for a flat prior: no evidence to bound."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0).mask(False))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def flat_by_data(x):
    """A mask of the data that happens to leave out all of them."""
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=x > 2):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def through_another(x):
    """Nothing that is observed sees the draw, but another latent's prior does."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0).mask(False))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def absent(x):
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(torch.where(x > 0, z, ZERO), 1.0), obs=x)


def absent_with_all_that_depends(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


USES = {
    "ELBO": lambda model, guide: pv.ELBO().loss(model, guide, FIVE),
    "IWAE": lambda model, guide: pv.IWAE(3).loss(model, guide, FIVE),
    "bounds": lambda model, guide: pv.elbo(model, guide, FIVE, num_particles=3),
    "compare": lambda model, guide: pv.compare(model, {"g": guide}, FIVE, num_particles=3),
    "refine": lambda model, guide: pv.refine(model, guide, FIVE, max_steps=1),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("model", [flat, flat_by_data])
def test_a_mask_for_a_flat_prior_is_refused(model, use):
    with pytest.raises(ValueError, match=MESSAGE):
        USES[use](model, guide)


def test_an_autoguide_is_no_way_around():
    with pytest.raises(ValueError, match=MESSAGE):
        pv.ELBO().loss(flat_by_data, AutoNormal(flat_by_data), FIVE)


def test_what_sees_the_draw_may_be_a_latent():
    def both(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))
            pyro.sample("w", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="'w' depends on draws of \\['z'\\]"):
        pv.elbo(through_another, both, FIVE, num_particles=3)


def test_absent_latents_are_taken():
    """By algebra: the guide is exact where the latent is there, x ~ Normal(0, sqrt(2))."""
    there = dist.Normal(ZERO, 2**0.5).log_prob(FIVE)
    for model, elsewhere in (
        (absent, dist.Normal(ZERO, 1.0).log_prob(FIVE)),
        (absent_with_all_that_depends, ZERO),
    ):
        wanted = torch.where(FIVE > 0, there, elsewhere)
        torch.testing.assert_close(pv.elbo(model, guide, FIVE, num_particles=3).value, wanted)
        assert pv.ELBO(kl="sample").loss(model, guide, FIVE) == pytest.approx(-float(wanted.sum()))
