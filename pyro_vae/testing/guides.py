"""Laws of a guide with its model: densities, particles, gradients, what is saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.evaluation.bounds import elbo, iwae_bound, log_weights
from pyro_vae.guides.coordinates import Coordinates
from pyro_vae.losses.elbo import ELBO
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.state import Look, module_of, unwrapped
from pyro_vae.programs.supports import is_discrete
from pyro_vae.programs.types import DataPlate, Program
from pyro_vae.testing.laws import Checked, Laws, check, close, require
from pyro_vae.training.fit import fit

__all__ = ["check_guide"]

_K, _CHUNK = 4, 5
_DRAWS, _FEWEST_DRAWS = 4096, 64  # (draw, datum) pairs of a comparison of draws and density
_STRETCH = 0.02  # of draws, about their middle
_SURE = 5.0  # standard errors


def check_guide(
    model: Program,
    guide: Program,
    *batch: Any,
    data_plate: DataPlate = None,
    expected_failures: Mapping[str, str] | None = None,
) -> Checked:
    """Check that a guide's numbers do not depend on how they are made, and that it can be trained.

    Log weights are finite and the same in chunks; particles run together are particles run alone,
    and the density of a draw is the one it was drawn with; draws are as wide as their density says;
    a gradient of the ELBO reaches every
    parameter of the guide; a trained guide that is saved and loaded gives the same log weights, and
    so does a copy. Of a guide that is no module the last two are left out. The guide and the model
    that are passed stay as they are.

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites, of any make.
        *batch: their arguments, of two or more data.
        data_plate: as in :func:`pyro_vae.log_weights`.
        expected_failures: name of a law to why it cannot hold. It is an error if it holds.

    Returns:
        Which laws hold.

    Raises:
        LawError: with the name of each broken law and what was found.
        ValueError: for an expected failure of no law.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([-1.0, 0.5, 2.0])
        >>> guide = pv.LocalGuide(model, num_data=3, example=x)
        >>> len(pv.testing.check_guide(model, guide, x).kept)
        6
    """
    laws = laws_of(model, guide, as_batch(*batch), data_plate)
    return check(guide, laws, expected_failures)


def laws_of(model: Program, guide: Program, batch: Batch, data_plate: DataPlate = None) -> Laws:
    """Return the laws that a guide of its kind has."""
    pair = (model, guide, batch, data_plate)
    laws = {
        "log weights are finite, and the same in chunks": partial(log_weights_hold, *pair),
        "particles together are particles alone": partial(particles_agree, *pair),
        "draws are as wide as their density": partial(_widths_agree, *pair),
    }
    if module_of(unwrapped(guide)) is not None:
        laws |= {
            "a gradient reaches every parameter": partial(_gradients, *pair),
            "what is trained is saved": partial(_saved, *pair),
            "a copy is the same": partial(_copied, *pair),
        }
    return laws


def log_weights_hold(
    model: Program, guide: Program, batch: Batch, data_plate: DataPlate = None
) -> None:
    """Raise LawError where chunks change log weights, or bounds are not reductions of them."""
    options: dict[str, Any] = {"num_particles": _K, "seed": 0, "data_plate": data_plate}
    weights = log_weights(model, guide, batch, **options)
    finite = torch.isfinite(weights.total)
    require(finite.all(), f"{int((~finite).sum())} of {finite.numel()} are not finite")
    chunked = log_weights(model, guide, batch, chunk_size=_CHUNK, **options)
    for part in ("log_likelihood", "log_prior", "log_guide"):
        close(getattr(chunked, part), getattr(weights, part), f"{part} in chunks")
    total = weights.total.double()
    close(elbo(model, guide, batch, **options).value, total.mean(0), "the ELBO")
    wanted = total.logsumexp(0) - math.log(_K)
    close(iwae_bound(model, guide, batch, **options).value, wanted, f"IWAE-{_K}")


def particles_agree(
    model: Program, guide: Program, batch: Batch, data_plate: DataPlate = None
) -> None:
    """Raise LawError where the same draws have other densities together than one by one."""
    options: dict[str, Any] = {"data_plate": data_plate, "seed": 0}
    together = Evaluator(model, guide, batch, **options)
    alone = Evaluator(model, guide, batch, particles="loop", **options)
    rows = slice(0, together.num_data)
    values, log_guide = alone.draw(rows, 3, (Purpose.CHECKS,))
    close(together.score_guide(rows, values), log_guide, "log q of draws, scored together")
    pairs = zip(
        ("log p(x | z)", "log p(z)"),
        together.score_model(rows, values),
        alone.score_model(rows, values),
        strict=True,
    )
    for name, one, other in pairs:
        close(one, other, f"{name}, scored together")


def _widths_agree(model: Program, guide: Program, batch: Batch, data_plate: DataPlate) -> None:
    r"""Raise LawError for draws that are wider or narrower than their density says.

    .. math:: E_q[(u - c) \cdot \nabla_u \log q(u)] = -D

    in unconstrained coordinates u, whatever c is (Stein's identity); of K draws about their own
    median -D (K - 1) / K. The slope is that between draws stretched and shrunk by a little. Of a
    guide with points, discrete latents or masks nothing is said.
    """
    evaluator = Evaluator(model, guide, batch, data_plate=data_plate, seed=0)
    structure, num_data = evaluator.structure, evaluator.num_data
    proposed = [structure.sites[n] for n in structure.sites if n in evaluator.pair.guide_sites]
    if not evaluator.pair.scorable or evaluator.pair.masked:
        return
    with Look() as look:
        found = {site.name: Coordinates.of(site, structure.data_plate, 0) for site in proposed}
    if look.error is not None or any(is_discrete(site.fn) is not False for site in proposed):
        return
    rows, count = slice(0, num_data), max(_FEWEST_DRAWS, _DRAWS // num_data)
    drawn, _ = evaluator.draw(rows, count, (Purpose.CHECKS, 2))
    single = evaluator.single_values({name: drawn[name] for name in found})
    u = {name: mine.transform.inv(single[name]) for name, mine in found.items()}
    middle = {name: value.median(0).values for name, value in u.items()}

    def density(stretched: Collection[str], by: float) -> Tensor:
        """Return the density in unconstrained coordinates, of some stretched, [K, N]."""
        total, moved = u[next(iter(u))].new_zeros(count, num_data, dtype=torch.float64), {}
        for name, mine in found.items():
            at = u[name]
            at = torch.lerp(middle[name], at, 1 + by) if name in stretched else at
            moved[name] = mine.transform(at)
            volume = mine.transform.log_abs_det_jacobian(at, moved[name])
            if mine.data_dim is None:
                by_datum = volume.unsqueeze(1)
            else:
                by_datum = volume.movedim(1 + len(mine.batch) + mine.data_dim, 1)
            total = total + by_datum.reshape(count, num_data, -1).sum(2)
        return total + evaluator.score_guide(rows, evaluator.from_single(moved))

    groups = [list(found), *([name] for name in found)] if len(found) > 1 else [list(found)]
    for names in groups:
        slope = (density(names, _STRETCH) - density(names, -_STRETCH)) / (2 * _STRETCH)
        if not bool(slope.isfinite().all()):  # where rounding cuts a support off
            return
        size = sum(u[name][0].numel() for name in names) / num_data
        off = slope + size * (count - 1) / count
        error = float(off.std()) / off.numel() ** 0.5
        width = max(0.0, 1 - float(off.mean()) / size) ** 0.5
        require(
            abs(float(off.mean())) < _SURE * error,
            f"draws of {', '.join(names)} are about {width:.2f} times as wide as log q says",
        )


def _gradients(model: Program, guide: Program, batch: Batch, data_plate: DataPlate) -> None:
    model, guide = copy.deepcopy((model, guide))
    module = _module(guide)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    objective = ELBO(_K, data_plate=data_plate)
    for _ in range(_K):  # of a unit that a rectifier cuts off at some draws
        loss = objective.differentiable_loss(model, guide, *batch.args, **batch.kwargs)
        require(loss.requires_grad, "the loss has no gradient")
        loss.backward()
    for name, value in before.items():
        close(named[name], value, f"{name} after a gradient", rtol=0.0, atol=0.0)
    lost = [n for n, p in named.items() if p.grad is None or not bool((p.grad != 0).any())]
    require(not lost, f"no gradient reaches {', '.join(lost)}")


def _saved(model: Program, guide: Program, batch: Batch, data_plate: DataPlate) -> None:
    """A fresh copy that loads what a trained one saves is the trained one."""
    fresh_model, fresh = copy.deepcopy((model, guide))
    model, guide = copy.deepcopy((model, guide))
    fit(model, guide, batch, max_steps=3, data_plate=data_plate, progress=False, compile=False)
    before = _total(fresh_model, fresh, batch, data_plate)
    _module(fresh).load_state_dict(_module(guide).state_dict())
    if isinstance(fresh_model, nn.Module) and isinstance(model, nn.Module):
        fresh_model.load_state_dict(model.state_dict())
    else:
        fresh_model = model
    wanted = _total(model, guide, batch, data_plate)
    require(not torch.equal(before, wanted), "training changed nothing")
    found = _total(fresh_model, fresh, batch, data_plate)
    close(found, wanted, "log weights after saving and loading")


def _copied(model: Program, guide: Program, batch: Batch, data_plate: DataPlate) -> None:
    copied_model, copied = copy.deepcopy((model, guide))
    found = _total(copied_model, copied, batch, data_plate)
    close(found, _total(model, guide, batch, data_plate), "log weights of a copy")


def _total(model: Program, guide: Program, batch: Batch, data_plate: DataPlate) -> Tensor:
    options: dict[str, Any] = {"num_particles": _K, "seed": 0, "data_plate": data_plate}
    return log_weights(model, guide, batch, **options).total


def _module(guide: Program) -> nn.Module:
    module = module_of(unwrapped(guide))
    if module is None:
        raise TypeError(f"a module is needed, found {guide!r}")
    return module
