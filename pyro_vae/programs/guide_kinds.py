"""Guides: kinds that the package knows more of, and what each must be for data to have weights."""

from __future__ import annotations

import contextlib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor, nn

from pyro_vae.programs.batch import Batch, rows_text
from pyro_vae.programs.nodes import is_circular, is_point, latent_nodes, plain_distribution
from pyro_vae.programs.pyro_internals import unconstrained
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import unwrapped
from pyro_vae.programs.supports import flat_transforms, support_of
from pyro_vae.programs.traces import trace_guide
from pyro_vae.programs.types import Distribution, Program, Trace, Values
from pyro_vae.torch_internals import buffers_of

_PART = 2**20  # numbers of a table that are summed at a time, at least; a multiple of 16
_SAME_TABLE = 1e-5  # of its length: by less it has moved by rounding
_PERIOD = 2 * math.pi * (1 + 1e-6)  # ends are rounded
_SAME_DATUM = 1e-4  # of its length: what two fingerprints of a datum may be apart


class DeclaredGuide(ABC):
    """A guide that declares its sites, so that no run is needed to find them out.

    Attributes:
        global_guide: the part that samples the sites outside the data plate; None without one.
        site_names: what the guide samples by itself, its global part aside.
    """

    global_guide: Program | None
    site_names: tuple[str, ...]

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the latent sites of a batch, as a Pyro guide."""

    @property
    @abstractmethod
    def is_dependent(self) -> bool:
        """Whether a site's proposal may depend on the draws of sites before it."""

    @abstractmethod
    def local_part(self, given: Values) -> DeclaredGuide:
        """Return this guide without its global part, held at values; the parameters are shared."""


class RowGuide(nn.Module):
    """A guide with a table of parameters, a row per datum; it remembers what they were fitted to.

    A subclass calls :meth:`_make_rows` once, and takes its parameters from the rows.

    Attributes:
        table: the parameters, [num_data, ...].
        converged: [num_data], whether each row is at its optimum.
        given_rows: the rows of :meth:`rows` that are in force, [n]; None for all.
        RECORDS: buffers that no run of the guide reads or writes: of what its rows were fitted to.
        is_start: whether :meth:`for_any_data` is in force.
        is_whole: whether its one row is for all data jointly.
    """

    RECORDS = frozenset({"converged", "_fingerprints", "_fitted"})
    converged: Tensor
    _fingerprints: Tensor
    _fitted: Tensor

    def _make_rows(self, table: Tensor, *, is_whole: bool) -> None:
        """Make the table; ``is_whole`` where its one row is for all data jointly."""
        num_data = table.shape[0]
        self.table = nn.Parameter(table)
        self.register_buffer("converged", torch.zeros(num_data, dtype=torch.bool))
        # Of the data that the rows were fitted to, and of the table then: infinite for none.
        self.register_buffer("_fingerprints", torch.zeros(num_data, dtype=torch.float64))
        self.register_buffer("_fitted", torch.tensor(math.inf, dtype=torch.float64))
        self.is_whole, self.is_start = is_whole, False
        self.given_rows: Tensor | None = None
        self._trial: Tensor | None = None

    @contextlib.contextmanager
    def _holding(self, name: str, value: object) -> Iterator[None]:
        """Give an attribute another value inside the context."""
        before, vars(self)[name] = vars(self)[name], value
        try:
            yield
        finally:
            vars(self)[name] = before

    @property
    def in_force(self) -> Tensor:
        """The table in force: the guide's own, or that of :meth:`using`."""
        return self.table if self._trial is None else self._trial

    def using(self, table: Tensor) -> contextlib.AbstractContextManager[None]:
        """Take another table in place of the guide's own inside the context."""
        return self._holding("_trial", table)

    @contextlib.contextmanager
    def using_all_of(self, table: Tensor) -> Iterator[None]:
        """Take another table, each of its rows once: a batch inside the context has as many."""
        with self.using(table), self._holding("given_rows", None):
            yield

    @property
    def num_data(self) -> int:
        """Rows of the table."""
        return self.in_force.shape[0]

    @property
    def given(self) -> dict[str, Tensor]:
        """The values of global latent sites that the rows were fitted at."""
        held = self._modules.get("_given")
        return {} if held is None else {n.replace("|", "."): v for n, v in held.named_buffers()}

    def _hold(self, given: Mapping[str, Tensor]) -> None:
        self._modules.pop("_given", None)
        if given:
            self._given = nn.Module()
            for site, value in given.items():  # a buffer's name may hold no dot
                self._given.register_buffer(site.replace(".", "|"), value.detach().clone())

    def remember(self, batch: Batch | None, given: Mapping[str, Tensor] | None = None) -> None:
        """Remember what the rows were fitted to: a datum for each, None to forget, and globals."""
        self._hold(given or {})
        self._fitted.fill_(math.inf)
        if batch is not None and (self.is_whole or batch.size == self.num_data):
            number, _ = batch.fingerprints(whole=self.is_whole)
            self._fingerprints.copy_(number)
            self._fitted.copy_(self._checksum()[0])

    def for_any_data(self) -> contextlib.AbstractContextManager[None]:
        """Take any batch of the right size inside the context, as a start for its rows."""
        return self._holding("is_start", True)

    def check_data(self, batch: Batch) -> None:
        """Raise ValueError where the rows in force were fitted to other data than these."""
        self.check_size(batch.size)
        if self.speaks_for_data:
            self.check_same(batch)

    @property
    def speaks_for_data(self) -> bool:
        """Whether the rows are still those that were fitted to data."""
        checksum, length = self._checksum()
        # Rows that moved since speak for whatever moved them.
        same = bool((checksum - self._fitted.to(checksum)).abs() <= _SAME_TABLE * length)
        return same and not self.is_start

    def check_same(self, batch: Batch) -> None:
        """Raise ValueError where data are not those that the rows in force were fitted to."""
        number, length = batch.fingerprints(whole=self.is_whole)
        wanted = self._fingerprints.to(number)
        if not self.is_whole:
            wanted = wanted[self.current_rows.to(wanted.device)]
        other = (number - wanted).abs() > _SAME_DATUM * length + torch.finfo(number.dtype).tiny
        if bool(other.any()):
            where = rows_text(other, batch.numbers)
            raise ValueError(
                f"{where} of the batch are not the data that this LocalGuide's rows "
                "were fitted to. Where it holds some of those, say which: with guide.rows(index): "
                "...; for other data, refine it: pyro_vae.refine(model, guide, *batch)"
            )

    def _checksum(self) -> tuple[Tensor, Tensor]:
        """Return a number that tells the table from others, and its length."""
        generator = torch.Generator().manual_seed(0)
        product, squares = torch.zeros(2, dtype=torch.float64)
        table = self.table.detach().flatten()
        # In parts, which draw what the whole would: a table may be most of the memory.
        count = max(1, len(table) // _PART)
        for i in range(count):
            part = table[i * _PART : (i + 1) * _PART if i + 1 < count else None]
            numbers = part.to("cpu", torch.float64)
            direction = torch.randn(len(numbers), generator=generator, dtype=torch.float64)
            product, squares = product + numbers @ direction, squares + numbers @ numbers
        return product, squares.sqrt()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # States of guides that remember nothing: of an earlier version.
        state_dict.setdefault(f"{prefix}_fingerprints", torch.zeros_like(self._fingerprints))
        state_dict.setdefault(f"{prefix}_fitted", torch.full_like(self._fitted, math.inf))
        held = f"{prefix}_given."
        found = {key.removeprefix(held): v for key, v in state_dict.items() if key.startswith(held)}
        self._hold({name.replace("|", "."): value for name, value in found.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def rows(self, index: Tensor | slice) -> contextlib.AbstractContextManager[None]:
        """Say which rows of the table the batches inside the context hold.

        Args:
            index: [n] integers below num_data, or a slice; row i of the batch is
                datum index[i].

        Raises:
            IndexError: for an index out of range.
        """
        if isinstance(index, slice):
            index = torch.arange(self.num_data)[index]
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            found = f"{index.dtype} of shape {tuple(index.shape)}"
            raise IndexError(f"rows: a 1-dimensional tensor of integers is needed, found {found}")
        first, last = map(int, index.aminmax()) if index.numel() else (0, 0)
        if not 0 <= first <= last < self.num_data:
            there = f"the guide has rows 0 to {self.num_data - 1}"
            raise IndexError(f"rows: indices run from {first} to {last}, but {there}")
        return self.rows_as_given(index)

    def rows_as_given(self, index: Tensor) -> contextlib.AbstractContextManager[None]:
        """Use these rows inside the context, unchecked: rows [n] that were checked before."""
        return self._holding("given_rows", index.to(self.in_force.device))

    @property
    def current_rows(self) -> Tensor:
        """The rows that a batch holds now: those of :meth:`rows`, else all, [n]."""
        if self.given_rows is not None:
            return self.given_rows
        return torch.arange(self.num_data, device=self.in_force.device)

    def check_size(self, size: int | None) -> None:
        """Raise ValueError if a batch of this size does not match the rows in force."""
        rows = self.given_rows
        wanted = self.num_data if rows is None else len(rows)
        if size in (None, wanted) or self.is_whole:
            return
        if rows is not None:
            raise ValueError(f"guide.rows(index) names {wanted} rows but the batch has {size}")
        raise ValueError(
            f"this LocalGuide has a row for each of {wanted} data but the batch has {size}; "
            "say which rows a minibatch holds: with guide.rows(index): ..."
        )


def buffers_of_runs(module: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers of a module itself that its runs may write to."""
    kept = module.RECORDS if isinstance(module, RowGuide) else frozenset[str]()
    for name, buffer in buffers_of(module).items():
        if buffer is not None and name not in kept:
            yield buffer


def is_given(name: str) -> bool:
    """Return whether a name in a module's state is that of a value that rows were fitted at.

    Such values come and go with what a table was last fitted to.
    """
    return "_given" in name.split(".")[:-1]


def row_guide(program: Program) -> RowGuide | None:
    """Return the guide inside Pyro's handlers if it has a row per datum, else None."""
    inner = unwrapped(program)
    return inner if isinstance(inner, RowGuide) else None


@contextlib.contextmanager
def on_rows(program: Program, rows: Tensor | None) -> Iterator[None]:
    """Say to a guide with a row per datum which of them a batch holds; None for all of them."""
    guide = row_guide(program)
    if guide is None or rows is None:
        yield
    else:
        held = guide.given_rows
        with guide.rows(rows if held is None else held[rows.to(held.device)]):
            yield


def repeated_rows(program: Program, times: int) -> Program:
    """Return a program for a batch that is repeated: the rows of its guide are repeated alike."""
    guide = row_guide(program)
    if guide is None:
        return program

    @functools.wraps(program, assigned=(), updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with guide.rows_as_given(guide.current_rows.repeat(times)):
            return program(*args, **kwargs)

    return run


def check_per_datum(structure: Structure, model_trace: Trace, guide_trace: Trace) -> None:
    """Raise ValueError for a guide's site whose density is no bound, or not one per datum."""
    plate = structure.data_plate
    for name, node in latent_nodes(guide_trace):
        theirs = model_trace.nodes.get(name)
        if theirs is not None and is_circular(theirs["fn"]):
            _check_circle(name, guide_trace)
        if plate is None:
            continue
        shape, events = node["fn"].batch_shape, node["fn"].event_dim
        found = shape[plate.dim] if len(shape) >= -plate.dim else None
        within = plate.name in {frame.name for frame in node["cond_indep_stack"]}
        if not within and found != structure.num_data:
            raise ValueError(
                f"the guide's site {name!r} has batch shape {list(shape)}: its density is one "
                f"number for the whole batch, not one for each of the {structure.num_data} data "
                f"of plate {plate.name!r} (dim {plate.dim}). Sample it in that plate, or pass "
                "data_plate=False to treat the whole batch as one datum"
            )
        if found not in (None, 1, structure.num_data):
            raise ValueError(
                f"the guide proposes {found} values of {name!r} along plate {plate.name!r}, and "
                f"the batch has {structure.num_data} data: it has parameters for each of the data "
                "that it was made for. Pass all of these, in their order, or use an AmortizedGuide"
            )
        if theirs is not None and theirs["fn"].event_dim != events:
            raise ValueError(
                f"latent site {name!r} has {theirs['fn'].event_dim} event dimensions in the "
                f"model and {events} in the guide; mend with .to_event(...)"
            )


def _check_circle(name: str, guide_trace: Trace) -> None:
    """Raise ValueError for a proposal that goes round the circle of an angle more than once."""
    fn = guide_trace.nodes[name]["fn"]
    if is_circular(fn):
        return
    holder = guide_trace.nodes.get(unconstrained(name))  # where AutoNormal holds the density
    if is_point(fn) and holder is not None:
        fn = holder["fn"]  # torch maps the reals to an angle by the identity
    width = _width(plain_distribution(fn))
    if width > _PERIOD:
        where = "the reals" if width == math.inf else f"an interval of {width:.3g}"
        raise ValueError(
            f"latent site {name!r} is an angle, and the guide's "
            f"{type(plain_distribution(fn)).__name__} runs over {where}, on which the model's "
            "periodic density goes on: no bound. Propose angles between -pi and pi: VonMises, or "
            "a guide of pyro_vae"
        )


def _width(fn: Distribution) -> float:
    """Return how wide the interval is that a distribution of numbers draws from; 0 for no answer.

    Of a transformed distribution torch may call the support real, where it is an interval.
    """
    transforms: list[td.Transform] = []
    while isinstance(fn, td.TransformedDistribution):
        transforms = [*flat_transforms(fn.transforms), *transforms]
        fn = plain_distribution(fn.base_dist)
    support = support_of(fn)
    if support is None or support.event_dim or any(t.domain.event_dim for t in transforms):
        return 0.0
    low = torch.as_tensor(getattr(support, "lower_bound", -math.inf))
    high = torch.as_tensor(getattr(support, "upper_bound", math.inf))
    for transform in transforms:
        low, high = transform(low), transform(high)
    width = (high - low).abs().max()
    return 0.0 if bool(width.isnan()) else float(width)


def points(guide: Program, batch: Batch, guide_trace: Trace) -> list[str]:
    """Return the latents that a guide proposes a point for, whose density nothing carries.

    Where there are auxiliary sites, they carry the density (as AutoNormal's do) of what moves
    with them from run to run, and of nothing else.
    """
    nodes = dict(latent_nodes(guide_trace))
    own = {n: node for n, node in nodes.items() if not node["infer"].get("is_auxiliary")}
    fixed = {n: node for n, node in own.items() if is_point(node["fn"])}
    bare = [n for n, at in fixed.items() if bool((at["fn"].log_prob(at["value"]) == 0).all())]
    if not bare or len(own) == len(nodes):
        return bare
    again = trace_guide(guide, batch)
    return [n for n in bare if torch.equal(nodes[n]["value"], again.nodes[n]["value"])]
