"""Are the draws of a guide those of the posterior? Its means and widths beside those of chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.diagnostics.moments import Moments
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.types import DataPlate, Program
from pyro_vae.sampling.prepare import Ready, ready
from pyro_vae.sampling.samples import PosteriorSamples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DrawsCheck", "check_draws"]

SHIFT, WIDTH = 0.2, 0.1  # posterior standard deviations; a share of one
_LEVEL = 0.01  # of false alarms, for each datum
_NAMES = ("shift", "narrowest", "widest")


@dataclass(frozen=True)
class DrawsCheck:
    """The result of :func:`check_draws`.

    Attributes:
        dataset: dim datum. ``shift``, by how many posterior standard deviations the guide's mean is
            away from the posterior's, along the direction where it is furthest; ``narrowest`` and
            ``widest``, the guide's standard deviation in those of the posterior where it is
            smallest and largest; each with its standard error ``<name>_se``, and ``<name>_site``,
            the latent site that the direction is mostly of. ``good``, the verdict;
            ``converged``, that of the chains. Attributes ``shift`` and ``width`` are the limits.
    """

    dataset: xr.Dataset

    @property
    def good(self) -> np.ndarray:
        """For which data draws of the guide may stand for the posterior, [N]."""
        return self.dataset["good"].values

    def summary(self) -> pd.DataFrame:
        """Return a row per number: its median and its worst over the data, and where that is."""
        data, rows = self.dataset, []
        for name in _NAMES:
            values = data[name].values
            worst = int(values.argmin() if name == "narrowest" else values.argmax())
            at = data.isel(datum=worst)
            rows.append(
                {
                    "median": float(np.median(values)),
                    "worst": float(at[name]),
                    "se": float(at[f"{name}_se"]),
                    "datum": worst,
                    "site": str(at[f"{name}_site"].values),
                }
            )
        return pd.DataFrame(rows, index=pd.Index(_NAMES, name="guide beside chains"))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the narrowest and the widest directions by datum; needs the extra ``plots``."""
        from pyro_vae.plots.posteriors import plot_widths

        return plot_widths(self.dataset, ax)

    def __repr__(self) -> str:
        data = self.dataset
        if data.sizes["datum"] == 1:
            verdict = f"the guide's draws are {'good' if self.good[0] else 'bad'}"
        else:
            verdict = f"the guide's draws are good for {self.good.mean():.1%} of the data"
        doubt = int((~data["converged"]).sum())
        note = f"; chains of {doubt} data have not converged, and no verdict is good there"
        return (
            f"{self.summary().to_string(float_format='%.3f')}\n{verdict} (mean within "
            f"{data.attrs['shift']:g} posterior standard deviations, widths within "
            f"{data.attrs['width']:.0%}, along every direction){note if doubt else ''}"
        )


def check_draws(
    model: Program,
    guide: Program,
    *batch: Any,
    posterior: PosteriorSamples,
    num_draws: int = 4000,
    shift: float = SHIFT,
    width: float = WIDTH,
    data_plate: DataPlate = None,
    seed: int | None = None,
) -> DrawsCheck:
    r"""Say whether draws of a guide may stand for the posterior, by chains that have converged.

    .. math:: \frac{|v^T (m_q - m_p)|}{\sqrt{v^T \Sigma_p v}} \leq 0.2, \quad
        \sqrt{\frac{v^T \Sigma_q v}{v^T \Sigma_p v}} = 1 \pm 0.1

    along every direction v of a datum's unconstrained latents: each axis, and three in which most
    is wrong, found from one half of the draws and measured by the other. So a guide shows whose
    latents are right one by one, but not together: with ``data_plate=False``, independent
    proposals for what all data share and for what each has. No bound and no k-hat shows it: in
    hundreds of latents, one direction of half the width costs 0.3 nats.

    A verdict is bad where a number is beyond its limit by more than chance explains, at a level of
    0.01 for each datum; where the draws are too few to see the limit at all; and where
    chains have not converged.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        *batch: their arguments.
        posterior: what :func:`pyro_vae.sample_posterior` gave for the same model and batch, with
            the same ``data_plate``; global latents are held at its values.
        num_draws: S, draws of the guide.
        shift: the limit for means, in posterior standard deviations.
        width: the limit for standard deviations, a share of one.
        data_plate: as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.

    Returns:
        A :class:`DrawsCheck`.

    Raises:
        ValueError: for what :func:`pyro_vae.sample_posterior` refuses, chains of other data, and a
            model whose masks leave latents out.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.zoo.FactorAnalysis(6, 2)
        >>> x = model.simulate(3, seed=0)
        >>> guide = pv.LocalGuide(model, num_data=3, example=x)  # not trained: the prior
        >>> samples = pv.sample_posterior(model, guide, x, seed=0, progress=False)
        >>> pv.check_draws(model, guide, x, posterior=samples, seed=0).good
        array([False, False, False])
    """
    num_draws = as_count("num_draws", num_draws, 100)
    made = ready(model, guide, batch, posterior.given or None, data_plate, seed, "auto")
    evaluator = made.evaluator
    if masked := evaluator.pair.masked:
        raise ValueError(
            f"a mask of the model leaves draws of {sorted(masked)} out for some data: these have "
            "no posterior to compare a guide with"
        )
    num_data, of_chains = evaluator.num_data, posterior.log_joint.shape[-1]
    if (of_chains, posterior.is_whole) != (num_data, evaluator.structure.data_dim is None):
        raise ValueError(
            f"posterior has chains of {of_chains} data, and the batch {num_data}: give what "
            "sample_posterior returned for this batch, with the same data_plate"
        )
    chains = _coordinates_of_chains(made, posterior)
    values, _ = evaluator.draw(slice(0, num_data), num_draws, (Purpose.CHECKED_DRAWS,))
    draws = made.coordinates_of(values).double().numpy(force=True)
    sites = np.concatenate(
        [[c.name] * (c.columns.stop - c.columns.start) for c in made.guide.coordinates]
    )
    converged = posterior.converged.numpy(force=True)
    found = [
        _verdict(Moments.of(draws[:, n], chains[:, :, n]), sites, shift, width)
        for n in range(num_data)
    ]
    columns = {name: ("datum", np.array([row[name] for row in found])) for name in found[0]}
    dataset = xr.Dataset(columns, {"datum": np.arange(num_data)}, {"shift": shift, "width": width})
    lost = made.lost.numpy(force=True)
    dataset["good"] = dataset["good"] & converged & ~lost
    dataset["converged"] = "datum", converged
    return DrawsCheck(dataset)


def _coordinates_of_chains(made: Ready, posterior: PosteriorSamples) -> np.ndarray:
    """Return the unconstrained coordinates of chains, [C, S, N, D]."""
    shape = posterior.log_joint.shape[:2]
    known = {c.name for c in made.guide.coordinates}
    if missing := known - set(posterior.draws):
        raise ValueError(
            f"posterior has no draws of {sorted(missing)}: give what sample_posterior returned for "
            "this model, with the same data_plate"
        )
    values: dict[str, Tensor] = {
        name: draws.flatten(0, 1) for name, draws in posterior.draws.items() if name in known
    }
    z = made.coordinates_of_single(made.evaluator.single_by_datum(values))
    return torch.unflatten(z.double(), 0, tuple(shape)).numpy(force=True)


def _verdict(moments: Moments, sites: np.ndarray, shift: float, width: float) -> dict[str, Any]:
    """Return the row of a datum."""
    chance = _chance(len(sites), len(moments.shift) - len(sites))
    away = np.abs(moments.shift)
    at = {
        "shift": int(away.argmax()),
        "narrowest": int(moments.width.argmin()),
        "widest": int(moments.width.argmax()),
    }
    row: dict[str, Any] = {}
    for name, index in at.items():
        value, error = (
            (away, moments.shift_se) if name == "shift" else (moments.width, moments.width_se)
        )
        row[name], row[f"{name}_se"] = value[index], error[index]
        shares = {
            site: float(np.square(moments.direction[index][sites == site]).sum())
            for site in dict.fromkeys(sites)
        }
        row[f"{name}_site"] = max(shares, key=shares.__getitem__)
    slack_shift, slack_width = chance * moments.shift_se, chance * moments.width_se
    fine = (away <= shift + slack_shift).all() and (
        np.abs(moments.width - 1) <= width + slack_width
    ).all()
    seen = (slack_shift <= shift).all() and (slack_width <= width).all()
    row["good"] = bool(fine and seen)
    return row


def _chance(axes: int, found: int) -> np.ndarray:
    """Return by how many standard errors a number differs by chance, of each direction, [M].

    Half of the level is for the axes, half for the few directions that were found; each has a mean
    and a width, of two sides.
    """
    levels = torch.tensor([_LEVEL / (8 * axes)] * axes + [_LEVEL / (8 * found)] * found).double()
    return -torch.special.ndtri(levels).numpy()
