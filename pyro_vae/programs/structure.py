"""The only inspector of a model's structure: sites, supports, plates, and the data plate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyro_vae.programs.batch import Batch, as_batch, dtypes_told, rows_text
from pyro_vae.programs.handlers import as_long_as
from pyro_vae.programs.plain_errors import trace_of
from pyro_vae.programs.state import Look, called_modules, evaluation, preserved_rng

__all__ = [
    "DataPlateError",
    "Plate",
    "Site",
    "Structure",
    "batch_nesting",
    "check_drawable",
    "check_guide",
    "check_repeated",
    "check_stable",
    "drawn_subsamples",
    "inner_dims",
    "inspect",
    "is_circular",
    "is_enumerable",
    "is_point",
    "is_subsampled",
    "latent_nodes",
    "leading_datum",
    "left_out",
    "plain_distribution",
    "plain_support",
    "point_of",
    "sample_nodes",
    "unvalidated",
]


class DataPlateError(ValueError):
    """The plate whose entries are the data could not be told."""


@dataclass(frozen=True)
class Plate:
    """A vectorized plate as one run of the model saw it.

    Attributes:
        name: the plate's name.
        dim: its batch dimension, negative.
        size: entries in this run (the size of the minibatch where it is subsampled).
        full_size: entries in all.
        drawn: whether the model draws the subsample itself (subsample_size=...).
    """

    name: str
    dim: int
    size: int
    full_size: int
    drawn: bool = False


@dataclass(frozen=True)
class Site:
    """A sample statement of the model, as one run saw it.

    Attributes:
        name: the site's name.
        kind: "local latent", "global latent", "latent" (data plate unknown) or "observed".
        fn: its distribution in that run.
        batch_shape: plates and other batch dimensions.
        event_shape: shape of one event.
        plates: the vectorized plates around it.
        value: its value in that run: drawn from the prior, or observed.
        mask: the mask on it (poutine.mask, obs_mask); None where there is none.
        missing: which of its values are missing; None where the model takes no missing data.
        scale: what its log density is multiplied with, by subsampled plates and poutine.scale.
    """

    name: str
    kind: str
    fn: Any
    batch_shape: torch.Size
    event_shape: torch.Size
    plates: tuple[Plate, ...]
    value: Tensor
    mask: Tensor | bool | None
    missing: Tensor | None = None
    scale: Any = 1.0

    @property
    def own_scale(self) -> Tensor:
        """Its scale without that of subsampled plates."""
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        for plate in self.plates:
            scale = scale * plate.size / plate.full_size
        return scale

    @property
    def support(self) -> Any:
        """The constraint on its values."""
        return self.fn.support

    @property
    def support_text(self) -> str:
        """The support in words, with its bounds."""
        support = plain_support(self)
        if support is None:
            return "not declared"
        bounds = [
            _bound_text(getattr(support, name))
            for name in ("lower_bound", "upper_bound")
            if hasattr(support, name)
        ]
        name = type(support).__name__.removeprefix("_")
        return f"{name}({', '.join(bounds)})" if bounds else name

    @property
    def distribution(self) -> str:
        """The name of its distribution, without Independent and Masked around it."""
        return type(plain_distribution(self.fn)).__name__

    @property
    def left_out(self) -> Tensor:
        """Which of its values masks leave out, missing ones among them; of its whole shape."""
        return left_out(self.fn, self.mask, self.value.device)

    @property
    def validated(self) -> bool:
        """Whether its distribution looks at values before it gives their density.

        What its maker said counts, see :func:`_default_validation_told_apart`.
        """
        return vars(plain_distribution(self.fn)).get("_validate_args", True) is not False

    @property
    def enumerable(self) -> bool:
        """Whether it is discrete, of finite support, and so can be summed out."""
        return is_enumerable(self.fn)


@dataclass(frozen=True)
class Structure:
    """What a model is made of.

    Attributes:
        sites: name to Site, in the order of the model.
        data_plate: the plate of the data; None where the model is treated as one datum.
        max_plate_nesting: number of batch dimensions that plates, and sites in none, take up.
        num_data: data in this batch (1 where the model is treated as one datum).
        sequential: plates that are iterated over (``for i in pyro.plate(...)``) and draw a
            subsample: their sites are others in each run.
    """

    sites: Mapping[str, Site]
    data_plate: Plate | None
    max_plate_nesting: int
    num_data: int
    sequential: tuple[str, ...] = ()
    local_latents: tuple[Site, ...] = field(init=False)
    global_latents: tuple[Site, ...] = field(init=False)
    observed: tuple[Site, ...] = field(init=False)

    def __post_init__(self) -> None:
        for attribute, kind in (
            ("local_latents", "local latent"),
            ("global_latents", "global latent"),
            ("observed", "observed"),
        ):
            found = tuple(site for site in self.sites.values() if site.kind == kind)
            object.__setattr__(self, attribute, found)

    @property
    def data_dim(self) -> int | None:
        """The data plate's batch dimension, negative; None for one datum."""
        return None if self.data_plate is None else self.data_plate.dim

    def drawing(self, names: Collection[str]) -> Structure:
        """Return this structure with plates of which a subsample is drawn: by the guide, say."""
        if not names:
            return self

        def told(plate: Plate) -> Plate:
            return replace(plate, drawn=plate.drawn or plate.name in names)

        sites = {
            name: replace(site, plates=tuple(map(told, site.plates)))
            for name, site in self.sites.items()
        }
        plate = None if self.data_plate is None else told(self.data_plate)
        return replace(self, sites=sites, data_plate=plate)

    def require_no_globals(self) -> None:
        """Raise ValueError if a latent site lies outside the data plate."""
        if self.data_plate is not None and self.global_latents:
            names = _names(self.global_latents)
            raise ValueError(
                f"the latent sites {names} lie outside the data plate "
                f"{self.data_plate.name!r}: they are global, and a bound for each datum needs "
                "them fixed. ELBO and IWAE(estimator='pathwise') train them; for a bound, pass "
                f"their values (given={{{names[0]!r}: value}}), or give an AmortizedGuide a "
                "global_guide that knows its median; or pass data_plate=False to treat the whole "
                "batch as one datum"
            )


def inspect(
    model: Callable[..., Any],
    *batch: Any,
    data_plate: str | bool | None = None,
    strict: bool = False,
    latents_needed: bool = True,
) -> Structure:
    """Run the model once on a batch and return its structure.

    The random state is left as it was found, and modules run in eval mode.

    Args:
        model: a Pyro model.
        *batch: its arguments (see :func:`pyro_vae.programs.batch.as_batch`).
        data_plate: the name of the plate of the data, where it is not plain; False to
            treat the whole batch as one datum.
        strict: whether to refuse values outside the support of a likelihood that does not
            validate them (validate_args=False): training may take them, a bound on log p(x) not.
        latents_needed: whether a model without latents is an error; else its data plate is the
            one that holds all that is observed.

    Returns:
        A Structure.

    Raises:
        DataPlateError: where no plate holds all observed sites and a latent one, or
            several do, or its size is not the batch's.
        ValueError: for NaN in the batch (but see :class:`pyro_vae.MissingData`), and for observed
            values of another shape than their likelihood's, or outside its support.
    """
    arguments = as_batch(*batch)
    try:
        with called_modules() as called:
            sites, nesting, sequential = run_model(model, arguments)
    finally:
        # First of all errors, for it is the cause of most; but only a run tells what takes NaN.
        missing = any(getattr(module, "takes_missing", False) for module in called.values())
        arguments.check_finite(missing=missing)
    _check_observed(sites, lambda: run_model(model, arguments, seed=1)[0], strict=strict)
    if data_plate is False:
        kinds = {name: _with_kind(site, "global latent") for name, site in sites.items()}
        return Structure(kinds, None, nesting, 1, sequential)
    plate = _find_data_plate(sites, None if data_plate is True else data_plate, latents_needed)
    if arguments.size is not None and not plate.drawn and plate.size != arguments.size:
        raise DataPlateError(
            f"the data plate {plate.name!r} has {plate.size} entries but the batch has "
            f"{arguments.size} rows; let the plate take its size from the batch, as in "
            f"pyro.plate({plate.name!r}, len(x)) or pyro.plate({plate.name!r}, num_data, "
            "subsample=x), or name another plate with data_plate="
        )
    kinds = {
        name: _with_kind(
            site,
            "local latent" if plate.name in {p.name for p in site.plates} else "global latent",
        )
        for name, site in sites.items()
    }
    for site in kinds.values():
        shape = site.batch_shape
        single = len(shape) < -plate.dim or shape[plate.dim] == 1
        if site.kind == "local latent" and single and plate.size > 1:
            raise DataPlateError(
                f"latent site {site.name!r} has batch shape {list(shape)}, one value for the "
                f"{plate.size} data of plate {plate.name!r}; give the plate its size, "
                f"pyro.plate({plate.name!r}, len(x)), and the site that shape, or pass "
                "data_plate=False to treat the whole batch as one datum"
            )
    return Structure(kinds, plate, nesting, plate.size, sequential)


def plain_distribution(fn: Any) -> Any:
    """Return a distribution without Independent, Masked and Expanded around it."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in (
        "Independent",
        "MaskedDistribution",
        "ExpandedDistribution",
    ):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """Return whether a distribution is a Delta, which may hide a density."""
    return point_of(fn) is not None


def point_of(fn: Any) -> Any:
    """Return the Delta that a distribution is, or wraps; None for another."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn if isinstance(fn, dist.Delta) else None


def left_out(fn: Any, mask: Tensor | bool | None, device: torch.device) -> Tensor:
    """Return which values of a sample statement masks leave out, ``[*batch, *event]``.

    Args:
        fn: its distribution, with the masks inside.
        mask: that on the statement (poutine.mask).
        device: of the result.
    """
    shape = (*fn.batch_shape, *fn.event_shape)
    masks = [(mask, fn.event_dim)]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    out = torch.zeros(shape, dtype=torch.bool, device=device)
    for seen, events in masks:
        if seen is not None:
            there = torch.as_tensor(seen, device=device)
            out = out | ~there.reshape((*there.shape, *[1] * events))
    return out


def is_circular(fn: Any) -> bool:
    """Whether a density is periodic: torch calls its support the reals, on which it has no end."""
    kinds = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
    return isinstance(plain_distribution(fn), kinds)


def is_enumerable(fn: Any) -> bool:
    """Whether a distribution is discrete and its finitely many values can be listed."""
    if not getattr(fn, "has_enumerate_support", False):
        return False
    if isinstance(plain_distribution(fn), dist.Empirical):
        return False  # lists its samples, of which several may be one value
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError:  # total counts of a Binomial that differ, event dimensions
        return False
    return True


def is_subsampled(model: Callable[..., Any], batch: Batch, plate: Plate) -> bool:
    """Return whether the data plate keeps its full size when the batch is of another size."""
    if plate.size != plate.full_size:
        return True
    if batch.size is None or batch.size < 1:
        return False
    other = batch.rows(slice(0, batch.size - 1)) if batch.size > 1 else batch.repeat(2)
    with Look():
        seen = inspect(model, other, data_plate=plate.name)
        return seen.data_plate is not None and seen.data_plate.full_size == plate.full_size
    return False  # the model takes batches of this one size only: no minibatches


def sample_nodes(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (name, site) of a trace's sample statements, plates' subsamples left out."""
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not site_is_subsample(node):
            yield name, node


def latent_nodes(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (name, site) of a trace's sample statements that are not observed."""
    for name, node in sample_nodes(trace):
        if not node["is_observed"]:
            yield name, node


def batch_nesting(*traces: Any) -> int:
    """Return how many batch dimensions sites take up: those of vectorized plates, and others.

    What is left of all of them is free for particles and for the values of discrete sites.
    """
    depth = 0
    for trace in traces:
        for _, node in sample_nodes(trace):
            if not node["infer"].get("_deterministic"):
                depth = max(depth, len(node["fn"].batch_shape))
            for frame in node["cond_indep_stack"]:
                if frame.vectorized:
                    depth = max(depth, -frame.dim)
    return depth


def check_repeated(trace: Any) -> None:
    """Raise ValueError for an observed value that PyTorch repeats along dimensions of no plate.

    A column [N, 1] beside values [N] makes a likelihood [N, N], and each datum counts N times:
    Pyro's own losses refuse it too.
    """
    for name, node in sample_nodes(trace):
        if not node["is_observed"]:
            continue
        batch, value = node["fn"].batch_shape, node["value"]
        declared = {frame.dim for frame in node["cond_indep_stack"] if frame.vectorized}
        own = tuple(value.shape[: value.ndim - node["fn"].event_dim])
        own = (1,) * (len(batch) - len(own)) + own
        for dim in range(-len(batch), 0):
            if batch[dim] > 1 and own[dim] == 1 and dim not in declared:
                raise ValueError(
                    f"observed site {name!r}: its value has shape {list(value.shape)}, its "
                    f"likelihood batch shape {list(batch)}, and dim {dim} is in no plate: each "
                    f"value would count {batch[dim]} times. Where an argument is a column [N, 1], "
                    "pass x.squeeze(-1); where the repetition is meant, put the site in a plate"
                )


def check_stable(
    model: Callable[..., Any], batch: Batch, structure: Structure, *, runs: int = 1
) -> None:
    """Raise ValueError if a model's sites, or their shapes, are others in one of some runs."""
    if structure.sequential:
        raise ValueError(
            f"the model draws a subsample of the sequential plate {structure.sequential[0]!r} "
            "(subsample_size=...), and so has other sites in each run, which have no density in "
            "common; iterate over all of it, or train with pyro_vae.ELBO"
        )
    for seed in range(1, runs + 1):
        with Look() as look:
            again, *_ = run_model(model, batch, seed=seed)
        if look.error is None:  # a draw from the prior that the model cannot take says nothing
            _check_same(structure, again)


def _check_same(structure: Structure, again: Mapping[str, Site]) -> None:
    for name in structure.sites.keys() | again.keys():
        shapes = [
            (*sites[name].batch_shape, *sites[name].event_shape) if name in sites else None
            for sites in (structure.sites, again)
        ]
        if shapes[0] != shapes[1]:
            told = " and ".join("no such site" if s is None else str(list(s)) for s in shapes)
            raise ValueError(
                f"site {name!r} is not the same in two runs of the model on one batch ({told}): "
                "latents of changing number or dimension have no density in common. Give it a "
                "fixed shape, and mask what is not there (poutine.mask)"
            )


def guide_factors(guide_trace: Any) -> list[str]:
    """Return the names of a guide's pyro.factor statements."""
    return [
        name
        for name, node in sample_nodes(guide_trace)
        if isinstance(node["fn"], dist.Unit) and node["is_observed"]
    ]


def check_guide(model_trace: Any, guide_trace: Any) -> None:
    """Raise ValueError if a guide does not propose just the model's latent sites.

    Discrete sites of finite support need no proposal: they are summed out. Sites that the
    guide observes, or marks auxiliary, are no proposals.
    """
    wanted = {name for name, _ in latent_nodes(model_trace)}
    observed = {name for name, node in sample_nodes(model_trace) if node["is_observed"]}
    proposed = {
        name for name, node in latent_nodes(guide_trace) if not node["infer"].get("is_auxiliary")
    }
    missing = {
        name
        for name, node in latent_nodes(model_trace)
        if name not in proposed and not is_enumerable(node["fn"])
    }
    if missing:
        raise ValueError(
            f"the guide has no sample statement for the model's latent sites {sorted(missing)}; "
            f"it has {sorted(proposed)}. Only discrete sites of finite support need none: they "
            "are summed out"
        )
    if unknown := proposed - wanted - observed:
        raise ValueError(
            f"the guide samples {sorted(unknown)}, which the model does not; the model's latent "
            f"sites are {sorted(wanted)}. Rename them. A global latent is fixed at a value in "
            "model and guide alike by given={name: value}"
        )
    if clash := proposed & observed:
        raise ValueError(
            f"the guide proposes {sorted(clash)}, which the model observes; observe them in the "
            "guide too (obs=...), or leave them out"
        )
    _check_helpers(guide_trace)


def _check_helpers(guide_trace: Any) -> None:
    """Raise ValueError for auxiliary sites of which no latent is made.

    Their density counts in log q(z | x). That is right where points are made of them, as
    Pyro's autoguides do; else the loss grows with their entropy past log p(x).
    """
    nodes = dict(latent_nodes(guide_trace))
    helpers = {
        name: node
        for name, node in nodes.items()
        if node["infer"].get("is_auxiliary") and not is_point(node["fn"])
    }
    made = [node for name, node in nodes.items() if name not in helpers and is_point(node["fn"])]
    if not helpers or _numbers(helpers.values()) <= _numbers(made):
        return
    free = {  # a density of one everywhere is no matter
        name: node
        for name, node in helpers.items()
        if bool((node["fn"].log_prob(node["value"]) != 0).any())
    }
    if _numbers(free.values()) > _numbers(made):
        raise ValueError(
            f"the guide's auxiliary sites {sorted(free)} have a density of which no latent of the "
            "model is made: it counts in log q(z | x), and nothing stands beside it in the model: "
            "no bound. Sample them in the model as well, from a distribution given the latents "
            "(and leave is_auxiliary out); or let latents be points made of them (dist.Delta), "
            "as pyro.infer.autoguide.AutoNormal does"
        )


def _numbers(nodes: Iterable[Any]) -> int:
    return sum(node["value"].numel() for node in nodes)


@contextlib.contextmanager
def _default_validation_told_apart() -> Iterator[None]:
    """Have distributions that validate nothing by default hold 0, where others were told False.

    Libraries (zuko, for one) switch validation off for a whole process. Plates copy a distribution,
    and its copy holds the default as if it were its own.
    """
    default = Distribution._validate_args
    Distribution._validate_args = default or 0  # type: ignore[assignment]
    try:
        yield
    finally:
        Distribution._validate_args = default


def run_model(
    model: Callable[..., Any], batch: Batch, seed: int | None = None
) -> tuple[dict[str, Site], int, tuple[str, ...]]:
    """Run a model once.

    Returns:
        Its sites, latents not yet told apart, its plate nesting, and the sequential plates of
        which it drew a subsample.
    """
    with (
        torch.no_grad(),
        preserved_rng(batch.device),
        evaluation(model),
        poutine.block(),
        drawn_subsamples() as drawn,
        _default_validation_told_apart(),
        _NameUndrawable(),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            with dtypes_told(batch.args, batch.kwargs):
                trace = trace_of(model, batch.args, batch.kwargs)
        except Exception as error:
            error.add_note(f"while running the model on {batch}")
            raise
    check_repeated(trace)
    unsized = _sizes_of_unsized(trace)
    sites = {}
    for name, node in sample_nodes(trace):
        if node["infer"].get("_deterministic"):
            continue
        plates = tuple(
            Plate(
                frame.name,
                frame.dim,
                unsized.get(frame.name, frame.size),
                unsized.get(frame.name, frame.full_size),
                frame.name in drawn,
            )
            for frame in node["cond_indep_stack"]
            if frame.vectorized
        )
        sites[name] = Site(
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
    vectorized = {plate.name for site in sites.values() for plate in site.plates}
    return sites, batch_nesting(trace), tuple(sorted(drawn - vectorized))


class _NameUndrawable(Messenger):
    """Says which latent it is whose distribution has no draws: a model is looked at by running."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn: Any = None  # the statement that is being drawn

    def _pyro_sample(self, msg: Any) -> None:
        self._drawn = msg

    def _pyro_post_sample(self, msg: Any) -> None:
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
def drawn_subsamples() -> Iterator[set[str]]:
    """Collect the names of plates that draw a subsample inside the context.

    Not of those that are given it, by subsample=... or by a replayed trace.
    """
    drawn: set[str] = set()

    class Watch(Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            if site_is_subsample(msg) and msg["value"] is None:
                plate = msg["fn"]
                if plate.subsample_size not in (None, -1, plate.size):
                    drawn.add(msg["name"])

    with Watch():
        yield drawn


def _sizes_of_unsized(trace: Any) -> dict[str, int]:
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


def _batch_shape(node: Any, plates: tuple[Plate, ...]) -> torch.Size:
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


def _check_observed(
    sites: Mapping[str, Site], run_again: Callable[[], Mapping[str, Site]], *, strict: bool
) -> None:
    """Raise ValueError for observed values of another shape, or outside the support.

    Not outside one that is another in a second run: that of Uniform(0, z) is a latent's to draw.
    """
    for site in sites.values():
        if site.kind != "observed" or not isinstance(site.value, Tensor):
            continue
        _check_shape(site)
        where = _outside_support(site) if site.validated or strict else None
        if where is not None and _bounds(site) == _bounds(run_again()[site.name]):
            hint = ". Its validate_args=False lets training take them, but they have no density"
            hint = "" if site.validated else hint
            raise ValueError(
                f"observed site {site.name!r}: values outside the support of its "
                f"{site.distribution} likelihood ({site.support_text}) in {where}; rescale or "
                f"clean the data, or choose another likelihood{hint}"
            )


def plain_support(fn: Any) -> Any:
    """Return the support of one number or event of a distribution; None where none is declared."""
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return None
    while hasattr(support, "base_constraint"):  # independent, or of a mixture
        support = support.base_constraint
    return support


def _inside(site: Site) -> Tensor | None:
    """Return which entries of a site's batch are in the support, where no mask leaves them out."""
    support = plain_support(site)
    if support is None:
        return None
    inside = support.check(site.value)
    joint = site.value.ndim - inside.ndim
    out = site.left_out
    inside = inside | (out.flatten(-joint).all(-1) if joint else out)
    events = len(site.event_shape) - joint
    return inside.flatten(-events).all(-1) if events > 0 else inside


def _bounds(site: Site) -> list[Any]:
    """Return the bounds of a support as plain numbers, to be compared."""
    support = plain_support(site)
    bounds = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    return [b.tolist() if isinstance(b, Tensor) else b for b in bounds]


def unvalidated(structure: Structure) -> list[str]:
    """Return the observed sites with values outside the support, which nothing validates."""
    return [
        site.name
        for site in structure.observed
        if not site.validated and isinstance(site.value, Tensor) and _outside_support(site)
    ]


def _outside_support(site: Site) -> str | None:
    """Say where an observed site has values outside its support; None if nowhere."""
    inside = _inside(site)
    if inside is None or bool(inside.all()):
        return None
    return _outside_text(inside, {plate.dim: plate for plate in site.plates})


def _check_shape(site: Site) -> None:
    # Torch would broadcast a value of other event dimensions, and count it several times.
    shape, wanted = tuple(site.value.shape), (*site.batch_shape, *site.event_shape)
    events = len(site.event_shape)
    batch = shape[: len(shape) - events]
    if (
        len(shape) < events
        or any(
            b not in (1, a)
            for a, b in zip(shape[len(shape) - events :], site.event_shape, strict=True)
        )
        or len(batch) > len(site.batch_shape)
        or any(a not in (1, b) for a, b in zip(batch[::-1], site.batch_shape[::-1], strict=False))
    ):
        raise ValueError(
            f"observed site {site.name!r}: its value has shape {list(shape)}, but its "
            f"{site.distribution} likelihood has shape {list(wanted)} (batch "
            f"{list(site.batch_shape)}, event {events} dimensions); give data of that shape, or "
            "mend the likelihood (.to_event(...))"
        )


def _outside_text(inside: Tensor, plates: Mapping[int, Plate]) -> str:
    """Name the entries of the outermost plate that hold values outside the support."""
    outermost = min((dim for dim in plates if -dim <= inside.ndim), default=None)
    if outermost is None:
        return "the data"
    bad = ~inside.movedim(outermost, 0).reshape(inside.shape[outermost], -1).all(1)
    return f"{rows_text(bad)} of plate {plates[outermost].name!r}"


def _find_data_plate(sites: Mapping[str, Site], name: str | None, latents_needed: bool) -> Plate:
    observed = [site for site in sites.values() if site.kind == "observed"]
    latents = [site for site in sites.values() if site.kind == "latent"]
    if not observed:
        raise DataPlateError(
            "the model observes nothing: no sample statement has obs=...; its latent sites are "
            f"{_names(latents)}"
        )
    if not latents and latents_needed:
        raise DataPlateError(
            f"the model has no latent site, only observed ones: {_names(observed)}"
        )
    if name is not None:
        return _named_data_plate(sites, observed, latents, name)
    shared = set.intersection(*({plate.name for plate in site.plates} for site in observed))
    if not shared:
        plates = "; ".join(
            f"{site.name!r} is in {_names(site.plates) if site.plates else 'no plate'}"
            for site in observed
        )
        raise DataPlateError(
            f"no data plate: no vectorized plate holds every observed site ({plates}). Put the "
            "data in one plate (with pyro.plate('data', len(x)): ...), or pass data_plate=False "
            "to treat the whole batch as one datum"
        )
    candidates = {
        plate.name: plate
        for site in latents or observed
        for plate in site.plates
        if plate.name in shared
    }
    if not candidates:
        raise DataPlateError(
            f"no local latents: the latent sites {_names(latents)} lie outside the plates "
            f"{sorted(shared)} of the observed sites {_names(observed)}. Pass data_plate=False to "
            "treat the whole batch as one datum"
        )
    # A latent outside the data plate is global: the plate that holds every latent that
    # another candidate holds, and more, makes the fewest so.
    held = {
        name: {site.name for site in latents if name in {plate.name for plate in site.plates}}
        for name in candidates
    }
    if not latents and len(candidates) == 1:
        return next(iter(candidates.values()))
    widest = [
        name for name in held if all(held[name] > held[other] for other in held if other != name)
    ]
    if len(widest) != 1:
        raise DataPlateError(
            f"the data plate is not plain: {sorted(candidates)} each hold every observed site"
            f"{' and a latent one' if latents else ''}; name it with data_plate="
        )
    return candidates[widest[0]]


def _named_data_plate(
    sites: Mapping[str, Site], observed: list[Site], latents: list[Site], name: str
) -> Plate:
    found = {plate.name: plate for site in sites.values() for plate in site.plates}
    if name not in found:
        raise DataPlateError(
            f"data_plate={name!r}: the model has no vectorized plate of that name; it has "
            f"{sorted(found)}"
        )
    outside = [site for site in observed if name not in {plate.name for plate in site.plates}]
    if outside:
        raise DataPlateError(
            f"the observed sites {_names(outside)} lie outside the data plate {name!r}; move "
            "them inside it"
        )
    if latents and all(name not in {plate.name for plate in site.plates} for site in latents):
        raise DataPlateError(
            f"no latent site lies inside the data plate {name!r}; the latent sites are "
            f"{_names(latents)}. Pass data_plate=False to treat the whole batch as one datum"
        )
    return found[name]


def _bound_text(bound: Any) -> str:
    values = torch.as_tensor(bound).unique()
    return f"{values.item():g}" if values.numel() == 1 else "varies"


def _with_kind(site: Site, latent_kind: str) -> Site:
    return site if site.kind == "observed" else replace(site, kind=latent_kind)


def _names(things: Iterable[Site | Plate]) -> list[str]:
    return [thing.name for thing in things]


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
                    "Where draws of the latents are enough: pyro_vae.to_arviz(..., "
                    "predictive=False)"
                ) from error


def leading_datum(value: Tensor, site: Site, structure: Structure) -> Tensor:
    """Bring the data dimension of a site's ``[*batch, *event]`` values to the front."""
    if structure.data_dim is None:
        return value
    return value.movedim(value.ndim - len(site.event_shape) + structure.data_dim, 0)


def inner_dims(site: Site, structure: Structure) -> list[str]:
    """Return names of a site's dimensions but the data's: inner plates, then ``<site>_dim_i``."""
    batch = len(site.batch_shape)
    inner = {batch + p.dim: p.name for p in site.plates if p != structure.data_plate}
    data_axis = None if structure.data_dim is None else batch + structure.data_dim
    axes = [axis for axis in range(batch) if axis != data_axis]
    names = [inner.get(axis, f"{site.name}_dim_{i}") for i, axis in enumerate(axes)]
    return names + [f"{site.name}_dim_{len(axes) + i}" for i in range(len(site.event_shape))]
