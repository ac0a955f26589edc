"""Wake and sleep: what dreams are of, and the exact posteriors that discrete proposals learn."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from tests.losses.normal import X, drawn_minibatch, drawn_posterior, latent, value
from tests.models import WEIGHTS

LOADINGS = torch.tensor([[1.0, 0.3], [0.2, -0.7], [0.5, 0.5], [-1.0, 0.1]], dtype=torch.float64)


def decode(x, obs):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS.T, 0.5).to_event(1), obs=obs)


def sleep_gradients(model, guide_of, args, kwargs=None, seed=0, **options):
    """The sleep-phi gradient by a linear encoder's weights."""
    torch.manual_seed(9)
    weights = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def propose(features):
        with pyro.plate("data", len(features)):
            pyro.sample("z", dist.Normal(features @ weights, 0.6).to_event(1))

    torch.manual_seed(seed)
    loss = pv.WakeSleep(3, insomnia=0.0, **options)
    loss.loss_and_grads(model, guide_of(propose), *args, **(kwargs or {}))
    return weights.grad


@pytest.fixture
def images():
    return torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_the_observed_value_is_found_wherever_it_is(images):
    wanted = sleep_gradients(lambda x: decode(x, x), lambda q: q, (images,))
    assert wanted.abs().min() > 1e-3
    scale = torch.ones(7, 1, dtype=torch.float64)
    cases = {
        "second of the arguments": sleep_gradients(
            lambda s, x: decode(x, x), lambda q: lambda s, x: q(x), (scale, images)
        ),
        "keyword": sleep_gradients(
            lambda s, x=None: decode(x, x),
            lambda q: lambda s, x=None: q(x),
            (scale,),
            {"x": images},
        ),
        "reshaped": sleep_gradients(
            lambda x: decode(x, x.reshape(-1, 4)),
            lambda q: lambda x: q(x.reshape(-1, 4)),
            (images.reshape(7, 2, 2),),
        ),
        "dream=": sleep_gradients(
            lambda x: decode(x, 2 * x - 1),
            lambda q: lambda x: q(2 * x - 1),
            ((images + 1) / 2,),
            dream=lambda values: (values["x"] + 1) / 2,
        ),
        "dream= to several arguments": sleep_gradients(
            lambda s, x: decode(x, 2 * x - 1),
            lambda q: lambda s, x: q(2 * x - 1),
            (scale, (images + 1) / 2),
            dream=lambda values: (scale, (values["x"] + 1) / 2),
        ),
    }
    for name, found in cases.items():
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=name)


def test_dreams_do_not_depend_on_the_observed_values(images):
    """And the batch is not changed; another seed dreams otherwise."""
    before = images.clone()
    pair = (lambda x: decode(x, x), lambda q: q)
    first = sleep_gradients(*pair, (images,))
    assert torch.equal(images, before)
    torch.testing.assert_close(sleep_gradients(*pair, (images.flip(0),)), first)
    assert (sleep_gradients(*pair, (images,), seed=1) - first).abs().max() > 0.01


def test_sleep_in_a_minibatch_is_scaled(images):
    def subsampled(x):
        with pyro.plate("data", 70, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ LOADINGS.T, 0.5).to_event(1), obs=x)

    wanted = sleep_gradients(lambda x: decode(x, x), lambda q: q, (images,))
    found = sleep_gradients(subsampled, lambda q: q, (images,))
    torch.testing.assert_close(found, 10 * wanted, rtol=1e-12, atol=1e-12)


def test_sleep_phases_that_cannot_be_had(images):
    with pytest.raises(
        ValueError, match="which argument of the batch holds the values.*'x'.*dream="
    ):
        sleep_gradients(lambda x: decode(x, 2 * x), lambda q: q, (images,))

    def answers(x):
        with pyro.plate("persons", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x[:, 0]), 1.0))
            with pyro.plate("items", 4, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def of_person(x):
        with pyro.plate("persons", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.mean(1), 1.0))

    with pytest.raises(ValueError, match="which argument of the batch holds the values.*'x'"):
        pv.WakeSleep(2, insomnia=0.5).loss_and_grads(answers, of_person, images)
    loss = pv.WakeSleep(3, insomnia=0.5)
    pair = (drawn_minibatch(latent), drawn_minibatch(drawn_posterior))
    with pytest.raises(ValueError, match="a sleep phase needs the minibatch as the batch"):
        loss.loss_and_grads(*pair, X)
    pyro.clear_param_store()
    positive = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def log_normal(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)

    auto = pyro.infer.autoguide.AutoNormal(
        log_normal, create_plates=lambda x: pyro.plate("data", len(x))
    )
    with pytest.raises(ValueError, match="hides .an auxiliary site, or a Delta.; use insomnia=1"):
        pv.WakeSleep(3, insomnia=0.5, vectorize_particles=False).loss_and_grads(
            log_normal, auto, positive
        )


CHANCES = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize("insomnia", [1.0, 0.0])
def test_discrete_proposals_learn_the_exact_posterior(insomnia):
    """c in 3 values given an observation in 3: all 9 probabilities within 0.02."""
    logits = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Categorical(CHANCES[c]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=logits[x.long()]))

    # The dreams of a step are as many as its data; a wake phase has K draws for each.
    num_particles, copies = (30, 100) if insomnia == 1 else (10, 300)
    x = torch.arange(3, dtype=torch.float64).repeat(copies)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / 250))
    loss = pv.WakeSleep(num_particles, insomnia=insomnia)
    for _ in range(250):
        optimizer.zero_grad()
        loss.loss_and_grads(model, guide, x)
        optimizer.step()
        schedule.step()
    joint = WEIGHTS[:, None] * CHANCES
    exact = (joint / joint.sum(0)).T
    torch.testing.assert_close(torch.softmax(logits.detach(), -1), exact, rtol=0, atol=0.02)
    evidence = joint.sum(0).log().sum().item() * copies
    assert value(loss, model, guide, x) == pytest.approx(-evidence, rel=1e-3)


def test_bernoulli_proposals_learn_the_exact_posterior():
    """Values that are floats, and a wake phase with K = 20 only: within 0.03."""
    levels = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64)
    x = levels.repeat(80)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.full_like(x, 0.3)))
            pyro.sample("x", dist.Normal(2 * c - 1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=logits[torch.searchsorted(levels, x)]))

    optimizer = torch.optim.Adam([logits], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / 200))
    loss = pv.WakeSleep(20)
    for _ in range(200):
        optimizer.zero_grad()
        loss.loss_and_grads(model, guide, x)
        optimizer.step()
        schedule.step()
    exact = torch.sigmoid(2 * levels + math.log(0.3 / 0.7))
    torch.testing.assert_close(torch.sigmoid(logits.detach()), exact, rtol=0, atol=0.03)


@pytest.mark.usefixtures("float64")
def test_the_argument_that_is_observed_is_told_by_what_it_is_not_by_its_numbers():
    location = torch.tensor(0.0, requires_grad=True)
    saw = []

    def model(t, y):
        with pyro.plate("data", len(t)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Bernoulli(logits=z + 3 * t), obs=y)

    def guide(t, y):
        saw.append(t)
        with pyro.plate("data", len(t)):
            pyro.sample("z", dist.Normal(location + y - t, 1.0))

    loss = pv.WakeSleep(5, insomnia=0.0)
    same = torch.tensor([1.0, 0.0])
    loss.differentiable_loss(model, guide, same, same.clone())
    assert all(torch.equal(t, same) for t in saw)

    def two(a, b):
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=a + 0)
            pyro.sample("b", dist.Normal(z, 1.0), obs=b + 0)

    with pytest.raises(ValueError, match=r"values of the observed site 'a' \(candidates: \[0, 1\]"):
        pv.WakeSleep(5, insomnia=0.0).loss_and_grads(two, guide, same, same.clone())
