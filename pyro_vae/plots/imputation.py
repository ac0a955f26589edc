"""A figure of imputed images: what is seen, the mean imputation, draws, the truth."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["plot_imputation"]

_MISSING = "#56B4E9"  # no grey, so that a missing pixel is not taken for a black or a white one


def plot_imputation(
    mean: np.ndarray,
    draws: np.ndarray,
    observed: np.ndarray,
    shape: tuple[int, int],
    *,
    truth: np.ndarray | None = None,
    num_columns: int = 10,
    unit: str = "intensity",
) -> Figure:
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

    Returns:
        The figure, with one panel for each row of images.

    Raises:
        ValueError: if an array has another shape.
    """
    height, width = shape
    num_images, num_pixels = len(mean), height * width
    given = [("mean", mean), ("observed", observed), *(("draws", draw) for draw in draws)]
    given += [("truth", truth)] if truth is not None else []
    for name, images in given:
        if images.shape != (num_images, num_pixels):
            raise ValueError(
                f"{name}: wanted shape [{num_images}, {num_pixels}] for {num_images} images of "
                f"{height} x {width}, found {list(images.shape)}"
            )
    rows = {"seen": mean, "mean": mean}
    rows |= {f"draw {number}": draw for number, draw in enumerate(draws, start=1)}
    if truth is not None:
        rows["truth"] = truth
    rows = {name: images[:num_columns] for name, images in rows.items()}
    # The scale of the data: that of the draws, which have noise, would flatten all the rest.
    known = [mean[:num_columns][observed[:num_columns]]]
    known += [rows["truth"].ravel()] if truth is not None else []
    scale = np.concatenate(known) if any(part.size for part in known) else rows["mean"]
    low, high = float(scale.min()), float(scale.max())
    cut = _cut(np.stack(list(rows.values())), low, high)

    pyplot = _pyplot()
    size = 0.75
    figure, panels = pyplot.subplots(
        len(rows),
        1,
        figsize=(1.6 + size * len(rows["mean"]), 0.6 + size * height / width * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for ax, (name, images) in zip(panels[:, 0], rows.items(), strict=True):
        picture = ax.imshow(_strip(images, shape), cmap="gray", vmin=low, vmax=high)
        if name == "seen":
            ax.imshow(_strip(np.where(observed[:num_columns], np.nan, 0.0), shape), cmap=_missing())
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    figure.colorbar(picture, ax=panels[:, 0], label=unit, aspect=30, extend=cut)
    figure.suptitle("Missing pixels (blue), imputed from those that are seen")
    return figure


def _cut(values: np.ndarray, low: float, high: float) -> str:
    """Say on which sides values exceed a scale, in Matplotlib's words."""
    below, above = bool((values < low).any()), bool((values > high).any())
    return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]


def _strip(images: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Lay images [n, H * W] side by side, with gaps of nan, which are drawn blank."""
    height, width = shape
    gap = np.full((len(images), height, max(1, width // 12)), np.nan)
    return (
        np.concatenate([images.reshape(-1, height, width), gap], 2)
        .swapaxes(0, 1)
        .reshape(height, -1)[:, : -gap.shape[2]]
    )


def _missing() -> Colormap:
    from matplotlib.colors import ListedColormap

    return ListedColormap([_MISSING])


def _pyplot() -> ModuleType:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "pyro-vae[plots]"') from error
    return pyplot
