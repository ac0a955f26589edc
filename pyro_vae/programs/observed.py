"""Observed values: of the shape of their likelihood, in its support, each counted once."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.programs.batch import rows_text
from pyro_vae.programs.handlers import as_long_as
from pyro_vae.programs.nodes import plain_support, sample_nodes
from pyro_vae.programs.sites import Site, Structure
from pyro_vae.programs.state import preserved_rng
from pyro_vae.programs.types import Trace


def check_observed(
    run: Structure, again: Callable[[], Structure], *, strict: bool, numbers: Tensor | None = None
) -> None:
    """Raise ValueError for observed values of another shape, or outside the support.

    Not outside one that is another in a second run: that of Uniform(0, z) is a latent's to draw.
    Rows are named by ``numbers`` where they were read as a part of the data.
    """
    for site in (site for site in run.observed if isinstance(site.value, Tensor)):
        _check_shape(site)
        where = _outside_support(site, numbers) if site.validated or strict else None
        if where is not None and site.bounds == again().sites[site.name].bounds:
            hint = ". Its validate_args=False lets training take them, but they have no density"
            raise ValueError(
                f"observed site {site.name!r}: values outside the support of its "
                f"{site.distribution} likelihood ({site.support_text}) in {where}; rescale or "
                f"clean the data, or choose another likelihood{'' if site.validated else hint}"
            )


def check_repeated(trace: Trace) -> None:
    """Raise ValueError for an observed value that PyTorch repeats along dimensions of no plate.

    A column [N, 1] beside values [N] makes a likelihood [N, N], and each datum counts N times:
    Pyro's own losses refuse it too.
    """
    for name, node in sample_nodes(trace):
        if not node["is_observed"]:
            continue
        batch, value = node["fn"].batch_shape, node["value"]
        own = value.shape[: value.ndim - node["fn"].event_dim]
        declared = {frame.dim for frame in node["cond_indep_stack"] if frame.vectorized}
        for dim in (dim for dim in range(-len(batch), 0) if dim not in declared):
            if batch[dim] > 1 and (len(own) < -dim or own[dim] == 1):
                raise ValueError(
                    f"observed site {name!r}: its value has shape {list(value.shape)}, its "
                    f"likelihood batch shape {list(batch)}, and dim {dim} is in no plate: each "
                    f"value would count {batch[dim]} times. Where an argument is a column [N, 1], "
                    "pass x.squeeze(-1); where the repetition is meant, put the site in a plate"
                )


def unvalidated(structure: Structure) -> list[str]:
    """Return the observed sites with values outside the support, which nothing validates."""
    loose = (s for s in structure.observed if not s.validated and isinstance(s.value, Tensor))
    return [site.name for site in loose if _outside_support(site)]


def check_drawable(structure: Structure, device: torch.device) -> None:
    """Raise ValueError for a likelihood that cannot be drawn from, naming its site."""
    with preserved_rng(device), torch.no_grad():
        for site in structure.observed:
            if isinstance(site.fn, dist.Unit):  # of pyro.factor: nothing to draw
                continue
            try:
                as_long_as(site.fn, site.value).sample()
            except (NotImplementedError, AssertionError) as error:
                raise ValueError(
                    f"observed site {site.name!r}: its {site.distribution} likelihood cannot be "
                    f"drawn from ({type(error).__name__}{f': {error}' if str(error) else ''}). "
                    "Where draws of latents are enough: pyro_vae.to_arviz(..., predictive=False)"
                ) from error


def _check_shape(site: Site) -> None:
    # Torch would broadcast a value of other event dimensions, and count it several times.
    shape, batch, event = site.value.shape, site.batch_shape, site.event_shape
    cut = len(shape) - len(event)
    if (
        not 0 <= cut <= len(batch)
        or any(b not in (1, a) for a, b in zip(shape[cut:], event, strict=True))
        or any(a not in (1, b) for a, b in zip(shape[:cut][::-1], batch[::-1], strict=False))
    ):
        raise ValueError(
            f"observed site {site.name!r}: its value has shape {list(shape)}, but its "
            f"{site.distribution} likelihood has shape {[*batch, *event]} (batch {list(batch)}); "
            "give data of that shape, or mend the likelihood (.to_event(...))"
        )


def _outside_support(site: Site, numbers: Tensor | None = None) -> str | None:
    """Say where an observed site has values outside its support, masks aside; None if nowhere."""
    support = plain_support(site.fn)
    if support is None:
        return None
    inside, out = support.check(site.value), site.left_out
    joint = site.value.ndim - inside.ndim
    inside = inside | (out.flatten(-joint).all(-1) if joint else out)
    if (events := len(site.event_shape) - joint) > 0:
        inside = inside.flatten(-events).all(-1)
    if bool(inside.all()):
        return None
    plates = [plate for plate in site.plates if -plate.dim <= inside.ndim]
    if not plates:
        return "the data"
    plate = min(plates, key=lambda plate: plate.dim)  # the outermost
    bad = ~inside.movedim(plate.dim, 0).reshape(inside.shape[plate.dim], -1).all(1)
    return f"{rows_text(bad, numbers)} of plate {plate.name!r}"
