"""The table of sites: kinds, plates, what needs no guide, what masks leave out."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

import pyro_vae as pv


def hierarchical(x):
    """A global scale, a latent per datum, one per datum and feature, a masked likelihood."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("features", x.shape[1], dim=-1):
            w = pyro.sample("w", dist.Normal(z.sum(-1), scale))
            with poutine.mask(mask=x > 0):
                pyro.sample("x", dist.Poisson(w.exp()), obs=x)


def test_describe_tells_every_site():
    described = pv.describe(hierarchical, torch.ones(5, 3))
    table = {row["site"]: row for row in described.rows}
    assert {name: row["kind"] for name, row in table.items()} == {
        "scale": "global latent",
        "z": "local latent",
        "w": "local latent",
        "x": "observed",
    }
    assert table["z"]["event_shape"] == "(2,)" and table["w"]["plates"] == "data[5], features[3]"
    assert table["x"]["distribution"] == "Poisson" and "data plate: 'data'" in repr(described)
    assert repr(described).splitlines()[0].split() == [
        "site", "kind", "distribution", "support", "batch_shape", "event_shape", "plates",
    ]  # fmt: skip
    html = described._repr_html_()
    assert html.count("<tr>") == 5 and "GreaterThan" in html


def test_describe_says_why_a_data_plate_is_not_told():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x)]).to_event(1), obs=x)

    described = pv.describe(model, torch.zeros(3))
    assert described.data_plate is None
    assert "no data plate" in described.note and "'x' is in no plate" in repr(described)
    assert {row["kind"] for row in described.rows} == {"latent", "observed"}


def test_a_subsampled_plate_shows_its_full_size():
    def model(x):
        with pyro.plate("data", 1000, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert pv.describe(model, torch.zeros(4)).rows[0]["plates"] == "data[4 of 1000]"


def test_describe_counts_what_masks_leave_out():
    """Of poutine.mask, of a mask inside a distribution, and of missing values, together."""
    x = torch.zeros(4, 3)
    x[0, 0] = float("nan")
    seen = torch.tensor([True, True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(seen))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z[..., :1], 1.0).expand([4, 3]).to_event(1), obs=x)

    table = {row["site"]: row for row in pv.describe(pv.MissingData(model), x).rows}
    assert table["z"]["left_out"] == "2 of 8"
    assert table["x"]["left_out"] == "4 of 12"
    assert "left_out" not in pv.describe(hierarchical, torch.ones(5, 3)).rows[0]
