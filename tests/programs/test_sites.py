"""Sites, plates and structures: scales, supports in words, kinds, shapes, values as arrays."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.programs.preimages import DrawByPreimage
from pyro_vae.programs.sites import (
    Plate,
    Site,
    SiteShape,
    Structure,
    absent,
    array_of,
    inner_dims,
    observed_values,
    site_shapes,
)

DATA = Plate("data", -1, 5, 50)
INNER = Plate("inner", -2, 2, 2)


def site(name="z", kind="local latent", fn=None, plates=(DATA,), **options):
    fn = dist.Normal(0.0, 1.0) if fn is None else fn
    shape = torch.Size([plate.size for plate in reversed(plates)])
    return Site(name, kind, fn, shape, plates, torch.zeros(shape), None, **options)


def structure(*sites, plate=DATA):
    return Structure({each.name: each for each in sites}, plate, 1)


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
    assert before.drawing(()) == before


# --- shapes, of sites and of what their draws are made from


def test_shapes_of_sites_in_several_traces():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(4, 3), 1.0).to_event(1))

    def guide():
        pyro.sample("u", dist.Dirichlet(torch.ones(2, 5, 3)))

    found = site_shapes(*(poutine.trace(fn).get_trace() for fn in (model, guide)))
    assert found == {"z": SiteShape(1, 1), "u": SiteShape(2, 1)}


def test_preimages_have_the_dimensions_of_their_coordinates():
    """Three shares are made of two real numbers: one event dimension, as the shares'."""

    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Multinomial(5, p), obs=x)

    x = torch.tensor([[5.0, 0, 0], [1, 2, 2]])
    guide = pv.LocalGuide(model, num_data=2, example=x)
    with DrawByPreimage():
        trace = poutine.trace(guide).get_trace(x)
    found = site_shapes(trace)
    (key,) = found.keys() - {"p"}
    assert found["p"] == SiteShape(1, 1)
    assert (found[key].batch_ndim, found[key].event_ndim) == (1, 1)
    assert found[key].preimage_of == "p"


# --- values as arrays

FOUR, ROWS = Plate("data", -1, 4, 4), Plate("rows", -2, 3, 3)


def array_site(plates=(FOUR, ROWS), mask=None, missing=None):
    """A site of events of two, in rows inside of data: [3, 4, 2]."""
    fn = dist.Normal(torch.zeros(3, 4, 2), 1.0).to_event(1)
    value = torch.arange(24.0).reshape(3, 4, 2)
    return Site("x", "observed", fn, torch.Size([3, 4]), plates, value, mask, missing)


def of(one, plate=FOUR):
    return Structure({"x": one}, plate, 2)


def test_the_datum_comes_first():
    one = array_site()
    assert np.array_equal(observed_values(one, of(one)), one.value.movedim(1, 0).numpy())
    assert np.array_equal(observed_values(one, of(one, None)), one.value.numpy())
    assert array_of(torch.zeros(1, 4, 1), one, of(one)).shape == (4, 3, 2)


def test_names_of_the_other_dimensions():
    one = array_site()
    assert inner_dims(one, of(one)) == ["rows", "x_dim_1"]
    assert inner_dims(one, of(one, None)) == ["rows", "data", "x_dim_2"]
    bare = array_site(plates=(FOUR,))
    assert inner_dims(bare, of(bare)) == ["x_dim_0", "x_dim_1"]


def test_a_missing_value_is_there_and_not_seen():
    missing = torch.zeros(3, 4, 2, dtype=torch.bool)
    missing[1, 2, 0] = True
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 3] = False
    one = array_site(mask=mask, missing=missing)
    found = observed_values(one, of(one))
    assert np.argwhere(np.isnan(found)).tolist() == [[2, 1, 0]]
    assert np.argwhere(absent(one, of(one))).tolist() == [[3, 0, 0], [3, 0, 1]]
    whole = array_site()
    assert absent(whole, of(whole)) is None
