"""Models and guides written as Pyro's own examples are: regressions, mixtures, topics, plates."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import affine_autoregressive, iterated, planar
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, autoguide, config_enumerate
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

import pyro_vae as pv
from tests.patterns.laws import agrees_with_pyro, evaluation_laws, mlp, normal, svi_steps, uses


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)  # conftest puts it back


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- global latents only, by every autoguide


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


class Regression(PyroModule):
    """Linear regression as a Bayesian PyroModule."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, torch.ones(1, 2)).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, torch.ones(1) * 10.0).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        mean = pyro.deterministic("mean", self.linear(x).squeeze(-1))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def logistic(x: Tensor, y: Tensor) -> None:
    """One coefficient vector for all data; broadcasts over particles by hand."""
    beta = pyro.sample("beta", dist.Normal(0.0, torch.ones(2)).to_event(1))
    logits = (x * beta).sum(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def _problems() -> dict[str, Any]:
    x = draws(6, 2)
    y = x[:, 0] + 0.3 * draws(6, seed=1)
    return {
        "eight schools": (
            lambda: eight_schools,
            (torch.tensor([2.8, 0.8, -0.3, 0.7]), torch.tensor([1.5, 1.0, 1.6, 1.1])),
        ),
        "linear": (Regression, (x, y)),
        "logistic": (lambda: logistic, (x, (y > 0).double())),
    }


AUTOGUIDES: dict[str, Any] = {
    "normal": autoguide.AutoNormal,
    "diagonal": autoguide.AutoDiagonalNormal,
    "multivariate": autoguide.AutoMultivariateNormal,
    "low rank": autoguide.AutoLowRankMultivariateNormal,
    "structured": autoguide.AutoStructured,
    "flow": lambda model: autoguide.AutoNormalizingFlow(
        model, partial(affine_autoregressive, hidden_dims=[8])
    ),
    "iaf": lambda model: autoguide.AutoIAFNormal(model, hidden_dim=[8]),
}
POINTS = {"delta": autoguide.AutoDelta, "laplace": autoguide.AutoLaplaceApproximation}


@pytest.mark.parametrize(
    "problem",
    [
        "eight schools",
        pytest.param("linear", marks=pytest.mark.slow),
        pytest.param("logistic", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", AUTOGUIDES)
def test_global_latents_by_autoguides(kind: str, problem: str) -> None:
    make, batch = _problems()[problem]
    model = make()
    guide = AUTOGUIDES[kind](model)
    guide(*batch)
    # A matrix of weights per particle is more than torch's linear layer takes.
    weights = evaluation_laws(
        model, guide, *batch, data_plate=False, vectorized=problem != "linear"
    )
    assert weights.total.shape == (5, 1)
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), model, guide, *batch)
    svi_steps(pv.ELBO(2), model, guide, *batch)
    svi_steps(pv.IWAE(3, data_plate=False), model, guide, *batch)
    svi_steps(pv.WakeSleep(3, data_plate=False), model, guide, *batch)


@pytest.mark.parametrize("kind", AUTOGUIDES)
def test_autoguides_in_use(kind: str) -> None:
    model, batch = eight_schools, _problems()["eight schools"][1]
    guide = AUTOGUIDES[kind](model)
    pv.fit(model, guide, batch, max_steps=20, batch_size=4, progress=False, data_plate=False)
    uses(model, guide, *batch, continuous=False, data_plate=False)
    best = pv.refine(model, guide, *batch, data_plate=False, max_steps=3)
    assert best.num_data == 1


@pytest.mark.parametrize("kind", POINTS)
def test_points_are_said_to_be_points(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = eight_schools, _problems()["eight schools"][1]
    guide = POINTS[kind](model)
    pv.fit(model, guide, batch, max_steps=20, progress=False, data_plate=False)
    with caplog.at_level(logging.WARNING):
        pv.elbo(model, guide, *batch, data_plate=False, num_particles=2)
    assert "one point" in caplog.text
    with pytest.raises(ValueError, match="one point"):
        pv.compare(model, {"point": guide}, *batch, data_plate=False)
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), model, guide, *batch)


def test_a_point_among_densities_is_said_to_be_one(caplog: pytest.LogCaptureFixture) -> None:
    batch = _problems()["eight schools"][1]
    guide = autoguide.AutoStructured(
        eight_schools,
        conditionals={"mu": "delta", "tau": "normal", "eta": "normal"},
        dependencies={},
    )
    pv.elbo(eight_schools, guide, *batch, data_plate=False, num_particles=2)
    assert "one point for 'mu'" in caplog.text


def test_a_flow_without_an_inverse_is_refused_by_name() -> None:
    """A planar flow knows the density of its last draw alone."""
    batch = _problems()["eight schools"][1]
    guide = autoguide.AutoNormalizingFlow(eight_schools, partial(iterated, 2, planar))
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), eight_schools, guide, *batch)
    with pytest.raises(ValueError, match="inverse"):
        pv.elbo(eight_schools, guide, *batch, data_plate=False)


def test_a_laplace_approximation_after_its_point() -> None:
    model, batch = logistic, _problems()["logistic"][1]
    guide = autoguide.AutoLaplaceApproximation(model)
    pv.fit(model, guide, batch, max_steps=200, progress=False, data_plate=False)
    found = guide.laplace_approximation(*batch)
    weights = evaluation_laws(model, found, *batch, data_plate=False)
    assert weights.total.shape == (5, 1)


def test_conjugate_regression_by_the_exact_posterior() -> None:
    """A multivariate autoguide set to the posterior: every weight is the evidence."""
    x, y = draws(6, 2), draws(6, seed=1)

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, torch.ones(2)).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * beta).sum(-1), 0.5), obs=y)

    precision = torch.eye(2) + x.T @ x / 0.25
    guide = autoguide.AutoMultivariateNormal(model)
    guide(x, y)
    cholesky = torch.linalg.cholesky(torch.linalg.inv(precision))
    with torch.no_grad():
        guide.loc.copy_(torch.linalg.solve(precision, x.T @ y / 0.25))
    guide.scale = cholesky.diagonal().clone()
    guide.scale_tril = cholesky / cholesky.diagonal()[:, None]
    covariance = x @ x.T + 0.25 * torch.eye(6)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(6), covariance).log_prob(y)
    weights = pv.log_weights(model, guide, x, y, num_particles=3, data_plate=False)
    torch.testing.assert_close(weights.total, evidence.expand(3, 1))


# --- mixtures: global parameters, assignments summed out


def mixture(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(Vindex(locs)[..., assignment], scale), obs=x)


@pytest.mark.parametrize("kind", ["AutoDelta", "AutoNormal"])
def test_mixture(kind: str) -> None:
    x = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    model = config_enumerate(mixture)
    exposed = poutine.block(model, expose=["weights", "locs", "scale"])
    guide = getattr(autoguide, kind)(exposed, init_loc_fn=init_to_median)
    guide(x)
    agrees_with_pyro(pv.ELBO(kl="sample"), TraceEnum_ELBO(max_plate_nesting=1), model, guide, x)
    svi_steps(pv.ELBO(2), model, guide, x)
    pv.fit(model, guide, x, max_steps=10, progress=False)
    with pytest.raises(ValueError, match="global"):
        pv.elbo(model, guide, x)
    if kind == "AutoNormal":
        evaluation_laws(model, guide, x, data_plate=False, vectorized=False)
        tree = pv.to_arviz(model, guide, x, num_draws=4, data_plate=False)
        assert tree["posterior"]["assignment"].shape == (1, 4, 5)


# --- topics


VOCABULARY, WORDS, DOCUMENTS, TOPICS = 6, 4, 3, 2


def corpus() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (WORDS, DOCUMENTS), generator=generator)


class LDA:
    """Latent Dirichlet allocation: topics of all, topics of a document, a topic of each word."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.predictor = nn.Sequential(mlp(VOCABULARY, 4, TOPICS), nn.Softmax(-1))

    def model(self, words: Tensor) -> None:
        with pyro.plate("topics", TOPICS):
            weights = pyro.sample("topic_weights", dist.Gamma(1.0 / TOPICS, 1.0))
            topics = pyro.sample("topic_words", dist.Dirichlet(torch.ones(VOCABULARY)))
        self.documents(words, weights, topics)

    def documents(self, words: Tensor, weights: Tensor, topics: Tensor) -> None:
        with pyro.plate("documents", words.shape[1]):
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(weights))
            with pyro.plate("words", words.shape[0]):
                topic = pyro.sample("word_topics", dist.Categorical(doc_topics))
                pyro.sample("doc_words", dist.Categorical(topics[topic]), obs=words)

    def guide(self, words: Tensor) -> None:
        weights = pyro.param(
            "topic_weights_posterior", torch.ones(TOPICS), constraint=constraints.positive
        )
        topics = pyro.param(
            "topic_words_posterior",
            torch.ones(TOPICS, VOCABULARY),
            constraint=constraints.greater_than(0.5),
        )
        with pyro.plate("topics", TOPICS):
            pyro.sample("topic_weights", dist.Gamma(weights, 1.0))
            pyro.sample("topic_words", dist.Dirichlet(topics))
        pyro.module("predictor", self.predictor)
        counts = nn.functional.one_hot(words, VOCABULARY).double().sum(0)
        with pyro.plate("documents", words.shape[1]):
            doc_topics = self.predictor(counts)
            pyro.sample("doc_topics", dist.Delta(doc_topics, event_dim=1))

    # Topics known: what is left is one document's.

    def local_model(self, words: Tensor) -> None:
        topics = torch.tensor([[3.0, 2, 1, 1, 1, 1], [1, 1, 1, 1, 2, 3]])
        self.documents(words.T, torch.ones(TOPICS), topics / topics.sum(-1, keepdim=True))

    def local_guide(self, words: Tensor) -> None:
        pyro.module("predictor", self.predictor)
        counts = nn.functional.one_hot(words, VOCABULARY).double().sum(1)
        with pyro.plate("documents", len(words)):
            pyro.sample("doc_topics", dist.Dirichlet(1 + self.predictor(counts)))


def test_topics_as_published() -> None:
    lda, words = LDA(), corpus()
    model = config_enumerate(lda.model)
    agrees_with_pyro(
        pv.ELBO(kl="sample"), TraceEnum_ELBO(max_plate_nesting=2), model, lda.guide, words
    )
    svi_steps(pv.ELBO(), model, lda.guide, words)
    pv.fit(model, lda.guide, words, max_steps=3, progress=False, data_plate=False)


def test_topics_of_documents() -> None:
    """A document's evidence by the sum over the topic of each word, by hand."""
    lda, words = LDA(), corpus().T
    weights = evaluation_laws(lda.local_model, lda.local_guide, words)
    assert weights.total.shape == (5, DOCUMENTS)
    agrees_with_pyro(
        pv.ELBO(kl="sample"),
        TraceEnum_ELBO(max_plate_nesting=2),
        config_enumerate(lda.local_model),
        lda.local_guide,
        words,
    )
    for loss in (pv.ELBO(2), pv.IWAE(3, "dreg"), pv.WakeSleep(3)):
        svi_steps(loss, lda.local_model, lda.local_guide, words)
    pv.fit(lda.local_model, lda.local_guide, words, batch_size=2, epochs=2, progress=False)
    uses(lda.local_model, lda.local_guide, words)


class ProdLDA(nn.Module):
    """Counts of words, of a logistic normal of topics; BatchNorm as published."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = mlp(VOCABULARY, 4, 2 * TOPICS)
        self.enc_norm = nn.BatchNorm1d(2 * TOPICS, affine=False)
        self.beta = nn.Linear(TOPICS, VOCABULARY, bias=False)
        self.dec_norm = nn.BatchNorm1d(VOCABULARY, affine=False)

    def model(self, docs: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("documents", docs.shape[0]):
            prior = dist.Normal(docs.new_zeros(docs.shape[0], TOPICS), 1.0).to_event(1)
            theta = pyro.sample("logtheta", prior).softmax(-1)
            probs = self.dec_norm(self.beta(theta)).softmax(-1)
            total = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total, probs), obs=docs)

    def guide(self, docs: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("documents", docs.shape[0]):
            pyro.sample("logtheta", normal(self.enc_norm(self.encoder(docs))))


def test_prod_lda() -> None:
    lda = ProdLDA()
    docs = nn.functional.one_hot(corpus(), VOCABULARY).double().sum(0)
    evaluation_laws(lda.model, lda.guide, docs)
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), lda.model, lda.guide, docs)
    for loss in (pv.ELBO(2), pv.IWAE(3, "dreg"), pv.WakeSleep(3)):
        svi_steps(loss, lda.model, lda.guide, docs)
    pv.fit(lda.model, lda.guide, docs, batch_size=3, epochs=2, progress=False)
    uses(lda.model, lda.guide, docs)


# --- two pairs of the same names


class Pair(nn.Module):
    """A model with parameters of its own, as a module."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(shift))

    def forward(self, x: Tensor) -> None:
        pyro.module("model", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4))


def _made(shift: float, x: Tensor) -> tuple[nn.Module, nn.Module]:
    model = Pair(shift)
    return model, pv.AmortizedGuide(model, _encoder(), example=x)


@pytest.mark.parametrize("train", ["fit", "torch"])
def test_two_pairs_of_one_name_share_nothing(train: str) -> None:
    """Trained by turns, each ends where it ends alone, to the last digit."""
    data = (draws(5), 3 + draws(5, seed=1))

    def step(model: Any, guide: Any, x: Tensor) -> None:
        torch.manual_seed(7)
        if train == "fit":
            pv.fit(model, guide, x, max_steps=3, progress=False)
        else:
            loss = pv.ELBO(kl="sample")(model, guide)
            optim = torch.optim.SGD(loss.parameters(), lr=0.01)
            loss(x).backward()
            optim.step()

    def parameters(pair: tuple[nn.Module, nn.Module]) -> list[Tensor]:
        return [p.detach().clone() for module in pair for p in module.parameters()]

    alone = []
    for shift, x in zip((0.0, 1.0), data, strict=True):
        pyro.clear_param_store()
        pair = _made(shift, x)
        for _ in range(2):
            step(*pair, x)
        alone.append(parameters(pair))
    pyro.clear_param_store()
    pairs = [_made(shift, x) for shift, x in zip((0.0, 1.0), data, strict=True)]
    for _ in range(2):
        for pair, x in zip(pairs, data, strict=True):
            step(*pair, x)
    for pair, wanted in zip(pairs, alone, strict=True):
        for found, value in zip(parameters(pair), wanted, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=0)


@pytest.mark.parametrize("loss", [pv.ELBO(), Trace_ELBO()], ids=["ours", "Pyro's"])
def test_svi_of_pyro_shares_what_the_user_registers_by_name(loss: Any) -> None:
    """pyro.module("model", ...) of two models is one to SVI: the first. Our guides are two."""
    x = draws(5)
    pairs = [_made(shift, x) for shift in (0.0, 1.0)]
    moved = []
    for model, guide in pairs:
        before = {k: v.clone() for k, v in (model.state_dict() | guide.state_dict()).items()}
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
        svi.step(x)
        after = model.state_dict() | guide.state_dict()
        moved.append(
            {name for name, value in after.items() if not torch.equal(value, before[name])}
        )
    assert "loc" in moved[0]
    assert moved[1] == moved[0] - {"loc"}


def _plain(shift: float) -> tuple[nn.Module, Any, Any]:
    """A pair of plain functions over an encoder that each registers as "encoder"."""
    network = _encoder()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", network)
        loc, log_scale, *_ = network(x).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return network, model, guide


def test_two_plain_pairs_of_one_module_name() -> None:
    """Both are trained: the second's encoder is its own, whatever the store calls "encoder"."""
    x = draws(5)
    for shift in (0.0, 2.0):
        network, model, guide = _plain(shift)
        before = [p.detach().clone() for p in network.parameters()]
        pv.fit(model, guide, x, max_steps=3, progress=False)
        for parameter, value in zip(network.parameters(), before, strict=True):
            assert not torch.equal(parameter, value)


def test_pyro_shares_params_by_name() -> None:
    """What Pyro says of pyro.param: one name, one parameter, for all functions of a process."""

    def make() -> tuple[Any, Any]:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            loc = pyro.param("loc", torch.zeros(()))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0).expand(x.shape))

        return model, guide

    (model, first), (_, second) = make(), make()
    x = draws(5)
    pv.fit(model, first, x, max_steps=2, progress=False)
    values = [pv.elbo(model, guide, x, num_particles=3, seed=0).value for guide in (first, second)]
    torch.testing.assert_close(*values, rtol=0, atol=0)


# --- plates


def test_subsampled_by_the_batch() -> None:
    x = draws(4)

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", 20, subsample=x):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(0.4))
        with pyro.plate("data", 20, subsample=x):
            pyro.sample("z", dist.Normal(weight * x, 0.7))

    evaluation_laws(model, guide, x)
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), model, guide, x)
    for loss in (pv.ELBO(2), pv.IWAE(3, "dreg"), pv.WakeSleep(3)):
        svi_steps(loss, model, guide, x)
    pv.fit(model, guide, draws(20), batch_size=6, epochs=2, progress=False)
    uses(model, guide, x)


def test_subsampled_by_the_plate() -> None:
    x = draws(20)

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", len(x), subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(0.4))
        with pyro.plate("data", len(x), subsample_size=4) as index:
            pyro.sample("z", dist.Normal(weight * x[index], 0.7))

    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), model, guide, x)
    for loss in (pv.ELBO(2), pv.IWAE(3, "dreg"), pv.WakeSleep(3)):
        svi_steps(loss, model, guide, x)
    with pytest.raises(ValueError, match="draws its own minibatch"):
        pv.elbo(model, guide, x)


def inner_plate(x: Tensor) -> None:
    """Data at dim -2, measurements inside at dim -1."""
    width = pyro.param("width", torch.tensor(1.2), constraint=constraints.positive)
    with pyro.plate("data", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", x.shape[1], dim=-1):
            u = pyro.sample("u", dist.Normal(z, width))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x)


def inner_guide(x: Tensor) -> None:
    weight = pyro.param("weight", torch.tensor(0.4))
    with pyro.plate("data", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(weight * x.mean(-1, keepdim=True), 0.8))
        with pyro.plate("inner", x.shape[1], dim=-1):
            pyro.sample("u", dist.Normal(0.5 * (x + z), 0.8))


def crossing(x: Tensor) -> None:
    """Data at dim -1, measurements inside at dim -2; the batch is data first."""
    width = pyro.param("width", torch.tensor(1.2), constraint=constraints.positive)
    data = pyro.plate("data", x.shape[0], dim=-1)
    inner = pyro.plate("inner", x.shape[1], dim=-2)
    with data:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with data, inner:
        u = pyro.sample("u", dist.Normal(z, width))
        pyro.sample("x", dist.Normal(u, 1.0), obs=x.T)


def crossing_guide(x: Tensor) -> None:
    weight = pyro.param("weight", torch.tensor(0.4))
    data = pyro.plate("data", x.shape[0], dim=-1)
    inner = pyro.plate("inner", x.shape[1], dim=-2)
    with data:
        z = pyro.sample("z", dist.Normal(weight * x.mean(-1), 0.8))
        with inner:
            pyro.sample("u", dist.Normal(0.5 * (x.T + z), 0.8))


def _nested_evidence(x: Tensor, width: float = 1.2) -> Tensor:
    size = x.shape[1]
    covariance = torch.ones(size, size) + (width**2 + 1) * torch.eye(size)
    return torch.distributions.MultivariateNormal(torch.zeros(size), covariance).log_prob(x)


@pytest.mark.parametrize(
    ("model", "guide"), [(inner_plate, inner_guide), (crossing, crossing_guide)]
)
def test_inner_plates(model: Any, guide: Any) -> None:
    x = draws(4, 3)
    weights = evaluation_laws(model, guide, x)
    assert weights.total.shape == (5, 4)
    bound = pv.iwae_bound(model, guide, x, num_particles=20_000, seed=0)
    error = (bound.value - _nested_evidence(x)).abs()
    assert bool((error < 5 * bound.std_error).all())
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), model, guide, x)
    for loss in (pv.ELBO(2), pv.IWAE(3, "dreg"), pv.WakeSleep(3)):
        svi_steps(loss, model, guide, x)
    pv.fit(model, guide, x, batch_size=3, epochs=2, progress=False)
    uses(model, guide, x)


def crossed_factors(x: Tensor) -> None:
    """Rows and columns that cross: a latent of each row, and a global one of each column."""
    rows, columns = pyro.plate("data", x.shape[0], dim=-1), pyro.plate("items", x.shape[1], dim=-2)
    with columns:
        item = pyro.sample("item", dist.Normal(0.0, 1.0))
    with rows:
        person = pyro.sample("person", dist.Normal(0.0, 1.0))
    with rows, columns:
        pyro.sample("x", dist.Normal(item + person, 1.0), obs=x.T)


def crossed_guide(x: Tensor) -> None:
    rows, columns = pyro.plate("data", x.shape[0], dim=-1), pyro.plate("items", x.shape[1], dim=-2)
    loc = pyro.param("loc", torch.zeros(x.shape[1], 1))
    with columns:
        pyro.sample("item", dist.Normal(loc, 0.6))
    with rows:
        pyro.sample("person", dist.Normal(0.7 * x.mean(-1), 0.5))


def test_plates_that_cross() -> None:
    x = draws(4, 3)
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), crossed_factors, crossed_guide, x)
    svi_steps(pv.ELBO(3), crossed_factors, crossed_guide, x)
    pv.fit(crossed_factors, crossed_guide, x, max_steps=3, progress=False, data_plate="data")
    evaluation_laws(crossed_factors, crossed_guide, x, data_plate=False)
    with pytest.raises(ValueError, match="item"):
        pv.elbo(crossed_factors, crossed_guide, x, data_plate="data")
    fixed = poutine.block(
        pyro.condition(crossed_factors, data={"item": torch.zeros(3, 1)}), hide=["item"]
    )
    guide = poutine.block(crossed_guide, hide=["item"])
    weights = evaluation_laws(fixed, guide, x, data_plate="data")
    # Each row is conjugate: a Normal person, measured three times.
    covariance = torch.ones(3, 3) + torch.eye(3)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    bound = pv.iwae_bound(fixed, guide, x, num_particles=20_000, seed=0, data_plate="data")
    assert bool(((bound.value - evidence).abs() < 5 * bound.std_error).all())
    assert weights.total.shape == (5, 4)
