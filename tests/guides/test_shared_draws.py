"""Proposals that see the draws of what all data share: against a joint posterior by algebra."""

from __future__ import annotations

import copy
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

import pyro_vae as pv

N, D, WIDE, NOISE = 7, 2, 2.0, 0.5
VARIANCE = 1 / (1 + NOISE**-2)  # of a latent given its datum and the mean of all


def model(x: Tensor) -> None:
    """mu ~ N(0, 2), z_n ~ N(mu, 1), x_n ~ N(z_n, 0.5), in two independent columns."""
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(D), WIDE).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)


def data() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return 1.2 * drawn + torch.tensor([1.5, -0.5], dtype=torch.float64)


def evidence(x: Tensor) -> float:
    """log p(x) of all data: each column is Gaussian, of covariance 4 + 1.25 on the diagonal."""
    ones, eye = torch.ones(N, N).double(), torch.eye(N).double()
    column = torch.distributions.MultivariateNormal(
        torch.zeros(N).double(), WIDE**2 * ones + (1 + NOISE**2) * eye
    )
    return float(column.log_prob(x.T).sum())


def posterior_of_mean(x: Tensor) -> tuple[Tensor, float]:
    """Mean [D] and standard deviation of mu given x."""
    precision = WIDE**-2 + N / (1 + NOISE**2)
    return x.sum(0) / (1 + NOISE**2) / precision, precision**-0.5


def make(x: Tensor, kind=AutoMultivariateNormal, top_down: bool = True, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pv.AmortizedGuide(
            model,
            nn.Linear(D, D, dtype=x.dtype, device=x.device),
            example=x,
            global_guide=kind(poutine.block(model, expose=["mu"])),
            top_down=top_down,
            **options,
        )


@torch.no_grad()
def make_exact(x: Tensor) -> pv.AmortizedGuide:
    """The joint posterior: q(mu) q(z | x, mu), its parameters written by algebra."""
    guide = make(x)
    shared = guide.shared
    for parameter in (*guide.head.parameters(), *shared.parameters(), guide.encoder.bias):
        parameter.zero_()
    guide.encoder.weight.copy_(torch.eye(D))
    guide.head.bias.view(D, 2)[:, 0] = VARIANCE * shared.loc
    guide.head.bias.view(D, 2)[:, 1] = 0.5 * math.log(VARIANCE)
    shared.of_datum.bias[D:] = 1.0  # the gate
    for d in range(D):
        guide.head.weight[2 * d, d] = VARIANCE / NOISE**2
        shared.of_shared.weight[D + d, d] = shared.scale[d]
        shared.last.weight[2 * d, D + d] = VARIANCE * math.sqrt(2 * D)
    mean, sd = posterior_of_mean(x)
    auto = guide.global_guide
    auto.loc.copy_(mean)
    auto.scale = torch.full((D,), sd, dtype=torch.float64)  # of a constrained parameter
    auto.scale_tril = torch.eye(D, dtype=torch.float64)
    return guide


def given_mean(x: Tensor, mu: Tensor) -> Tensor:
    """log p(x_n | mu), [N]."""
    return torch.distributions.Normal(mu, (1 + NOISE**2) ** 0.5).log_prob(x).sum(-1)


@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
def test_the_joint_posterior_has_one_weight(particles):
    """Each draw of everything has the weight log p(x), to rounding: nothing is left out."""
    x = data()
    guide = make_exact(x)
    weights = pv.log_weights(
        model, guide, x, num_particles=5, data_plate=False, seed=0, particles="loop"
    )
    wanted = torch.full((5, 1), evidence(x)).double()
    torch.testing.assert_close(weights.total, wanted, rtol=0, atol=1e-5)
    # And given the mean of all, each datum has its own.
    mu = torch.tensor([0.3, 2.0], dtype=torch.float64)
    found = pv.log_weights(
        model, guide, x, num_particles=4, given={"mu": mu}, seed=0, particles=particles
    )
    torch.testing.assert_close(found.total, given_mean(x, mu).expand(4, N), rtol=0, atol=1e-5)


def test_the_median_of_the_global_guide_is_seen():
    x = data()
    guide = make_exact(x)
    bound = pv.elbo(model, guide, x, num_particles=3, seed=0)
    wanted = given_mean(x, posterior_of_mean(x)[0])
    torch.testing.assert_close(bound.value, wanted, rtol=0, atol=1e-5)
    assert set(bound.given) == {"mu"}


@pytest.mark.parametrize(("particles", "compile"), [(1, False), (6, False), (6, "replay")])
def test_training_sees_the_same_draws(particles, compile):
    """Losses of the exact guide are minus log p(x), of one particle and of several, in graphs."""
    x = data()
    losses = [pv.ELBO(particles, estimator="stl")]
    if compile is False:
        theirs = pyro.infer.Trace_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
        losses += [pv.ELBO(particles, kl="sample"), theirs]
    for loss in losses:
        svi = pv.CompiledSVI(
            model, make_exact(x), pyro.optim.SGD({"lr": 0.0}), loss, compile=compile
        )
        for _ in range(3):
            assert svi.step(x) == pytest.approx(-evidence(x), abs=1e-5)
        assert compile is False or svi.mode == "replayed"


def test_an_iwae_draws_what_is_shared_once():
    """Whatever mu is drawn: log p(mu) - log q(mu) and each log p(x_n | mu) add up to log p(x)."""
    x = data()
    loss = pv.IWAE(5)(model, make_exact(x))(x)
    assert float(loss.detach()) == pytest.approx(-evidence(x), abs=1e-5)


def test_a_fit_comes_near_the_evidence():
    x = data()
    guide = make(x)
    loss, optim = pv.ELBO(2, estimator="stl"), lambda p: torch.optim.Adam(p, lr=0.03)
    options = {"max_steps": 600, "seed": 1, "progress": False}
    pv.fit(model, guide, x, loss=loss, optim=optim, **options)
    bound = pv.elbo(model, guide, x, num_particles=1000, data_plate=False, seed=0)
    # Half of what any guide without loses, at the least.
    assert evidence(x) - float(bound.value) + 4 * float(bound.std_error) < best_without() / 2


def test_what_a_guide_loses_that_does_not_see_them():
    """The best of all guides without, written by algebra, is lower by what algebra says."""
    x = data()
    guide = make(x, top_down=False)
    mean, _ = posterior_of_mean(x)
    with torch.no_grad():
        for parameter in (*guide.head.parameters(), guide.encoder.bias):
            parameter.zero_()
        guide.encoder.weight.copy_(torch.eye(D))
        guide.head.bias.view(D, 2)[:, 0] = VARIANCE * mean
        guide.head.bias.view(D, 2)[:, 1] = 0.5 * math.log(VARIANCE)
        for d in range(D):
            guide.head.weight[2 * d, d] = VARIANCE / NOISE**2
        guide.global_guide.loc.copy_(mean)
        guide.global_guide.scale = torch.full((D,), (WIDE**-2 + N) ** -0.5).double()
        guide.global_guide.scale_tril = torch.eye(D).double()
    bound = pv.elbo(model, guide, x, num_particles=4000, data_plate=False, seed=0)
    error = 4 * float(bound.std_error)
    assert evidence(x) - float(bound.value) == pytest.approx(best_without(), abs=error)
    assert error < best_without() / 2


def best_without() -> float:
    """What independent z_1..z_N and mu lose: a block diagonal q of the joint Gaussian, in nats.

    KL of the best q with independent blocks: half of (sum of log conditional precisions of the
    blocks, less the log determinant of the whole precision), of each column.
    """
    precision = torch.eye(N + 1).double() / VARIANCE
    precision[0, 0] = WIDE**-2 + N
    precision[0, 1:] = precision[1:, 0] = -1.0
    return float(D * 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)))


def test_it_begins_where_a_guide_without_begins():
    """Nothing is gained at first; then a gradient reaches every parameter."""
    x = data()
    plain, seeing = make(x, top_down=False), make(x)
    for guide in (plain, seeing):
        torch.manual_seed(1)
        guide.found = guide(x)["z"]
    assert torch.equal(plain.found, seeing.found)
    seeing.shared.last.weight.data.fill_(0.1)
    pv.ELBO(3)(model, seeing)(x).backward()
    for name, parameter in seeing.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("width", [4, 400])
def test_a_step_of_adam_moves_proposals_by_little_at_any_width(width):
    """By the learning rate times the norm of 2 F hidden units, at most; not by their sum.

    Of 128 features that sum is a step of a log scale at which training ends in NaN.
    """
    x = data()
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(D, width, dtype=x.dtype), nn.Tanh())
    items = AutoMultivariateNormal(poutine.block(model, expose=["mu"]))
    guide = pv.AmortizedGuide(model, encoder, example=x, global_guide=items, top_down=True)
    shared, mu = guide.shared, {"mu": torch.tensor([2.0, -1.0], dtype=torch.float64)}
    features = encoder(x).detach()
    optim = torch.optim.Adam([shared.last.weight], lr=0.01)
    shared(features, mu)[0, 1].backward()  # a log scale of the first datum
    optim.step()
    place, gate = (features @ shared.of_datum.weight.T + shared.of_datum.bias).chunk(2, -1)
    moved, slope = (((mu["mu"] - shared.loc) / shared.scale) @ shared.of_shared.weight.T).chunk(2)
    hidden = torch.cat([(place + moved).tanh(), gate * slope], -1)[0].detach()
    change = -float(shared(features, mu)[0, 1].detach())
    assert change <= 0.01 * float(hidden.norm()) * (1 + 1e-6)
    assert change == pytest.approx(0.01 * float(hidden.abs().sum()) / (2 * width) ** 0.5, rel=1e-3)


def test_refined_and_compared_given_what_all_share():
    """Held at values a guide is of its family: refine starts at its answer, and gains nothing."""
    x = data()
    guide = make_exact(x)
    mu = torch.tensor([0.3, 2.0], dtype=torch.float64)
    refined = pv.refine(model, guide, x, given={"mu": mu}, seed=0, progress=False)
    assert refined.converged.all()
    wanted = VARIANCE * (mu + x / NOISE**2)
    torch.testing.assert_close(refined.table[..., 0], wanted, rtol=0, atol=1e-4)
    table = pv.compare(
        model, {"seeing": guide}, x, given={"mu": mu}, num_particles=50, seed=0, progress=False
    ).dataset.sel(guide="seeing")
    assert abs(table.amortization_gap.values).max() < 1e-3
    assert abs(table.approximation_gap.values).max() < 1e-3


def test_draws_of_the_whole_are_of_the_joint_posterior():
    """The correlation of mu and z_n that no independent proposals have."""
    x = data()
    tree = pv.to_arviz(model, make_exact(x), x, num_draws=20_000, data_plate=False, seed=0)
    posterior = tree["posterior"] if "posterior" in dict(tree.items()) else tree.posterior
    mu = torch.as_tensor(posterior["mu"].values[0, :, 0])
    z = torch.as_tensor(posterior["z"].values[0, :, 0, 0])
    sd = posterior_of_mean(x)[1]
    wanted = VARIANCE * sd / (VARIANCE**2 * sd**2 + VARIANCE) ** 0.5
    error = (1 - wanted**2) / 20_000**0.5
    assert float(torch.corrcoef(torch.stack([mu, z]))[0, 1]) == pytest.approx(wanted, abs=4 * error)


@pytest.mark.slow
def test_chains_given_what_all_share():
    x = data()
    mu = torch.tensor([0.3, 2.0], dtype=torch.float64)
    samples = pv.sample_posterior(
        model, make_exact(x), x, given={"mu": mu}, num_draws=250, seed=0, progress=False
    )
    z = torch.as_tensor(samples.draws["z"]).flatten(0, 1)
    wanted = VARIANCE * (mu + x / NOISE**2)
    assert ((z.mean(0) - wanted).abs() < 6 * VARIANCE**0.5 / 300**0.5).all()


def test_saved_loaded_and_copied():
    x = data()
    guide, other = make_exact(x), make(x)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(guide)):
        weights = pv.log_weights(model, twin, x, num_particles=2, data_plate=False, seed=0).total
        torch.testing.assert_close(weights, torch.full_like(weights, evidence(x)))


def test_float32_and_a_batch_of_another_size():
    x = data().float()
    guide = make(x)
    nn.init.normal_(guide.shared.last.weight)
    assert guide(x)["z"].dtype == torch.float32
    assert guide(x[:3])["z"].shape == (3, D)
    assert pv.elbo(model, guide, x[:3], num_particles=2, seed=0).value.shape == (3,)


def layered(x: Tensor) -> None:
    """Globals of an inner plate, on a constrained support and discrete; two sites of a datum."""
    columns = pyro.plate("columns", 3, dim=-1)
    with columns:
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 0.5))
    shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x), dim=-2):
        top = pyro.sample("top", dist.Normal(shift, 1.0))
        with columns:
            z = pyro.sample("z", dist.Normal(top, scale))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


class OfTwoPlates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).tanh()


@pytest.mark.parametrize(
    "family", [None, pv.families.FullRankNormal()], ids=["mean field", "joint"]
)
def test_plates_inside_a_datum_and_joint_families(family):
    """Particles together are particles one by one; with parents beside the shared ones, too."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(0)
    guide = pv.AmortizedGuide(
        layered,
        OfTwoPlates(),
        example=x,
        family=family,
        data_plate="data",
        global_guide=AutoNormal(poutine.block(layered, expose=["scale", "shift"])),
        top_down=True,
    )
    assert [c.name for c in guide.shared.coordinates] == ["scale", "shift"]
    nn.init.normal_(guide.shared.last.weight, std=0.3)
    for conditioner in guide.conditioners.values():
        nn.init.normal_(conditioner[-1].weight, std=0.3)
    # Asked for by name, particles in a plate are refused where they differ from single ones.
    how = {"num_particles": 4, "particles": "plate", "seed": 0}
    together = pv.log_weights(layered, guide, x, data_plate=False, **how).total
    assert together.shape == (4, 1) and together.std() > 0
    values = {"scale": torch.tensor([0.5, 1.0, 2.0]), "shift": torch.tensor(0.7)}
    given = pv.log_weights(layered, guide, x, given=values, data_plate="data", **how)
    assert given.total.shape == (4, 5)
    pv.ELBO(3, data_plate="data")(layered, guide)(x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


def test_what_is_seen_moves_the_proposal():
    """A guide whose globals are others proposes others: by what the algebra says."""
    x = data()
    guide = make_exact(x)
    for mu in (torch.zeros(D).double(), torch.ones(D).double()):
        held = poutine.condition(guide, data={"mu": mu})
        node = poutine.trace(held).get_trace(x).nodes["z"]
        wanted = VARIANCE * (mu + x / NOISE**2)
        torch.testing.assert_close(node["fn"].base_dist.loc, wanted, rtol=0, atol=1e-12)


def test_a_joint_family_without_shared_latents_is_refused_still():
    def plain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = data()
    with pytest.raises(ValueError, match="top_down with FullRankNormal"):
        pv.AmortizedGuide(
            plain,
            nn.Linear(D, 3).double(),
            example=x,
            family=pv.families.FullRankNormal(),
            top_down=True,
        )
