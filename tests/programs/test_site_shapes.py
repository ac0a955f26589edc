"""Batch and event dimensions of sites, and of what their draws are made from."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.programs.preimages import DrawByPreimage
from pyro_vae.programs.site_shapes import SiteShape, site_shapes


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
