"""Tables of parameters: rows stay aligned with their data, and know which these are."""

from __future__ import annotations

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from tests.models import factor_analysis


@pytest.fixture
def setting():
    model = factor_analysis()
    torch.manual_seed(0)
    return model, model.data(9)


def test_the_prior_start_is_mapped_through_the_support():
    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(5.0, 0.1))
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)

    table = pv.LocalGuide(model, num_data=2, example=torch.zeros(2)).table
    torch.testing.assert_close(table[:, 0, 0], torch.full((2,), 5.0), rtol=0, atol=0.02)
    torch.testing.assert_close(table[:, 0, 1].exp(), torch.full((2,), 0.1), rtol=0, atol=0.01)


def test_no_two_guides_share_parameters(setting):
    """Two AutoNormal guides of Pyro's share parameters in the store; two of ours do not."""
    model, x = setting
    first, second = (pv.LocalGuide(model, num_data=9, example=x) for _ in range(2))
    third = copy.deepcopy(first)
    optim = pyro.optim.Adam({"lr": 0.1})
    start = second.table.detach().clone()
    pyro.infer.SVI(model, first, optim, loss=pv.ELBO()).step(x)
    assert not torch.equal(first.table, start)
    for other in (second, third):
        pyro.infer.SVI(model, other, optim, loss=pv.ELBO()).loss(model, other, x)
        assert torch.equal(other.table, start)


def test_rows_keep_a_minibatch_aligned(setting):
    model, x = setting
    guide = pv.LocalGuide(model, num_data=9, example=x)
    nn.init.normal_(guide.table)
    index = torch.tensor([4, 0, 7])
    with guide.rows(index):
        assert torch.equal(guide.family_params(x[index]), guide.table[index])
        fn = poutine.trace(guide).get_trace(x[index]).nodes["z"]["fn"].base_dist
        assert torch.equal(fn.loc, guide.table[index][..., 0])
        with guide.rows(slice(0, 2)):
            assert torch.equal(guide.family_params(x[:2]), guide.table[:2])
        assert torch.equal(guide.current_rows, index)
    assert torch.equal(guide.family_params(x), guide.table)


def test_rows_that_do_not_fit_are_refused(setting):
    model, x = setting
    guide = pv.LocalGuide(model, num_data=9, example=x)
    with pytest.raises(ValueError, match="a row for each of 9 data but the batch has 3"):
        guide(x[:3])
    with (
        guide.rows(torch.tensor([0, 1])),
        pytest.raises(ValueError, match="names 2 rows but the batch has 3"),
    ):
        guide(x[:3])
    for index, message in [
        (torch.tensor([0, 9]), "indices run from 0 to 9, but the guide has rows 0 to 8"),
        (torch.tensor([-1]), "indices run from -1"),
        (torch.tensor([0.5]), "integers is needed, found torch.float32"),
        (torch.tensor([True] * 9), "integers is needed, found torch.bool"),
    ]:
        with pytest.raises(IndexError, match=message), guide.rows(index):
            pass


def test_a_table_follows_the_minibatch_that_the_model_draws():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    x = torch.arange(12.0)
    guide = pv.LocalGuide(model, num_data=12, example=x)
    with torch.no_grad():
        guide.table[:, 0, 0] = x
    guide_trace = poutine.trace(guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x)
    assert torch.equal(guide_trace.nodes["z"]["fn"].loc, model_trace.nodes["x"]["value"])


@pytest.fixture
def refined(setting):
    model, x = setting
    return model, x, pv.refine(model, pv.LocalGuide(model, num_data=9, example=x), x, seed=0)


def test_a_refined_guide_knows_its_data(refined):
    model, x, guide = refined
    options = {"num_particles": 10, "seed": 0}
    index = torch.tensor([7, 2, 5])
    whole = pv.elbo(model, guide, x, **options).value
    with guide.rows(index):
        part = pv.elbo(model, guide, x[index], **options).value
    # Diagonal of neither posterior: the same draws would be needed for more.
    assert (part - whole[index]).abs().max() < 2.0
    message = r"rows 0, .* of the batch are not the data .* guide\.rows\(index\).*pyro_vae\.refine"
    for other in (x.flip(0), x + 1):
        for use in (pv.elbo, pv.log_weights, pv.iwae_bound):
            with pytest.raises(ValueError, match=message):
                use(model, guide, other, **options)
    changed = x.clone()
    changed[1, 2] += 0.1
    with pytest.raises(ValueError, match=r"rows 1 \(1 of 9\)"):
        pv.elbo(model, guide, changed, **options)
    with guide.rows(index), pytest.raises(ValueError, match=r"\(2 of 3\)"):
        pv.elbo(model, guide, x[[7, 5, 2]], **options)
    # What the message says is what helps.
    again = pv.refine(model, guide, x.flip(0), seed=0)
    pv.elbo(model, again, x.flip(0), **options)


def test_what_rows_were_fitted_to_is_saved_with_them(refined):
    model, x, guide = refined
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    other = pv.LocalGuide(model, num_data=9, example=x)
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(guide), copy.deepcopy(guide).float().double()):
        pv.elbo(model, same, x, num_particles=10, seed=0)
        with pytest.raises(ValueError, match="are not the data"):
            pv.elbo(model, same, x.flip(0), num_particles=10, seed=0)
    # A state without memory, and rows that were trained since, take what they are given.
    plain = {name: v for name, v in guide.state_dict().items() if not name.startswith("_")}
    other.load_state_dict(plain)
    pv.elbo(model, other, x.flip(0), num_particles=10, seed=0)
    with torch.no_grad():
        guide.table += 0.01
    pv.elbo(model, guide, x.flip(0), num_particles=10, seed=0)


def test_fit_remembers_its_data_too(setting):
    model, x = setting
    guide = pv.LocalGuide(model, num_data=9, example=x)
    pv.fit(model, guide, x, epochs=3, batch_size=4, progress=False, seed=0)
    pv.elbo(model, guide, x, num_particles=10, seed=0)
    with pytest.raises(ValueError, match="are not the data"):
        pv.elbo(model, guide, x.flip(0), num_particles=10, seed=0)
    pv.fit(model, guide, x.flip(0), epochs=1, progress=False, seed=0)
    pv.elbo(model, guide, x.flip(0), num_particles=10, seed=0)


def test_all_data_as_one_datum_are_known_too():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([1.0, 2.0, 4.0])
    options = {"data_plate": False, "seed": 0}
    start = pv.LocalGuide(model, num_data=1, example=x, data_plate=False)
    guide = pv.refine(model, start, x, **options)
    pv.elbo(model, guide, x, num_particles=10, **options)
    with pytest.raises(ValueError, match=r"rows 0 \(1 of 1\) of the batch are not the data"):
        pv.elbo(model, guide, x.flip(0), num_particles=10, **options)


# --- the first width

WIDE = {
    "Normal": pv.families.Normal(),
    "FullRankNormal": pv.families.FullRankNormal(),
    "LowRankNormal": pv.families.LowRankNormal(1),
    "Annealed": pv.families.Annealed(pv.families.Normal(), 2),
}


@pytest.mark.parametrize("name", WIDE)
def test_the_first_width_is_that_share_of_the_priors(name):
    """Of z ~ Normal(3, 2)^2: by draws of the guide, to 5 standard errors; as for 1 at the mean."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor([3.0, 3.0]), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x, scale, num_draws = torch.zeros(4000, 2, dtype=torch.float64), 0.05, 4000
    guide = pv.LocalGuide(model, num_data=4000, example=x[:3], family=WIDE[name], init_scale=scale)
    plain = pv.LocalGuide(model, num_data=1, example=x[:3], family=WIDE[name])
    base = WIDE[name].base if name == "Annealed" else WIDE[name]
    noise = torch.randn(num_draws, base.num_noise(2), dtype=torch.float64)

    def moments(one):
        params = one.table[:1].detach()
        params = WIDE[name].base_params(params, 2) if name == "Annealed" else params
        z = base.from_noise(params, 2, noise.unsqueeze(1))[:, 0]
        return z.mean(0), z.std(0)

    (mean, std), (wide_mean, wide_std) = moments(guide), moments(plain)
    torch.testing.assert_close(std / wide_std, torch.full((2,), scale).double(), rtol=1e-6, atol=0)
    error = 5 * 2.0 * scale / num_draws**0.5
    torch.testing.assert_close(mean, wide_mean, rtol=0, atol=error + 5 * 2.0 / num_draws**0.5)
    torch.testing.assert_close(wide_std, torch.full((2,), 2.0).double(), rtol=0.1, atol=0)


def test_the_first_width_of_a_positive_latent_is_on_the_log_scale():
    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(1.0, 0.5))
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)

    x = torch.zeros(2)
    one, tenth = (
        pv.LocalGuide(model, num_data=2, example=x, init_scale=scale).table for scale in (1.0, 0.1)
    )
    torch.testing.assert_close(tenth[..., 1].exp(), 0.1 * one[..., 1].exp())
    assert torch.equal(tenth[..., 0], one[..., 0])
    assert torch.equal(one, pv.LocalGuide(model, num_data=2, example=x).table)


@pytest.mark.parametrize("scale", [0.0, -1, float("nan"), float("inf"), "0.1", True, None])
def test_a_first_width_that_is_none_is_refused(setting, scale):
    model, x = setting
    with pytest.raises(ValueError, match="init_scale=.*: a finite number above 0 is needed"):
        pv.LocalGuide(model, num_data=9, example=x, init_scale=scale)


def test_a_point_has_no_first_width(setting):
    model, x = setting
    with pytest.raises(ValueError, match=r"families\.Delta is a point, and has no width"):
        pv.LocalGuide(model, num_data=9, example=x, family=pv.families.Delta(), init_scale=0.1)
