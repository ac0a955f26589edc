"""Figures of images, in rows on one grey scale: reconstructions, imputations, traversals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_vae.plots.results import axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_MISSING = "#56B4E9"  # no grey, so that a missing pixel is not taken for a black or a white one


def plot_reconstructions(
    data: np.ndarray,
    reconstructions: np.ndarray,
    prior_samples: np.ndarray | None,
    shape: tuple[int, int],
    *,
    num_columns: int = 12,
    unit: str = "intensity",
    ax: Axes | None = None,
) -> Axes:
    """Draw data, their reconstructions below them, and samples of the prior, on one grey scale.

    Args:
        data: [n, H * W].
        reconstructions: [n, H * W], of the same data in the same order, in the same unit.
        prior_samples: [m, H * W] in the same unit, or None.
        shape: (H, W).
        num_columns: how many of each to draw, from the first.
        unit: what the grey scale measures.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: if an array has another shape, or there are not as many reconstructions as
            data.
    """
    named = {"data": data, "reconstructions": reconstructions, "prior samples": prior_samples}
    rows = {name: np.asarray(images) for name, images in named.items() if images is not None}
    height, width = shape
    for name, images in rows.items():
        if images.shape[1:] != (height * width,):
            wanted = f"[n, {height * width}] for images of {height} x {width}"
            raise ValueError(f"{name}: wanted shape {wanted}, found {list(images.shape)}")
    if len(data) != len(reconstructions):
        raise ValueError(f"{len(data)} data, but {len(reconstructions)} reconstructions")
    shown = {name: images[:num_columns] for name, images in rows.items()}
    every = np.concatenate(list(shown.values()))
    ax, picture = _draw_rows(shown, shape, float(every.min()), float(every.max()), ax)
    ax.figure.colorbar(picture, ax=ax, label=unit, aspect=30)
    ax.set_title(", ".join(shown).capitalize(), loc="left")
    return ax


def plot_imputation(
    mean: np.ndarray,
    draws: np.ndarray,
    observed: np.ndarray,
    shape: tuple[int, int],
    *,
    truth: np.ndarray | None = None,
    num_columns: int = 10,
    unit: str = "intensity",
    ax: Axes | None = None,
) -> Axes:
    """Draw images with missing pixels, and below each what was imputed, on one grey scale.

    The scale is that of the known pixels; where others exceed it, its ends are pointed.

    Args:
        mean: [N, H * W], means of the missing pixels, seen ones in place.
        draws: [S, N, H * W], likewise.
        observed: [N, H * W], whether a pixel was seen.
        shape: (H, W).
        truth: [N, H * W], the whole images, if they are known.
        num_columns: how many images to draw, from the first.
        unit: what the grey scale measures.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: if an array has another shape.
    """
    height, width = shape
    num_images, num_pixels = len(mean), height * width
    rows = {"seen": mean, "mean": mean}
    rows |= {f"draw {number}": draw for number, draw in enumerate(draws, start=1)}
    rows |= {} if truth is None else {"truth": truth}
    for name, images in {**rows, "observed": observed}.items():
        if images.shape != (num_images, num_pixels):
            wanted = f"[{num_images}, {num_pixels}] for {num_images} images of {height} x {width}"
            name = "mean" if name == "seen" else name
            raise ValueError(f"{name}: wanted shape {wanted}, found {list(images.shape)}")
    rows = {name: images[:num_columns] for name, images in rows.items()}
    seen = observed[:num_columns]
    # The scale of the data: that of the draws, which have noise, would flatten all the rest.
    known = np.concatenate([rows["mean"][seen], *(rows["truth"] if truth is not None else [])])
    scale = known if known.size else rows["mean"]
    low, high = float(scale.min()), float(scale.max())
    every = np.stack(list(rows.values()))
    below, above = bool((every < low).any()), bool((every > high).any())
    cut = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    ax, picture = _draw_rows(rows, shape, low, high, ax)
    from matplotlib.colors import ListedColormap  # after pyplot has been asked for

    nothing = np.full_like(mean[: len(seen)], np.nan)
    marked = dict.fromkeys(rows, nothing) | {"seen": np.where(seen, np.nan, 0.0)}
    ax.imshow(_stacked(marked, shape), cmap=ListedColormap([_MISSING]))
    ax.figure.colorbar(picture, ax=ax, label=unit, aspect=30, extend=cut)
    ax.set_title("Missing pixels (blue), imputed from those that are seen", loc="left")
    return ax


def plot_traversals(
    decode: Callable[[np.ndarray], np.ndarray],
    center: np.ndarray,
    shape: tuple[int, int],
    *,
    latents: Sequence[int] | None = None,
    values: Sequence[float] = tuple(np.linspace(-3.0, 3.0, 9)),
    unit: str = "intensity",
    ax: Axes | None = None,
) -> Axes:
    """Draw what a decoder makes of a latent that moves while the others stay; a row per latent.

    Args:
        decode: from latents [M, D] to images [M, H * W], NumPy arrays both, such as
            ``lambda z: vae.likelihood(torch.as_tensor(z).float()).mean.detach().numpy()``.
        center: [D], where the others stay: zeros, or the posterior mean of a datum.
        shape: (H, W).
        latents: which, counted from 0; all, or the first twelve, if None.
        values: that a latent takes in turn.
        unit: what the grey scale measures.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: for images of another shape, and a latent that is not there.
    """
    center = np.asarray(center, dtype=float)
    which = list(range(min(len(center), 12))) if latents is None else list(latents)
    if not which or not all(0 <= latent < len(center) for latent in which):
        raise ValueError(f"latents={latents!r}: numbers from 0 to {len(center) - 1} are needed")
    rows = {}
    for latent in which:
        z = np.tile(center, (len(values), 1))
        z[:, latent] = values
        rows[f"latent {latent + 1}"] = images = np.asarray(decode(z), dtype=float)
        wanted = (len(values), shape[0] * shape[1])
        if images.shape != wanted:
            raise ValueError(
                f"decode: wanted shape {list(wanted)} for {len(values)} images of {shape[0]} x "
                f"{shape[1]}, found {list(images.shape)}"
            )
    every = np.stack(list(rows.values()))
    ax, picture = _draw_rows(rows, shape, float(every.min()), float(every.max()), ax)
    step = shape[1] + _gap(shape[1])
    places = [(shape[1] - 1) / 2 + step * i for i in range(len(values))]
    ax.set_xticks(places, [f"{value:.3g}".replace("-", "−") for value in values])
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel("value of the latent, the others as they are")
    ax.figure.colorbar(picture, ax=ax, label=unit, aspect=30)
    ax.set_title("What each latent does", loc="left")
    return ax


def _draw_rows(
    rows: Mapping[str, np.ndarray], shape: tuple[int, int], low: float, high: float, ax: Axes | None
) -> tuple[Axes, AxesImage]:
    """Draw rows of images [n, H * W], by name; return the axes, and the picture of all of them."""
    num_columns, size = max(map(len, rows.values())), 0.75
    figsize = (1.6 + size * num_columns, 0.8 + size * shape[0] / shape[1] * len(rows))
    ax = axes(ax, figsize)
    picture = ax.imshow(_stacked(rows, shape), cmap="gray", vmin=low, vmax=high)
    step = shape[0] + _gap(shape[0])
    ax.set_yticks([(shape[0] - 1) / 2 + step * i for i in range(len(rows))], list(rows))
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)
    return ax, picture


def _stacked(rows: Mapping[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Lay rows of images below each other, with gaps of nan, which are drawn blank."""
    num_columns = max(map(len, rows.values()))
    strips = [_strip(images, shape, num_columns) for images in rows.values()]
    gap = np.full((_gap(shape[0]), strips[0].shape[1]), np.nan)
    return np.concatenate([part for strip in strips for part in (strip, gap)][:-1])


def _gap(length: int) -> int:
    """Return how many pixels lie between images of such a length."""
    return max(1, length // 12)


def _strip(images: np.ndarray, shape: tuple[int, int], num_columns: int) -> np.ndarray:
    """Lay images [n, H * W] side by side, with gaps of nan, which are drawn blank."""
    height, width = shape
    gap = _gap(width)
    strip = np.full((height, num_columns * (width + gap) - gap), np.nan)
    for i, image in enumerate(images):
        left = i * (width + gap)
        strip[:, left : left + width] = image.reshape(height, width)
    return strip
