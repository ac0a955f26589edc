"""Structure of models: kinds of sites, the data plate, and what is refused by name."""

from __future__ import annotations

import functools
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.programs.looks import check_sequential
from pyro_vae.programs.structure import DataPlateError, inspect
from tests.models import factor_analysis


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


def test_inspection_leaves_the_random_state_and_the_modules_alone():
    model = factor_analysis()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    inspect(model, torch.zeros(4, 6, dtype=torch.float64))
    assert torch.equal(torch.rand(2), expected)


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
        inspect(model, batch, **options)


def test_an_ambiguous_data_plate_can_be_named():
    structure = inspect(ambiguous, torch.zeros(3, 3), data_plate="rows")
    assert [site.name for site in structure.local_latents] == ["a"]
    assert [site.name for site in structure.global_latents] == ["b"]


def test_data_outside_the_support_are_refused_with_their_rows():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Binomial(16, logits=z.unsqueeze(-1)).to_event(1), obs=x)

    x = torch.zeros(6, 2)
    x[1, 0], x[4, 1] = 17, 0.5
    with pytest.raises(ValueError, match=r"'x'.*Binomial.*\(0, 16\).*rows 1, 4 \(2 of 6\)"):
        inspect(model, x)


def test_masked_values_may_lie_outside_the_support():
    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Bernoulli(logits=z), obs=x)

    x = torch.tensor([0.0, 1.0, 9.0])
    inspect(model, x, torch.tensor([True, True, False]))
    with pytest.raises(ValueError, match="rows 2"):
        inspect(model, x, torch.tensor([True, True, True]))


def test_deterministic_sites_are_no_observations():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert list(inspect(model, torch.zeros(2)).sites) == ["z", "x"]


@pytest.mark.parametrize("columns", [1, 4])
def test_observed_values_of_another_shape_are_refused(columns):
    """One column would be broadcast, and silently count three times."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    inspect(model, torch.zeros(5, 3))
    message = rf"'x': its value has shape \[5, {columns}\], but its Normal likelihood .* \[5, 3\]"
    with pytest.raises(ValueError, match=message):
        inspect(model, torch.zeros(5, columns))


def test_an_error_in_the_model_says_what_it_was_run_on():
    model = factor_analysis()
    with pytest.raises(ValueError, match="shape") as caught:
        inspect(model, torch.zeros(5, 4, dtype=torch.float64))
    assert "its value has shape [5, 4]" in str(caught.value)

    def broken(x):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError) as other:
        inspect(broken, torch.zeros(5, 4))
    assert other.value.__notes__ == [
        "while running the model on a batch of argument 0: torch.float32 of shape [5, 4]"
    ]


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


def test_values_are_looked_at_where_a_library_switched_validation_off():
    """As zuko does for the whole process when it is imported."""
    x = torch.tensor([0.0, 9.0])
    before = torch.distributions.Distribution._validate_args
    try:
        torch.distributions.Distribution.set_default_validate_args(False)
        with pytest.raises(ValueError, match="rows 1"):
            inspect(bernoulli, x)
        inspect(functools.partial(bernoulli, validate_args=False), x)
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)
    with pytest.raises(ValueError, match="rows 1"):
        inspect(bernoulli, x)
    inspect(functools.partial(bernoulli, validate_args=False), x)


def bernoulli(x, validate_args=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z, validate_args=validate_args), obs=x)


def test_a_plate_without_a_size_has_that_of_its_data():
    def model(x):
        f = pyro.sample("f", dist.Beta(10.0, 10.0))
        with pyro.plate("data"):
            pyro.sample("x", dist.Bernoulli(f), obs=x)

    structure = inspect(model, torch.tensor([1.0, 1.0, 0.0]), data_plate=False)
    assert structure.sites["x"].batch_shape == (3,)
    assert structure.sites["x"].plates[0].size == 3


def test_one_latent_in_a_plate_without_a_size_is_not_one_for_each_datum():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(DataPlateError, match=r"'z' has batch shape \[\], one value for the 4 data"):
        inspect(model, torch.zeros(4))


def test_a_subsample_that_is_given_is_not_drawn():
    data = torch.arange(4.0)

    def model(index):
        with pyro.plate("data", 4, len(index), index) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[rows])

    plate = inspect(model, torch.tensor([2, 0])).data_plate
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
        structure = inspect(model, x, data_plate=False)
        with pytest.raises(ValueError, match=r"subsample of the sequential plate 'rows'"):
            check_sequential(structure)


@pytest.mark.parametrize("of", ["latent", "likelihood"])
def test_a_column_beside_values_is_refused(of):
    """[N, 1] and [N] make [N, N], and each datum counts N times: by name, as Pyro does."""
    x, column = torch.linspace(-1, 1, 6), torch.zeros(6, 1)

    def model(x, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c if of == "latent" else 0 * x, 1.0))
            pyro.sample("x", dist.Normal(z + c, 0.5), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + (c if of == "latent" else 0), 1.0))

    with pytest.raises(ValueError, match="invalid log_prob shape"):
        pyro.infer.Trace_ELBO().loss(model, guide, x, column)
    for refuses in (
        lambda: pv.ELBO().loss(model, guide, x, column),
        lambda: pv.IWAE(3).loss(model, guide, x, column),
        lambda: pv.elbo(model, guide, (x, column), num_particles=2),
        lambda: pv.describe(model, (x, column)),
        lambda: pv.LocalGuide(model, num_data=6, example=(x, column)),
    ):
        with pytest.raises(ValueError, match=r"'x'.*dim -2 is in no plate.*count 6 times"):
            refuses()
    pv.elbo(model, guide, (x, column.squeeze(-1)), num_particles=2)
