"""Global latents: at the guide's median for a datum's bound, one draw for all particles in loss."""

from __future__ import annotations

import gc

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.poutine import block
from torch import nn

import pyro_vae as pv

N = 7


def model(x):
    """g ~ N(0, 1); per datum z ~ N(g, 1), x ~ N(z, 1): given g, x ~ N(g, 2)."""
    g = pyro.sample("g", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def log_evidence(x):
    covariance = 2 * torch.eye(len(x), dtype=x.dtype) + 1
    return dist.MultivariateNormal(torch.zeros_like(x), covariance).log_prob(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 4).double()

    def forward(self, x):
        return torch.tanh(self.layer(x.unsqueeze(-1)))


@pytest.fixture
def x():
    return torch.linspace(-1.0, 2.0, N, dtype=torch.float64)


@pytest.fixture
def guide(x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoguide = AutoNormal(
            block(model, expose=["g"]), init_loc_fn=lambda site: x.new_tensor(0.4)
        )
        return pv.AmortizedGuide(model, Encoder(), example=x, global_guide=autoguide.double())


def test_bounds_are_given_the_median_and_say_so(guide, x):
    bound = pv.iwae_bound(model, guide, x, num_particles=50_000, seed=0)
    exact = dist.Normal(0.4, 2**0.5).log_prob(x)
    assert ((bound.value - exact).abs() < 4 * bound.std_error).all()
    assert bound.given["g"].item() == pytest.approx(0.4)
    assert "given g at the guide's median" in repr(bound)
    weights = pv.log_weights(model, guide, x, num_particles=3, seed=0)
    assert weights.total.shape == (3, N)
    assert list(weights.given) == ["g"]


def test_every_function_of_a_datum_takes_them_fixed(guide, x):
    comparison = pv.compare(
        model, {"amortized": guide}, x, num_particles=2000, max_steps=500, seed=0
    )
    assert comparison.dataset.attrs["given"] == "g at the guide's median"
    assert "given g at the guide's median" in repr(comparison)
    exact = dist.Normal(0.4, 2**0.5).log_prob(x)
    best = comparison.dataset["elbo"].sel(guide="Normal per datum").values
    assert abs(best - exact.numpy()).max() < 0.03  # the family holds the posterior
    tree = pv.to_arviz(model, guide, x, num_draws=10, seed=0)
    assert list(tree["posterior"].data_vars) == ["z"]
    attrs = {**tree.attrs, **tree["posterior"].attrs}  # ArviZ 1.x and 0.x
    assert attrs["given"] == "g at the guide's median"


def test_all_latents_jointly_are_one_datum(guide, x):
    weights = pv.log_weights(model, guide, x, num_particles=5, data_plate=False, seed=0)
    assert weights.total.shape == (5, 1)
    assert not weights.given


def test_a_table_of_one_row_holds_the_joint_posterior(x):
    """Of a Gaussian model the full-rank family finds log p(x) itself."""
    start = pv.LocalGuide(model, num_data=1, example=x, data_plate=False)
    assert start.num_coordinates == N + 1
    best = pv.refine(model, start, x, family=pv.families.FullRankNormal(), data_plate=False, seed=0)
    bound = pv.elbo(model, best, x, num_particles=200, data_plate=False, seed=1)
    assert bound.value.item() == pytest.approx(log_evidence(x).item(), abs=1e-3)
    assert best.converged.all()


def test_a_comparison_of_one_datum(x):
    autoguide = AutoMultivariateNormal(model).double()
    autoguide(x)
    comparison = pv.compare(
        model,
        {"auto": autoguide, "mean-field": pv.families.Normal()},
        x,
        num_particles=500,
        data_plate=False,
        seed=0,
    )
    gap = comparison.dataset["approximation_gap"].sel(guide="mean-field").item()
    assert gap > 0.1
    error = comparison.dataset["log_evidence_se"].item()
    assert abs(comparison.dataset["log_evidence"].item() - log_evidence(x).item()) < 4 * error


def test_iwae_with_one_draw_of_the_globals(guide, x):
    """At K = 1 it is the ELBO; for large K the expectation over q(g) of the evidence given g."""
    elbo = pv.elbo(model, guide, x, num_particles=20_000, data_plate=False, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = -torch.tensor([pv.IWAE(1).loss(model, guide, x) for _ in range(300)])
    error = (found.var() / 300 + elbo.std_error.item() ** 2) ** 0.5
    assert abs(found.mean() - elbo.value.item()) < 4 * error

    scale = guide.global_guide.scales.g.item()
    loc = 0.4
    g = dist.Normal(loc, scale)
    given = dist.Normal(loc, 2**0.5).log_prob(x).sum() - N * scale**2 / 4
    exact = given - torch.distributions.kl_divergence(g, dist.Normal(0.0, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        found = -torch.tensor([pv.IWAE(2000).loss(model, guide, x) for _ in range(100)])
    assert abs(found.mean() - exact) < 4 * found.std() / 10 + 0.01


@pytest.mark.parametrize("vectorized", [True, False])
def test_the_globals_of_all_particles_are_one_draw(guide, x, vectorized):
    seen = []

    def watched(x):
        g = pyro.sample("g", dist.Normal(x.new_zeros(()), 1.0))
        seen.append(g.detach().unique())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    loss = pv.IWAE(5, vectorize_particles=vectorized)
    loss.loss(watched, guide, x)
    seen.clear()
    loss.loss(watched, guide, x)
    assert len(torch.cat(seen).unique()) == 1


def test_iwae_trains_local_and_global_parts_together(guide, x):
    before = {name: value.clone() for name, value in guide.named_parameters()}
    pv.fit(model, guide, x, loss=pv.IWAE(5), max_steps=5, progress=False)
    moved = {n for n, value in guide.named_parameters() if not torch.equal(before[n], value)}
    assert moved == set(before)


@pytest.mark.parametrize(
    "loss", [pv.IWAE(5, estimator="dreg"), pv.IWAE(5, estimator="stl"), pv.WakeSleep(5)], ids=repr
)
def test_other_estimators_refuse_global_latents_by_name(loss, guide, x):
    with pytest.raises(ValueError, match=r"\['g'\] lie outside the data plate"):
        loss.loss(model, guide, x)


def test_a_global_guide_without_a_median_is_refused(x):
    def by_hand(x):
        pyro.sample("g", dist.Normal(x.new_zeros(()), 1.0))

    guide = pv.AmortizedGuide(model, Encoder(), example=x, global_guide=by_hand)
    with pytest.raises(TypeError, match="function has no method median"):
        pv.elbo(model, guide, x)


def test_a_median_of_other_sites_is_refused(guide, x):
    guide.global_guide.median = lambda *args: {"h": x.sum()}
    with pytest.raises(ValueError, match=r"not the model's global latent sites \['g'\]"):
        pv.elbo(model, guide, x)


def test_two_global_guides_of_one_name_share_nothing(x):
    def made(start):
        autoguide = AutoNormal(
            block(model, expose=["g"]), init_loc_fn=lambda site: x.new_tensor(start)
        )
        return pv.AmortizedGuide(model, Encoder(), example=x, global_guide=autoguide.double())

    first = made(0.4)
    pv.fit(model, first, x, max_steps=3, progress=False)
    trained = first.global_guide.median(x)["g"].clone()
    second = made(2.0)
    assert second.global_guide.median(x)["g"].item() == pytest.approx(2.0)
    pv.fit(model, second, x, max_steps=3, progress=False)
    assert torch.equal(first.global_guide.median(x)["g"], trained)
    store = pyro.get_param_store()
    names = [name for name in store if name.startswith("AutoNormal-")]
    del first, second
    gc.collect()
    assert names and not any(name in store for name in names)


def test_the_guide_itself_keeps_its_global_part(guide, x):
    pv.elbo(model, guide, x, num_particles=2)
    assert set(guide(x)) == {"g", "z"}
    assert guide.global_guide is not None
    assert guide.local_part({}).head is guide.head


# --- values passed -------------------------------------------------------------------------------


def by_hand(x):
    """Of the model; given g it is the exact posterior of z."""
    g = pyro.sample("g", dist.Normal(x.new_tensor(5.0), 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + g) / 2, 0.5**0.5))


def mean_field(x):
    guide = AutoNormal(model, create_plates=lambda x: pyro.plate("data", len(x))).double()
    guide(x)
    return guide


def test_values_passed_are_those_that_model_and_guide_see(x):
    """Given g, x ~ N(g, 2): exactly, for any g, through a guide that samples g itself."""
    exact = dist.Normal(0.7, 2**0.5).log_prob(x)
    given = {"g": 0.7}
    for bound in (pv.elbo, pv.iwae_bound):
        found = bound(model, by_hand, x, given=given, num_particles=30)
        torch.testing.assert_close(found.value, exact)
        assert found.given["g"].item() == pytest.approx(0.7)
        assert "given g at the values passed" in repr(found)
    weights = pv.log_weights(model, by_hand, x, given=given, num_particles=3)
    torch.testing.assert_close(weights.total, exact.expand(3, N))
    whole = pv.elbo(model, by_hand, x, given=given, num_particles=3, data_plate=False)
    torch.testing.assert_close(whole.value, exact.sum().unsqueeze(0))
    tree = pv.to_arviz(model, by_hand, x, given=given, num_draws=10, seed=0)
    assert list(tree["posterior"].data_vars) == ["z"]
    attrs = {**tree.attrs, **tree["posterior"].attrs}  # ArviZ 1.x and 0.x
    assert attrs["given"] == "g at the values passed"


def test_values_passed_go_before_the_median(guide, x):
    exact = dist.Normal(-0.3, 2**0.5).log_prob(x)
    bound = pv.iwae_bound(model, guide, x, given={"g": -0.3}, num_particles=50_000, seed=0)
    assert ((bound.value - exact).abs() < 4 * bound.std_error).all()
    found = pv.compare(
        model,
        {"amortized": guide, "by hand": by_hand, "auto": mean_field(x)},
        x,
        given={"g": -0.3},
        num_particles=500,
        max_steps=400,
        seed=0,
    ).dataset
    assert abs(found["log_evidence"].values - exact.numpy()).max() < 1e-6
    best = found["elbo"].sel(guide="Normal per datum").values
    assert abs(best - exact.numpy()).max() < 0.03  # the family holds the posterior


def test_a_mean_field_autoguide_of_all_latents(x):
    """Its unconstrained twin of g goes with g. Gaussians: the ELBO is known."""
    auto = mean_field(x)
    auto.locs.z.data, auto.scales.z = x / 3, torch.full_like(x, 0.6)
    exact = dist.Normal(0.2, 2**0.5).log_prob(x)
    posterior = dist.Normal((x + 0.2) / 2, 0.5**0.5)
    kl = torch.distributions.kl_divergence(dist.Normal(x / 3, 0.6), posterior)
    found = pv.elbo(model, auto, x, given={"g": 0.2}, num_particles=20_000, seed=0)
    assert ((found.value - (exact - kl)).abs() < 4 * found.std_error).all()


def test_refinement_given_values(x):
    local = pv.refine(model, by_hand, x, given={"g": 0.7}, max_steps=400, seed=0)
    bound = pv.elbo(model, local, x, given={"g": 0.7}, num_particles=10, seed=0)
    torch.testing.assert_close(bound.value, dist.Normal(0.7, 2**0.5).log_prob(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"z": 0.0},
            ValueError,
            r"given names 'z', a site of kind 'local latent'; its global.*'g'",
        ),
        ({"x": 0.0}, ValueError, r"given names 'x', a site of kind 'observed'"),
        ({"mu": 0.0}, ValueError, r"given names 'mu', no site of the model"),
        ({"g": [0.0, 1.0]}, ValueError, r"given\['g'\] has shape \[2\], but the site has \[\]"),
        ({"g": float("nan")}, ValueError, r"given\['g'\]=nan lies outside the site's support"),
        ([("g", 0.0)], TypeError, "a mapping from the names of global latent sites"),
    ],
)
def test_values_that_fit_no_global_latent_are_refused(given, error, message, x):
    with pytest.raises(error, match=message):
        pv.elbo(model, by_hand, x, given=given)


def test_a_joint_guide_has_no_density_given_one_site(x):
    auto = AutoMultivariateNormal(model).double()
    auto(x)
    with pytest.raises(ValueError, match="computes from '_AutoMultivariateNormal_latent'"):
        pv.elbo(model, auto, x, given={"g": 0.0}, data_plate=False)


def test_the_advice_of_the_refusal_works(x):
    with pytest.raises(ValueError, match=r"pass their values \(given=\{'g': value\}\)"):
        pv.elbo(model, by_hand, x)
    assert pv.elbo(model, by_hand, x, given={"g": 0.0}).value.isfinite().all()
    hidden = block(pyro.condition(model, data={"g": x.new_zeros(())}), hide=["g"])
    with pytest.raises(ValueError, match=r"guide samples \['g'\].*given=\{name: value\}"):
        pv.elbo(hidden, by_hand, x)


def test_a_model_whose_latents_are_all_given(x):
    """log p(x | g), datum by datum, though no latent lies in the plate of the data."""

    def regression(x):
        g = pyro.sample("g", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)

    def shared(x):
        pyro.sample("g", dist.Normal(x.new_zeros(()), 1.0))

    exact = dist.Normal(0.5, 1.0).log_prob(x)
    for bound in (pv.elbo, pv.iwae_bound):
        found = bound(regression, shared, x, given={"g": 0.5}, num_particles=3)
        torch.testing.assert_close(found.value, exact)
    with pytest.raises(ValueError, match="given names 'x', a site of kind 'observed'"):
        pv.elbo(regression, shared, x, given={"g": 0.5, "x": 0.0})
    with pytest.raises(ValueError, match="no local latents: the latent sites"):
        pv.elbo(regression, shared, x, given={"h": 0.5})


def test_values_passed_beside_a_global_guide_of_the_whole_batch(guide, x):
    """Of one datum too: the global guide's site is hidden, and the sum is that of the data."""
    options = {"given": {"g": 0.7}, "num_particles": 20_000, "seed": 0}
    whole = pv.elbo(model, guide, x, data_plate=False, **options)
    each = pv.elbo(model, guide, x, **options)
    error = (whole.std_error**2 + each.std_error.square().sum()).sqrt()
    assert abs(whole.value - each.value.sum()) < 4 * error


def test_a_refined_guide_knows_the_globals_that_it_was_fitted_at():
    """x ~ Normal(mu, sqrt 2) given mu: bounds take mu from the refined guide, and no other."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

    def start(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    guide = pv.refine(model, start, x, given={"mu": 0.7}, seed=0)
    assert guide.given["mu"].item() == 0.7
    exact = torch.distributions.Normal(0.7, 2**0.5).log_prob(x)
    other = pv.LocalGuide(
        pyro.poutine.block(pyro.condition(model, data={"mu": guide.given["mu"]}), hide=["mu"]),
        num_data=3,
        example=x,
    )
    other.load_state_dict(guide.state_dict())
    for one in (guide, other):
        bound = pv.elbo(model, one, x, num_particles=50, seed=0)
        torch.testing.assert_close(bound.value, exact, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"fitted given 'mu' at \[0.7\], not at \[1\].*refine"):
        pv.elbo(model, guide, x, num_particles=50, seed=0, given={"mu": 1.0})
    again = pv.refine(model, guide, x, given={"mu": 1.0}, seed=0)
    exact = torch.distributions.Normal(1.0, 2**0.5).log_prob(x)
    bound = pv.elbo(model, again, x, num_particles=50, seed=0)
    torch.testing.assert_close(bound.value, exact, rtol=0, atol=1e-4)
