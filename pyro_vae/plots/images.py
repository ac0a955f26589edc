"""Figures of images, in rows on one grey scale: reconstructions, and what was imputed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.plots.results import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
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
) -> Figure:
    """Draw data, their reconstructions below them, and samples of the prior, on one grey scale.

    Args:
        data: [n, H * W].
        reconstructions: [n, H * W], of the same data in the same order, in the same unit.
        prior_samples: [m, H * W] in the same unit, or None.
        shape: (H, W).
        num_columns: how many of each to draw, from the first.
        unit: what the grey scale measures.

    Returns:
        The figure, with one panel for each row of images.

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
    figure, panels, picture = _draw_rows(shown, shape, float(every.min()), float(every.max()))
    figure.colorbar(picture, ax=list(panels.values()), label=unit, aspect=30)
    figure.suptitle(", ".join(shown).capitalize())
    return figure


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
    figure, panels, picture = _draw_rows(rows, shape, low, high)
    from matplotlib.colors import ListedColormap  # after pyplot has been asked for

    strip = _strip(np.where(seen, np.nan, 0.0), shape, len(seen))
    panels["seen"].imshow(strip, cmap=ListedColormap([_MISSING]))
    figure.colorbar(picture, ax=list(panels.values()), label=unit, aspect=30, extend=cut)
    figure.suptitle("Missing pixels (blue), imputed from those that are seen")
    return figure


def _draw_rows(
    rows: Mapping[str, np.ndarray], shape: tuple[int, int], low: float, high: float
) -> tuple[Figure, dict[str, Axes], AxesImage]:
    """Draw a strip of images [n, H * W] for each row; return the figure, its panels and a picture.

    The panels are by name; the picture is any, for the grey scale.
    """
    num_columns, size = max(map(len, rows.values())), 0.75
    figsize = (1.6 + size * num_columns, 0.6 + size * shape[0] / shape[1] * len(rows))
    look: dict[str, Any] = {"figsize": figsize, "layout": "constrained", "squeeze": False}
    figure, panels = pyplot().subplots(len(rows), 1, **look)
    by_name = dict(zip(rows, panels[:, 0], strict=True))
    for name, ax in by_name.items():
        strip = _strip(rows[name], shape, num_columns)
        picture = ax.imshow(strip, cmap="gray", vmin=low, vmax=high)
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, by_name, picture


def _strip(images: np.ndarray, shape: tuple[int, int], num_columns: int) -> np.ndarray:
    """Lay images [n, H * W] side by side, with gaps of nan, which are drawn blank."""
    height, width = shape
    gap = max(1, width // 12)
    strip = np.full((height, num_columns * (width + gap) - gap), np.nan)
    for i, image in enumerate(images):
        left = i * (width + gap)
        strip[:, left : left + width] = image.reshape(height, width)
    return strip
