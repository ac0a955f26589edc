"""A corpus of pairs: what pyro-ppl ships, the patterns of its tests, those of packages on it.

Each function returns a fresh Pair: what pyro.infer.SVI is given. They are small, and as their
authors write them: no concession to anything but Pyro.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.contrib.autoname
import pyro.contrib.autoname.named
import pyro.contrib.cevae
import pyro.contrib.epidemiology.models
import pyro.contrib.forecast
import pyro.contrib.gp as gp
import pyro.contrib.mue.models
import pyro.contrib.mue.statearrangers
import pyro.distributions as dist
import pyro.distributions.transforms
import pyro.infer
import pyro.infer.autoguide as autoguide
import pyro.nn
import torch
from pyro import poutine
from pyro.contrib.easyguide import easy_guide
from pyro.contrib.oed.glmm import guides as glmm_guides
from pyro.distributions import constraints
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn

__all__ = ["PAIRS", "Pair"]


@dataclass
class Pair:
    """What SVI is given, and what else there is to know of it."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    loss: Any = field(default_factory=Trace_ELBO)
    steps: int = 12
    # Whether pv.ELBO(kl="sample") has the value of the loss from one seed.
    same_value: bool = True
    lr: float = 0.01


PAIRS: dict[str, Callable[[], Pair]] = {}


def pair(make: Callable[[], Pair]) -> Callable[[], Pair]:
    PAIRS[make.__name__] = make
    return make


def positive(name: str, value: float | Tensor) -> Tensor:
    return pyro.param(name, torch.as_tensor(value), constraint=constraints.positive)


# --- pyro.contrib


@pair
def cevae() -> Pair:
    x = torch.randn(12, 5)
    t = (torch.rand(12) < 0.5).to(x)
    y = x[:, 0] + t
    return _causal(x, t, y, "normal")


class Part(pyro.nn.PyroModule):
    """Gives a network's parts names of their own: those of CEVAE's two meet in Pyro's store."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any) -> Any:
        return self.net(*args)


class GuidePart(pyro.nn.PyroModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.guide_net = net

    def forward(self, *args: Any) -> Any:
        return self.guide_net(*args)


def _causal(x: Tensor, t: Tensor, y: Tensor, outcome: str) -> Pair:
    net = pyro.contrib.cevae.CEVAE(
        5, outcome_dist=outcome, latent_dim=2, hidden_dim=5, num_layers=2
    )
    loss = pyro.contrib.cevae.TraceCausalEffect_ELBO()
    return Pair(Part(net.model), GuidePart(net.guide), (x, t, y, 120), loss=loss, same_value=False)


@pair
def cevae_as_it_is() -> Pair:
    x = torch.randn(12, 5)
    t = (torch.rand(12) < 0.5).to(x)
    net = pyro.contrib.cevae.CEVAE(
        5, outcome_dist="laplace", latent_dim=2, hidden_dim=5, num_layers=2
    )
    loss = pyro.contrib.cevae.TraceCausalEffect_ELBO()
    return Pair(net.model, net.guide, (x, t, x[:, 0]), loss=loss, same_value=False)


def _cevae_with(outcome: str) -> Pair:
    x = torch.randn(12, 5)
    t = (torch.rand(12) < 0.5).to(x)
    y = {"bernoulli": t, "exponential": x[:, 0].exp(), "laplace": x[:, 0]}[outcome]
    return _causal(x, t, y, outcome)


@pair
def cevae_bernoulli() -> Pair:
    return _cevae_with("bernoulli")


@pair
def cevae_laplace() -> Pair:
    return _cevae_with("laplace")


def _kernel() -> Any:
    return gp.kernels.RBF(input_dim=1, variance=torch.tensor(2.0), lengthscale=torch.tensor(0.8))


def _curve() -> tuple[Tensor, Tensor]:
    x = torch.linspace(0, 3, 9)
    return x, x.sin() + 0.1 * torch.randn(9)


@pair
def gp_regression() -> Pair:
    model = gp.models.GPRegression(*_curve(), _kernel(), noise=torch.tensor(0.1))
    return Pair(model.model, model.guide, same_value=False)


@pair
def gp_regression_with_priors() -> Pair:
    model = gp.models.GPRegression(*_curve(), _kernel(), noise=torch.tensor(0.1))
    model.kernel.lengthscale = pyro.nn.PyroSample(dist.LogNormal(torch.zeros(()), 1.0))
    model.kernel.autoguide("lengthscale", dist.Normal)
    return Pair(model.model, model.guide, same_value=False)


def _sparse(approx: str) -> Pair:
    x, y = _curve()
    model = gp.models.SparseGPRegression(
        x, y, _kernel(), Xu=x[::3].clone(), noise=torch.tensor(0.1), approx=approx
    )
    return Pair(model.model, model.guide, same_value=False)


@pair
def gp_sparse_vfe() -> Pair:
    return _sparse("VFE")


@pair
def gp_sparse_fitc() -> Pair:
    return _sparse("FITC")


@pair
def gp_variational() -> Pair:
    x, y = _curve()
    likelihood = gp.likelihoods.Gaussian(torch.tensor(0.2))
    model = gp.models.VariationalGP(x, y, _kernel(), likelihood=likelihood, whiten=True)
    return Pair(model.model, model.guide, loss=TraceMeanField_ELBO(), same_value=False)


@pair
def gp_variational_binary() -> Pair:
    x, y = _curve()
    model = gp.models.VariationalGP(x, (y > 0).to(y), _kernel(), likelihood=gp.likelihoods.Binary())
    return Pair(model.model, model.guide, same_value=False)


@pair
def gp_variational_sparse() -> Pair:
    x, y = _curve()
    model = gp.models.VariationalSparseGP(
        x, y, _kernel(), Xu=x[::3].clone(), likelihood=gp.likelihoods.Poisson(), whiten=True
    )
    model.y = torch.poisson(y.exp())
    return Pair(model.model, model.guide, loss=TraceMeanField_ELBO(), same_value=False)


@pair
def gp_latent_variables() -> Pair:
    y = torch.randn(6, 4)
    prior = torch.zeros(4, 1)
    base = gp.models.SparseGPRegression(
        prior,
        y,
        gp.kernels.RBF(input_dim=1),
        Xu=torch.randn(3, 1),
        noise=torch.tensor(0.1),
        jitter=1e-4,
    )
    model = gp.models.GPLVM(base)
    return Pair(model.model, model.guide, same_value=False)


def _sequences() -> Tensor:
    letters = torch.randint(4, (6, 5))
    return nn.functional.one_hot(letters, 4).to(torch.get_default_dtype())


def _in_default_dtype(module: Any) -> Any:
    """Convert what a module holds, tensors that are no buffers too."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(part, name, value.to(torch.get_default_dtype()))
    return module.to(torch.get_default_dtype())


@pair
def mue_profile() -> Pair:
    model = _in_default_dtype(pyro.contrib.mue.models.ProfileHMM(4, 4, prior_scale=1.0))
    return Pair(model.model, model.guide, (_sequences(), torch.tensor(2.0)))


@pair
def mue_factor() -> Pair:
    model = _in_default_dtype(
        pyro.contrib.mue.models.FactorMuE(5, 4, 2, batch_size=6, latent_seq_length=4)
    )
    args = (_sequences(), torch.tensor(2.0), torch.tensor(0.5))
    return Pair(model.model, model.guide, args)


class Walk(pyro.contrib.forecast.ForecastingModel):
    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        scale = pyro.sample("drift_scale", dist.LogNormal(torch.tensor(-2.0), 0.5))
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(torch.zeros(()), scale))
        noise = pyro.sample("noise_scale", dist.LogNormal(torch.tensor(-1.0), 0.5))
        mean = drift.cumsum(-1) + (covariates * weight.unsqueeze(-2)).sum(-1)
        self.predict(dist.Normal(torch.zeros(()), noise), mean.unsqueeze(-1))


def _forecast() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 1).cumsum(0), torch.randn(12, 2)


@pair
def forecast_auto_normal() -> Pair:
    model = Walk()
    guide = autoguide.AutoNormal(model, init_scale=0.1)
    return Pair(model, guide, _forecast())


@pair
def forecast_reparameterized() -> Pair:
    model = poutine.reparam(Walk(), {"drift": LocScaleReparam()})
    return Pair(model, autoguide.AutoNormal(model), _forecast())


@pair
def epidemiology_sir() -> Pair:
    data = torch.tensor([1.0, 2.0, 4.0, 3.0, 2.0])
    sir = pyro.contrib.epidemiology.models.SimpleSIRModel(100, 3.0, data)
    sir.relaxed, sir.num_quant_bins = True, 1
    guide = autoguide.AutoNormal(
        sir._relaxed_model, init_loc_fn=autoguide.init_to_median, init_scale=0.01
    )
    loss = Trace_ELBO(max_plate_nesting=sir.max_plate_nesting)
    return Pair(sir._relaxed_model, guide, loss=loss)


@pair
def easyguide() -> Pair:
    x = torch.randn(8)

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @easy_guide(model)
    def guide(self: Any, x: Tensor) -> None:
        self.map_estimate("mu")
        group = self.group(match="z")
        with self.plate("data", len(x)):
            loc = pyro.param("loc", torch.zeros(group.event_shape), event_dim=1)
            scale = positive("scale", torch.ones(group.event_shape))
            group.sample("zs", dist.Normal(loc, scale).to_event(1))

    return Pair(model, guide, (x,))


@pair
def autoname_scope() -> Pair:
    x = torch.randn(6)

    @pyro.contrib.autoname.scope
    def layer(z: Tensor) -> Tensor:
        return pyro.sample("w", dist.Normal(torch.zeros(()), 1.0)) * z

    def model(x: Tensor) -> None:
        with pyro.contrib.autoname.scope(prefix="net"):
            slope = layer(torch.ones(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(slope, 1.0), obs=x)

    return Pair(model, autoguide.AutoNormal(model), (x,))


@pair
def autoname_named() -> Pair:
    x = torch.randn(6)

    def model(x: Tensor) -> None:
        latent = pyro.contrib.autoname.named.Object("latent")
        latent.mu.sample_(dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(latent.mu, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        latent = pyro.contrib.autoname.named.Object("latent")
        loc = latent.loc.param_(torch.tensor(0.1))
        latent.mu.sample_(dist.Normal(loc, 0.5))

    return Pair(model, guide, (x,))


@pair
def oed_linear_guide() -> Pair:
    design, y = torch.randn(1, 5, 2), torch.randn(1, 5)
    guide_net = _in_default_dtype(
        glmm_guides.LinearModelPosteriorGuide((1,), {"w": 2}, {"y": 5}, regressor_init=0.1)
    )

    def model(y_dict: dict[str, Tensor], design: Tensor, *rest: Any) -> None:
        with pyro.plate("designs", 1, dim=-1):
            w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
            mean = (design @ w.unsqueeze(-1)).squeeze(-1)
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y_dict["y"])

    def guide(y_dict: dict[str, Tensor], design: Tensor, *rest: Any) -> None:
        pyro.module("posterior_guide", guide_net)
        mu, scale_tril = guide_net.get_params(y_dict, design, ["w"])
        with pyro.plate("designs", 1, dim=-1):
            pyro.sample("w", dist.MultivariateNormal(mu["w"], scale_tril=scale_tril["w"]))

    return Pair(model, guide, ({"y": y}, design))


# --- pyro.infer.autoguide


def _regression() -> tuple[Callable[..., Any], tuple[Tensor, Tensor]]:
    x = torch.randn(10, 2)
    y = x.sum(-1) + 0.3 * torch.randn(10)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(torch.zeros(()), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), s), obs=y)

    return model, (x, y)


def _local() -> tuple[Callable[..., Any], tuple[Tensor]]:
    counts = torch.poisson(3 * torch.rand(7, 4))

    def model(counts: Tensor) -> None:
        with pyro.plate("data", len(counts)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
            share = pyro.sample("share", dist.Dirichlet(torch.ones(4)))
            mean = rate.unsqueeze(-1) * share
            pyro.sample("counts", dist.Poisson(mean).to_event(1), obs=counts)

    return model, (counts,)


def _autoguide_pairs() -> None:
    guides = {
        "AutoNormal": autoguide.AutoNormal,
        "AutoDelta": autoguide.AutoDelta,
        "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
        "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
        "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
        "AutoLaplaceApproximation": autoguide.AutoLaplaceApproximation,
        "AutoGaussian": autoguide.AutoGaussian,
        "AutoStructured": autoguide.AutoStructured,
        "AutoIAFNormal": lambda m: autoguide.AutoIAFNormal(m, hidden_dim=[40], num_transforms=1),
        "AutoNormalMessenger": autoguide.AutoNormalMessenger,
        "AutoHierarchicalNormalMessenger": autoguide.AutoHierarchicalNormalMessenger,
    }
    programs = {"regression": _regression, "local": _local}
    for kind, make_guide in guides.items():
        for name, program in programs.items():

            def make(program: Any = program, make_guide: Any = make_guide) -> Pair:
                model, args = program()
                return Pair(model, make_guide(model), args)

            PAIRS[f"{kind}_{name}"] = make


_autoguide_pairs()


@pair
def auto_guide_list() -> Pair:
    model, args = _regression()
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoDelta(poutine.block(model, expose=["s"])))
    guide.append(autoguide.AutoMultivariateNormal(poutine.block(model, expose=["w"])))
    return Pair(model, guide, args, steps=130)


@pair
def auto_discrete_parallel() -> Pair:
    x = torch.randn(6)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(c.to(x), 1.0), obs=x)

    guide = autoguide.AutoDiscreteParallel(model)
    return Pair(model, guide, (x,), loss=TraceEnum_ELBO(max_plate_nesting=1), same_value=False)


# --- the patterns of pyro's tests of valid models


def _normal_pair(x: Tensor, **kwargs: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(p, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        q = pyro.param("q", torch.tensor(0.2))
        s = positive("s", 0.8)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(q * x, s), **kwargs)

    return model, guide


@pair
def nonempty() -> Pair:
    def model() -> None:
        loc, scale = pyro.param("loc", torch.zeros(())), positive("scale", 1.0)
        pyro.sample("x", dist.Normal(loc, scale))

    def guide() -> None:
        pyro.sample("x", dist.Normal(pyro.param("qloc", torch.ones(())), 0.7))

    return Pair(model, guide)


@pair
def normal_130() -> Pair:
    x = torch.randn(5)
    return Pair(*_normal_pair(x), (x,), steps=130)


@pair
def mean_field() -> Pair:
    x = torch.randn(5)
    return Pair(*_normal_pair(x), (x,), loss=TraceMeanField_ELBO(), same_value=False)


@pair
def graph_elbo() -> Pair:
    x = torch.randn(5)
    return Pair(*_normal_pair(x), (x,), loss=TraceGraph_ELBO())


@pair
def renyi() -> Pair:
    x = torch.randn(5)
    loss = RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    return Pair(*_normal_pair(x), (x,), loss=loss, same_value=False)


@pair
def tail_adaptive() -> Pair:
    x = torch.randn(5)
    loss = TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    return Pair(*_normal_pair(x), (x,), loss=loss, same_value=False)


@pair
def particles() -> Pair:
    x = torch.randn(5)
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    return Pair(*_normal_pair(x), (x,), loss=loss)


@pair
def particles_in_a_loop() -> Pair:
    x = torch.randn(5)
    return Pair(*_normal_pair(x), (x,), loss=Trace_ELBO(num_particles=3))


@pair
def empty_guide() -> Pair:
    x = torch.randn(5)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("p", torch.tensor(0.5)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pass

    return Pair(model, guide, (x,))


@pair
def sequential_plate() -> Pair:
    x = torch.randn(4)

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.5))
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(p, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        q = pyro.param("q", torch.zeros(len(x)))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(q[i], 1.0))

    return Pair(model, guide, (x,))


@pair
def sequential_plate_subsampled() -> Pair:
    x = torch.randn(6)

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.5))
        for i in pyro.plate("data", len(x), 2):
            z = pyro.sample(f"z_{i}", dist.Normal(p, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        q = pyro.param("q", torch.zeros(len(x)))
        for i in pyro.plate("data", len(x), 2):
            pyro.sample(f"z_{i}", dist.Normal(q[i], 1.0))

    return Pair(model, guide, (x,), same_value=False)


@pair
def nested_plates() -> Pair:
    x = torch.randn(3, 4)

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.5))
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(p, 1.0))
        with columns:
            b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
        with rows, columns:
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        a, b = pyro.param("qa", torch.zeros(3, 1)), pyro.param("qb", torch.zeros(4))
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("a", dist.Normal(a, 0.5))
        with pyro.plate("columns", 4, dim=-1):
            pyro.sample("b", dist.Normal(b, 0.5))

    return Pair(model, guide, (x,))


@pair
def subsampled_plate() -> Pair:
    x = torch.randn(8)

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.5))
        with pyro.plate("data", 8, subsample_size=3) as i:
            z = pyro.sample("z", dist.Normal(p, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        q = pyro.param("q", torch.zeros(8))
        with pyro.plate("data", 8, subsample_size=3) as i:
            pyro.sample("z", dist.Normal(q[i], 1.0))

    return Pair(model, guide, (x,), same_value=False)


@pair
def subsample_given() -> Pair:
    x = torch.randn(4)

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.5))
        with pyro.plate("data", 20, subsample=x):
            z = pyro.sample("z", dist.Normal(p, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample=x):
            pyro.sample("z", dist.Normal(pyro.param("q", torch.tensor(0.3)) * x, 1.0))

    return Pair(model, guide, (x,))


@pair
def scale_and_mask() -> Pair:
    x, seen = torch.randn(5), torch.tensor([True, False, True, True, False])

    def model(x: Tensor, seen: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.5))
        with pyro.plate("data", len(x)), poutine.scale(scale=0.3):
            z = pyro.sample("z", dist.Normal(p, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, seen: Tensor) -> None:
        q = pyro.param("q", torch.zeros(5))
        with pyro.plate("data", len(x)), poutine.scale(scale=0.3):
            pyro.sample("z", dist.Normal(q, 1.0))

    return Pair(model, guide, (x, seen))


@pair
def obs_mask() -> Pair:
    x, seen = torch.randn(5), torch.tensor([True, False, True, True, False])

    def model(x: Tensor, seen: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(p, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    def guide(x: Tensor, seen: Tensor) -> None:
        q = pyro.param("q", torch.zeros(5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(q, 1.0))
            pyro.sample("x_unobserved", dist.Normal(z, 1.0))

    return Pair(model, guide, (x, seen), same_value=False)


@pair
def factors() -> Pair:
    x = torch.randn(5)

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(p, 1.0))
            pyro.factor("x", -((z - x) ** 2))
        pyro.factor("penalty", -(p**2))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("q", torch.zeros(5)), 1.0))

    return Pair(model, guide, (x,))


@pair
def deterministic_sites() -> Pair:
    x = torch.randn(5)

    def model(x: Tensor) -> None:
        p = pyro.deterministic("p", pyro.param("w", torch.tensor(0.5)) ** 2)
        with pyro.plate("data", len(x)):
            z = pyro.deterministic("z", pyro.sample("e", dist.Normal(torch.zeros(()), 1.0)) + p)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("e", dist.Normal(pyro.param("q", torch.zeros(5)), 1.0))

    return Pair(model, guide, (x,))


@pair
def discrete_proposals() -> Pair:
    x = torch.randn(5)

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        q = pyro.param("q", 0.4 * torch.ones(5), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(q))

    return Pair(model, guide, (x,))


@pair
def discrete_with_baselines() -> Pair:
    x = torch.randn(5)

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        q = pyro.param("q", 0.4 * torch.ones(5), constraint=constraints.unit_interval)
        baseline = {"use_decaying_avg_baseline": True, "baseline_beta": 0.8}
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(q), infer={"baseline": baseline})

    return Pair(model, guide, (x,), loss=TraceGraph_ELBO())


def _mixture() -> tuple[Tensor, Callable[..., Any]]:
    x = torch.randn(6)

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
        locs = pyro.param("locs", torch.tensor([-1.0, 0.0, 1.0]))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[c], 1.0), obs=x)

    return x, model


@pair
def mixture_summed_in_the_model() -> Pair:
    x, model = _mixture()
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    return Pair(config_enumerate(model), lambda x: None, (x,), loss=loss)


@pair
def mixture_enumerated_in_the_guide() -> Pair:
    x, model = _mixture()

    @config_enumerate
    def guide(x: Tensor) -> None:
        q = pyro.param("q", torch.ones(6, 3) / 3, constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(q))

    return Pair(model, guide, (x,), loss=TraceEnum_ELBO(max_plate_nesting=1))


@pair
def mixture_with_globals() -> Pair:
    x = torch.randn(6)

    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(torch.zeros(()), 2.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(locs[c], 1.0), obs=x)

    guide = autoguide.AutoNormal(poutine.block(model, hide=["c"]))
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    return Pair(model, guide, (x,), loss=loss, steps=130, same_value=False)


@pair
def hidden_markov_model() -> Pair:
    x = torch.randn(5)

    @config_enumerate
    def model(x: Tensor) -> None:
        move = pyro.param(
            "move", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex
        )
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        state: Any = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            state = pyro.sample(f"c_{t}", dist.Categorical(move[state]))
            pyro.sample(f"x_{t}", dist.Normal(locs[state], 1.0), obs=x[t])

    loss = TraceEnum_ELBO(max_plate_nesting=0)
    return Pair(model, lambda x: None, (x,), loss=loss, same_value=False)


@pair
def sequential_enumeration() -> Pair:
    x, model = _mixture()

    def guide(x: Tensor) -> None:
        q = pyro.param("q", torch.ones(6, 3) / 3, constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(q), infer={"enumerate": "parallel"})

    loss = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    return Pair(model, guide, (x,), loss=loss)


@pair
def gradient_of_a_sample_without_reparameterization() -> Pair:
    x = torch.rand(5) + 0.5

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        a = positive("a", torch.ones(5))
        with pyro.plate("data", len(x)):
            z = dist.testing.fakes.NonreparameterizedGamma(a, torch.ones(5))
            pyro.sample("z", z)

    return Pair(model, guide, (x,), same_value=False)


@pair
def lazy_param_of_the_first_batch() -> Pair:
    x = torch.randn(5)

    def model(x: Tensor) -> None:
        p = pyro.param("p", lambda: x.mean())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(p, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("q", lambda: x / 2), 1.0))

    return Pair(model, guide, (x,))


@pair
def pyro_module() -> Pair:
    x = torch.randn(6, 3)

    class Model(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = pyro.nn.PyroModule[nn.Linear](3, 1)
            self.linear.weight = pyro.nn.PyroSample(
                dist.Normal(torch.zeros(()), 1.0).expand([1, 3]).to_event(2)
            )
            self.scale = pyro.nn.PyroParam(torch.tensor(0.5), constraint=constraints.positive)

        def forward(self, x: Tensor) -> None:
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, self.scale), obs=x.sum(-1))

    model = Model()
    return Pair(model, autoguide.AutoDiagonalNormal(model), (x,), steps=130)


@pair
def vae() -> Pair:
    x = torch.rand(6, 8).round()
    decoder = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 8))
    encoder = nn.Sequential(nn.Linear(8, 5), nn.Softplus(), nn.Linear(5, 4))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, (0.1 * scale).exp()).to_event(1))

    return Pair(model, guide, (x,), steps=130)


@pair
def vae_of_grey_pixels() -> Pair:
    x = torch.rand(6, 8)
    decoder, encoder = nn.Linear(2, 8), nn.Linear(8, 2)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pixels = dist.Bernoulli(logits=decoder(z), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return Pair(model, guide, (x,))


@pair
def semi_supervised() -> Pair:
    x = torch.rand(6, 8).round()
    decoder, encoder = nn.Linear(5, 8), nn.Linear(8, 7)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(len(x), 3) / 3))
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            z = z.expand(*y.shape[:-1], 2)
            logits = decoder(torch.cat([z, y], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        h = encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OneHotCategorical(logits=h[:, :3]))
            pyro.sample("z", dist.Normal(h[:, 3:5], (0.1 * h[:, 5:]).exp()).to_event(1))

    guide = config_enumerate(guide, "parallel", expand=True)
    return Pair(model, guide, (x,), loss=TraceEnum_ELBO(max_plate_nesting=1), same_value=False)


@pair
def deep_markov() -> Pair:
    x = torch.randn(4, 3)
    transition, emission = nn.Linear(2, 2), nn.Linear(2, 1)
    rnn, combine = nn.RNN(1, 4, batch_first=True), nn.Linear(6, 2)

    def model(x: Tensor, annealing: float) -> None:
        pyro.module("transition", transition)
        pyro.module("emission", emission)
        z = torch.zeros(len(x), 2)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                with poutine.scale(scale=annealing):
                    z = pyro.sample(f"z_{t}", dist.Normal(transition(z).tanh(), 1.0).to_event(1))
                pyro.sample(
                    f"x_{t}", dist.Normal(emission(z), 1.0).to_event(1), obs=x[:, t : t + 1]
                )

    def guide(x: Tensor, annealing: float) -> None:
        pyro.module("rnn", rnn)
        pyro.module("combine", combine)
        h, _ = rnn(x.unsqueeze(-1).flip(1))
        z = torch.zeros(len(x), 2)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc = combine(torch.cat([z, h[:, -1 - t]], -1))
                with poutine.scale(scale=annealing):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, 0.5).to_event(1))

    return Pair(model, guide, (x, 0.5))


@pair
def normalizing_flow_guide() -> Pair:
    x = torch.randn(5, 2)
    flow = dist.transforms.affine_coupling(2, hidden_dims=[4])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("flow", flow)
        base = dist.Normal(x / 2, 0.7)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base.to_event(1), [flow]))

    return Pair(model, guide, (x,))


@pair
def conditional_model() -> Pair:
    x = torch.randn(5)

    def model() -> None:
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(pyro.param("p", torch.tensor(0.5)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide() -> None:
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(pyro.param("q", torch.zeros(5)), 1.0))

    return Pair(poutine.condition(model, {"x": x}), guide)


# --- patterns of packages on Pyro


@pair
def amortized_lda() -> Pair:
    """scvi-tools: counts, topics, a guide whose scale is a softplus; a Dirichlet on the genes."""
    x = torch.poisson(3 * torch.rand(6, 9))
    encoder = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 6))

    def model(x: Tensor) -> None:
        total = x.sum(-1)
        with pyro.plate("topics", 3), poutine.scale(scale=0.5):
            genes = pyro.sample("genes", dist.Dirichlet(torch.ones(9)))
        with pyro.plate("cells", 60, subsample=x):
            shares = pyro.sample("shares", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
            shares = shares / shares.sum(-1, keepdim=True)
            pyro.sample(
                "x", dist.Multinomial(int(total.max()), shares @ genes, validate_args=False), obs=x
            )

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        concentration = positive("concentration", torch.ones(3, 9))
        with pyro.plate("topics", 3), poutine.scale(scale=0.5):
            pyro.sample("genes", dist.Dirichlet(concentration))
        loc, scale = encoder(x.log1p()).chunk(2, -1)
        with pyro.plate("cells", 60, subsample=x):
            scale = nn.functional.softplus(scale)
            pyro.sample("shares", dist.LogNormal(loc, scale).to_event(1))

    return Pair(model, guide, (x,), loss=TraceMeanField_ELBO(), same_value=False)


@pair
def batch_covariates() -> Pair:
    """Decipher, antipode: batch indices one-hot encoded, BatchNorm, dropout off."""
    x, batch = torch.poisson(3 * torch.rand(8, 5)), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    decoder = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))
    encoder = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))

    def one_hot(batch: Tensor) -> Tensor:
        return nn.functional.one_hot(batch, 3).to(torch.get_default_dtype())

    def model(x: Tensor, batch: Tensor) -> None:
        pyro.module("decoder", decoder)
        theta = positive("theta", torch.ones(5))
        with pyro.plate("cells", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            rate = decoder(torch.cat([z, one_hot(batch)], -1)).softmax(-1) * x.sum(-1, keepdim=True)
            logits = (rate + 1e-6).log() - (theta + 1e-6).log()
            pyro.sample("x", dist.NegativeBinomial(theta, logits=logits).to_event(1), obs=x)

    def guide(x: Tensor, batch: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, scale = encoder(torch.cat([x.log1p(), one_hot(batch)], -1)).chunk(2, -1)
        with pyro.plate("cells", len(x)):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale) + 1e-3).to_event(1))

    return Pair(model, guide, (x, batch))


@pair
def kl_weight_of_each_epoch() -> Pair:
    """scvi-tools hands its KL warm-up to the model as a Python float."""
    x = torch.randn(6)

    def model(x: Tensor, kl_weight: float) -> None:
        p = pyro.param("p", torch.tensor(0.5))
        with pyro.plate("cells", len(x)):
            with poutine.scale(scale=kl_weight):
                z = pyro.sample("z", dist.Normal(p, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, kl_weight: float) -> None:
        with pyro.plate("cells", len(x)), poutine.scale(scale=kl_weight):
            pyro.sample("z", dist.Normal(pyro.param("q", torch.zeros(6)), 1.0))

    return Pair(model, guide, (x, 0.3))


@pair
def hurdle() -> Pair:
    """cellbender: a discrete latent decides whether a droplet holds a cell."""
    x = torch.poisson(2 * torch.rand(6, 4))

    @config_enumerate
    def model(x: Tensor) -> None:
        ambient = pyro.param("ambient", torch.ones(4) / 4, constraint=constraints.simplex)
        with pyro.plate("droplets", len(x)):
            size = pyro.sample("size", dist.LogNormal(torch.zeros(()), 1.0))
            cell = pyro.sample("cell", dist.Bernoulli(torch.tensor(0.4)))
            rate = (cell * size + 0.5).unsqueeze(-1) * ambient
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(6))
        with pyro.plate("droplets", len(x)):
            pyro.sample("size", dist.LogNormal(loc, 0.5))

    return Pair(model, guide, (x,), loss=TraceEnum_ELBO(max_plate_nesting=1))


@pair
def spots() -> Pair:
    """tapqir: latents under a mask that a discrete latent of the guide decides."""
    x = torch.randn(6)

    def model(x: Tensor) -> None:
        with pyro.plate("frames", len(x)):
            m = pyro.sample("m", dist.Bernoulli(torch.tensor(0.4)))
            with poutine.mask(mask=m > 0):
                h = pyro.sample("h", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(m * (2 + h), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        q = pyro.param("q", 0.5 * torch.ones(6), constraint=constraints.unit_interval)
        with pyro.plate("frames", len(x)):
            m = pyro.sample("m", dist.Bernoulli(q), infer={"enumerate": "parallel"})
            with poutine.mask(mask=m > 0):
                pyro.sample("h", dist.Normal(pyro.param("loc", torch.zeros(6)), 0.7))

    return Pair(model, guide, (x,), loss=TraceEnum_ELBO(max_plate_nesting=1), same_value=False)


@pair
def noise_without_a_name() -> Pair:
    """scvi's ResolVI, pyro.contrib.gp: a draw in the model that is no sample statement."""
    x = torch.randn(5)

    def model(x: Tensor) -> None:
        with pyro.plate("cells", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("p", torch.tensor(0.5)), 1.0))
            rate = dist.Normal(z, 0.5).rsample()
            pyro.sample("x", dist.Normal(rate, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("cells", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("q", torch.zeros(5)), 0.7))

    return Pair(model, guide, (x,))


@pair
def factor_analysis_of_a_module() -> Pair:
    """A module's methods, whose parameters Pyro is not told of: SVI trains nothing."""

    class PPCA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, 4))

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.w, 1.0).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            scale = positive("scale", 1.0)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ self.w.T / 5, scale).to_event(1))

    net = PPCA()
    return Pair(net.model, net.guide, (torch.randn(6, 4),))


@pair
def lstm_encoder() -> Pair:
    x = torch.randn(5, 6, 2)
    lstm, head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 2)

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal((z + p).unsqueeze(-2), 1.0).expand(x.shape).to_event(2), obs=x
            )

    def guide(x: Tensor) -> None:
        pyro.module("lstm", lstm)
        pyro.module("head", head)
        _, (h, _) = lstm(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(head(h[0]), 0.5).to_event(1))

    return Pair(model, guide, (x,))


@pair
def air_of_one_step() -> Pair:
    """The guide draws the minibatch, the model's plate is full."""
    x = torch.arange(6.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 6) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0).expand([len(i)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        m = pyro.param("m", torch.tensor(0.5))
        with pyro.plate("data", 6, subsample_size=2) as i:
            pyro.sample("z", dist.Normal(m * x[i], 0.7))

    return Pair(model, guide, (x,), same_value=False)
