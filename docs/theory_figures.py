"""Draw the figures of docs/theory.md: points by pyro_vae, lines beside them by algebra.

    python docs/theory_figures.py --output docs/figures

prints every number that it draws. --quick takes a fraction of the draws: noisy, and fast.
The model is Gaussian wherever it can be, z ~ Normal(0, I) and x ~ Normal(W z, s), so that
log p(x) and the posterior are known. Where the spread of an estimate is wanted, one datum is
repeated: each row of the batch is then a replicate, and one call gives them all.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from torch import Tensor

import pyro_vae as pv

# The palette of pyro_vae.plots: Okabe and Ito (2008).
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
GREY = "#999999"
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
}


class LinearGaussian:
    """z ~ Normal(0, I), x ~ Normal(W z, noise), and everything that algebra says of it."""

    def __init__(self, loadings: Tensor, noise: float) -> None:
        self.loadings, self.noise = loadings, noise
        identity = torch.eye(loadings.shape[1])
        self.precision = identity + loadings.T @ loadings / noise**2
        self.covariance = torch.linalg.inv(self.precision)

    def __call__(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.loadings.shape[1]), 1.0).to_event(1))
            mean = z @ self.loadings.T
            pyro.sample("x", dist.Normal(mean, self.noise).to_event(1), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        covariance = self.loadings @ self.loadings.T + self.noise**2 * torch.eye(x.shape[-1])
        return dist.MultivariateNormal(torch.zeros(x.shape[-1]), covariance).log_prob(x)

    def posterior_mean(self, x: Tensor) -> Tensor:
        return x @ self.loadings @ self.covariance / self.noise**2


def normal_guide(loc: Tensor, scale: Tensor, kind: Any = dist.Normal) -> Callable[[Tensor], None]:
    """The guide Normal(loc, scale), [N, L] or [L] each."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            shape = (len(x), loc.shape[-1])
            pyro.sample("z", kind(loc.expand(shape), scale.expand(shape)).to_event(1))

    return guide


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean over independent replicates, and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def curve(ax: Axes, x: Iterable[float], points: Any, color: str, label: str, **kw: Any) -> None:
    """Points (value, standard error) with error bars, joined by a line; and print them."""
    x, values, errors = list(x), [p[0] for p in points], [p[1] for p in points]
    ax.errorbar(x, values, errors, color=color, label=label, capsize=2, **{"marker": "o", **kw})
    for place, value, error in zip(x, values, errors, strict=True):
        print(f"  {label:28s} {place:8.3g}  {value:12.5g} ± {error:.2g}")


def evidence(scale: float) -> Figure:
    """Naive Monte Carlo against importance sampling, as the dimension of z grows."""
    dimensions, particles, replicates = [1, 2, 4, 8, 16, 32], 1000, max(20, int(200 * scale))
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.0, 3.0))
    points: dict[str, list[tuple[float, float]]] = {"prior": [], "wide posterior": []}
    needed: dict[str, list[float]] = {"prior": [], "wide posterior": []}
    noise, wide = 0.5, 1.3
    for size in dimensions:
        model = LinearGaussian(torch.eye(size), noise)
        x = torch.full((replicates, size), (1 + noise**2) ** 0.5)  # a datum of typical length
        mean, variance = model.posterior_mean(x), float(model.covariance[0, 0])
        guides = {
            "prior": normal_guide(torch.zeros(size), torch.ones(size)),
            "wide posterior": normal_guide(mean, torch.full_like(mean, wide * variance**0.5)),
        }
        for name, guide in guides.items():
            bound = pv.iwae_bound(model, guide, x, num_particles=particles, seed=size)
            points[name].append(mean_and_error(bound.value - model.log_evidence(x)))
        # E_q[w^2] / p(x)^2 = integral of p(z|x)^2 / q(z), a Gaussian integral per dimension.
        a, m = 1 / variance - 0.5, float(mean[0, 0])
        prior = math.exp((m / variance) ** 2 / a - m**2 / variance) / (variance * (2 * a) ** 0.5)
        needed["prior"].append(100 * (prior**size - 1))
        needed["wide posterior"].append(100 * ((wide / (2 - wide**-2) ** 0.5) ** size - 1))
    left.axhline(0.0, color="black", linewidth=1.0, label="log p(x), exact")
    for (name, color), label in zip(
        {"prior": VERMILION, "wide posterior": BLUE}.items(),
        ("naive Monte Carlo", "importance sampling"),
        strict=True,
    ):
        curve(left, dimensions, points[name], color, label)
        right.plot(dimensions, needed[name], color=color, marker=".")
        print(f"  K for 10%, {name}:", [f"{value:.3g}" for value in needed[name]])
    left.set(xscale="log", xlabel="dimension of z", ylabel="estimate − log p(x)  [nats]")
    left.set_title(f"K = {particles}, mean of {replicates} runs", loc="left", fontsize=9)
    right.set(xscale="log", yscale="log", xlabel="dimension of z", ylabel="particles K")
    right.set_title("K for p(x) within 10% (exact)", loc="left", fontsize=9)
    right.set_ylim(10, None)
    for ax in (left, right):
        ax.set_xticks(dimensions, dimensions)
        ax.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def gradient(
    loss: Any, model: Any, loc: Tensor, log_scale: Tensor, x: Tensor, kind: Any = dist.Normal
) -> Tensor:
    """The gradient of the objective by loc and log scale, for each row, [N, 2 L]."""
    loc, log_scale = loc.clone().requires_grad_(), log_scale.clone().requires_grad_()
    loss(model, normal_guide(loc, log_scale.exp(), kind))(x).backward()
    return -torch.cat([loc.grad, log_scale.grad], -1)


def gradients(scale: float) -> Figure:
    """Variance of gradient estimators, from the prior to the exact posterior as guide."""
    size, replicates, blocks = 10, max(200, int(20000 * scale)), 10
    model = LinearGaussian(torch.eye(size), 0.5)
    x = torch.full((replicates, size), 1.25**0.5)
    mean, log_std = model.posterior_mean(x), 0.5 * float(model.covariance[0, 0].log())
    estimators = {
        "score function": (lambda: pv.ELBO(1, "sample", "score"), VERMILION),
        "score function, baseline": (lambda: pv.ELBO(1, "sample", "score"), ORANGE),
        "pathwise, KL sampled": (lambda: pv.ELBO(1, "sample"), GREEN),
        "pathwise, KL analytic": (lambda: pv.ELBO(1), BLUE),
        "sticking the landing": (lambda: pv.ELBO(1, estimator="stl"), PURPLE),
    }
    path = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0])
    kls, found = [], {name: [] for name in estimators}
    for t in path:
        loc, log_scale = t * mean, (t * log_std).expand_as(mean)
        ratio = ((log_scale - log_std)[0] * 2).exp()
        offset = ((loc - mean)[0] / math.exp(log_std)).square()
        kls.append(float(0.5 * (ratio + offset - 1 - ratio.log()).sum()))
        for name, (make, _) in estimators.items():
            kind = NonreparameterizedNormal if name.startswith("score") else dist.Normal
            loss = make()
            if name.endswith("baseline"):  # a running mean: have it settle
                for _ in range(10):
                    gradient(loss, model, loc, log_scale, x, kind)
            g = gradient(loss, model, loc, log_scale, x, kind)[:, :size]
            found[name].append(
                mean_and_error(torch.stack([b.var(0).mean() for b in g.chunk(blocks)]))
            )
    figure, ax = plt.subplots(figsize=(5.6, 3.6))
    for name, (_, color) in estimators.items():
        print(
            f"  {name}, at the exact posterior: {found[name][-1][0]:.3g} ± {found[name][-1][1]:.2g}"
        )
        curve(ax, kls[:-1], found[name][:-1], color, name)  # 0 has no place on this axis
    ax.set(xscale="log", yscale="log", xlabel="KL(q, posterior)  [nats]")
    ax.set_ylabel("variance of ∂ELBO/∂loc  [nats²]")
    ax.invert_xaxis()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def correlated() -> tuple[LinearGaussian, Tensor]:
    """A model of 5 latents and 8 observables, and one datum."""
    generator = torch.Generator().manual_seed(1)
    model = LinearGaussian(torch.randn(8, 5, generator=generator), 1.0)
    z, noise = torch.randn(5, generator=generator), torch.randn(8, generator=generator)
    return model, (model.loadings @ z + noise).unsqueeze(0)


def iwae(scale: float) -> Figure:
    """The importance-weighted bound, rising with K to log p(x)."""
    model, datum = correlated()
    replicates = max(50, int(6000 * scale))
    x, exact = datum.expand(replicates, -1), float(model.log_evidence(datum))
    mean = model.posterior_mean(datum)[0]
    guides = {
        "prior": (normal_guide(torch.zeros(5), torch.ones(5)), VERMILION),
        "mean field, 1 / diag(precision)": (
            normal_guide(mean, model.precision.diagonal() ** -0.5),
            BLUE,
        ),
        "mean field, diag(covariance)": (
            normal_guide(mean, model.covariance.diagonal() ** 0.5),
            GREEN,
        ),
    }
    counts = [4**i for i in range(5)]
    for name, variances in (
        ("1 / diag(precision)", 1 / model.precision.diagonal()),
        ("diag(covariance)", model.covariance.diagonal()),
    ):
        # They have a moment of order a where a * precision - (a - 1) / variances > 0.
        tail = 1 - float(torch.linalg.eigvals(variances.diag() @ model.precision).real.min())
        print(f"  {name}: tail of the weights by algebra, k = {tail:.3f}")
    figure, ax = plt.subplots(figsize=(5.2, 3.4))
    for name, (guide, color) in guides.items():
        bounds = [pv.iwae_bound(model, guide, x, num_particles=k, seed=k).value for k in counts]
        curve(ax, counts, [mean_and_error(exact - b) for b in bounds], color, f"q = {name}")
        weights = pv.log_weights(model, guide, x[:50], num_particles=5000, seed=0)
        found = mean_and_error(pv.pareto_k(weights))
        print(f"  {name}: k-hat of 5000 draws {found[0]:.3f} ± {found[1]:.2g}")
    ax.set(xscale="log", yscale="log", xlabel="particles K")
    ax.set_ylabel("log p(x) − IWAE-K  [nats]")
    ax.set_xticks(counts, counts)
    ax.minorticks_off()
    ax.legend()
    return figure


def signal_to_noise(scale: float) -> Figure:
    """|mean| / standard deviation of the gradients of IWAE-K."""
    size, counts, replicates = 5, [4**i for i in range(5)], max(100, int(16_000 * scale))
    model = LinearGaussian(torch.eye(size), 0.5)
    datum = torch.full((1, size), 1.25**0.5)
    # A little wide, and a little off: tails heavy enough to cover the posterior.
    std = float(model.covariance[0, 0]) ** 0.5
    loc, log_scale = (
        model.posterior_mean(datum)[0] + 0.5 * std,
        torch.full((size,), 1.3 * std).log(),
    )
    estimators = {"dreg": ("doubly reparameterized", BLUE), "pathwise": ("pathwise", VERMILION)}
    figure, ax = plt.subplots(figsize=(5.2, 3.4))
    for name, (label, color) in estimators.items():
        found = []
        for count in counts:
            rows = min(replicates, 100_000 // count)
            x, locs = datum.expand(rows, -1), loc.expand(rows, -1)
            scales = log_scale.expand(rows, -1)
            runs = range(math.ceil(replicates / rows))
            g = torch.cat([gradient(pv.IWAE(count, name), model, locs, scales, x) for _ in runs])
            # All dimensions are alike: their gradients are draws from one distribution.
            blocks = g[:, :size].chunk(20)
            found.append(mean_and_error(torch.stack([-b.mean() / b.std() for b in blocks])))
        curve(ax, counts, found, color, label)
        power = 0.5 if name == "dreg" else -0.5
        line = [found[2][0] * (count / counts[2]) ** power for count in counts]
        ax.plot(counts, line, color=GREY, linestyle="--" if name == "dreg" else ":", zorder=1)
    ax.set(xscale="log", yscale="log", xlabel="particles K")
    ax.set_ylabel("signal-to-noise ratio of ∂IWAE-K/∂loc")
    ax.set_xticks(counts, counts)
    ax.minorticks_off()
    handles, labels = ax.get_legend_handles_labels()
    for style, label in (("--", "∝ √K"), (":", "∝ 1/√K")):
        handles.append(plt.Line2D([], [], color=GREY, linestyle=style))
        labels.append(label)
    ax.legend(handles, labels)
    return figure


def folded(x: Tensor) -> None:
    """The sign of z cannot be told from x: two modes."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 2.0).to_event(1))
        pyro.sample("x", dist.Normal(z.square().squeeze(-1), 1.0), obs=x)


def fitted(model: Any, loss: Any, x: Tensor, size: int, steps: int) -> tuple[Tensor, Tensor]:
    """The location and the scale of a Normal guide trained from Normal(0.5, 1.6)."""
    loc = torch.full((1, size), 0.5, requires_grad=True)
    log_scale = torch.full((1, size), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([loc, log_scale], lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / steps))

    def guide(x: Tensor) -> None:
        normal_guide(loc, log_scale.exp())(x)

    for _ in range(steps):
        optimizer.zero_grad()
        loss.loss_and_grads(model, guide, x)
        optimizer.step()
        schedule.step()
    return loc.detach()[0], log_scale.detach().exp()[0]


def divergences(scale: float) -> Figure:
    """Reverse KL takes a mode or is too narrow; forward KL covers."""
    steps = max(100, int(1000 * scale))
    losses = {
        "reverse KL: pv.ELBO": (pv.ELBO(20), BLUE, "-"),
        "forward KL: pv.WakeSleep": (pv.WakeSleep(2000), VERMILION, "--"),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.0, 3.0))
    x = torch.tensor([4.0])
    z = torch.linspace(-5, 5, 2001)
    log_joint = dist.Normal(0.0, 2.0).log_prob(z) + dist.Normal(z.square(), 1.0).log_prob(x)
    exact = (log_joint - torch.logsumexp(log_joint, 0)).exp() / (z[1] - z[0])
    left.fill_between(z, exact, color=GREY, alpha=0.5, linewidth=0, label="posterior, exact")
    print("  posterior std:", float((exact * z.square()).sum() * (z[1] - z[0])) ** 0.5)
    gaussian = LinearGaussian(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), 0.5)
    datum = torch.zeros(1, 2)
    ellipse(right, gaussian.covariance, facecolor=GREY, alpha=0.5)
    print("  1 / diag(precision):", (1 / gaussian.precision.diagonal()).tolist())
    print("  diag(covariance):", gaussian.covariance.diagonal().tolist())
    for name, (loss, color, style) in losses.items():
        loc, std = fitted(folded, loss, x, 1, steps)
        print(f"  {name}: mean {loc.tolist()}, standard deviation {std.tolist()}")
        left.plot(
            z, dist.Normal(loc, std).log_prob(z).exp(), color=color, linestyle=style, label=name
        )
        _, std = fitted(gaussian, loss, datum, 2, steps)
        print(f"  {name}: variances {std.square().tolist()}")
        line = {"facecolor": "none", "edgecolor": color, "linestyle": style, "linewidth": 1.6}
        ellipse(right, std.square().diag(), **line)
    left.set(xlabel="z", ylabel="density", ylim=(0, None))
    right.set(xlabel="z₁", ylabel="z₂", xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def ellipse(ax: Axes, covariance: Tensor, **kwargs: Any) -> None:
    """Draw the contour of a Gaussian at two standard deviations."""
    values, vectors = torch.linalg.eigh(covariance)
    angle = math.degrees(math.atan2(float(vectors[1, 1]), float(vectors[0, 1])))
    width, height = 4 * float(values[1]) ** 0.5, 4 * float(values[0]) ** 0.5
    ax.add_patch(Ellipse((0, 0), width, height, angle=angle, **kwargs))


FIGURES = {
    "evidence": evidence,
    "gradients": gradients,
    "iwae": iwae,
    "signal_to_noise": signal_to_noise,
    "divergences": divergences,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--quick", action="store_true", help="few draws: noisy figures, fast")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    torch.set_default_dtype(torch.float64)
    with mpl.rc_context(STYLE):
        for name, draw in FIGURES.items():
            begin = time.perf_counter()
            pyro.set_rng_seed(0)
            print(name)
            figure = draw(0.02 if arguments.quick else 1.0)
            path = arguments.output / f"theory_{name}.png"
            figure.savefig(path, dpi=110)
            plt.close(figure)
            print(f"  {path}, {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
