"""What is compared and refused before runs count: independence, modes, rounding, edges."""

from __future__ import annotations

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from tests.losses.normal import X as DATA
from tests.losses.normal import mixed
from tests.models import MEANS, WEIGHTS, NormalModel
from tests.particles.models import ConvModel

X = torch.tensor([3.0, -3.0, 2.0], dtype=torch.float64)
X3 = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)


def of(seen, plate=lambda x: pyro.plate("data", len(x))):
    def model(x):
        with plate(x) as index:
            rows = x if isinstance(index, slice) else x[index]
            z = pyro.sample("z", dist.Normal(torch.zeros_like(rows), 1.0))
            pyro.sample("x", dist.Normal(seen(z), 0.5), obs=rows)

    return model


def prior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))


def bound(objective, model, runs):
    torch.manual_seed(0)
    return -sum(objective.loss(model, prior, X) for _ in range(runs)) / runs


@pytest.mark.parametrize(
    "seen",
    [
        lambda z: z.mean(-1, keepdim=True).expand(z.shape),
        lambda z: z.cumsum(-1),
        lambda z: z.roll(1, -1),
        lambda z: z.softmax(-1),
    ],
    ids=["mean", "walk", "neighbour", "shares"],
)
@pytest.mark.parametrize(
    "objective",
    [pv.IWAE(200, vectorize_particles=False), pv.IWAE(200), pv.WakeSleep(200)],
    ids=["loop", "together", "wake"],
)
def test_data_that_see_one_another_are_refused(objective, seen):
    """Through a mean, log p(x) is -43.35, and the sum of each datum's own bound was -21.8."""
    with pytest.raises(ValueError, match="depends on the latents of other data"):
        objective.loss(of(seen), prior, X)


def test_as_one_datum_they_have_a_bound():
    mean = of(lambda z: z.mean(-1, keepdim=True).expand(z.shape))
    covariance = 0.25 * torch.eye(3, dtype=X.dtype) + 1 / 3
    exact = dist.MultivariateNormal(torch.zeros_like(X), covariance).log_prob(X)
    objective = pv.IWAE(500, vectorize_particles=False, data_plate=False)
    assert bound(objective, mean, 4) == pytest.approx(float(exact), abs=0.3)


def test_independent_data_run_one_by_one_as_before():
    exact = dist.Normal(0.0, math.sqrt(1.25)).log_prob(X).sum()
    objective = pv.IWAE(500, vectorize_particles=False)
    assert bound(objective, of(lambda z: z), 4) == pytest.approx(float(exact), abs=0.3)


def test_noise_beside_the_sites_is_no_dependence():
    """Dropout by hand: each run draws it anew, and a bound over it is one."""
    noisy = of(lambda z: z + 0.01 * torch.randn_like(z))
    assert math.isfinite(pv.IWAE(2, vectorize_particles=False).loss(noisy, prior, X))


def test_data_of_a_drawn_minibatch_are_looked_at_too():
    def drawn(x):
        return pyro.plate("data", len(x), subsample_size=2)

    def rows(x):
        with drawn(x) as index:
            pyro.sample("z", dist.Normal(torch.zeros_like(x[index]), 1.0))

    objective = pv.IWAE(2)
    assert math.isfinite(objective.loss(of(lambda z: z, drawn), rows, X))
    with pytest.raises(ValueError, match="depends on the latents of other data"):
        objective.loss(of(lambda z: z.flip(-1), drawn), rows, X)


def test_a_network_that_takes_no_particles_gets_the_batch_repeated():
    torch.manual_seed(0)
    model, x = ConvModel(), torch.randn(5, 1, 4, 4, dtype=torch.float64)
    guide = pv.AmortizedGuide(model, nn.Flatten(), example=x)
    evaluator = Evaluator(model, guide, as_batch(x), seed=0)
    assert evaluator.modes == {"guide": "plate", "model": "repeat"}
    by_repeat = pv.log_weights(model, guide, x, num_particles=6, seed=0)
    (chunk,) = evaluator.chunks(6)
    by_hand = [
        poutine.trace(poutine.condition(model.eval(), data={"z": z})).get_trace(x).nodes
        for z in chunk.values["z"]
    ]
    likelihood = torch.stack([n["x"]["fn"].log_prob(x) for n in by_hand])
    torch.testing.assert_close(by_repeat.log_likelihood, likelihood)


def test_a_wrong_broadcast_is_found_and_another_way_taken():
    """Reshaping by the batch size mixes data up, silently, once there are particles."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            location = z.reshape(len(x), -1).flip(-1).reshape(z.shape)
            pyro.sample("x", dist.Normal(location, 1.0).to_event(1), obs=x)

    x = torch.randn(4, 2, dtype=torch.float64)
    guide = pv.AmortizedGuide(model, nn.Linear(2, 3).double(), example=x)
    evaluator = Evaluator(model, guide, as_batch(x), seed=0)
    assert evaluator.modes == {"guide": "plate", "model": "repeat"}
    with pytest.raises(ValueError, match=r"model's log density .*plate: .*differ"):
        pv.log_weights(model, guide, x, num_particles=2, particles="plate")


def test_falling_back_to_a_loop_says_so(caplog):
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            if z.ndim != 2 or len(z) != 3:
                raise ValueError("only [3, 2]")
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.zeros(3, 2)
    guide = pv.LocalGuide(model, num_data=3, example=x)
    with caplog.at_level(logging.WARNING):
        pv.log_weights(model, guide, x, num_particles=2)
    assert "the model runs particle by particle" in caplog.text and "only [3, 2]" in caplog.text


def test_a_random_density_is_refused():
    class Dropping(nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                noise = torch.randn(len(x))
                pyro.sample("x", dist.Normal(z + noise, 1.0), obs=x)

    model, x = Dropping(), torch.zeros(4)
    guide = pv.LocalGuide(model, num_data=4, example=x)
    with pytest.raises(ValueError, match=r"dropout in training mode"):
        pv.log_weights(model, guide, x, num_particles=2)


def test_one_datum_is_not_repeated():
    model, x = NormalModel(), torch.zeros(3)
    options = {"data_plate": False, "particles": "repeat", "num_particles": 2}
    with pytest.raises(ValueError, match="particles='repeat' needs a data plate to repeat along"):
        pv.log_weights(model, model.posterior, x, **options)


F64 = torch.float64
GENES = 2000


@pytest.fixture
def counts():
    """Counts to a million of two data, their base rates and loads, all exact in float32."""
    generator = torch.Generator().manual_seed(0)
    base = torch.exp(9 + 1.5 * torch.randn(GENES, generator=generator)).double()
    load = (0.2 * torch.randn(GENES, generator=generator)).double()
    x = torch.poisson(base * torch.exp(0.5 * load) + torch.zeros(2, 1), generator=generator)
    return base, load, x


def model_of(kind, base, load):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(base.new_zeros(()), 1.0)).unsqueeze(-1)
            mean = base * torch.exp(z * load)
            if kind == "NegativeBinomial":
                size = base.new_tensor(20.0)
                fn = dist.NegativeBinomial(size, logits=mean.log() - math.log(20.0))
            else:
                fn = dist.Poisson(mean)
            pyro.sample("x", fn.to_event(1), obs=x)

    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["NegativeBinomial", "Poisson"])
def test_bounds_of_large_counts_in_float32(kind, counts, caplog):
    base, load, x = counts
    grid = torch.linspace(-0.3, 1.3, 3201, dtype=F64)
    joint = torch.stack(
        [
            pyro.poutine.trace(pyro.condition(model_of(kind, base, load), {"z": z.expand(2)}))
            .get_trace(x)
            .nodes["x"]["fn"]
            .log_prob(x)
            + dist.Normal(0.0, 1.0).log_prob(z)
            for z in grid
        ]
    )
    mode = grid[joint.argmax(0)]
    wide = 0.06 if kind == "NegativeBinomial" else 0.003
    offsets = torch.linspace(-8 * wide, 8 * wide, 1601, dtype=F64)
    model = model_of(kind, base, load)
    fine = []
    for offset in offsets:
        z = mode + offset
        trace = pyro.poutine.trace(pyro.condition(model, {"z": z})).get_trace(x)
        fine.append(trace.nodes["x"]["fn"].log_prob(x) + dist.Normal(0.0, 1.0).log_prob(z))
    table = torch.stack(fine)
    exact = table.logsumexp(0) + (offsets[1] - offsets[0]).log()
    share = table.softmax(0)
    mean = (share * offsets.unsqueeze(1)).sum(0)
    sd = (share * (offsets.unsqueeze(1) - mean) ** 2).sum(0).sqrt()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((mode + mean).float(), (1.2 * sd).float()))

    narrow = model_of(kind, base.float(), load.float())
    found = pv.iwae_bound(narrow, guide, x.float(), num_particles=1000, seed=0)
    coarse = float(next((r.args[1] for r in caplog.records if "float32" in r.msg), 0.0))
    assert ((found.value - exact).abs() < 5 * found.std_error + 2 * coarse).all()
    assert ((found.value - exact).abs() < 0.2).all()  # 1 to 3 nats in float32


def test_a_loss_of_large_counts_says_that_it_is_off(counts, caplog):
    base, load, x = counts

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((len(x),), 0.5), 0.001))

    model = model_of("Poisson", base.float(), load.float())
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        pv.ELBO().loss(model, guide, x.float())
    assert (
        sum("loss is off by about" in r.message and "'x'" in r.message for r in caplog.records) == 1
    )
    caplog.clear()
    pv.ELBO().loss(model_of("Poisson", base, load), guide, x)
    assert not caplog.records


def test_parameters_that_are_too_coarse_are_warned_of(counts, caplog):
    """Where counts are twice their mean, a rounding of the mean counts to first order."""
    base, load, x = counts

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((len(x),), 0.5), 0.001))

    model = model_of("Poisson", base.float(), load.float())
    pv.elbo(model, guide, 2 * x.float(), num_particles=2, seed=0)
    (record,) = (r for r in caplog.records if "in float32: its rounding" in r.message)
    told = record.args[1]
    mean = base * torch.exp(0.5 * load)
    by_hand = (torch.finfo(torch.float32).eps / 2 * (2 * x - mean)).square().sum(1).sqrt().mean()
    assert told == pytest.approx(by_hand.item(), rel=0.2)
    caplog.clear()
    pv.elbo(model_of("Poisson", base, load), guide, 2 * x, num_particles=2, seed=0)
    assert not [r for r in caplog.records if "float32" in r.message]


def test_small_terms_stay_in_float32():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    weights = pv.log_weights(NormalModel(), guide, torch.ones(3, 2), num_particles=4, seed=0)
    assert weights.total.dtype == torch.float32


def test_weights_that_are_not_numbers_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("bad", torch.where(z > 4, torch.nan, 0.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(2.0, 1.0))

    with pytest.raises(ValueError, match=r"log weights of data .* through log p\(x \| z\)"):
        pv.elbo(model, guide, torch.zeros(3), num_particles=50, seed=0)


# --- proposals beside latents that are summed out: what is refused by name


def test_draws_of_a_sites_own_are_refused_by_name():
    def guide(x):
        with pyro.plate("data", len(x)):
            infer = {"enumerate": "parallel", "num_samples": 1000}
            pyro.sample("z", dist.Normal(x, 0.5), infer=infer)

    model = NormalModel(noise=0.2)

    for loss in (pv.ELBO(), pv.IWAE(2), pv.WakeSleep(2)):
        with pytest.raises(ValueError, match="'z' asks for 1000 draws .*num_particles=1000"):
            loss.loss(model, guide, X3)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_proposal_that_depends_on_one_summed_out_is_refused(num_particles):
    def guide(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(MEANS[c], 1.0))

    with pytest.raises(
        ValueError, match=r"site 'z' depends on \['c'\], which ask to be enumerated"
    ):
        pv.IWAE(num_particles).loss(mixed, guide, DATA)


@pytest.mark.usefixtures("float64")
def test_markov_proposals_that_share_dimensions_are_refused():
    table = torch.tensor([[0.7, 0.3], [0.2, 0.8]])

    def chain(x=None, infer=None):
        c = 0
        for t in pyro.markov(range(4)):
            c = pyro.sample(f"c{t}", dist.Categorical(table[c]), infer=infer or {})
            if x is not None:
                pyro.sample(f"x{t}", dist.Normal(c * 1.0, 1.0), obs=x[t])

    def model(x):
        chain(x)

    def guide(x):
        chain(infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match=r"dimensions that some share \(pyro.markov\)"):
        pv.ELBO().loss(model, guide, torch.zeros(4))
    # Left out of the guide, they are summed out: the forward algorithm.
    alpha = table[0] * torch.exp(dist.Normal(torch.arange(2.0), 1.0).log_prob(torch.tensor(0.0)))
    for _ in range(3):
        likelihood = dist.Normal(torch.arange(2.0), 1.0).log_prob(torch.tensor(0.0)).exp()
        alpha = (alpha @ table) * likelihood
    found = pv.ELBO(data_plate=False).loss(model, lambda x: None, torch.zeros(4))
    assert found == pytest.approx(-alpha.sum().log().item(), rel=1e-12)
