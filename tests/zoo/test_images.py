"""Variational autoencoders of the zoo: densities by hand, closed forms, ways to run them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import Binomial, Categorical, MultivariateNormal, Normal

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from pyro_vae.zoo import likelihoods

N, L = 8, 2

MODELS = {
    "bernoulli": lambda: pv.zoo.VAE(6, L, hidden=[8]),
    "binomial": lambda: pv.zoo.VAE(6, L, hidden=[8], num_trials=16),
    "gaussian": lambda: pv.zoo.VAE(6, L, hidden=[8], likelihood=likelihoods.Gaussian(0.3)),
    "learned": lambda: pv.zoo.VAE(6, L, hidden=[8], likelihood=likelihoods.Gaussian()),
    "categorical": lambda: pv.zoo.VAE(6, L, hidden=[8], likelihood=likelihoods.Categorical(3)),
    "conv": lambda: pv.zoo.ConvVAE((1, 6, 5), L, channels=[4, 3]),
    "conv categorical": lambda: pv.zoo.ConvVAE(
        (2, 3, 4), L, channels=[4], likelihood=likelihoods.Categorical(3)
    ),
    "conv batch norm": lambda: pv.zoo.ConvVAE(
        (2, 3, 4),
        L,
        channels=[4],
        likelihood=likelihoods.Gaussian(0.3),
        batch_norm=True,
        dropout=0.2,
    ),
    "two layers": lambda: pv.zoo.TwoLayerVAE(6, (3, L), hidden=[8]),
    "conditional": lambda: pv.zoo.ConditionalVAE(6, L, 4, hidden=[8]),
    "mixture": lambda: pv.zoo.MixtureVAE(6, L, 3, hidden=[8], likelihood=likelihoods.Gaussian(0.3)),
}
DISTRIBUTIONS = {
    "bernoulli": "Bernoulli",
    "binomial": "Binomial",
    "categorical": "Categorical",
    "conv": "Bernoulli",
    "conv categorical": "Categorical",
    "two layers": "Bernoulli",
    "conditional": "Bernoulli",
}

every = pytest.mark.parametrize("name", MODELS)


def strong(model):
    """Move the parameters away from a start at which the latents hardly matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.5 * noise)
    return model


def make(name, num_data=N):
    """A model in float64, a guide of it, and data from it."""
    torch.manual_seed(0)
    model = strong(MODELS[name]().double())
    batch = as_batch(model.simulate(num_data, seed=2))
    guide = pv.AmortizedGuide(model, model.make_encoder(), example=batch)
    return model, guide, batch


@every
def test_what_describe_says(name):
    model, _, batch = make(name)
    found = pv.describe(model, batch)
    assert found.data_plate == "data"
    latents = {"two layers": {"z2": (L,), "z1": (3,)}, "mixture": {"c": (), "z": (L,)}}
    latents = latents.get(name, {"z": (L,)})
    rows = {row["site"]: row for row in found.rows}
    assert list(rows) == [*latents, "x"]
    for site, shape in latents.items():
        assert rows[site]["kind"] == "local latent"
        assert rows[site]["distribution"] == ("Categorical" if site == "c" else "Normal")
        assert rows[site]["event_shape"] == str(shape)
    assert rows["x"]["kind"] == "observed"
    assert rows["x"]["distribution"] == DISTRIBUTIONS.get(name, "Normal")
    shape = {"conv": (1, 6, 5), "conv categorical": (2, 3, 4), "conv batch norm": (2, 3, 4)}
    assert rows["x"]["event_shape"] == str(shape.get(name, (6,)))
    assert all(row["batch_shape"] == f"({N},)" for row in found.rows if row["site"] != "c")
    assert found.note == (
        "discrete ['c']: summed out where no guide proposes them" if name == "mixture" else ""
    )


@every
def test_float64_throughout(name):
    model, guide, batch = make(name)
    weights = pv.log_weights(model, guide, batch, num_particles=5, seed=0)
    for term in (weights.log_likelihood, weights.log_prior, weights.log_guide, weights.total):
        assert term.shape == (5, N) and term.dtype == torch.float64
        assert bool(term.isfinite().all())
    tensors = [*guide.state_dict().values(), guide.encoder(*batch.args, **batch.kwargs)]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}
    (x, *_) = (*batch.args, *batch.kwargs.values())
    integers = name in ("categorical", "conv categorical")
    assert x.dtype == (torch.int64 if integers else torch.float64)


@every
def test_float32_by_default(name):
    model = MODELS[name]()
    batch = as_batch(model.simulate(N))
    guide = pv.AmortizedGuide(model, model.make_encoder(), example=batch)
    weights = pv.log_weights(model, guide, batch, num_particles=5, seed=0)
    assert weights.total.dtype == torch.float32
    assert bool(weights.total.isfinite().all())


@every
def test_the_encoder_is_new_and_its_own(name):
    """No parameter is the model's, and every one has a part in the features."""
    model, _, batch = make(name)
    first, second = model.make_encoder(), model.make_encoder()
    own = {id(p) for p in first.parameters()}
    assert not own & {id(p) for p in (*model.parameters(), *second.parameters())}
    features = first(*batch.args, **batch.kwargs)
    assert features.ndim == 2 and len(features) == N
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in first.parameters())


# --- densities by hand -------------------------------------------------------------------


def log_prior_by_hand(name, model, values):
    standard = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    if name == "two layers":
        location, log_scale = model.prior(values["z2"]).chunk(2, -1)
        below = Normal(location, log_scale.exp()).log_prob(values["z1"])
        return standard.log_prob(values["z2"]).sum(-1) + below.sum(-1)
    if name == "mixture":
        weights = model.logits.log_softmax(0)
        each = Normal(model.means, model.log_scales.exp()).log_prob(values["z"].unsqueeze(-2))
        return (weights + each.sum(-1)).logsumexp(-1)
    return standard.log_prob(values["z"]).sum(-1)


def log_likelihood_by_hand(name, model, batch, values):
    """One datum and particle after the other, from what the decoder network says."""
    x = batch.kwargs["x"] if name == "conditional" else batch.args[0]
    z = values["z1" if name == "two layers" else "z"]
    rows = []
    for particle in z:
        inputs = particle
        if name == "conditional":
            indicators = nn.functional.one_hot(batch.kwargs["y"], 4).double()
            inputs = torch.cat([particle, indicators], -1)
        out = model.decoder(inputs)
        if name in ("bernoulli", "conv", "two layers", "conditional"):
            term = -nn.functional.binary_cross_entropy_with_logits(out, x, reduction="none")
        elif name == "binomial":
            term = Binomial(16, logits=out).log_prob(x)
        elif name == "categorical":  # category by category, then feature by feature
            logits = torch.stack([out[:, i * 6 : i * 6 + 6] for i in range(3)], -1)
            term = Categorical(logits=logits).log_prob(x)
        elif name == "conv categorical":
            logits = torch.stack([out[:, i * 2 : i * 2 + 2] for i in range(3)], -1)
            term = Categorical(logits=logits).log_prob(x)
        else:
            sigma = model.observation.log_sigma.exp() if name == "learned" else 0.3
            term = Normal(out, sigma).log_prob(x)
        rows.append(term.reshape(N, -1).sum(1))
    return torch.stack(rows)


@every
def test_weights_are_the_densities_written_by_hand(name):
    """Of the mixture too, whose component is summed out by hand over its values."""
    model, guide, batch = make(name)
    (chunk,) = Evaluator(model, guide, batch, seed=0).chunks(5)
    with torch.no_grad():
        model.eval()
        prior = log_prior_by_hand(name, model, chunk.values)
        likelihood = log_likelihood_by_hand(name, model, batch, chunk.values)
        params = guide.family_params(*batch.args, **batch.kwargs)
    z = torch.cat(list(chunk.values.values()), -1)
    proposal = Normal(params[..., 0], params[..., 1].exp()).log_prob(z).sum(-1)
    torch.testing.assert_close(chunk.weights.log_prior, prior)
    torch.testing.assert_close(chunk.weights.log_likelihood, likelihood)
    torch.testing.assert_close(chunk.weights.log_guide, proposal)
    public = pv.log_weights(model, guide, batch, num_particles=5, seed=0)
    torch.testing.assert_close(public.total, prior + likelihood - proposal)


# --- closed forms: with a linear decoder all is Gaussian, and every weight the evidence --------


def linear(kind):
    torch.manual_seed(3)
    options = {"hidden": [], "likelihood": likelihoods.Gaussian(0.9)}
    return {
        "vae": lambda: pv.zoo.VAE(4, 2, **options),
        "two layers": lambda: pv.zoo.TwoLayerVAE(4, (3, 2), **options),
        "conditional": lambda: pv.zoo.ConditionalVAE(4, 2, 3, **options),
        "mixture": lambda: pv.zoo.MixtureVAE(4, 2, 3, **options),
    }[kind]().double()


def weight_and_bias(network):
    (layer,) = network.layers
    return layer.weight.detach(), layer.bias.detach()


def condition(mean, covariance, w, b, noise, x):
    """For z ~ N(mean, covariance), x ~ N(w z + b, noise): p(z | x), and log p(x)."""
    marginal = w @ covariance @ w.T + noise
    gain = torch.linalg.solve(marginal, w @ covariance).mT
    expected = mean @ w.T + b
    location = mean + (gain @ (x - expected).unsqueeze(-1)).squeeze(-1)
    posterior = dist.MultivariateNormal(location, covariance - gain @ w @ covariance)
    return posterior, MultivariateNormal(expected, marginal).log_prob(x)


NOISE = 0.81 * torch.eye(4, dtype=torch.float64)


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def every_weight_is(exact, model, guide, batch):
    weights = pv.log_weights(model, guide, batch, num_particles=7, seed=0)
    torch.testing.assert_close(weights.total, exact.expand(7, -1))


def test_a_linear_gaussian_vae_is_probabilistic_pca():
    model = linear("vae")
    x = model.simulate(5)
    posterior, exact = condition(eye(2)[0] * 0, eye(2), *weight_and_bias(model.decoder), NOISE, x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior)

    every_weight_is(exact, model, guide, x)


def test_two_linear_layers_are_one():
    model = linear("two layers")
    (prior,) = model.prior.layers
    with torch.no_grad():
        prior.weight[3:] = 0  # a scale of z1 that does not depend on z2
        prior.bias[3:] = torch.tensor([-0.5, 0.2, 0.0])
    x = model.simulate(5)
    v, mean, scales = (
        prior.weight.detach()[:3],
        prior.bias.detach()[:3],
        prior.bias.detach()[3:].exp(),
    )
    below = torch.diag(scales**2)
    covariance = v @ v.T + below
    posterior, exact = condition(mean, covariance, *weight_and_bias(model.decoder), NOISE, x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", posterior)
            pyro.sample("z2", condition(eye(2)[0] * 0, eye(2), v, mean, below, z1)[0])

    every_weight_is(exact, model, guide, x)


def test_the_evidence_of_a_linear_conditional_model_is_that_given_the_class():
    model = linear("conditional")
    batch = model.simulate(5, seed=1)
    assert len(batch["y"].unique()) > 1
    w, b = weight_and_bias(model.decoder)
    shift = b + w[:, 2:].T[batch["y"]]
    posterior, exact = condition(eye(2)[0] * 0, eye(2), w[:, :2], shift, NOISE, batch["x"])

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior)

    every_weight_is(exact, model, guide, batch)
    every_weight_is(exact, model, guide, (batch["x"], batch["y"]))


def test_the_evidence_of_a_linear_mixture_is_a_mixture():
    model = strong(linear("mixture"))
    x = model.simulate(5)
    covariances = torch.diag_embed((2 * model.log_scales.detach()).exp())
    each, log_each = condition(
        model.means.detach(), covariances, *weight_and_bias(model.decoder), NOISE, x.unsqueeze(1)
    )
    joint = model.logits.detach().log_softmax(0) + log_each

    def guide(x):
        with pyro.plate("data", len(x)):
            mixture = dist.MixtureSameFamily(dist.Categorical(logits=joint), each)
            pyro.sample("z", mixture)

    every_weight_is(joint.logsumexp(-1), model, guide, x)


# --- ways to run -----------------------------------------------------------------------------


@every
def test_particles_at_once_are_particles_one_by_one(name):
    model, guide, batch = make(name)
    together = pv.log_weights(model, guide, batch, num_particles=6, particles="plate", seed=0)
    repeated = pv.log_weights(model, guide, batch, num_particles=6, particles="repeat", seed=0)
    torch.testing.assert_close(together.total, repeated.total)
    if name == "two layers":
        # In a loop the random numbers of two sites come by turns; so the same draws, scored.
        (chunk,) = Evaluator(model, guide, batch, particles="plate", seed=0).chunks(6)
        loop = Evaluator(model, guide, batch, particles="loop", seed=0)
        likelihood, prior = loop.score_model(chunk.rows, chunk.values)
        looped = likelihood + prior - loop.score_guide(chunk.rows, chunk.values)
    else:
        looped = pv.log_weights(
            model, guide, batch, num_particles=6, particles="loop", seed=0
        ).total
    torch.testing.assert_close(together.total, looped)


@every
def test_a_chunk_changes_no_result(name):
    model, guide, batch = make(name)
    whole = pv.log_weights(model, guide, batch, num_particles=6, seed=0)
    part = pv.log_weights(model, guide, batch, num_particles=6, seed=0, chunk_size=3)
    torch.testing.assert_close(part.total, whole.total)


@every
@pytest.mark.parametrize("loss", [pv.ELBO(2), pv.IWAE(4)], ids=["elbo", "iwae"])
def test_a_few_steps_lower_the_loss(name, loss):
    _, _, batch = make(name, num_data=64)
    model = MODELS[name]().double()
    guide = pv.AmortizedGuide(model, model.make_encoder(), example=batch)
    model.eval(), guide.eval()
    before, before_error = mean_loss(loss, model, guide, batch)
    pv.fit(
        model,
        guide,
        dict(batch.kwargs) or batch.args,
        loss=loss,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        max_steps=10,
        progress=False,
    )
    after, after_error = mean_loss(loss, model, guide, batch)
    assert before - after > 4 * math.hypot(before_error, after_error)


def mean_loss(loss, model, guide, batch):
    """The mean of a loss over draws, and its standard error."""
    found = [loss.loss(model, guide, *batch.args, **batch.kwargs) for _ in range(20)]
    return torch.tensor(found).mean().item(), torch.tensor(found).std().item() / 20**0.5


# --- simulation ------------------------------------------------------------------------------


@every
def test_simulation_has_a_seed_of_its_own(name):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    pyro.clear_param_store()
    state = torch.get_rng_state()
    a, b, other = (as_batch(model.simulate(N, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    pairs = zip(*((*c.args, *c.kwargs.values()) for c in (a, b, other)), strict=True)
    for first, again, different in pairs:
        assert torch.equal(first, again)
        assert not torch.equal(first, different)


def test_simulated_data_have_the_mean_of_the_model():
    """Of the linear mixture; four standard errors in each feature."""
    model = strong(linear("mixture"))
    x = model.simulate(20_000)
    w, b = weight_and_bias(model.decoder)
    mean = (model.logits.softmax(0) @ model.means).detach() @ w.T + b
    assert bool(((x.mean(0) - mean).abs() < 4 * x.std(0) / len(x) ** 0.5).all())
    batch = pv.zoo.ConditionalVAE(4, 2, 3, hidden=[]).simulate(3000)
    assert batch["y"].bincount().tolist() == pytest.approx([1000] * 3, abs=4 * 26)


def test_one_trial_is_a_bernoulli():
    assert isinstance(pv.zoo.VAE(3, 2, hidden=[]).likelihood(torch.zeros(4, 2)).mean, torch.Tensor)
    assert type(pv.zoo.VAE(3, 2, hidden=[]).observation) is likelihoods.Bernoulli
    assert type(pv.zoo.VAE(3, 2, hidden=[], num_trials=2).observation) is likelihoods.Binomial


# --- refusals --------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(ValueError, match="num_trials=0: at least 1"):
        pv.zoo.VAE(3, 2, hidden=[], num_trials=0)
    with pytest.raises(ValueError, match="num_trials=3 and likelihood=Gaussian.*give one of them"):
        pv.zoo.VAE(3, 2, hidden=[], num_trials=3, likelihood=likelihoods.Gaussian())
    for sigma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"sigma={sigma}: a positive number is needed"):
            likelihoods.Gaussian(sigma)
    with pytest.raises(ValueError, match="num_categories=1: at least 2"):
        likelihoods.Categorical(1)
    with pytest.raises(ValueError, match="num_components=0: at least 1"):
        pv.zoo.MixtureVAE(3, 2, 0, hidden=[])
    with pytest.raises(ValueError, match="num_data=0: at least 1"):
        pv.zoo.VAE(3, 2, hidden=[]).simulate(0)
    with pytest.raises(ValueError, match="channels is empty"):
        pv.zoo.ConvVAE((1, 4, 4), 2, channels=[])


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_of_no_class_is_refused(label):
    model, _, batch = make("conditional")
    y = batch.kwargs["y"].clone()
    y[3] = label
    with pytest.raises(ValueError, match="categories from 0 to 3 are needed, found values from"):
        pv.describe(model, {"x": batch.kwargs["x"], "y": y})
