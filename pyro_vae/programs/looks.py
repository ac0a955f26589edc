"""Runs of a model under its prior, to see its sites; the global random state stays as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

from pyro_vae.programs.batch import Batch, dtype_errors
from pyro_vae.programs.nodes import (
    batch_nesting,
    drawn_subsamples,
    plain_distribution,
    sample_nodes,
)
from pyro_vae.programs.observed import check_repeated
from pyro_vae.programs.plain_errors import trace_of
from pyro_vae.programs.pyro_internals import is_deterministic
from pyro_vae.programs.sites import Plate, Site, Structure
from pyro_vae.programs.state import looking
from pyro_vae.programs.types import Node, Program, Trace


@dataclass(frozen=True, slots=True)
class ModelRun:
    """What one run of a model has shown.

    Attributes:
        sites: name to Site, in the order of the model; latents are not yet local or global.
        nesting: batch dimensions that plates, and sites in none, take up.
        sequential: plates that are iterated over, and of which a subsample was drawn.
    """

    sites: Mapping[str, Site]
    nesting: int
    sequential: tuple[str, ...] = ()

    @classmethod
    def of(cls, trace: Trace, drawn: Collection[str] = ()) -> ModelRun:
        """Return what a trace of a model shows.

        Args:
            trace: of the model.
            drawn: plates of which the run drew a subsample.
        """
        sizes = _sizes_of_unsized(trace)
        sites = {
            name: _site(name, node, sizes, drawn)
            for name, node in sample_nodes(trace)
            if not is_deterministic(node)
        }
        vectorized = {plate.name for site in sites.values() for plate in site.plates}
        return cls(sites, batch_nesting(trace), tuple(sorted(set(drawn) - vectorized)))

    def is_like(self, other: ModelRun) -> bool:
        """Return whether another run, on any number of data, has the same sites and events."""
        kinds = [
            {
                name: (site.kind, site.event_shape, len(site.batch_shape))
                for name, site in run.sites.items()
            }
            for run in (self, other)
        ]
        return kinds[0] == kinds[1]


def _site(name: str, node: Node, sizes: Mapping[str, int], drawn: Collection[str]) -> Site:
    plates = tuple(
        Plate(
            frame.name,
            frame.dim,
            sizes.get(frame.name, frame.size),
            sizes.get(frame.name, frame.full_size),
            frame.name in drawn,
        )
        for frame in node["cond_indep_stack"]
        if frame.vectorized
    )
    return Site(
        name=name,
        kind="observed" if node["is_observed"] else "latent",
        fn=node["fn"],
        batch_shape=_batch_shape(node, plates),
        event_shape=node["fn"].event_shape,
        plates=plates,
        value=node["value"],
        mask=node["mask"],
        missing=node["infer"].get("_missing"),
        scale=node["scale"],
    )


def run_model(model: Program, batch: Batch, seed: int | None = None) -> ModelRun:
    """Run a model once under its prior, in eval mode.

    Args:
        model: a Pyro model.
        batch: its arguments.
        seed: of its draws; None takes the global random state, and leaves it as it was.
    """
    with (
        looking(model, device=batch.device),
        drawn_subsamples() as drawn,
        default_validation_told_apart(),
        _NameUndrawable(),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            with dtype_errors(batch):
                trace = trace_of(model, batch)
        except Exception as error:
            error.add_note(f"while running the model on {batch}")
            raise
    check_repeated(trace)
    return ModelRun.of(trace, drawn)


def check_same(structure: Structure, again: Mapping[str, Site]) -> None:
    """Raise ValueError if sites of another run, or their shapes, are not those of a structure."""
    for name in structure.sites.keys() | again.keys():
        shapes = [
            (*sites[name].batch_shape, *sites[name].event_shape) if name in sites else None
            for sites in (structure.sites, again)
        ]
        if shapes[0] != shapes[1]:
            found = " and ".join("no such site" if s is None else str(list(s)) for s in shapes)
            raise ValueError(
                f"site {name!r} is not the same in two runs of the model on one batch ({found}): "
                "latents of changing number or dimension have no density in common. Give it a "
                "fixed shape, and mask what is not there (poutine.mask)"
            )


class _NameUndrawable(Messenger):
    """Says which latent it is whose distribution has no draws: a model is looked at by running."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn: Any = None  # the statement that is being drawn

    def _pyro_sample(self, msg: Node) -> None:
        self._drawn = msg

    def _pyro_post_sample(self, msg: Node) -> None:
        self._drawn = None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, NotImplementedError) and self._drawn is not None:
            raise ValueError(
                f"latent site {self._drawn['name']!r}: its prior "
                f"{type(plain_distribution(self._drawn['fn'])).__name__} cannot be drawn from, and "
                "a model is looked at by drawing from its priors. Give the class a method sample; "
                "any value of its support will do where its draws are not asked for"
            ) from error


@contextlib.contextmanager
def default_validation_told_apart() -> Iterator[None]:
    """Have distributions that validate nothing by default hold 0, where others got False.

    Libraries (zuko, for one) switch validation off for a whole process. Plates copy a distribution,
    and its copy holds the default as if it were its own.
    """
    default = Distribution._validate_args
    Distribution._validate_args = default or 0  # type: ignore[assignment]
    try:
        yield
    finally:
        Distribution._validate_args = default


def _sizes_of_unsized(trace: Trace) -> dict[str, int]:
    """Return the sizes of plates without one (pyro.plate("data")): those of what is in them."""
    sizes: dict[str, int] = {}
    for _, node in sample_nodes(trace):
        value, fn = node["value"], node["fn"]
        shapes = [fn.batch_shape]
        if isinstance(value, Tensor):
            shapes.append(value.shape[: value.ndim - fn.event_dim])
        for frame in node["cond_indep_stack"]:
            if frame.vectorized and frame.size == -1:
                found = [shape[frame.dim] for shape in shapes if len(shape) >= -frame.dim]
                sizes[frame.name] = max(*found, sizes.get(frame.name, 1), 1)
    return sizes


def _batch_shape(node: Node, plates: tuple[Plate, ...]) -> torch.Size:
    """Return a site's batch shape; of an observed one in a plate without a size, its data's too."""
    shape = node["fn"].batch_shape
    unsized = {f.name for f in node["cond_indep_stack"] if f.vectorized and f.size == -1}
    if not node["is_observed"] or not unsized:
        return shape
    own = {-dim: size for dim, size in enumerate(reversed(shape), 1)}
    for plate in plates:
        if plate.name in unsized and own.get(plate.dim, 1) == 1:
            own[plate.dim] = plate.size
    return torch.Size(own.get(dim, 1) for dim in range(min(own, default=0), 0))
