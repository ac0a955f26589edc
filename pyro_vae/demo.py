"""The main job end to end: train a VAE on images, say how wrong its posterior is, and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_vae import plots
from pyro_vae.datasets import images as datasets
from pyro_vae.diagnostics.pareto_k import PARETO_K_THRESHOLD
from pyro_vae.evaluation.compare import compare
from pyro_vae.evaluation.comparison import Comparison, format_table
from pyro_vae.export.arviz import to_arviz
from pyro_vae.export.arviz_versions import write
from pyro_vae.families.gaussian import Normal
from pyro_vae.guides.amortized import AmortizedGuide
from pyro_vae.nets import MLP
from pyro_vae.training.fit import fit
from pyro_vae.training.result import FitResult
from pyro_vae.zoo.images import VAE

__all__ = ["Settings", "run"]

# Images with at most this many grey levels are counts (Binomial); finer ones are
# binarized at random (Bernoulli), as is the custom for MNIST.
_LARGEST_COUNT = 16
_VALIDATION_FRACTION = 0.1
_IMAGES_SHOWN = 12
# Pixels drawn for posterior.nc, of the posterior predictive and of the prior's each.
_PIXELS_DRAWN = 20_000_000


@dataclass(frozen=True)
class Settings:
    """How long a demo takes.

    Attributes:
        num_latents: latents of the VAE.
        hidden: widths of the two hidden layers of encoder and decoder.
        epochs: at most.
        max_steps: of training at most, so that a large data set takes no longer.
        patience: epochs without a better validation ELBO.
        num_data: images of each part that get guides of their own.
        refine_steps: steps of a datum's own guide at most.
        num_particles: K of the bounds.
        num_draws: posterior draws written for ArviZ; fewer for large images.
    """

    num_latents: int = 10
    hidden: tuple[int, int] = (200, 200)
    epochs: int = 300
    max_steps: int = 8000
    patience: int = 20
    num_data: int = 256
    refine_steps: int = 4000
    num_particles: int = 5000
    num_draws: int = 500

    @classmethod
    def quick(cls) -> Settings:
        """Return settings of a run of seconds."""
        return cls(
            hidden=(64, 64),
            epochs=15,
            patience=5,
            num_data=32,
            refine_steps=1000,
            num_particles=500,
            num_draws=100,
        )


@dataclass(frozen=True)
class _Data:
    """Images made ready: floats as the likelihood wants them, [N, D] each."""

    train: Any  # a tensor, or StochasticBinarization
    validation: Tensor
    parts: dict[str, Tensor]  # "train" and "test": the images to look at closely
    labels: Tensor | None  # of the test part
    num_trials: int
    shape: tuple[int, int]
    name: str


def run(
    settings: Settings,
    *,
    data: Path | None = None,
    output: Path,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Comparison]:
    """Run the demo: print the gap table, write posterior.nc, gaps.csv and figures.

    Args:
        settings: how long it takes.
        data: a file of images (see :func:`pyro_vae.datasets.load`); the 8x8 digits by
            default.
        output: the folder to write to; made where it does not exist.
        seed: of everything.
        device: where to compute.
        progress: whether to show a bar.

    Returns:
        "train" and "test" to their Comparison.

    Raises:
        FileNotFoundError, ValueError: for missing or malformed data.
    """
    output.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    images = datasets.digits() if data is None else datasets.load(data)
    ready = _prepare(images, settings, seed, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the networks' first weights
        model, guide = _make(ready, settings, device)
    print(
        f"{ready.name}: {len(ready.train)} images to train on, {len(ready.validation)} to "
        f"validate; {'Bernoulli' if ready.num_trials == 1 else f'Binomial({ready.num_trials})'} "
        f"likelihood, {settings.num_latents} latents"
    )
    with clock("train"):
        result = fit(
            model,
            guide,
            ready.train,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            validation_data=ready.validation,
            patience=settings.patience,
            seed=seed,
            device=device,
            progress=progress,
        )
    print(
        f"stopped by {result.stopped_by} after {len(result.history['epoch'])} epochs; kept epoch "
        f"{result.best_epoch} (validation ELBO {max(result.history['validation_elbo']):.2f})"
    )
    comparisons = {}
    for part, x in ready.parts.items():
        with clock(f"compare on {part}"):
            comparisons[part] = compare(
                model,
                {"amortized": guide, "mean-field": Normal()},
                x,
                num_particles=settings.num_particles,
                max_steps=settings.refine_steps,
                seed=seed,
            )
    with clock("write"):
        _write(model, guide, ready, result, comparisons, settings, seed, output)
    print()
    print(format_table(comparisons))
    print()
    print(_meaning(comparisons))
    print()
    print(f"wrote {output}/: {', '.join(sorted(path.name for path in output.iterdir()))}")
    print(clock)
    return comparisons


def _prepare(images: datasets.ImageData, settings: Settings, seed: int, device: str) -> _Data:
    held_out = max(1, int(len(images.train) * _VALIDATION_FRACTION))
    raw = {
        "train": images.train[:-held_out],
        "validation": images.train[-held_out:],
        "test": images.test,
    }
    counts = images.max_value <= _LARGEST_COUNT
    fixed = {
        part: x.float()
        if counts
        else datasets.StochasticBinarization(x, images.max_value).fixed(seed + i)
        for i, (part, x) in enumerate(raw.items())
    }
    fixed = {part: x.to(device) for part, x in fixed.items()}
    labels = images.test_labels
    return _Data(
        train=fixed["train"]
        if counts
        else datasets.StochasticBinarization(raw["train"], images.max_value),
        validation=fixed["validation"],
        parts={part: fixed[part][: settings.num_data] for part in ("train", "test")},
        labels=None if labels is None else labels[: settings.num_data],
        num_trials=images.max_value if counts else 1,
        shape=images.shape,
        name=images.name,
    )


def _make(data: _Data, settings: Settings, device: str) -> tuple[VAE, AmortizedGuide]:
    num_features = data.validation.shape[1]
    model = VAE(
        num_features,
        settings.num_latents,
        hidden=settings.hidden[::-1],
        num_trials=data.num_trials,
    ).to(device)
    encoder = MLP(
        [num_features, *settings.hidden], activate_last=True, input_scale=data.num_trials
    ).to(device)
    return model, AmortizedGuide(model, encoder, example=data.validation)


def _write(
    model: VAE,
    guide: AmortizedGuide,
    data: _Data,
    result: FitResult,
    comparisons: dict[str, Comparison],
    settings: Settings,
    seed: int,
    output: Path,
) -> None:
    tree = to_arviz(
        model,
        guide,
        data.parts["test"],
        num_draws=max(1, min(settings.num_draws, _PIXELS_DRAWN // data.parts["test"].numel())),
        dims={"z": ["latent"], "x": ["pixel"]},
        seed=seed,
    )
    write(tree, output / "posterior.nc")
    gaps = pd.concat(
        {part: found.dataset.to_dataframe() for part, found in comparisons.items()},
        names=["part"],
    )
    gaps.to_csv(output / "gaps.csv")
    for name, draw in _figures(model, guide, data, result, comparisons, tree).items():
        _save(draw, output / f"{name}.png")


def _figures(
    model: VAE,
    guide: AmortizedGuide,
    data: _Data,
    result: FitResult,
    comparisons: dict[str, Comparison],
    tree: Any,
) -> dict[str, Callable[[], Any]]:
    found = {part: comparison.dataset for part, comparison in comparisons.items()}
    x = data.parts["test"]
    means = tree["posterior"]["z"].mean(("chain", "draw")).values
    with torch.no_grad():
        location = guide.family_params(x[:_IMAGES_SHOWN])[..., 0]
        reconstructions = _expected(model, location)
    prior = tree["prior_predictive"]["x"].values[0, :_IMAGES_SHOWN, 0]
    return {
        "training": lambda: plots.plot_history(result),
        "gaps": lambda: plots.plot_gaps(found),
        "gap_distribution": lambda: plots.plot_gap_distribution(found),
        "pareto_k": lambda: plots.plot_pareto_k(found),
        "reconstructions": lambda: plots.plot_reconstructions(
            x[:_IMAGES_SHOWN].cpu().numpy(), reconstructions, prior, data.shape
        ),
        "latents": lambda: plots.plot_latents(
            means, None if data.labels is None else data.labels.numpy()
        ),
    }


def _expected(model: VAE, z: Tensor) -> np.ndarray:
    return model.likelihood(z).mean.cpu().numpy()


def _save(draw: Callable[[], Any], path: Path) -> None:
    from matplotlib import pyplot

    drawn = draw()
    figure = getattr(drawn, "figure", drawn)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _meaning(comparisons: dict[str, Comparison]) -> str:
    """Say in two sentences what the numbers mean for this posterior."""
    tables = {part: found.summary() for part, found in comparisons.items()}
    test, train = tables["test"].loc["amortized"], tables["train"].loc["amortized"]
    family, encoder = test["approximation_gap"], test["amortization_gap"]
    seen = train["amortization_gap"]
    if encoder < family:
        remedy = "a richer family than the mean field would help most"
    elif encoder > 2 * seen:
        remedy = "the encoder does not generalize, and more training images would help most"
    else:
        remedy = "a larger encoder, or one trained for longer, would help most"
    bad = {name: 100 * tables["test"].loc[name, "pareto_k_bad"] for name in tables["test"].index}
    return (
        f"On held-out images the amortized posterior falls {family + encoder:.2f} nats short of "
        f"log p(x), {family:.2f} of them because of the mean-field family and {encoder:.2f} "
        f"because of the encoder, which loses {seen:.2f} on the images it was trained on: "
        f"{remedy}. "
        f"Importance weights through it are not to be trusted (k-hat > {PARETO_K_THRESHOLD}) for "
        f"{bad['amortized']:.0f}% of the held-out images, nor for {bad['mean-field']:.0f}% of them "
        "through the mean field fitted to each image alone."
    )


class _Clock:
    """Wall time of the parts of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - begin

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {parts}"
