"""Guides: one family, two sources of parameters; nothing shared, nothing misaligned."""

from __future__ import annotations

import copy
import io
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from tests.models import encoder, factor_analysis, log_normal_model


@pytest.fixture
def setting():
    model = factor_analysis()
    torch.manual_seed(0)
    return model, model.data(9)


def guides(model, x):
    return {
        "amortized": pv.AmortizedGuide(model, encoder(6), example=x),
        "local": pv.LocalGuide(model, num_data=len(x), example=x),
    }


@pytest.mark.parametrize("kind", ["amortized", "local"])
def test_all_parameters_exist_and_each_gets_a_gradient(setting, kind):
    model, x = setting
    guide = guides(model, x)[kind]
    before = {name: p.shape for name, p in guide.named_parameters()}
    pv.ELBO(kl="sample")(model, guide)(x).backward()
    assert {name: p.shape for name, p in guide.named_parameters()} == before
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["amortized", "local"])
def test_save_and_load_without_a_training_step(setting, kind):
    model, x = setting
    guide, other = guides(model, x)[kind], guides(model, x)[kind]
    if kind == "local":
        nn.init.normal_(guide.table)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other.family_params(x), guide.family_params(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["amortized", "local"])
def test_a_new_guide_is_the_prior(setting, kind):
    """The start has the prior's moments: exact up to 1,000 draws, and the encoder's noise."""
    model, x = setting
    trace = poutine.trace(guides(model, x)[kind]).get_trace(x)
    fn = trace.nodes["z"]["fn"].base_dist
    assert fn.loc.abs().max() < 0.4 and (fn.scale.log().abs() < 0.4).all()


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


def test_positive_latents_are_sampled_from_the_family_itself():
    """No Delta: the density of the log-normal proposal is at the site."""
    x = torch.tensor([3.0, 0.5], dtype=torch.float64)
    guide = pv.LocalGuide(log_normal_model, num_data=2, example=x)
    node = poutine.trace(guide).get_trace(x).nodes["s"]
    location, log_scale = guide.table[:, 0].unbind(-1)
    expected = torch.distributions.LogNormal(location, log_scale.exp()).log_prob(node["value"])
    torch.testing.assert_close(node["fn"].log_prob(node["value"]), expected)


def test_a_simplex_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Multinomial(5, p), obs=x)

    x = torch.tensor([[5.0, 0, 0], [1, 2, 2]])
    guide = pv.AmortizedGuide(model, nn.Linear(3, 4), example=x)
    assert guide.num_coordinates == 2
    refined = pv.refine(model, guide, x, seed=0)
    bound = pv.iwae_bound(model, refined, x, num_particles=20_000, seed=0)
    # Uniform over the 21 count vectors that sum to 5.
    uniform = -torch.log(torch.tensor(21.0, dtype=torch.float64))
    assert ((bound.value - uniform).abs() < 4 * bound.std_error + 1e-4).all()


@pytest.mark.parametrize("example_rows", [50, 10])
def test_subsampled_plates_scale_the_guide_as_the_model(example_rows):
    """Whether the example is a minibatch or the whole, q is scaled as p is."""

    def model(x):
        with pyro.plate("data", 50, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(50)
    guide = pv.AmortizedGuide(
        model, nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2)), example=x[:example_rows]
    )
    nodes = poutine.trace(guide).get_trace(x[:10]).nodes
    assert nodes["z"]["scale"] == 5.0
    assert poutine.trace(guide).get_trace(x).nodes["z"]["scale"] == 1.0


def test_a_plate_that_follows_the_batch_is_not_scaled(setting):
    model, x = setting
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    assert poutine.trace(guide).get_trace(x[:2]).nodes["z"]["scale"] == 1.0


def test_a_model_that_draws_its_own_minibatch():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    class Remember(nn.Linear):
        def forward(self, x):
            self.seen = x
            return super().forward(x.unsqueeze(-1))

    x = torch.arange(12.0)
    guide = pv.AmortizedGuide(model, Remember(1, 2), example=x)
    guide_trace = poutine.trace(guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x)
    assert torch.equal(model_trace.nodes["x"]["value"], guide.encoder.seen)
    assert guide_trace.nodes["z"]["scale"] == model_trace.nodes["z"]["scale"] == 4.0


def test_global_latents_get_the_global_guide():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    net = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2))
    with pytest.raises(ValueError, match=r"\['mu'\] lie outside.*global_guide=\.\.\."):
        pv.AmortizedGuide(model, net, example=x)
    auto = pyro.infer.autoguide.AutoNormal(poutine.block(model, expose=["mu"]))
    guide = pv.AmortizedGuide(model, net, example=x, global_guide=auto)
    assert any("mu" in name for name, _ in guide.named_parameters())
    assert set(guide(x)) == {"mu", "z"}
    loss = pv.ELBO(kl="sample")(model, guide)(x)
    loss.backward()
    assert all(p.grad is not None for p in guide.parameters())


def test_bad_guides_are_refused(setting):
    model, x = setting
    with pytest.raises(ValueError, match=r"encoder returned a tensor of shape \(9, 2, 3\)"):
        pv.AmortizedGuide(model, nn.Unflatten(1, (2, 3)), example=x)
    with pytest.raises(ValueError, match=r"encoder returned a tensor of shape \(6, 9\)"):
        pv.AmortizedGuide(model, Transpose(), example=x)
    with pytest.raises(TypeError, match="family='normal': an instance of a family is needed"):
        pv.LocalGuide(model, num_data=9, example=x, family="normal")
    with pytest.raises(ValueError, match="num_data=0"):
        pv.LocalGuide(model, num_data=0, example=x)
    with pytest.raises(ValueError, match="with data_plate=False there are none"):
        pv.AmortizedGuide(model, nn.Linear(6, 2).double(), example=x, data_plate=False)
    with pytest.raises(ValueError, match="num_data=9: with data_plate=False the whole batch is"):
        pv.LocalGuide(model, num_data=9, example=x, data_plate=False)


class Transpose(nn.Module):
    def forward(self, x):
        return x.T


def test_discrete_latents_are_refused_by_name():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(c.float(), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"latent site 'c' \(Categorical\)"):
        pv.LocalGuide(model, num_data=2, example=torch.zeros(2))


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


def _encoded(network):
    x = torch.linspace(-1.0, 1.0, 6)[:, None].expand(6, 3).clone()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample(
                "x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 3]).to_event(1), obs=x
            )

    guide = pv.AmortizedGuide(model, network, example=x)
    return guide, pv.fit(model, guide, x, epochs=60, compile="replay", progress=False)


def test_encoders_of_torchscript():
    """As the module that they are made from; all their parameters are trained."""
    found = []
    for kind in (lambda net: net, torch.jit.script):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch would have no more of it
            net = kind(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()))
        before = [p.detach().clone() for p in net.parameters()]
        found.append(_encoded(net)[1].history["elbo"])
        assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_an_encoder_that_is_a_function():
    """One without parameters will do; one that hides some is refused, for nobody finds them."""
    guide, result = _encoded(torch.tanh)
    assert sum(p.numel() for p in guide.parameters()) == 2 * 3 + 2
    assert len(result.history["elbo"]) == 60
    net = torch.nn.Linear(3, 4)
    told = r"parameters that are not its own .*\[4, 3\], \[4\]"
    for hiding in (lambda x: net(x), net.forward, pv.MissingEncoder(lambda x: net(x[:, :3]))):
        with pytest.raises(ValueError, match=told):
            _encoded(hiding)


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


def test_a_prior_whose_parents_vary():
    """Dirichlet(w), w ~ Gamma(1/8): one draw of w may leave a single corner, others do not."""

    def model(x):
        with pyro.plate("topics", 8):
            w = pyro.sample("w", dist.Gamma(1 / 8, 1.0))
        z = pyro.sample("z", dist.Dirichlet(w))
        pyro.sample("x", dist.Multinomial(13, z), obs=x)

    x = torch.tensor([3.0, 1, 0, 2, 5, 0, 1, 1])
    for seed in range(8):
        torch.manual_seed(seed)
        guide = pv.LocalGuide(model, num_data=1, example=(x,), data_plate=False)
        assert torch.isfinite(guide.table).all()

    def point(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(1.0, 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="'z': its prior does not vary"):
        pv.LocalGuide(point, num_data=2, example=torch.zeros(2))


@pytest.mark.parametrize(
    "call",
    [pv.elbo, pv.iwae_bound, pv.ELBO(1).loss, pv.ELBO(3).loss, pv.IWAE(2).loss],
)
def test_a_helper_of_which_no_latent_is_made_is_refused(call):
    """Its entropy of 1.42 nats would count: log p(x) is -1.39 at x = 0.5, the ELBO -0.2."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            noise = dist.Normal(torch.zeros_like(x), 1.0)
            e = pyro.sample("e", noise, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x / 2 + 0.3 * e, 0.7))

    with pytest.raises(ValueError, match=r"auxiliary sites \['e'\] .* no bound"):
        call(model, guide, torch.tensor([0.5, -1.0]))


def test_a_helper_that_the_model_samples_too_has_its_bound():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("e", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            e = pyro.sample("e", dist.Normal(x / 2, 1.5))
            pyro.sample("z", dist.Normal(x / 4 + e / 3, 0.7))

    x = torch.tensor([0.5, -1.0])
    bound = pv.iwae_bound(model, guide, x, num_particles=20_000, seed=0)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert ((bound.value - exact).abs() < 5 * bound.std_error + 1e-3).all()
