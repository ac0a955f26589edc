"""Models and guides written as Pyro's own examples are: sequences, cells and causes."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.cevae import CEVAE, TraceCausalEffect_ELBO
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from tests.patterns.laws import (
    agrees_with_pyro,
    evaluation_laws,
    loss_and_gradients,
    mlp,
    normal,
    svi_steps,
    uses,
)


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)  # conftest puts it back


# --- the deep Markov model

N, TIME, NOTES, STATES = 4, 3, 3, 2


class DMM(nn.Module):
    """States that drift, notes that they emit; sequences of different lengths, by masks."""

    def __init__(self, masked: str = "inside") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masked = masked  # where the mask stands: inside of to_event, outside, or poutine
        self.emitter, self.transition = mlp(STATES, 4, NOTES), mlp(STATES, 4, 2 * STATES)
        self.rnn = nn.RNN(NOTES, 3, batch_first=True).double()
        self.combiner_h, self.combiner_z = mlp(STATES, 3), mlp(3, 2 * STATES)
        self.h_0 = nn.Parameter(torch.zeros(1, 1, 3).double())
        self.z_0 = nn.Parameter(torch.full((STATES,), 0.1).double())
        self.z_q_0 = nn.Parameter(torch.full((STATES,), -0.1).double())

    def sample(self, name: str, fn: Any, mask: Tensor, **options: Any) -> Tensor:
        if self.masked == "inside":
            return pyro.sample(name, fn.mask(mask[:, None]).to_event(1), **options)
        if self.masked == "outside":
            return pyro.sample(name, fn.to_event(1).mask(mask), **options)
        with poutine.mask(mask=mask):
            return pyro.sample(name, fn.to_event(1), **options)

    def model(self, x: Tensor, mask: Tensor, annealing: float = 1.0) -> None:
        pyro.module("dmm", self)
        z = self.z_0.expand(len(x), STATES)
        with pyro.plate("minibatch", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc, log_scale = self.transition(z).chunk(2, -1)
                with poutine.scale(scale=annealing):
                    z = self.sample(f"z_{t}", dist.Normal(loc, log_scale.exp()), mask[:, t])
                logits = self.emitter(z)
                self.sample(f"x_{t}", dist.Bernoulli(logits=logits), mask[:, t], obs=x[:, t])

    def guide(self, x: Tensor, mask: Tensor, annealing: float = 1.0) -> None:
        pyro.module("dmm", self)
        backwards, _ = self.rnn(x.flip(1), self.h_0.expand(1, len(x), 3).contiguous())
        states = backwards.flip(1)
        z = self.z_q_0.expand(len(x), STATES)
        with pyro.plate("minibatch", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                h = 0.5 * (torch.tanh(self.combiner_h(z)) + states[:, t])
                loc, log_scale = self.combiner_z(h).chunk(2, -1)
                with poutine.scale(scale=annealing):
                    z = self.sample(f"z_{t}", dist.Normal(loc, log_scale.exp()), mask[:, t])


def sequences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(N, TIME, NOTES, generator=generator) < 0.5).double()
    return x, torch.arange(TIME) < torch.tensor([3, 2, 1, 3])[:, None]


MASKS = ["inside", "outside", "poutine"]
MASKS_OF_THE_MODEL = ["inside", pytest.param("outside", marks=pytest.mark.slow), "poutine"]


@pytest.mark.parametrize("masked", MASKS)
def test_deep_markov_model(masked: str) -> None:
    dmm, batch = DMM(masked), sequences()
    weights = evaluation_laws(dmm.model, dmm.guide, batch)
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), dmm.model, dmm.guide, *batch)
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), dmm.model, dmm.guide, *batch, 0.3)
    agrees_with_pyro(pv.ELBO(), TraceMeanField_ELBO(), dmm.model, dmm.guide, *batch, 0.3)
    x, mask = batch
    first = pv.log_weights(dmm.model, dmm.guide, x, mask, 0.3, num_particles=5, seed=1)
    torch.testing.assert_close(first.total, weights.total)  # annealing is training's
    svi_steps(pv.ELBO(2), dmm.model, dmm.guide, *batch, 0.3)
    svi_steps(pv.IWAE(3, "dreg"), dmm.model, dmm.guide, *batch)


@pytest.mark.parametrize("masked", MASKS)
def test_a_padded_sequence_weighs_what_it_weighs_without_padding(masked: str) -> None:
    """By the same draws: those of the padding count for nothing, wherever they lie."""
    dmm = DMM(masked)
    x, mask = sequences()
    whole = Evaluator(dmm.model, dmm.guide, as_batch(x, mask), seed=0)
    (chunk,) = whole.chunks(4)
    row, length = 1, 2
    alone = Evaluator(
        dmm.model, dmm.guide, as_batch(x[[row], :length], mask[[row], :length]), seed=0
    )
    values = {f"z_{t}": chunk.values[f"z_{t}"][:, [row]] for t in range(length)}
    likelihood, prior = alone.score_model(slice(0, 1), values)
    torch.testing.assert_close(likelihood[:, 0], chunk.weights.log_likelihood[:, row])
    torch.testing.assert_close(prior[:, 0], chunk.weights.log_prior[:, row])


@pytest.mark.parametrize("masked", MASKS_OF_THE_MODEL)
def test_a_mask_of_the_model_alone(masked: str) -> None:
    """A latent that the model masks is not there, however the mask is written."""
    dmm, plain, batch = DMM(masked), DMM("none"), sequences()
    plain.load_state_dict(dmm.state_dict())
    plain.sample = lambda name, fn, mask, **o: pyro.sample(name, fn.to_event(1), **o)
    wanted = pv.log_weights(dmm.model, dmm.guide, batch, num_particles=5, seed=1)
    found = pv.log_weights(dmm.model, plain.guide, batch, num_particles=5, seed=1)
    torch.testing.assert_close(found.total, wanted.total)
    losses = []
    for guide in (dmm.guide, plain.guide):
        torch.manual_seed(0)
        losses.append(pv.ELBO(kl="sample").loss(dmm.model, guide, *batch))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("masked", MASKS_OF_THE_MODEL)
def test_deep_markov_model_in_use(masked: str) -> None:
    dmm, batch = DMM(masked), sequences()
    pv.fit(dmm.model, dmm.guide, batch, batch_size=2, epochs=2, progress=False)
    pv.fit(
        dmm.model,
        dmm.guide,
        batch,
        batch_size=2,
        epochs=2,
        progress=False,
        schedule=pv.schedules.LinearWarmup(steps=2),
    )
    uses(dmm.model, dmm.guide, batch)


# --- single cells


CELLS, GENES, TYPES = 5, 4, 3


class SCANVI(PyroModule):
    """Counts of genes, of cells whose type is known for a whole batch or for none of it."""

    def __init__(self, *, factor: bool = False, inflated: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.factor, self.inflated = factor, inflated
        self.scale_factor = 1.0 / (CELLS * GENES)
        self.z2_decoder, self.x_decoder = mlp(2 + TYPES, 4, 4), mlp(2, 4, 2 * GENES)
        self.z2l_encoder = mlp(GENES, 4, 6)
        self.classifier, self.z1_encoder = mlp(2, TYPES), mlp(2 + TYPES, 4, 4)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        theta = pyro.param(
            "inverse_dispersion", 10.0 * x.new_ones(GENES), constraint=dist.constraints.positive
        )
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale_factor):
            z1 = pyro.sample("z1", dist.Normal(0, x.new_ones(2)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(TYPES)), obs=y)
            z2 = pyro.sample("z2", normal(self.z2_decoder(_cat(z1, y))))
            size = pyro.sample("l", dist.LogNormal(2.0, x.new_ones(1)).to_event(1))
            gate, mu = self.x_decoder(z2).chunk(2, -1)
            logits = (size * mu.softmax(-1) + 1e-6).log() - (theta + 1e-6).log()
            fn: Any = dist.NegativeBinomial(total_count=theta, logits=logits)
            if self.inflated:
                fn = dist.ZeroInflatedNegativeBinomial(
                    gate_logits=gate, total_count=theta, logits=logits, validate_args=False
                )
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale_factor):
            raw = self.z2l_encoder(torch.log1p(x))
            l_loc, l_scale = raw[..., 4:5], raw[..., 5:].exp()
            pyro.sample("l", dist.LogNormal(l_loc, l_scale).to_event(1))
            z2 = pyro.sample("z2", normal(raw[..., :4]))
            types = dist.OneHotCategorical(logits=self.classifier(z2))
            if y is None:
                y = pyro.sample("y", types)
            elif self.factor:
                pyro.factor("classification_loss", -5.0 * types.log_prob(y), has_rsample=False)
            pyro.sample("z1", normal(self.z1_encoder(_cat(z2, y))))


def _cat(a: Tensor, b: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], -1)


def cells() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((CELLS, GENES), 3.0).double(), generator=generator)
    return x, torch.eye(TYPES).double()[torch.arange(CELLS) % TYPES]


@pytest.mark.parametrize("inflated", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("labelled", [True, False])
def test_cells(labelled: bool, inflated: bool) -> None:
    scanvi, (x, y) = SCANVI(inflated=inflated), cells()
    batch = (x, y if labelled else None)
    weights = evaluation_laws(scanvi.model, scanvi.guide, batch)
    guide = scanvi.guide if labelled else config_enumerate(scanvi.guide, "parallel", expand=True)
    pyros = Trace_ELBO() if labelled else TraceEnum_ELBO(max_plate_nesting=1)
    agrees_with_pyro(pv.ELBO(kl="sample"), pyros, scanvi.model, guide, *batch)
    scanvi.scale_factor = 1.0  # evaluation is of these data, whatever training weighs
    again = pv.log_weights(scanvi.model, scanvi.guide, batch, num_particles=5, seed=1)
    torch.testing.assert_close(again.total, weights.total)
    svi_steps(pv.ELBO(2), scanvi.model, guide, *batch)
    svi_steps(pv.WakeSleep(3), scanvi.model, scanvi.guide, *batch)
    if labelled:
        assert pv.explain(pv.ELBO(), scanvi.model, guide, batch)["l"].startswith("analytic")
        svi_steps(pv.IWAE(3, "dreg"), scanvi.model, guide, *batch)
    pv.fit(scanvi.model, guide, batch, batch_size=3, epochs=2, progress=False)
    uses(scanvi.model, scanvi.guide, batch, continuous=labelled)


def test_cells_with_a_classification_loss_in_the_guide() -> None:
    """As published: the labelled cells' classifier is trained by a factor in the guide.

    The loss is Pyro's. Its gradient is the derivative of that loss, which Pyro's is not: of a
    factor that was not reparameterized Trace_ELBO takes the score function.
    """
    scanvi, (x, y) = SCANVI(factor=True), cells()
    value, gradients = loss_and_gradients(pv.ELBO(kl="sample"), scanvi.model, scanvi.guide, x, y)
    wanted, _ = loss_and_gradients(Trace_ELBO(), scanvi.model, scanvi.guide, x, y)
    assert value == pytest.approx(wanted, rel=1e-12)
    torch.manual_seed(3)
    z2 = poutine.trace(scanvi.guide).get_trace(x, y).nodes["z2"]["value"].detach()
    types = dist.OneHotCategorical(logits=scanvi.classifier(z2))
    loss = -5.0 * scanvi.scale_factor * types.log_prob(y).sum()
    (derivative,) = torch.autograd.grad(loss, [scanvi.classifier[0].weight])
    torch.testing.assert_close(gradients["scanvi$$$classifier.0.weight"], derivative)
    pv.fit(scanvi.model, scanvi.guide, (x, y), batch_size=3, epochs=2, progress=False)


def test_cells_with_a_classification_loss_by_pyros_loss() -> None:
    scanvi, batch = SCANVI(factor=True), cells()
    options = {"batch_size": 3, "epochs": 2, "progress": False}
    pv.fit(scanvi.model, scanvi.guide, batch, loss=Trace_ELBO(), **options)


def test_cells_evaluated_without_the_classification_loss() -> None:
    scanvi, plain, batch = SCANVI(factor=True), SCANVI(), cells()
    with pytest.raises(ValueError, match="classification_loss"):
        pv.elbo(scanvi.model, scanvi.guide, batch)
    guide = poutine.block(scanvi.guide, hide=["classification_loss"])
    found = pv.elbo(scanvi.model, guide, batch, seed=0)
    pyro.clear_param_store()
    torch.testing.assert_close(found.value, pv.elbo(plain.model, plain.guide, batch, seed=0).value)


# --- causal effects


def causes(outcome: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    t = torch.bernoulli(torch.sigmoid(x[:, 0]), generator=generator)
    y = x[:, 1] + t
    return x, t, (y > 0).double() if outcome == "bernoulli" else y.exp()


def cevae(outcome: str) -> CEVAE:
    torch.manual_seed(0)
    return CEVAE(3, outcome_dist=outcome, latent_dim=2, hidden_dim=4, num_layers=2).double()


@pytest.mark.parametrize(
    "outcome",
    [
        "normal",
        *(
            pytest.param(outcome, marks=pytest.mark.slow)
            for outcome in ("bernoulli", "studentt", "laplace", "exponential")
        ),
    ],
)
def test_causal_effects(outcome: str) -> None:
    vae, batch = cevae(outcome), causes(outcome)
    assert pv.describe(vae.model, batch).data_plate == "data"
    evaluation_laws(vae.model, vae.guide, batch)
    # The guide's observed t and y are no proposals: their densities are not in log q.
    blocked = poutine.block(vae.guide, hide=["t", "y"])
    first, second = (
        pv.log_weights(vae.model, g, batch, num_particles=5, seed=1).total
        for g in (vae.guide, blocked)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), vae.model, blocked, *batch)
    agrees_with_pyro(pv.ELBO(), TraceMeanField_ELBO(), vae.model, blocked, *batch)


def test_causal_effects_in_use() -> None:
    vae, batch = cevae("bernoulli"), causes("bernoulli")
    for loss in (pv.ELBO(2), pv.IWAE(3, "dreg"), pv.WakeSleep(3)):
        svi_steps(loss, vae.model, vae.guide, *batch)
    before = [p.detach().clone() for p in vae.guide.t_nn.parameters()]
    pv.fit(
        vae.model,
        vae.guide,
        batch,
        batch_size=4,
        epochs=2,
        progress=False,
        loss=TraceCausalEffect_ELBO(),
    )
    assert all(
        not torch.equal(p, b) for p, b in zip(vae.guide.t_nn.parameters(), before, strict=True)
    )
    names = dict(zip("xty", batch, strict=True))
    pv.fit(vae.model, vae.guide, {**names, "size": 7}, batch_size=4, epochs=2, progress=False)
    uses(vae.model, vae.guide, batch)


def test_a_subsampled_batch_of_causes_counts_for_all_data() -> None:
    vae, (x, t, y) = cevae("normal"), causes("normal")
    blocked = poutine.block(vae.guide, hide=["t", "y"])
    batch = {"x": x[:3], "t": t[:3], "y": y[:3], "size": 7}
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), vae.model, blocked, **batch)
    value, _ = loss_and_gradients(pv.ELBO(kl="sample"), vae.model, blocked, **batch)
    part, _ = loss_and_gradients(pv.ELBO(kl="sample"), vae.model, blocked, x[:3], t[:3], y[:3])
    assert value == pytest.approx(part * 7 / 3, rel=1e-12)
    evaluation_laws(vae.model, vae.guide, batch)
