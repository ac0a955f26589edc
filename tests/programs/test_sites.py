"""Sites, plates and structures: scales, supports in words, kinds, and global latents refused."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_vae.programs.sites import Plate, Site, Structure

DATA = Plate("data", -1, 5, 50)
INNER = Plate("inner", -2, 2, 2)


def site(name="z", kind="local latent", fn=None, plates=(DATA,), **options):
    fn = dist.Normal(0.0, 1.0) if fn is None else fn
    shape = torch.Size([plate.size for plate in reversed(plates)])
    return Site(name, kind, fn, shape, fn.event_shape, plates, torch.zeros(shape), None, **options)


def structure(*sites, plate=DATA):
    return Structure({each.name: each for each in sites}, plate, 1, 5)


def test_the_scale_without_that_of_subsampled_plates():
    assert site(scale=30.0).own_scale.item() == pytest.approx(3.0)
    assert site(plates=(DATA, INNER), scale=10.0).own_scale.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (dist.Normal(0.0, 1.0), "Real"),
        (dist.Beta(1.0, 1.0), "Interval(0, 1)"),
        (dist.Uniform(torch.tensor([0.0, 1.0]), 2.0), "Interval(varies, 2)"),
        (dist.LogNormal(torch.zeros(3), 1.0).to_event(1), "GreaterThan(0)"),
        (dist.Dirichlet(torch.ones(3)), "Simplex"),
    ],
)
def test_supports_in_words(fn, text):
    assert site(fn=fn).support_text == text


def test_kinds_of_sites():
    found = structure(site("mu", "global latent", plates=()), site("z"), site("x", "observed"))
    assert [s.name for s in found.local_latents] == ["z"]
    assert [s.name for s in found.global_latents] == ["mu"]
    assert [s.name for s in found.observed] == ["x"]
    assert found.data_dim == -1
    with pytest.raises(ValueError, match=r"\['mu'\] lie outside the data plate 'data'"):
        found.require_no_globals()
    structure(site("z")).require_no_globals()
    one_datum = structure(site("mu", "global latent", plates=()), plate=None)
    one_datum.require_no_globals()
    assert one_datum.data_dim is None


def test_a_plate_that_the_guide_draws():
    before = structure(site("z"))
    after = before.drawing({"data"})
    assert after.data_plate.drawn
    assert after.sites["z"].plates[0].drawn
    assert not before.data_plate.drawn
    assert before.drawing(()) is before
