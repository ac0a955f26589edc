"""Several particles of a guide or a model at once: in a plate, by repeat, or in a loop.

Particles are a dimension outside the model's own plates. A network that cannot
take it gets the batch repeated along the data plate, or a loop; which of the
three is decided by comparing with a loop of single particles, model and guide
each on its own, so that a wrong broadcast is found and not averaged over.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.programs.agreement import agree, largest_gap
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.enumeration import conditionals, contract, draw, enumerated
from pyro_vae.programs.enumeration_check import check_values
from pyro_vae.programs.masks import lift_masks, mask_of
from pyro_vae.programs.nodes import latent_nodes, sample_nodes
from pyro_vae.programs.plain_errors import text_of, trace_of
from pyro_vae.programs.preimages import DrawByPreimage, Preimage, draw_of, preimage_key, preimage_of
from pyro_vae.programs.row_guide import RowGuide, row_guide
from pyro_vae.programs.site_shapes import SiteShape
from pyro_vae.programs.state import Look, unwrapped
from pyro_vae.programs.traces import GiveValues, site_log_prob
from pyro_vae.programs.warned_once import warn_once

__all__ = [
    "MODES",
    "Runner",
    "UnnamedDrawsError",
    "choose_mode",
    "is_any",
    "is_latent",
    "is_observed",
    "per_datum",
]

logger = logging.getLogger(__name__)

MODES: tuple[str, ...] = ("plate", "repeat", "loop")

_ROUNDING = 1e-3  # nats of a datum, beyond which a site is scored in float64

_PARTICLE_PLATE = "num_particles_vectorized"  # Pyro's own name for it


class UnnamedDrawsError(ValueError):
    """A model or guide draws random numbers that no sample statement knows."""


class Runner:
    """Runs a guide or a model on rows of a batch, for several particles at once.

    Values are kept in one layout, ``[K, *plates, *event]``: particles, then
    ``nesting`` plate dimensions, then the event. Each mode folds it to what its
    run takes and back. Discrete sites that are summed out are enumerated in every run
    that does not give their values.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        batch: Batch,
        shapes: Mapping[str, SiteShape],
        nesting: int,
        data_dim: int | None,
        summed: tuple[str, ...] = (),
    ) -> None:
        self.fn = fn
        self.batch = batch
        self.shapes = shapes
        self.nesting = nesting
        self.data_dim = data_dim
        # On sites of a guide, the model's, for all draws alike: [1, *plates] of the whole batch.
        self.masks: Mapping[str, Tensor] = {}
        self.summed = summed
        self.num_values = 1  # of the discrete sites, those that one density depends on
        self.double: frozenset[str] = frozenset()  # sites that are scored in float64
        self.mode = "plate"

    def block(self, rows: slice) -> tuple[Batch, dict[str, Any], Tensor | None]:
        """Return all that a run on some data depends on: batch, masks, rows of a table."""
        guide = row_guide(self.fn)
        return (
            self.batch if self._whole(rows) else self.batch.rows(rows),
            self._masks_of(rows),
            None if guide is None else self.table_rows(guide, rows),
        )

    def on(self, batch: Batch, masks: Mapping[str, Any]) -> Runner:
        """Return a runner of the same kind for a block of its own."""
        other = copy.copy(self)
        other.batch, other.masks = batch, masks
        return other

    def traces(
        self, rows: slice, num_particles: int, values: Mapping[str, Tensor] | None = None
    ) -> list[Any]:
        """Run in the mode: one trace, or a trace for each particle in a loop."""
        batch = self.batch if self._whole(rows) else self.batch.rows(rows)
        if values is not None:
            # Preimages of a guide that this one is compared with may be of another kind.
            values = {name: value for name, value in values.items() if name in self.shapes}
        if self.mode == "loop":
            return [
                self._trace(self.fn, batch, rows, 1, self._fold(values, k))
                for k in range(num_particles)
            ]
        if self.mode == "repeat":
            repeated = batch.repeat(num_particles)
            return [self._trace(self.fn, repeated, rows, num_particles, self._fold(values, None))]
        plate = pyro.plate(_PARTICLE_PLATE, num_particles, dim=-1 - self.nesting)
        return [self._trace(plate(self.fn), batch, rows, 1, values)]

    def values(self, traces: list[Any], num_particles: int) -> dict[str, Tensor]:
        """Return the values of sites not observed in a run, ``[K, *plates, *event]`` each.

        The preimages of draws stand beside them.
        """
        found = {}
        for name, node in latent_nodes(traces[0]):
            nodes = [trace.nodes[name] for trace in traces]
            found[name] = self._unfold(name, [n["value"] for n in nodes], num_particles)
            preimage = preimage_of(node)
            key = preimage and preimage_key(name, preimage.transforms)
            if key and key in self.shapes:
                found[key] = self._unfold(key, [draw_of(n) for n in nodes], num_particles)
        return found

    def log_prob(
        self,
        traces: list[Any],
        rows: slice,
        num_particles: int,
        keep: Callable[[str, Any], bool],
        masks: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the summed log density of the kept sites, unscaled: [K, N].

        Of discrete sites that are summed out, the log of the sum over their values.

        Args:
            traces: from :meth:`traces`.
            rows: of which data.
            num_particles: K.
            keep: which sites, by name and node.
            masks: on sites of a guide for these draws, as :meth:`latent_masks` returns them;
                None where they are the same for all.
        """
        if self.summed:
            return self._contracted(traces, num_particles, keep)
        total: Tensor | None = None
        for name, node in sample_nodes(traces[0]):
            if keep(name, node):
                term = self.site_log_prob(traces, rows, name, num_particles, masks)
                total = term if total is None else total + term
        if total is None:
            raise ValueError("no site to score")
        return total

    def site_log_prob(
        self,
        traces: list[Any],
        rows: slice,
        name: str,
        num_particles: int,
        masks: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return one site's log density for each particle and datum, unscaled: [K, N]."""
        terms = [self._term(name, trace.nodes[name]) for trace in traces]
        mask = (self._masks_of(rows) if masks is None else masks).get(name)
        if mask is not None:
            folded = self._fold_mask(mask, num_particles, rows.stop - rows.start)
            pairs = zip(terms, folded, strict=True)
            terms = [scale_and_mask(term, 1.0, seen) for term, seen in pairs]
        return self._by_particle(terms, num_particles)

    def _term(self, name: str, node: Any) -> Tensor:
        return site_log_prob(name, node, scaled=False, double=name in self.double)

    def _terms(self, trace: Any, keep: Callable[[str, Any], bool]) -> dict[str, Tensor]:
        return {n: self._term(n, node) for n, node in sample_nodes(trace) if keep(n, node)}

    def find_double(self, traces: list[Any], rows: slice, num_particles: int) -> None:
        """Find the sites whose log density float32 gives wrong by more than a tolerance.

        They are scored in float64 from then on.
        """
        double = set()
        for name, _ in sample_nodes(traces[0]):
            nodes = [trace.nodes[name] for trace in traces]
            with Look():  # a distribution may be made for one dtype
                if self._rounding(name, nodes, rows, num_particles) > _ROUNDING:
                    double.add(name)
        self.double = frozenset(double)

    def _rounding(self, name: str, nodes: list[Any], rows: slice, num_particles: int) -> float:
        """Return how far a site's log density of a datum is from that in float64, at most."""
        narrow, wide = (
            [site_log_prob(name, node, scaled=False, double=double) for node in nodes]
            for double in (False, True)
        )
        if narrow[0].dtype == wide[0].dtype:
            return 0.0
        if self.summed:  # with dimensions of its own: on average
            pairs = zip(narrow, wide, strict=True)
            total = torch.stack([(a - b).abs().nan_to_num().sum() for a, b in pairs]).sum()
            return float(total) / (num_particles * (rows.stop - rows.start))
        a, b = (self._by_particle(terms, num_particles) for terms in (narrow, wide))
        return float((a - b).abs().nan_to_num().max())

    def latent_masks(self, traces: list[Any], num_particles: int) -> dict[str, Tensor]:
        """Return the masks on the latents of a run, ``[K, *plates]`` each, or of size 1."""
        found = {}
        for name, node in latent_nodes(traces[0]):
            if name in self.summed:
                continue
            masks = [mask_of(trace.nodes[name]) for trace in traces]
            if any(mask is not None and mask is not True for mask in masks):
                device = node["value"].device
                seen = [torch.as_tensor(True if m is None else m, device=device) for m in masks]
                found[name] = self._unfold_mask(seen, num_particles)
        return found

    def _unfold_mask(self, masks: list[Tensor], num_particles: int) -> Tensor:
        """Bring the mask of each run to ``[K, *plates]``, or of size 1."""
        ndim = self._plate_dims
        padded = [mask.reshape((1,) * (ndim - mask.ndim) + mask.shape) for mask in masks]
        if self.mode == "loop":
            return torch.stack(torch.broadcast_tensors(*padded))
        (mask,) = padded
        if self.mode == "plate":
            return mask
        axis = mask.ndim + self.require_data_dim()
        if mask.shape[axis] == 1:
            return mask[None]
        return mask.unflatten(axis, (num_particles, -1)).movedim(axis, 0)

    def _fold_mask(self, mask: Tensor, num_particles: int, size: int) -> list[Tensor]:
        """Bring a mask ``[K, *plates]`` to the plates of each run."""
        if self.mode == "plate":
            return [mask]
        mask = mask.expand(num_particles, *mask.shape[1:])
        if self.mode == "loop":
            return list(mask)
        axis = mask.ndim + self.require_data_dim()
        shape = list(mask.shape)
        shape[axis] = size
        return [mask.expand(shape).movedim(0, axis - 1).flatten(axis - 1, axis)]

    def _masks_of(self, rows: slice) -> dict[str, Tensor]:
        """Return the masks that are the same for all draws, of some data."""
        return {name: self._rows_of_mask(mask, rows) for name, mask in self.masks.items()}

    def _rows_of_mask(self, mask: Tensor, rows: slice) -> Tensor:
        if self.data_dim is None or mask.shape[self.data_dim] == 1:
            return mask
        return mask.narrow(self.data_dim, rows.start, rows.stop - rows.start)

    def _by_particle(self, terms: list[Tensor], num_particles: int) -> Tensor:
        """Bring a log density of each run to [K, N]."""
        if self.mode == "loop":
            return torch.stack(
                [per_datum(term, self.nesting, self.data_dim, leading=0) for term in terms]
            )
        (term,) = terms
        if self.mode == "repeat":
            return per_datum(term, self.nesting, self.data_dim, leading=0).reshape(
                num_particles, -1
            )
        reduced = per_datum(term, self.nesting, self.data_dim, leading=1)
        return reduced.expand(num_particles, reduced.shape[1])

    def _contracted(
        self, traces: list[Any], num_particles: int, keep: Callable[[str, Any], bool]
    ) -> Tensor:
        groups = [contract(trace, self._terms(trace, keep), self._plate_dims) for trace in traces]
        total: Tensor | None = None
        for names in groups[0]:
            term = self._by_particle([group[names] for group in groups], num_particles)
            total = term if total is None else total + term
        if total is None:
            raise ValueError("no site to score")
        return total

    def draw_summed(
        self, traces: list[Any], num_particles: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draw the sites that are summed out from their exact posterior, given all else.

        Returns:
            Site name to values, ``[K, *plates, *event]``, and their log probability, [K, N].
        """
        found = [
            draw(conditionals(trace, self._terms(trace, is_any), self._plate_dims))
            for trace in traces
        ]
        drawn, chosen = {}, []
        for name in found[0][0]:
            shape = self.shapes[name]
            ndim = shape.batch_ndim if self.mode != "plate" else 1 + self.nesting
            values = [v[name] for v, _ in found]
            missing = (1,) * (ndim + shape.event_ndim - values[0].ndim)
            values = [v.reshape(missing + v.shape) for v in values]
            drawn[name] = self._unfold(name, values, num_particles)
            chosen.append(self._by_particle([terms[name] for _, terms in found], num_particles))
        return drawn, torch.stack(chosen).sum(0)

    def check_summed(self, rows: slice, values: Mapping[str, Tensor]) -> None:
        """Raise ValueError where the values of a site do not run together as each alone.

        In a loop, the mode that takes any network.
        """
        first = {name: value[:1] for name, value in values.items()}
        (together,) = self.traces(rows, 1, first)
        terms = self._terms(together, is_any)
        self.num_values = max(
            t.shape[: max(0, t.ndim - self.nesting)].numel() for t in terms.values()
        )

        def alone(discrete: Mapping[str, Tensor]) -> Any:
            chosen = {name: self._padded(name, value)[None] for name, value in discrete.items()}
            (trace,) = self.traces(rows, 1, {**first, **chosen})
            return trace

        check_values(together, alone, self.nesting)

    def _padded(self, name: str, value: Tensor) -> Tensor:
        """Bring a value of a single run to ``[*plates, *event]``."""
        missing = self.nesting + self.shapes[name].event_ndim - value.ndim
        return value.reshape((1,) * missing + value.shape)

    @property
    def _plate_dims(self) -> int:
        """Batch dimensions of a run that plates take up, the particles' too."""
        return self.nesting + (self.mode == "plate")

    def pointwise_log_prob(self, traces: list[Any], name: str) -> Tensor:
        """Return one site's log density for each particle, not summed: ``[K, *batch]``."""
        terms = [self._term(name, trace.nodes[name]) for trace in traces]
        if self.mode == "loop":
            return torch.stack(terms)
        (term,) = terms
        missing = self.nesting - self.shapes[name].batch_ndim
        return term.reshape(term.shape[:1] + term.shape[1 + missing :])

    def _fold(
        self, values: Mapping[str, Tensor] | None, particle: int | None
    ) -> dict[str, Tensor] | None:
        """Bring values to the shape of a single run: one particle, or all along the data."""
        if values is None:
            return None
        folded = {}
        for name, value in values.items():
            shape = self.shapes[name]
            if particle is not None:
                value = value[particle]
            else:
                axis = value.ndim - shape.event_ndim + self.require_data_dim() - 1
                value = value.movedim(0, axis)
                value = value.reshape(*value.shape[:axis], -1, *value.shape[axis + 2 :])
            extra = self.nesting - shape.batch_ndim
            folded[name] = value.reshape(value.shape[extra:])
        return folded

    def _unfold(self, name: str, found: list[Tensor], num_particles: int) -> Tensor:
        """Bring the values of a run to ``[K, *plates, *event]``."""
        shape = self.shapes[name]
        pad = (1,) * (self.nesting - shape.batch_ndim)
        if self.mode == "loop":
            return torch.stack([value.reshape(pad + value.shape) for value in found])
        (value,) = found
        if self.mode == "repeat":
            axis = value.ndim - shape.event_ndim + self.require_data_dim()
            value = value.reshape(
                *value.shape[:axis], num_particles, -1, *value.shape[axis + 1 :]
            ).movedim(axis, 0)
            return value.reshape(value.shape[:1] + pad + value.shape[1:])
        return value

    def require_data_dim(self) -> int:
        """Return the data dimension; raise ValueError where the model is one datum."""
        if self.data_dim is None:
            raise ValueError("particles='repeat' needs a data plate to repeat along")
        return self.data_dim

    def _trace(
        self,
        fn: Callable[..., Any],
        batch: Batch,
        rows: slice,
        times: int,
        values: Mapping[str, Tensor] | None,
    ) -> Any:
        if summed := [name for name in self.summed if values is None or name not in values]:
            fn = enumerated(fn, summed, -1 - self._plate_dims)
        if values is not None:
            preimages = {
                shape.preimage_of: Preimage(value, shape.transforms)
                for name, value in values.items()
                if (shape := self.shapes[name]).preimage_of is not None
            }
            fn = GiveValues(values, preimages)(fn)
        with self._table_rows(rows, times), DrawByPreimage():
            trace = trace_of(fn, batch.args, batch.kwargs)
        return lift_masks(trace, summed) if summed else trace

    @contextlib.contextmanager
    def _table_rows(self, rows: slice, times: int) -> Iterator[None]:
        """Keep a per-datum guide aligned with the rows of the batch."""
        guide = row_guide(self.fn)
        if guide is None:
            yield
            return
        with guide.rows_as_given(self.table_rows(guide, rows).repeat(times)):
            yield

    def table_rows(self, guide: RowGuide, rows: slice) -> Tensor:
        """Return the rows of a per-datum guide's table that some data have."""
        index = guide.current_rows
        return index if self._whole(rows) else index[rows]

    def _whole(self, rows: slice) -> bool:
        size = self.batch.size
        if self.data_dim is None or size is None:
            return True
        return rows.start == 0 and rows.stop >= size


def per_datum(term: Tensor, nesting: int, data_dim: int | None, leading: int) -> Tensor:
    """Sum all dimensions but the data's, and ``leading`` ones of particles before the plates.

    Args:
        term: of a site's batch shape.
        nesting: plate dimensions, particles' excluded.
        data_dim: the data's, negative; None for one datum.
        leading: 0 or 1.

    Returns:
        [N], or [K, N]; N is 1 for a site outside the data plate, or for one datum.
    """
    missing = nesting + leading - term.ndim
    if missing > 0:
        term = term.reshape((1,) * missing + term.shape)
    data_axis = None if data_dim is None else term.ndim + data_dim
    axes = [axis for axis in range(leading, term.ndim) if axis != data_axis]
    term = term.sum(axes) if axes else term
    return term if data_axis is not None else term.unsqueeze(-1)


def choose_mode(
    runner: Runner, role: str, particles: str, reference: Tensor, score: Callable[[], Tensor]
) -> None:
    """Set the runner's mode to the first that agrees with single particles."""
    if runner.data_dim is None and particles == "repeat":
        raise ValueError("particles='repeat' needs a data plate to repeat along")
    modes = MODES if particles == "auto" else (particles,)
    if runner.data_dim is None or runner.batch.size is None:
        modes = tuple(mode for mode in modes if mode != "repeat") or ("loop",)
    reasons: list[str] = []
    for mode in modes:
        runner.mode = mode
        if mode == "loop" and reasons and agree(reference, score()):
            told = "the %s runs particle by particle, which is slow: %s"
            warn_once(logger, (unwrapped(runner.fn),), told, role, "; ".join(reasons))
            return
        with Look() as look:
            found = score()
        if look.error is not None:
            # A shape that the network cannot take, told in its own way; the loop, which is the
            # reference and has already run, is always left to fall back on, and says so.
            reasons.append(f"{mode}: {type(look.error).__name__}: {text_of(look.error)}")
            continue
        if agree(reference, found):
            return
        gap = largest_gap(reference, found)
        reasons.append(f"{mode}: log densities differ from single particles by {gap:.3g} nats")
    runner.mode = "loop"
    if not agree(reference, score()):
        raise UnnamedDrawsError(
            f"the {role} draws random numbers outside of sample statements: its log density of the "
            "same latents is another in each run, and a weight of each draw needs one. Give the "
            "draw a name with pyro.sample, as a latent of its own; or, if it is dropout in "
            f"training mode, call .eval() on the {role}'s modules. A mean over particles (pv.ELBO) "
            "is well defined, and trains it"
        )
    raise ValueError(
        f"the {role}'s log density of several particles does not agree with that of each alone "
        f"({'; '.join(reasons)}): its broadcasting over the particle dimension, the leftmost, is "
        "wrong"
    )


def is_any(name: str, node: Any) -> bool:
    """Keep every site of a trace."""
    return True


def is_observed(name: str, node: Any) -> bool:
    """Keep the observed sites of a trace."""
    return bool(node["is_observed"])


def is_latent(name: str, node: Any) -> bool:
    """Keep the sites of a trace that are not observed."""
    return not node["is_observed"]
