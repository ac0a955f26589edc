"""The main job end to end: train a VAE on images, say how wrong its posterior is, and mend it."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_vae import plots
from pyro_vae.arviz_versions import Container, write
from pyro_vae.datasets import images as datasets
from pyro_vae.evaluation.bdmc import Sandwich, bdmc
from pyro_vae.evaluation.compare import compare
from pyro_vae.evaluation.comparison import Comparison, format_table
from pyro_vae.evaluation.repair import FEWEST_PARTICLES, Repair, repair
from pyro_vae.evaluation.rungs import Rung
from pyro_vae.evaluation.saved import report
from pyro_vae.export.arviz import to_arviz
from pyro_vae.families.gaussian import Normal
from pyro_vae.guides.amortized import AmortizedGuide
from pyro_vae.nets import MLP
from pyro_vae.report import findings
from pyro_vae.sampling.chains import sample_posterior
from pyro_vae.sampling.samples import PosteriorSamples
from pyro_vae.training.fit import fit
from pyro_vae.training.fit_result import FitResult
from pyro_vae.zoo.images import VAE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        num_repaired: held-out images whose posterior is mended.
        rungs: of the ladder that they climb; the last rungs of :func:`pyro_vae.repair` take a
            minute for what is left.
        num_sandwiched: those of them whose exact posterior is drawn from by chains, and whose
            log p(x) is bounded from both sides: first those that the ladder leaves.
        num_annealed: steps of the chains that bound it.
        num_transitions: of the chains that draw, after a warm-up of half as many.
    """

    num_latents: int = 10
    hidden: tuple[int, int] = (200, 200)
    epochs: int = 300
    max_steps: int = 8000
    patience: int = 20
    num_data: int = 160
    refine_steps: int = 4000
    num_particles: int = 5000
    num_draws: int = 500
    num_repaired: int = 32
    rungs: tuple[Rung, ...] = ("importance", "refined", "full rank")
    num_sandwiched: int = 8
    num_annealed: int = 200
    num_transitions: int = 700

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
            num_repaired=8,
            num_sandwiched=4,
            num_annealed=50,
            num_transitions=50,
        )


def run(
    settings: Settings,
    *,
    data: Path | None = None,
    output: Path,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Comparison]:
    """Run the demo: print the gap table, mend posteriors, write posterior.nc and a report.

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
    seconds: dict[str, float] = {}
    images = datasets.digits() if data is None else datasets.load(data)
    demo = _Demo(images, settings, seed, device)
    print(demo)
    with _timed("train", seconds):
        result = demo.train(progress)
    print(
        f"stopped by {result.stopped_by} after {len(result.history['epoch'])} epochs; kept epoch "
        f"{result.best_epoch} (validation ELBO {max(result.history['validation_elbo']):.2f})"
    )
    comparisons = {}
    for part in demo.parts:
        with _timed(f"compare on {part}", seconds):
            comparisons[part] = demo.compare(part)
    with _timed("repair", seconds):
        repaired = demo.repair(progress)
    with _timed("both sides of log p(x)", seconds):
        bad_first = np.argsort(repaired.good, kind="stable")[: settings.num_sandwiched]
        samples = demo.chains(bad_first, progress)
        sandwich = demo.sandwich(bad_first, samples, progress)
    with _timed("write", seconds):
        demo.write(output, result, comparisons, repaired)
        demo.write_chains(output, repaired, bad_first, samples, sandwich)
        page = _report(output, comparisons, repaired, sandwich, f"The demo on {images.name}")
    wrote = f"wrote {output}/: {', '.join(sorted(path.name for path in output.iterdir()))}"
    times = ", ".join(f"{part} {each:.1f} s" for part, each in seconds.items())
    clock = f"{sum(seconds.values()):.1f} s: {times}"
    told = [format_table(comparisons), repr(repaired), repr(sandwich)]
    told += [_findings(comparisons, repaired, sandwich), wrote]
    told.append(f"findings, tables and figures in one page: {page}")
    print("", "\n\n".join(told), clock, sep="\n")
    return comparisons


class _Demo:
    """Images as counts or binarized at random, [N, D], a VAE of them and its guide."""

    def __init__(
        self, images: datasets.ImageData, settings: Settings, seed: int, device: str
    ) -> None:
        self.images, self.settings, self.seed, self.device = images, settings, seed, device
        held_out = max(1, int(len(images.train) * _VALIDATION_FRACTION))
        raw = {"train": images.train[:-held_out], "validation": images.train[-held_out:]}
        raw["test"] = images.test
        self.data: Tensor | datasets.StochasticBinarization
        if images.max_value <= _LARGEST_COUNT:
            fixed = {part: x.float().to(device) for part, x in raw.items()}
            self.data, self.num_trials = fixed["train"], images.max_value
        else:
            grey = {n: datasets.StochasticBinarization(x, images.max_value) for n, x in raw.items()}
            fixed = {n: x.fixed(seed + i).to(device) for i, (n, x) in enumerate(grey.items())}
            self.data, self.num_trials = grey["train"], 1
        self.validation = fixed["validation"]
        # The images to look at closely.
        self.parts = {part: fixed[part][: settings.num_data] for part in ("train", "test")}
        num_features, trials = self.validation.shape[1], self.num_trials
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of the networks' first weights
            sizes, hidden = [num_features, *settings.hidden], settings.hidden[::-1]
            model = VAE(num_features, settings.num_latents, hidden=hidden, num_trials=trials)
            encoder = MLP(sizes, activate_last=True, input_scale=trials).to(device)
            self.model = model.to(device)
            self.guide = AmortizedGuide(self.model, encoder, example=self.validation)

    def __str__(self) -> str:
        likelihood = "Bernoulli" if self.num_trials == 1 else f"Binomial({self.num_trials})"
        return (
            f"{self.images.name}: {len(self.data)} images to train on, {len(self.validation)} to "
            f"validate; {likelihood} likelihood, {self.settings.num_latents} latents"
        )

    def train(self, progress: bool) -> FitResult:
        """Train model and guide, with a part of the images to stop by."""
        return fit(
            self.model,
            self.guide,
            self.data,
            epochs=self.settings.epochs,
            max_steps=self.settings.max_steps,
            validation_data=self.validation,
            patience=self.settings.patience,
            seed=self.seed,
            device=self.device,
            progress=progress,
        )

    def compare(self, part: str) -> Comparison:
        """Compare the guide with one fitted to each image of a part."""
        return compare(
            self.model,
            {"amortized": self.guide, "mean-field": Normal()},
            self.parts[part],
            num_particles=self.settings.num_particles,
            max_steps=self.settings.refine_steps,
            seed=self.seed,
        )

    def repair(self, progress: bool) -> Repair:
        """Mend the posteriors of the first test images."""
        return repair(
            self.model,
            self.guide,
            self.parts["test"][: self.settings.num_repaired],
            rungs=self.settings.rungs,
            num_particles=max(FEWEST_PARTICLES, self.settings.num_particles),
            max_steps=self.settings.refine_steps,
            seed=self.seed,
            progress=progress,
        )

    def chains(self, rows: np.ndarray, progress: bool) -> PosteriorSamples:
        """Draw from the exact posteriors of some of the test images."""
        return sample_posterior(
            self.model,
            self.guide,
            self.parts["test"][rows],
            num_draws=self.settings.num_transitions,
            num_warmup=max(20, self.settings.num_transitions // 2),
            seed=self.seed,
            progress=progress,
        )

    def sandwich(self, rows: np.ndarray, samples: PosteriorSamples, progress: bool) -> Sandwich:
        """Bound log p(x) of these from both sides."""
        return bdmc(
            self.model,
            self.guide,
            self.parts["test"][rows],
            num_steps=self.settings.num_annealed,
            posterior=samples,
            seed=self.seed,
            progress=progress,
        )

    def write(
        self,
        output: Path,
        result: FitResult,
        comparisons: Mapping[str, Comparison],
        repaired: Repair,
    ) -> None:
        """Write the posterior of the test part, tables of gaps and of repairs, and the figures."""
        x = self.parts["test"]
        num_draws = max(1, min(self.settings.num_draws, _PIXELS_DRAWN // x.numel()))
        dims = {"z": ["latent"], "x": ["pixel"]}
        pair = (self.model, self.guide)
        tree = to_arviz(*pair, x, num_draws=num_draws, dims=dims, seed=self.seed)
        write(tree, output / "posterior.nc")
        found = {part: comparison.dataset for part, comparison in comparisons.items()}
        gaps = pd.concat({n: gap.to_dataframe() for n, gap in found.items()}, names=["part"])
        gaps.to_csv(output / "gaps.csv")
        repaired.dataset.drop_dims("rung_name").to_dataframe().to_csv(output / "repair.csv")
        means = tree["posterior"]["z"].mean(("chain", "draw")).values
        labels = self.images.test_labels
        shown = None if labels is None else labels[: self.settings.num_data].numpy()
        figures: dict[str, Axes] = {
            "training": plots.plot_history(result),
            "gaps": plots.plot_gaps(
                found, summaries={n: c.summary() for n, c in comparisons.items()}
            ),
            "gap_distribution": plots.plot_gap_distribution(found),
            "pareto_k": plots.plot_pareto_k(found),
            "reconstructions": self._reconstructions(tree),
            "latents": plots.plot_latents(means, shown),
            "rungs": plots.plot_rungs(repaired.dataset),
        }
        _save(output, figures)

    def write_chains(
        self,
        output: Path,
        repaired: Repair,
        rows: np.ndarray,
        samples: PosteriorSamples,
        sandwich: Sandwich,
    ) -> None:
        """Write the figures of what chains drew for some of the test images."""
        _save(
            output,
            {
                "evidence": plots.plot_evidence(sandwich.dataset),
                "posterior": self._posterior(repaired, rows, samples),
            },
        )

    def _posterior(self, repaired: Repair, rows: np.ndarray, samples: PosteriorSamples) -> Axes:
        """Draw the posterior of an image: the encoder's, the repaired one, and chains.

        Of the images with a good verdict, that of whose log p(x) the encoder's weights missed most,
        in the two latents that the chains' draws correlate most.
        """
        good = repaired.good[rows]
        rung = repaired.dataset["log_evidence_of_rung"].values[0, rows]
        lost = repaired.dataset["log_evidence"].values[rows] - rung
        place = int(np.where(good | ~good.any(), lost, -np.inf).argmax())
        image = int(rows[place])
        z = samples.draws["z"].flatten(0, 1)[:, place].cpu().numpy()
        strength = np.abs(np.corrcoef(z.T)) - np.eye(z.shape[1])
        kept = sorted(map(int, np.unravel_index(strength.argmax(), strength.shape)))
        with torch.no_grad():
            location, log_scale = self.guide.family_params(self.parts["test"][[image]])[0].T.cpu()
        noise = torch.randn(len(z), z.shape[1], generator=torch.Generator().manual_seed(self.seed))
        guides = {
            "the encoder's": (location + log_scale.exp() * noise).numpy()[:, kept],
            f"repaired ({repaired.dataset['rung'].values[image]})": repaired.draws["z"]
            .cpu()
            .numpy()[:, image, kept],
        }
        names = f"latent {kept[0] + 1}", f"latent {kept[1] + 1}"
        return plots.plot_posterior_pair(z[:, kept], guides, names, f"Test image {image}")

    def _reconstructions(self, tree: Container) -> Axes:
        """Draw the first test images, what the decoder makes of their codes, and prior samples."""
        x = self.parts["test"][:_IMAGES_SHOWN]
        with torch.no_grad():
            location = self.guide.family_params(x)[..., 0]
            reconstructions = self.model.likelihood(location).mean.cpu().numpy()
        prior = tree["prior_predictive"]["x"].values[0, :_IMAGES_SHOWN, 0]
        data, shape = x.cpu().numpy(), self.images.shape
        return plots.plot_reconstructions(data, reconstructions, prior, shape)


def _findings(comparisons: Mapping[str, Comparison], repaired: Repair, sandwich: Sandwich) -> str:
    """Return what held-out images say of the posterior, but for what is fine."""
    train, test = (comparisons[part].summary() for part in ("train", "test"))
    found = [*findings.of_generalization(train, test), *comparisons["test"].findings()]
    found += [*repaired.findings(), *sandwich.findings()]
    return "\n".join(
        textwrap.fill(str(each), 100, initial_indent="- ", subsequent_indent="  ")
        for each in findings.by_severity(found)
        if each.severity != "good"
    )


def _report(
    output: Path,
    comparisons: Mapping[str, Comparison],
    repaired: Repair,
    sandwich: Sandwich,
    title: str,
) -> Path:
    """Write the datasets of results, which pyro-vae report reads, and the report of them."""
    found = {part: comparison.dataset for part, comparison in comparisons.items()}
    for part, dataset in found.items():
        dataset.to_netcdf(output / f"comparison-{part}.nc", engine="h5netcdf")
    more = {"repair": repaired.dataset, "bounds": sandwich.dataset}
    for name, dataset in more.items():
        dataset.to_netcdf(output / f"{name}.nc", engine="h5netcdf")
    path = output / "report.html"
    path.write_text(report({**found, **more}, title), encoding="utf-8")
    return path


def _save(output: Path, figures: Mapping[str, Axes]) -> None:
    """Write figures by name, and close them."""
    from matplotlib import pyplot

    for name, drawn in figures.items():
        figure = cast("Figure", drawn.figure)
        figure.savefig(output / f"{name}.png", dpi=150, bbox_inches="tight")
        pyplot.close(figure)


@contextmanager
def _timed(part: str, seconds: dict[str, float]) -> Iterator[None]:
    """Write down the wall time of a part of a run."""
    begin = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - begin
