"""HTML of results: escaped, whole, and of every result."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import markup
from pyro_vae.evaluation.comparison import Comparison
from pyro_vae.evaluation.repair import Repair
from tests.report.cases import comparison_dataset, repair_dataset


class Balanced(HTMLParser):
    """Raises where a tag is not closed; keeps the text of cells and paragraphs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.found.append(data)


def test_cells_and_errors():
    frame = pd.DataFrame(
        {"gap": [1.5, math.nan], "gap_se": [0.25, math.nan], "count": [3, 4], "of": ["a", "b"]},
        index=pd.Index(["one", "two"], name="guide"),
    )
    assert markup.cells(frame) == [
        ["guide", "gap", "count", "of"],
        ["one", "1.500 ± 0.250", "3", "a"],
        ["two", "-", "4", "b"],
    ]


def test_names_are_escaped():
    shown = markup.table([["<b>", "&"], ["<i>", "</table>"]], "<script>")
    assert "<b>" not in shown and "<script>" not in shown
    assert Balanced(shown).found == ["<script>", "<b>", "&", "<i>", "</table>"]
    assert markup.paragraphs(["a < b", ""]) == "<p>a &lt; b</p>"


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        loc = torch.stack([x / 2, torch.zeros_like(x)], -1)
        pyro.sample("z", dist.Normal(loc, torch.tensor([0.5**0.5, 1.0])).to_event(1))


X = torch.linspace(-2.0, 2.0, 10)
RESULTS = {
    "Comparison": lambda: Comparison(comparison_dataset(name="<i>mine</i>"), {}),
    "Repair": lambda: Repair(repair_dataset(), {}),
    "Bound": lambda: pv.elbo(model, guide, X, num_particles=10, seed=0),
    "PosteriorSamples": lambda: pv.sample_posterior(
        model, guide, X, num_chains=2, num_draws=10, num_warmup=20, seed=0, progress=False
    ),
    "ModelComparison": lambda: pv.compare_models(
        {"<i>one</i>": (model, guide), "two": (model, guide)}, X, seed=0, progress=False
    ),
    "Outliers": lambda: pv.outliers(model, guide, X, train=X, level=0.2, num_particles=50, seed=0),
    "RateDistortion": lambda: pv.rate_distortion(model, guide, X, num_particles=10, seed=0),
    "ActiveUnits": lambda: pv.active_units(model, guide, X, num_particles=10, seed=0),
    "AggregatePosterior": lambda: pv.aggregate_posterior(
        model, guide, X, num_draws=20, num_permutations=19, seed=0
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_notebook_shows_a_result(name: str):
    found = RESULTS[name]()
    shown = found._repr_html_()
    text = Balanced(shown).found
    assert "<i>" not in shown and "object at" not in shown
    if name == "ModelComparison":
        assert text[0] == "model" and "<i>one</i>" in text
    elif name == "Comparison":
        assert "<i>mine</i>" in text and "-11.990 ± 0.002" in text
    elif name not in ("Bound", "PosteriorSamples"):
        head = markup.cells(found.summary())[0]
        assert text[: len(head) - 1] == head[1:] or text[: len(head)] == head
    else:
        assert "; ".join(text) == repr(found)
    if name == "PosteriorSamples":
        assert text[0] == "2 chains of 10 draws of z for 10 data"
        assert text[1] == f"{int(found.converged.sum())} of 10 have converged"
