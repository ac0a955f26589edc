"""Log weights and bounds: exact on exact guides, the same for any chunks, honest errors."""

from __future__ import annotations

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.evaluation.bounds import Bound
from pyro_vae.particles.estimators import LargestWeights
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from tests.models import NormalModel, encoder, factor_analysis


@pytest.fixture
def setting():
    model = factor_analysis()
    torch.manual_seed(0)
    x = model.data(6)
    return model, x, pv.AmortizedGuide(model, encoder(6), example=x)


@pytest.mark.parametrize("num_particles", [1, 2, 50])
def test_with_the_exact_posterior_every_bound_is_the_evidence(setting, num_particles):
    model, x, _ = setting
    for bound in (pv.elbo, pv.iwae_bound):
        found = bound(model, model.posterior, x, num_particles=num_particles)
        torch.testing.assert_close(found.value, model.log_evidence(x), rtol=0, atol=1e-10)
        assert found.value.dtype == torch.float64 and found.num_particles == num_particles
        if num_particles == 1:
            assert found.std_error.isnan().all()
        else:
            assert (found.std_error < 1e-7).all()


def test_streaming_is_the_reduction_of_the_log_weights(setting):
    model, x, guide = setting
    weights = pv.log_weights(model, guide, x, num_particles=500, seed=2).total
    elbo = pv.elbo(model, guide, x, num_particles=500, seed=2, chunk_size=77)
    iwae = pv.iwae_bound(model, guide, x, num_particles=500, seed=2, chunk_size=77)
    torch.testing.assert_close(elbo.value, weights.mean(0))
    torch.testing.assert_close(elbo.std_error, calibrated(weights))
    torch.testing.assert_close(iwae.value, torch.logsumexp(weights, 0) - math.log(500))
    relative = torch.exp(weights - iwae.value)
    torch.testing.assert_close(iwae.std_error, calibrated(relative))
    for bound in (elbo, iwae):
        torch.testing.assert_close(bound.pareto_k, pv.pareto_k(weights))
        torch.testing.assert_close(bound.ess, weights.softmax(0).square().sum(0).reciprocal())


def calibrated(x):
    """By hand: the standard error of a mean, wider by eight times the squared skewness over K."""
    z = (x - x.mean(0)) / x.std(0, correction=0)
    return x.std(0) / len(x) ** 0.5 * (1 + 8 * z.pow(3).mean(0) ** 2 / len(x)).clamp(max=4)


def test_the_elbo_is_the_closed_form_within_its_standard_error(setting):
    model, x, guide = setting
    exact = model.elbo_of(x, *location_and_scale(guide.family_params(x)))
    bound = pv.elbo(model, guide, x, num_particles=20_000, seed=0)
    assert ((bound.value - exact).abs() < 4 * bound.std_error).all()
    assert abs(bound.mean - exact.mean()) < 4 * bound.mean_std_error


def location_and_scale(params):
    return params[..., 0].detach(), params[..., 1].exp().detach()


def test_standard_errors_are_those_of_repetition(setting):
    """200 repetitions: the spread is the error but for what skewness adds, to 25% (5 errors)."""
    model, x, _ = setting
    guide = pv.refine(model, setting[2], x, seed=0)
    for bound in (pv.elbo, pv.iwae_bound):
        found = [bound(model, guide, x, num_particles=200, seed=s) for s in range(200)]
        spread = torch.stack([f.value for f in found]).std(0)
        added = [(1 + 8 * f.skewness.square() / 200).clamp(max=4) for f in found]
        plain = [f.std_error / wider for f, wider in zip(found, added, strict=True)]
        reported = torch.stack(plain).square().mean(0).sqrt()
        assert ((spread / reported - 1).abs() < 0.25).all()
        means = torch.tensor([f.mean for f in found])
        assert abs(means.std() / found[0].mean_std_error - 1) < 0.3


def test_the_bound_tightens_with_particles(setting):
    """E[IWAE-K] grows with K to log p(x): by more than 4 standard errors at each step here."""
    model, x, guide = setting
    guide = pv.refine(model, guide, x, seed=0)
    weights = pv.log_weights(model, guide, x, num_particles=20_000, seed=0).total
    one = weights.reshape(20_000, -1)
    many = torch.logsumexp(weights.reshape(20, 1000, -1), 0) - math.log(20)
    low, high = one.mean(0), many.mean(0)
    error = (one.var(0) / len(one) + many.var(0) / len(many)).sqrt()
    assert (high - low > 4 * error).all()
    assert (model.log_evidence(x) - high > -4 * many.std(0) / len(many) ** 0.5).all()


def test_a_bound_prints_its_error(setting):
    model, x, guide = setting
    text = repr(pv.iwae_bound(model, guide, x, num_particles=10, seed=0))
    assert text.startswith("IWAE-10: ") and "±" in text and "(6 data)" in text


def test_float32_models_get_float32_weights_and_float64_bounds():
    model = factor_analysis()
    model = type(model)(model.loadings.float(), model.mean.float(), model.noise)
    x = model.data(4)
    bound = pv.iwae_bound(model, model.posterior, x, num_particles=64)
    assert bound.value.dtype == torch.float64
    torch.testing.assert_close(
        bound.value, model.log_evidence(x).double(), rtol=0, atol=1e-4
    )  # float32 rounding of numbers near 10


def test_a_point_is_said_to_be_no_bound(caplog):
    model = factor_analysis()
    x = model.data(3)
    guide = pv.LocalGuide(model, num_data=3, example=x, family=pv.families.Delta())
    found = pv.elbo(model, guide, x, num_particles=2)
    assert "'z', and a point has no entropy" in caplog.text
    trace = poutine.trace(poutine.condition(model, {"z": guide(x)["z"]})).get_trace(x)
    log_joint = sum(trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]) for name in "zx")
    torch.testing.assert_close(found.value, log_joint.detach())
    with pytest.raises(ValueError, match=r"guides\['map'\] proposes one point for \['z'\]"):
        pv.compare(model, {"map": guide}, x, num_particles=10)


# --- how far a bound is to be trusted ------------------------------------------------------------


normal = NormalModel()


def narrow(x):
    """The posterior where x > 0; a tenth of its width elsewhere: k = 1 - 0.01."""
    width = torch.where(x > 0, 1.0, 0.1).to(x) * 0.5**0.5
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, width))


def test_a_bound_says_for_how_many_data_it_is_not_to_be_trusted():
    x = torch.tensor([1.0, 2.0, -1.0, 3.0, -2.0], dtype=torch.float64)
    found = pv.iwae_bound(normal, narrow, x, num_particles=2000, seed=0)
    assert found.untrusted.tolist() == [False, False, True, False, True]
    assert found.pareto_k[~found.untrusted].tolist() == [0.0, 0.0, 0.0]
    assert (found.pareto_k[found.untrusted] > 0.7).all()
    assert found.ess[0] == pytest.approx(2000) and found.ess[2] < 1000
    assert "(5 data); for 2 of 5 data the importance weights are not to be trusted" in repr(found)
    assert "2 with a heavy tail (k-hat above 0.70, and the largest" in repr(found)
    assert repr(found).endswith("There log p(x) may be far above, and the error too small")
    good = pv.iwae_bound(normal, narrow, x[:2], num_particles=2000, seed=0)
    assert repr(good).endswith("(2 data)")
    # The error of an ELBO is, but its guide is as narrow.
    elbo = pv.elbo(normal, narrow, x, num_particles=2000, seed=0)
    assert not elbo.untrusted.any()
    assert "as a proposal for importance sampling: for 2 of 5 data" in repr(elbo)
    torch.testing.assert_close(elbo.tail_share, found.tail_share)
    few = pv.iwae_bound(normal, narrow, x, num_particles=20, seed=0)
    assert few.pareto_k[2].isnan() and few.untrusted.tolist() == found.untrusted.tolist()
    assert "20 particles are too few for a k-hat" in repr(few) and "k-hat above" not in repr(few)
    whole = pv.iwae_bound(normal, narrow, x, num_particles=2000, data_plate=False, seed=0)
    assert "for 1 of 1 data the importance weights are not to be trusted" in repr(whole)


def test_the_tail_of_a_bound_is_that_of_all_its_weights():
    """Its share from K log weights at once, in chunks or not; one of a datum of no weight too."""
    x = torch.tensor([1.0, -1.0, -2.0], dtype=torch.float64)
    weights = pv.log_weights(normal, narrow, x, num_particles=1000, seed=0)
    size = math.ceil(3 * 1000**0.5) + 1
    shares = weights.total.softmax(0).sort(0, descending=True).values[:size].sum(0)
    for bound in (pv.iwae_bound, pv.elbo):
        found = bound(normal, narrow, x, num_particles=1000, chunk_size=77, seed=0)
        torch.testing.assert_close(found.tail_share, shares * 1000 / size)


@pytest.mark.parametrize(
    ("shift", "scale", "untrusted"),
    [(0.0, 1.0, (0, 0)), (0.5, 1.0, (0, 0)), (0.0, 1.5, (0, 0)), (0.0, 0.7, (0, 0.1)),
     (0.0, 0.5, (0.3, 1)), (0.0, 0.2, (0.9, 1)), (2.0, 1.0, (0.9, 1)), (0.0, 20.0, (0.9, 1))],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guides_that_are_beside_the_posterior_or_of_another_width(shift, scale, untrusted, dtype):
    """In posterior sds. Half as wide has k = 0.75, at the threshold; of 20 times few draws count.

    The share of data that are untrusted lies within these limits, at four of its standard errors
    or more; where none is, errors are right.
    """

    def guide(x):
        sd = 0.5**0.5
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift * sd, scale * sd))

    x = torch.linspace(-2, 2, 200, dtype=dtype)
    bound = pv.iwae_bound(normal, guide, x, num_particles=5000, seed=0)
    low, high = untrusted
    assert low <= float(bound.untrusted.double().mean()) <= high
    off = (bound.value - normal.log_evidence(x)).abs() / bound.std_error.clamp_min(1e-5)
    assert high > 0 or off.max() < 5
    if scale == 20.0:  # a light tail: the reason is another one
        count = int(bound.untrusted.sum())
        assert (bound.pareto_k < 0.7).all() and "heavy" not in repr(bound)
        assert f"{count} with fewer than 400 effective particles" in repr(bound)


def test_an_elbo_that_a_few_particles_decide_says_so():
    bound = Bound(
        "ELBO",
        torch.zeros(3),
        torch.ones(3),
        100,
        skewness=torch.tensor([0.0, -9.0, 9.9]),
        ess=torch.full((3,), 99.0),
        largest=torch.zeros(21, 3),
    )
    assert bound.untrusted.tolist() == [False, True, True]
    assert repr(bound).endswith(
        "for 2 of 3 data the error is not to be trusted: a few particles decide it"
    )


def test_every_weight_zero_is_an_infinite_k_hat():
    """x = 1 ~ Poisson(max(z, 0)): E[z+ exp(-z+)] = sqrt(e) (phi(1) - (1 - Phi(1)))."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Poisson(z.clamp(min=0)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_tensor([0.0, -99.0]), 1.0))

    x = torch.ones(2, dtype=torch.float64)
    found = pv.iwae_bound(model, guide, x, num_particles=4000, seed=0)
    assert found.value[1] == -math.inf and found.pareto_k[1] == math.inf
    assert "for 1 of 2 data the importance weights are not to be trusted" in repr(found)
    assert "1 of which every draw has no density under the model" in repr(found)
    normal, one = dist.Normal(0.0, 1.0), x.new_tensor(1.0)
    exact = 0.5 + (normal.log_prob(one).exp() - normal.cdf(-one)).log()
    assert abs(found.value[0] - exact) < 4 * found.std_error[0]


def test_what_is_kept_for_k_hat_does_not_grow_with_the_particles():
    stream = LargestWeights(50)
    torch.manual_seed(0)
    weights = torch.randn(20_000, 3)
    most = 0
    for chunk in weights.split(32):
        stream.update(chunk)
        most = max(most, sum(len(kept) for kept in stream._kept))
    assert most <= 4 * 50
    assert torch.equal(stream.value.sort(0).values, weights.sort(0).values[-50:])


def test_bounds_can_be_pickled(setting):
    model, x, guide = setting
    found = pv.iwae_bound(model, guide, x, num_particles=100, seed=0)
    again = pickle.loads(pickle.dumps(found))
    assert repr(again) == repr(found) and torch.equal(again.pareto_k, found.pareto_k)


def test_bound():
    bound = Bound("IWAE-7", torch.tensor([-1.0, -2.0]), torch.tensor([0.3, 0.4]), 7)
    assert bound.mean == -1.5
    assert bound.mean_std_error == pytest.approx(0.25)
    assert repr(bound) == "IWAE-7: -1.5000 ± 0.2500 nats per datum (2 data)"


# --- log weights ---------------------------------------------------------------------------------


@pytest.fixture
def exact():
    model = factor_analysis()
    torch.manual_seed(1)
    return model, model.data(7)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 7, 23, 10_000])
@pytest.mark.parametrize("particles", ["auto", "plate", "repeat", "loop"])
def test_weights_of_the_exact_posterior_are_the_evidence(exact, particles, chunk_size):
    model, x = exact
    weights = pv.log_weights(
        model, model.posterior, x, num_particles=11, particles=particles, chunk_size=chunk_size
    )
    assert weights.total.shape == (11, 7)
    assert weights.total.std(0).max() < 1e-10
    torch.testing.assert_close(
        weights.total, model.log_evidence(x).expand(11, -1), rtol=0, atol=1e-10
    )


def test_the_three_parts_are_what_they_say(exact):
    model, x = exact
    evaluator = Evaluator(model, model.posterior, as_batch(x), seed=0)
    (chunk,) = evaluator.chunks(4)
    z = chunk.values["z"]
    likelihood = dist.Normal(z @ model.loadings.T + model.mean, model.noise).log_prob(x).sum(-1)
    torch.testing.assert_close(chunk.weights.log_likelihood, likelihood)
    torch.testing.assert_close(chunk.weights.log_prior, dist.Normal(0.0, 1.0).log_prob(z).sum(-1))
    posterior = torch.distributions.MultivariateNormal(
        model.posterior_mean(x), precision_matrix=model.posterior_precision
    )
    torch.testing.assert_close(chunk.weights.log_guide, posterior.log_prob(z))


def test_more_particles_are_the_same_and_others():
    """The first hundreds of them do not depend on how many there are."""
    model = factor_analysis()
    x = model.data(300)
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    few, many = (
        pv.log_weights(model, guide, x, num_particles=k, seed=3).log_guide for k in (100, 270)
    )
    torch.testing.assert_close(many[:100], few, rtol=1e-12, atol=1e-12)


def test_one_seed_one_result_and_the_global_state_is_left_alone(exact):
    model, x = exact
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = pv.log_weights(model, guide, x, num_particles=4, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.total, pv.log_weights(model, guide, x, num_particles=4, seed=1).total)
    other = pv.log_weights(model, guide, x, num_particles=4, seed=2)
    assert not torch.equal(first.total, other.total)


def test_without_a_seed_the_global_state_decides(exact):
    model, x = exact
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    draws = []
    for _ in range(2):
        torch.manual_seed(8)
        draws.append(pv.log_weights(model, guide, x, num_particles=4).total)
        draws.append(pv.log_weights(model, guide, x, num_particles=4).total)
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])


def test_bad_numbers_are_refused(exact):
    model, x = exact
    with pytest.raises(ValueError, match="num_particles=0: a whole number of at least 1"):
        pv.log_weights(model, model.posterior, x, num_particles=0)
    with pytest.raises(ValueError, match="chunk_size=0: a whole number of at least 1"):
        pv.log_weights(model, model.posterior, x, num_particles=2, chunk_size=0)
    with pytest.raises(ValueError, match="particles='fast'"):
        pv.log_weights(model, model.posterior, x, num_particles=2, particles="fast")
    with pytest.raises(ValueError, match=r"argument 0 .* NaN or infinite values in rows 2 \(1 of"):
        pv.log_weights(
            model, model.posterior, x.index_fill(0, torch.tensor([2]), torch.nan), num_particles=2
        )
    with pytest.raises(ValueError, match="the batch is empty"):
        pv.log_weights(model, model.posterior, x[:0], num_particles=2)


@pytest.mark.parametrize("seed", [-1, 0.5])
def test_a_bad_seed_is_refused(exact, seed):
    model, x = exact
    with pytest.raises(ValueError, match="whole number of at least 0"):
        pv.log_weights(model, model.posterior, x, num_particles=2, seed=seed)


def test_a_bound_of_chains_is_trusted_where_their_weights_are_alike():
    """Above 0.3 of the chains' number; a nan is not. Means of weights and of log weights differ."""
    zeros = torch.zeros(4, dtype=torch.float64)
    ess = torch.tensor([20.0, 6.01, 6.0, math.nan], dtype=torch.float64)
    bound = Bound("AIS-5", zeros, zeros, 20, skewness=10 + zeros, ess=ess, mean_of="chains")
    assert bound.untrusted.tolist() == [False, False, True, True]
    assert "for 2 of 4 data neither value nor error is to be trusted" in repr(bound)
    assert "k-hat" not in repr(bound)
    other = Bound("ELBO", zeros, zeros, 20, skewness=10 + zeros, ess=ess)
    assert other.untrusted.all()
    trusted = Bound("AIS-5", zeros, zeros, 20, skewness=zeros, ess=20 + zeros, mean_of="chains")
    assert repr(trusted).endswith("(4 data)")
