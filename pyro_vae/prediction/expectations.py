"""Expected values of a model's sites given what was drawn before: means, class probabilities."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_vae.particles.run import Run
from pyro_vae.programs.nodes import is_circular, plain_distribution
from pyro_vae.programs.types import Distribution, Node

_FAR = 8.0  # standard errors by which draws may be from the mean that their distribution says


@dataclass(frozen=True, slots=True)
class Expected:
    """What a site is expected to be, given its parents, by particle: ``[K, *plates, *event]``.

    Attributes:
        mean: of categories their probabilities, in a dimension at the end.
        variance: about it; None where it is not known, or of no use.
    """

    mean: Tensor
    variance: Tensor | None


def is_categorical(fn: Distribution) -> bool:
    """Return whether values of a distribution are the numbers of classes, which have no mean."""
    return isinstance(plain_distribution(fn), torch.distributions.Categorical)


def one_hot(value: Tensor, fn: Distribution) -> Tensor:
    """Return the classes of a categorical distribution as vectors of 0 and 1."""
    classes = plain_distribution(fn).probs.shape[-1]
    return torch.nn.functional.one_hot(value.long(), classes)


def error_of_shares(share: np.ndarray, error: np.ndarray, count: int) -> np.ndarray:
    """Return the standard errors of shares of drawn classes, none of them 0.

    Where all draws agree there is no spread among them, and yet a rare class may be missed: the
    error is then that of the share with half a draw more of either kind (Jeffreys' prior).

    Args:
        share: of each class.
        error: its standard error from the spread of the draws.
        count: how many draws there are.
    """
    smooth = (share * count + 0.5) / (count + 1)
    return np.where(error == 0, np.sqrt(smooth * (1 - smooth) / (count + 1)), error)


def expected_of(run: Run, name: str) -> Expected | None:
    """Return what a site of a run is expected to be; None where its distribution does not say.

    Also where draws of the run are far from what it says: a subclass may have draws of its own.
    """
    nodes, events = run.nodes(name), run.shapes[name].event_ndim

    def unfolded(parts: list[Tensor], extra: int = 0) -> Tensor:
        value = run.mode.unfold(parts, events + extra, run.num_particles)
        return value.expand(run.num_particles, *value.shape[1:])

    if is_categorical(nodes[0]["fn"]):
        return Expected(unfolded([_probabilities(node) for node in nodes], 1), None)
    moments = [_moments(node) for node in nodes]
    means = [mean for mean, _ in moments if mean is not None]
    if len(means) < len(nodes):
        return None
    variances = [variance for _, variance in moments if variance is not None]
    mean = unfolded(means)
    variance = unfolded(variances) if len(variances) == len(nodes) else None
    drawn = unfolded([node["value"] for node in nodes])
    return (
        None if variance is not None and _far(drawn, mean, variance) else Expected(mean, variance)
    )


def _probabilities(node: Node) -> Tensor:
    probs: Tensor = plain_distribution(node["fn"]).probs
    return probs.expand(*node["value"].shape, probs.shape[-1])


def _moments(node: Node) -> tuple[Tensor | None, Tensor | None]:
    """Return the mean and the variance of a site, of its value's shape."""
    fn, shape = node["fn"], node["value"].shape
    found: list[Tensor | None] = []
    for name in ("mean", "variance"):
        moment: Tensor | None = None
        # On a circle the mean is a direction, and no average.
        with contextlib.suppress(NotImplementedError, AttributeError):
            moment = None if is_circular(fn) else getattr(fn, name)
        usable = isinstance(moment, Tensor) and len(moment.shape) <= len(shape)
        found.append(moment.expand(shape) if usable and moment is not None else None)
    mean, variance = found
    return mean, variance


def _far(drawn: Tensor, mean: Tensor, variance: Tensor) -> bool:
    """Return whether the average of draws is not what their distribution says it is."""
    gap = (drawn.double() - mean).mean(0)
    error = (variance.double().mean(0) / len(drawn)).sqrt()
    return bool((gap.abs() > _FAR * error + 1e-5 * mean.abs().amax(0)).any())
